"""Denoising queries: true boxes with noise, which the decoder puts right: it learns before the matching settles.

Per image `groups` groups of n positive and n negative queries, n the largest number of boxes in the batch: a positive's
corners move by less than half its side, a negative's by half to a whole side (times `box_noise`), and it must find
nothing. A quarter of the labels are drawn anew. Groups do not see each other, and ordinary queries see none of them.
How many groups there are depends on the images of one forward, so denoising depends on how a batch is split.
Zhang et al., DINO, arXiv 2203.03605, section 3.3; the official settings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.detr.boxes import inverse_sigmoid, to_centers, to_corners

Target = dict[str, Tensor]  # labels (n,), boxes (n, 4)


@dataclass(frozen=True)
class Noise:
    """How much noise, and of how many queries."""

    queries: int  # aimed at, positive ones; 0: none
    max_queries: int  # positive and negative ones; what is over is left out at random
    box: float
    label: float


@dataclass(frozen=True)
class Denoising:
    """D queries per image, group by group, in each the positives before the negatives."""

    labels: Tensor  # (B, D) noised, of empty slots 0
    boxes: Tensor  # (B, D, 4) noised, in 0..1, of empty slots .5
    real: Tensor  # (B, D), False for the empty slots of images with fewer boxes
    true_labels: Tensor  # (B, D), what positives must find
    true_boxes: Tensor  # (B, D, 4)
    positive: Tensor  # (B, D), False for negatives and empty slots
    groups: int

    def blocked(self, queries: int) -> Tensor:
        """(D + queries, D + queries): True where the query of a row must not see that of a column."""
        number = self.labels.shape[1]
        group = torch.arange(number + queries, device=self.labels.device) // (number // self.groups)
        group[number:] = self.groups
        return (group[:, None] != group) & (group < self.groups)


def make_denoising(targets: list[Target], num_classes: int, noise: Noise) -> Denoising | None:
    """Noised queries for the images of a batch, drawn from torch's generator; None if there is no box in it."""
    if not noise.queries:
        return None
    targets = [_at_most(target, max(1, noise.max_queries // 2)) for target in targets]
    largest = max(len(target["labels"]) for target in targets)
    if not largest:
        return None
    groups = max(1, noise.queries // largest)
    labels = torch.stack([_filled(target["labels"], largest) for target in targets])
    boxes = torch.stack([_filled(target["boxes"], largest) for target in targets])
    real = torch.stack([_filled(torch.ones_like(target["labels"], dtype=torch.bool), largest) for target in targets])
    positive = torch.stack([real, torch.zeros_like(real)], dim=1)  # (B, 2, n)

    def repeat(x: Tensor) -> Tensor:
        """(B, n, ...) -> (B, D, ...)."""
        return x.repeat(1, 2 * groups, *[1] * (x.dim() - 2))

    true_labels, true_boxes, real = repeat(labels), repeat(boxes), repeat(real)
    negative = torch.arange(2 * groups * largest, device=labels.device) // largest % 2 == 1
    drawn = torch.rand(true_labels.shape, device=labels.device) < noise.label / 2
    other = torch.randint(num_classes, true_labels.shape, device=labels.device)
    noised = _moved(true_boxes, negative, noise.box)
    return Denoising(
        labels=torch.where(drawn & real, other, true_labels),
        boxes=torch.where(real[..., None], noised, 0.5),
        real=real,
        true_labels=true_labels,
        true_boxes=true_boxes,
        positive=positive.repeat(1, groups, 1).flatten(1),
        groups=groups,
    )


def _moved(boxes: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Boxes (B, D, 4) with their corners moved; a negative's may change places, which leaves it with hardly a size."""
    sign = torch.randint(2, boxes.shape, device=boxes.device) * 2 - 1
    share = torch.rand(boxes.shape, device=boxes.device) + negative[:, None]
    half = boxes[..., 2:].repeat(1, 1, 2) / 2
    corners = (to_corners(boxes) + sign * share * half * scale).clamp(0, 1)
    return inverse_sigmoid(to_centers(corners)).sigmoid()


def _at_most(target: Target, limit: int) -> Target:
    number = len(target["labels"])
    if number <= limit:
        return target
    kept = torch.randperm(number, device=target["labels"].device)[:limit]
    return {"labels": target["labels"][kept], "boxes": target["boxes"][kept]}


def _filled(values: Tensor, length: int) -> Tensor:
    """(n, ...) -> (length, ...), zeros at the end."""
    rest = values.new_zeros(length - len(values), *values.shape[1:])
    return torch.cat([values, rest])
