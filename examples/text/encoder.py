"""MiniLM with six layers, and the tokens it reads.

    encoder = build_encoder(MINILM_FOLDER)                       # a BertModel of transformers, loaded strictly
    samples = Tokens(texts, labels, MINILM_FOLDER, max_tokens=32)

Not here: how its files come there (`engine/backbones/minilm.py`), its branches (`dr2net/adapters/transformers.py`).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.files import read_json
from engine.weights import load_tensors, read_tensors

UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")  # in the file, and not needed here
MULTIPLE = 8  # batches are as long as their longest text, rounded up


class Tokens:
    """Texts as token ids, padded batch by batch."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int], folder: Path, *, max_tokens: int) -> None:
        """max_tokens: of a text, the first and the last one included; the rest is cut."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        self.ids = [torch.tensor(encoded.ids) for encoded in tokenizer.encode_batch(list(texts))]
        self.labels = torch.tensor(labels)
        self.max_tokens = max_tokens

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """input_ids (B, N) and attention_mask (B, N), int64; N a multiple of 8, or `max_tokens`."""
        chosen = [self.ids[k] for k in indices.tolist()]
        longest = max(len(ids) for ids in chosen)
        length = min(-(-longest // MULTIPLE) * MULTIPLE, self.max_tokens)
        ids = torch.zeros(len(chosen), length, dtype=torch.int64)
        mask = torch.zeros(len(chosen), length, dtype=torch.int64)
        for row, own in enumerate(chosen):
            ids[row, : len(own)] = own
            mask[row, : len(own)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def in_order(self) -> Tensor:
        """(N,) the shortest first."""
        return torch.tensor([len(ids) for ids in self.ids]).argsort(stable=True)


def build_encoder(folder: Path) -> nn.Module:
    """The encoder with the weights of the folder, its dropout as its configuration says, without a pooler.

    ValueError if a weight is missing, left over or of another shape.
    """
    from transformers import BertConfig, BertModel

    config = BertConfig(**read_json(folder / "config.json", "delete its folder, and it is fetched again"))
    encoder = BertModel(config, add_pooling_layer=False)
    path = folder / "model.safetensors"
    tensors = {name: value for name, value in read_tensors(path).items() if name not in UNUSED}
    load_tensors(encoder, tensors, str(path))
    return encoder


def mean_of_tokens(encoder: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, D) the mean over a text's tokens, padding left out, as the encoder was trained to be read."""
    states = encoder(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)
