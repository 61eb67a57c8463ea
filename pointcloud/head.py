"""All that is learned around the transformer: from points to tokens, from tokens back to points, the loss.

    tokenizer   Pix4Point's P3Embed: per stage 1 of 4 points becomes a center; what its k neighbors tell, by two small
                MLPs with a maximum after each, becomes its features. LayerNorm only: centers are independent.
    decoder     per stage the features of the coarse points are interpolated to the fine ones, joined with what those
                had, and mixed by two layers; then class token and maximum over points join, and a classifier.

Indices come with the batch (`ops.py`); here is only gathering. Both parts hold more activations than the transformer,
so both know `recompute` (`engine.task.Recomputed`): the tokenizer in chunks of centers, which changes nothing, the
decoder whole, since its batch norm sees all points. Not here: the transformer (`engine.backbones.point_vit`).
"""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dr2net
from engine.task import Batch

Norm = Literal["batch", "layer"]


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each sample: values (B, N, C), index (B, M, ...) of integers -> (B, M, ..., C)."""
    num_samples, num_points, width = values.shape
    offset = torch.arange(num_samples, device=index.device).view(-1, *[1] * (index.dim() - 1)) * num_points
    rows = values.reshape(-1, width).index_select(0, (index.long() + offset).flatten())
    return rows.view(*index.shape, width)


class Stage(nn.Module):
    """Centers and what their neighbors tell: positions (B, N, 3), features (B, N, C) -> (B, M, width).

    Of each neighbor: its offset from the center, and the difference of its features to the center's.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Linear(3 + channels, width, bias=False), nn.LayerNorm(width, eps=1e-5)
        self.second = nn.Linear(width, width)
        self.third, self.third_norm = nn.Linear(2 * width, 2 * width, bias=False), nn.LayerNorm(2 * width, eps=1e-5)
        self.fourth, self.fourth_norm = nn.Linear(2 * width, width, bias=False), nn.LayerNorm(width, eps=1e-5)
        self.width = width
        # floats alive per neighbor while a center is differentiated: inputs, outputs and their gradients
        self.floats = 2 * (3 + channels + 3 * width + width + 2 * 3 * 2 * width + 3 * width)

    def forward(self, position: Tensor, features: Tensor, center: Tensor, neighbor: Tensor) -> Tensor:
        """center: (B, M), neighbor: (B, M, k), indices of points."""
        offset = gather(position, neighbor) - gather(position, center).unsqueeze(2)
        change = gather(features, neighbor) - gather(features, center).unsqueeze(2)
        h = F.relu(self.first_norm(self.first(torch.cat([offset, change.to(offset.dtype)], dim=-1))))
        h = self.second(h)  # (B, M, k, width)
        h = torch.cat([h.amax(dim=2, keepdim=True).expand_as(h), h], dim=-1)
        h = F.relu(self.third_norm(self.third(h)))
        h = F.relu(self.fourth_norm(self.fourth(h)))
        return h.amax(dim=2)


