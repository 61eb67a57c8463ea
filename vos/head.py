"""MTTR's head: maps of a backbone and a sentence in, per query whether it is what is meant and its mask in each frame.

    outputs = head(features, padding, text, text_padding, frames)
    outputs["logits"]   (L, N, Q, 2)            # of each decoder layer, the last one is the result; 0: referred
    outputs["masks"]    (L, N, Q, H / 4, W / 4) # logits
    head.losses(outputs, batch);  head.segment(outputs, batch);  head.segment_frames(outputs, batch, sample)

N are the annotated frames of all samples, ordered by sample, then time: only they reach the head. A mask is a query's
kernel times a map that all queries share. Names of parameters are those of the official code. Not here: attention
(`transformer.py`), matching (`criterion.py`).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from engine.detr.padding import resize_padding
from engine.task import Batch
from vos.configs import Model as Settings
from vos.criterion import Target, all_losses
from vos.transformer import MultimodalTransformer, WordTable

GROUPS = 8  # of a normalization


class Segmented(NamedTuple):
    """What a sample's queries are in its annotated frames, on the CPU."""

    scores: Tensor  # (T, Q) float32: how likely each is what the sentence says
    masks: Tensor  # (T, Q, H, W) bool, in pixels of the original video


class Frames(NamedTuple):
    """The annotated frames of a batch, N, ordered by sample, then time."""

    place: Tensor  # (N,) among the B T frames of the batch
    sample: Tensor  # (N,) whose they are
    counts: list[int]  # how many of each sample

    @classmethod
    def of(cls, batch: Batch) -> "Frames":
        """Fake tensors (a predicted memory) have no values: as many frames as there are masks, from the first on."""
        annotated = batch["annotated"]
        counts = (
            [masks.shape[1] for masks in batch["masks"]]
            if isinstance(annotated, FakeTensor)
            else annotated.sum(dim=1).tolist()
        )
        order = annotated.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        rows = [order[sample, :count] for sample, count in enumerate(counts)]
        place = [row + sample * annotated.shape[1] for sample, row in enumerate(rows)]
        return cls(torch.cat(place), torch.cat([torch.full_like(row, i) for i, row in enumerate(rows)]), counts)


class SpatialDecoder(nn.Module):
    """Maps from coarse to fine: what the encoder made of the last stage's (N, C, h, w), joined by the stages before it,
    (N, C', 2 h, 2 w) and (N, C'', 4 h, 4 w) -> (N, kernels, 4 h, 4 w).
    """

    def __init__(self, width: int, widths: Sequence[int], own: Sequence[int], kernels: int) -> None:
        super().__init__()
        for layer, (before, after) in enumerate(zip([width, *own], own, strict=False), start=1):
            self.add_module(f"lay{layer}", nn.Conv2d(before, after, 3, padding=1))
            self.add_module(f"gn{layer}", nn.GroupNorm(GROUPS, after))
        self.adapter1 = nn.Conv2d(widths[1], own[1], 1)
        self.adapter2 = nn.Conv2d(widths[0], own[2], 1)
        self.out_lay = nn.Conv2d(own[-1], kernels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """features: of the first stages, from fine to coarse."""
        x = self._layer(2, self._layer(1, x))
        x = self._layer(3, _joined(x, self.adapter1(features[1])))
        x = self._layer(4, _joined(x, self.adapter2(features[0])))
        return self.out_lay(x)

    def _layer(self, number: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"gn{number}")(self.get_submodule(f"lay{number}")(x)).relu()


def _joined(x: Tensor, finer: Tensor) -> Tensor:
    return finer + F.interpolate(x, size=(finer.shape[-2], finer.shape[-1]), mode="nearest")


class Kernels(nn.Module):
    """Contents of queries (..., C) -> kernels (..., K)."""

    def __init__(self, width: int, kernels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, kernels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).relu())


