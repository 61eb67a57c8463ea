"""A small BERT in place of MiniLM: its weights are loaded strictly, texts are padded, each method makes its steps."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from examples.compare import Classifier
from examples.tests.toy_comparison import check_each_method
from examples.text.encoder import Tokens, build_encoder, mean_of_tokens

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "star", "a", "the", "large", "stone", "bird")
CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 24,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a package brings it: with a pooler, and position ids among the weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=20)  # as sentence-transformers' files do
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "position_embedding_type": "x", **CONFIG}))
    tensors = BertModel(BertConfig(**CONFIG)).state_dict()
    save_file({**tensors, "embeddings.position_ids": torch.arange(24)[None]}, tmp_path / "model.safetensors")
    return tmp_path


def texts(folder: Path, count: int = 20) -> Tokens:
    lines = ["the red star", "a stone", "the large red bird a stone the large red bird a stone the star", "bird"]
    return Tokens([lines[k % 4] for k in range(count)], [k % 2 for k in range(count)], folder, max_tokens=12)


def test_texts_are_padded_to_the_longest_of_a_batch_and_cut_at_the_limit(folder: Path) -> None:
    tokens = texts(folder)
    short = tokens.take(torch.tensor([0, 1]))
    assert short["input_ids"].tolist() == [[2, 7, 4, 5, 3, 0, 0, 0], [2, 6, 9, 3, 0, 0, 0, 0]]
    assert short["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 4 + [0] * 4]
    long = tokens.take(torch.tensor([2, 3]))
    assert long["input_ids"].shape == (2, 12) and long["input_ids"][0, -1] == 3
    assert [len(tokens.ids[k]) for k in tokens.in_order().tolist()] == sorted(len(ids) for ids in tokens.ids)


def test_padding_does_not_change_what_is_read(folder: Path) -> None:
    encoder, tokens = build_encoder(folder).eval(), texts(folder)
    alone = mean_of_tokens(encoder, tokens.take(torch.tensor([1])))
    beside = mean_of_tokens(encoder, tokens.take(torch.tensor([2, 1])))[1:]
    torch.testing.assert_close(alone, beside)
    batch = tokens.take(torch.tensor([1]))
    states = encoder(**batch).last_hidden_state[0, batch["attention_mask"][0].bool()]
    torch.testing.assert_close(alone[0], states.mean(0))


def test_a_weight_that_is_missing_or_left_over_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    whole = dict(tensors)
    del tensors["encoder.layer.1.output.LayerNorm.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="encoder.layer.1.output.LayerNorm.weight"):
        build_encoder(folder)
    save_file({**whole, "encoder.layer.2.x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="encoder.layer.2.x"):
        build_encoder(folder)


def test_each_method_makes_its_steps_and_leaves_a_record(folder: Path, tmp_path: Path) -> None:
    tokens = texts(folder)
    check_each_method("text", tokens, 2, lambda: Classifier(build_encoder(folder), mean_of_tokens, 16, 2), tmp_path)