class Tokenizer(nn.Module):
    """Points (B, N, 3) with features (B, N, C) -> those of each level; of the last, the tokens (B, N_last, width)."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        inputs = [channels, *widths]
        self.stages = nn.ModuleList(Stage(inputs[i], width) for i, width in enumerate(widths))
        self.recomputed, self.chunk_mib = False, float("inf")

    def recompute(self, chunk_mib: float | None) -> None:
        """Keep no activations inside a stage, but run it again in backward, in chunks of centers."""
        self.recomputed, self.chunk_mib = True, float("inf") if chunk_mib is None else chunk_mib

    def forward(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Positions and features of all levels, the finest first. batch: position, features, and the indices."""
        positions, features = [batch["position"]], [batch["features"]]
        for s, stage in enumerate(self.stages, start=1):
            center, neighbor = batch[f"center_{s}"], batch[f"neighbor_{s}"]
            features.append(self._run(stage, positions[-1], features[-1], center, neighbor))
            positions.append(gather(positions[-1], center))
        return positions, features

    def _run(self, stage: nn.Module, position: Tensor, features: Tensor, center: Tensor, neighbor: Tensor) -> Tensor:
        if not (self.recomputed and torch.is_grad_enabled()):
            return stage(position, features, center, neighbor)
        per_center = 4 * stage.floats * neighbor.shape[0] * neighbor.shape[2]  # type: ignore[operator]  # bytes, all samples
        size = int(max(1, min(center.shape[1], self.chunk_mib * 2**20 // per_center if self.chunk_mib < 1e9 else 1e9)))
        run = functools.partial(checkpoint, stage, position, features, use_reentrant=False)
        pieces = zip(center.split(size, dim=1), neighbor.split(size, dim=1), strict=True)
        return torch.cat([run(c, n) for c, n in pieces], dim=1)


class PointNorm(nn.Module):
    """Normalization of (B, N, C): batch norm over all points of all samples, as the authors', or LayerNorm."""

    def __init__(self, width: int, kind: Norm) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm1d(width) if kind == "batch" else nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


class Propagation(nn.Module):
    """Features of coarse points to finer ones: (B, M, C) and (B, N, skip) -> (B, N, width)."""

    def __init__(self, skip: int, channels: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Linear(skip + channels, width, bias=False), PointNorm(width, norm)
        self.second, self.second_norm = nn.Linear(width, width, bias=False), PointNorm(width, norm)

    def forward(self, skip: Tensor, coarse: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """index, weight: (B, N, 3), the three coarse points from which each fine one is interpolated."""
        interpolated = (gather(coarse, index) * weight.unsqueeze(-1).to(coarse.dtype)).sum(dim=2)
        h = F.relu(self.first_norm(self.first(torch.cat([skip.to(interpolated.dtype), interpolated], dim=-1))))
        return F.relu(self.second_norm(self.second(h)))


class Classifier(nn.Module):
    """Logits (B, N, K) of each point from its features (B, N, C) and from the cloud's: class token and maximum.

    W [cls, max, f] is computed as W_1 [cls, max] + W_2 f: the cloud's part once, not once per point.
    """

    def __init__(self, width: int, hidden: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.norm = nn.Linear(3 * width, hidden, bias=False), nn.LayerNorm(hidden, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden, num_classes)

    def forward(self, features: Tensor, cls: Tensor) -> Tensor:
        """cls: (B, C)."""
        cloud = torch.cat([cls.to(features.dtype), features.amax(dim=1)], dim=-1)
        of_cloud, of_point = self.hidden.weight.split([cloud.shape[-1], features.shape[-1]], dim=1)
        h = F.linear(features, of_point) + F.linear(cloud, of_cloud).unsqueeze(1)
        return self.linear(self.dropout(F.relu(self.norm(h))))


class Decoder(nn.Module):
    """Tokens back to logits of points: propagations, the finest first, and the classifier."""

    def __init__(
        self,
        skips: Sequence[int],
        channels: int,
        width: int,
        num_classes: int,
        *,
        norm: Norm,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        last = len(skips) - 1
        self.propagations = nn.ModuleList(
            Propagation(skip, channels if i == last else width, width, norm) for i, skip in enumerate(skips)
        )
        self.cls = nn.Linear(channels, width) if channels != width else nn.Identity()
        self.classifier = Classifier(width, hidden, num_classes, dropout)

    def recompute(self, chunk_mib: float | None) -> None:
        """Keep only what is between the parts. Whole, whatever the chunks: batch norm sees all points."""
        for part in (*self.propagations, self.classifier):
            dr2net.recompute(part)

    def forward(self, features: Sequence[Tensor], cls: Tensor, batch: Batch) -> Tensor:
        """features: of all levels, the finest first, the tokens last; cls: (B, D). batch: up_<s>, weight_<s>."""
        h = features[-1]
        for s in reversed(range(len(self.propagations))):
            h = self.propagations[s](features[s], h, batch[f"up_{s + 1}"], batch[f"weight_{s + 1}"])
        return self.classifier(h, self.cls(cls))


def segmentation_loss(logits: Tensor, label: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy over all points, a scalar, in float32 outside autocast. logits: (B, N, K), label: (B, N)."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.float().flatten(0, 1), label.flatten(), label_smoothing=label_smoothing)