class MTTRHead(nn.Module):
    """See the module's docstring. widths: channels of the backbone's maps, from fine to coarse. max_words: of a
    sentence, if the text is numbers of words, for which the head has a table; None: it is features of an encoder.
    """

    def __init__(self, widths: Sequence[int], own: Settings, max_words: int | None) -> None:
        super().__init__()
        self.transformer = MultimodalTransformer(own)
        self.is_referred_head = nn.Linear(own.width, 2)
        self.instance_kernels_head = Kernels(own.width, own.kernels)
        self.obj_queries = nn.Embedding(own.queries, own.width)
        self.vid_embed_proj = nn.Conv2d(widths[-1], own.width, 1)
        self.spatial_decoder = SpatialDecoder(own.width, widths, own.mask_widths, own.kernels)
        if max_words is not None:
            self.word_table = WordTable(max_words, own.text_width)

    def forward(
        self, features: Sequence[Tensor], padding: Tensor, text: Tensor, text_padding: Tensor, frames: Frames
    ) -> dict[str, Tensor]:
        """features: (B, C, T, h, w) each; padding: (B, H, W) of the frames, True where padded; text: (B, S, D), or
        numbers of words (B, S); text_padding: (B, S).
        """
        *finer, maps = (one.transpose(1, 2).flatten(0, 1).index_select(0, frames.place) for one in features)
        if not text.is_floating_point():
            text = self.word_table(text)
        own_padding = resize_padding(padding, (maps.shape[2], maps.shape[3]))[frames.sample]
        maps = self.vid_embed_proj(maps)
        queries = self.obj_queries.weight
        contents, maps = self.transformer(maps, own_padding, text, text_padding, frames.sample, queries)
        kernels, shared = self.instance_kernels_head(contents), self.spatial_decoder(maps, finer)
        return {
            "logits": self.is_referred_head(contents),
            "masks": torch.einsum("lnqc,nchw->lnqhw", kernels, shared),
        }

    def losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Weighted; those of masks divided by the targets of the whole global batch; float32."""
        targets = [
            Target(masks, referred, visible)
            for masks, referred, visible in zip(batch["masks"], batch["referred"], batch["visible"], strict=True)
        ]
        found = all_losses(outputs["logits"], outputs["masks"], targets, batch["num_targets"])
        losses = dict(zip(("mask_dice", "mask_focal", "referred"), found[-1], strict=True))
        return losses | {"auxiliary": found[:-1].sum()}

    @torch.no_grad()
    def scores(self, outputs: dict[str, Tensor], batch: Batch) -> list[Tensor]:
        """Of each sample, on the CPU: how likely each query is what the sentence says, in annotated frames: (T, Q)."""
        scores = outputs["logits"][-1].float().softmax(dim=-1)[..., 0].cpu()
        return list(scores.split(Frames.of(batch).counts))

    @torch.no_grad()
    def segment_frames(
        self, outputs: dict[str, Tensor], batch: Batch, sample: int, queries: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The masks (Q, H, W) bool of one annotated frame of a sample after the other, on the CPU, in pixels of its
        original video; of all queries, or of those with the numbers `queries`. As officially: enlarged to the batch's
        size, cut at 1/2, without the padding, to the original size by the nearest pixel.
        """
        size, original = batch["size"][sample], batch["original_size"][sample]
        first, padded = sum(Frames.of(batch).counts[:sample]), batch["video"].shape[-2:]
        for masks in outputs["masks"][-1][first : first + Frames.of(batch).counts[sample]]:
            chosen = masks if queries is None else masks[queries.to(masks.device)]
            large = F.interpolate(chosen.float()[None], size=padded, mode="bilinear", align_corners=False)
            real = (large[..., : size[0], : size[1]] > 0).to(torch.uint8)
            yield F.interpolate(real, size=tuple(original), mode="nearest")[0].bool().cpu()

    def segment(self, outputs: dict[str, Tensor], batch: Batch) -> list[Segmented]:
        """Of each sample, all queries in all annotated frames; for long videos see `segment_frames`."""
        return [
            Segmented(scores, torch.stack(list(self.segment_frames(outputs, batch, sample))))
            for sample, scores in enumerate(self.scores(outputs, batch))
        ]
