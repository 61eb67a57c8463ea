"""DINO's losses: a one-to-one matching per layer, then focal loss of the classes, L1 and generalized IoU of the boxes.

    cost   2 focal(p at the target's class) + 5 |b - t|_1 - 2 GIoU(b, t)                                  matching
    loss   1 focal(p) + 5 |b - t|_1 + 2 (1 - GIoU(b, t)), each a sum over the batch / number of targets    every layer

for each decoder layer, for what the encoder proposes, and for the denoising queries (not matched: they know their
target; divided by their groups too). The number of targets is that of the whole global batch (`num_targets`). Boxes are
cx, cy, w, h in 0..1. Everything here is float32, outside autocast.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from detection.denoising import Denoising, Target
from engine.detr.boxes import generalized_iou, to_corners
from engine.detr.matching import assign

CLASS, BOX, GIOU = 1.0, 5.0, 2.0  # weights of the losses
CLASS_COST, BOX_COST, GIOU_COST = 2.0, 5.0, 2.0
ALPHA, GAMMA = 0.25, 2.0


def matching_costs(logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
    """logits (..., Q, K), boxes (..., Q, 4), n targets -> (..., Q, n)."""
    p = logits.sigmoid()
    negative = (1 - ALPHA) * p**GAMMA * -torch.log(1 - p + 1e-8)
    positive = ALPHA * (1 - p) ** GAMMA * -torch.log(p + 1e-8)
    classes = (positive - negative)[..., target["labels"]]
    distance = torch.cdist(boxes, target["boxes"].to(boxes.dtype), p=1)
    overlap = generalized_iou(to_corners(boxes)[..., :, None, :], to_corners(target["boxes"]))
    return CLASS_COST * classes + BOX_COST * distance - GIOU_COST * overlap


class Matches(NamedTuple):
    """Indices of all matches, (M,) each."""

    sets: Tensor
    images: Tensor
    queries: Tensor
    targets: Tensor  # among those of the whole batch


def match(logits: Tensor, boxes: Tensor, targets: list[Target]) -> Matches:
    """Targets for S sets of predictions, logits (S, B, Q, K) and boxes (S, B, Q, 4)."""
    sets, images, queries, chosen = [], [], [], []
    first = 0
    for image, target in enumerate(targets):
        with torch.no_grad():
            costs = matching_costs(logits[:, image], boxes[:, image], target).cpu()
        for number, cost in enumerate(costs):
            query, one = assign(cost, f"image {image} of the batch")
            sets.append(torch.full_like(query, number))
            images.append(torch.full_like(query, image))
            queries.append(query)
            chosen.append(one + first)
        first += len(target["labels"])
    return Matches(*(torch.cat(indices).to(logits.device) for indices in (sets, images, queries, chosen)))


def matched_losses(logits: Tensor, boxes: Tensor, targets: list[Target], num_targets: float) -> Tensor:
    """Class, box and GIoU loss, weighted, of each set: logits (S, B, Q, K), boxes (S, B, Q, 4) -> (S, 3)."""
    found = match(logits, boxes, targets)
    place = found.sets, found.images, found.queries
    labels = torch.cat([target["labels"] for target in targets])[found.targets]
    truth = torch.cat([target["boxes"] for target in targets])[found.targets]
    wanted = torch.zeros_like(logits)
    wanted[(*place, labels)] = 1.0
    classes = sigmoid_focal_loss(logits, wanted, ALPHA, GAMMA).sum(dim=(1, 2, 3))
    sums = torch.stack(box_losses(boxes[place], truth), dim=-1)  # (M, 2)
    both = logits.new_zeros(len(logits), 2).index_add(0, found.sets, sums)
    return torch.cat([CLASS * classes[:, None], both], dim=1) / num_targets


def box_losses(boxes: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and GIoU loss, weighted, of each pair of boxes (..., 4)."""
    distance = F.l1_loss(boxes, truth, reduction="none").sum(dim=-1)
    return BOX * distance, GIOU * (1 - generalized_iou(to_corners(boxes), to_corners(truth)))


def denoising_loss(logits: Tensor, boxes: Tensor, plan: Denoising, num_targets: float) -> Tensor:
    """All losses of the denoising queries of all layers, a number: logits (S, B, D, K), boxes (S, B, D, 4)."""
    wanted = F.one_hot(plan.true_labels, logits.shape[-1]) * plan.positive[..., None]
    classes = sigmoid_focal_loss(logits, wanted.to(logits.dtype).expand_as(logits), ALPHA, GAMMA).sum()
    distance, overlap = box_losses(boxes, plan.true_boxes.expand_as(boxes))
    both = ((distance + overlap) * plan.positive).sum()
    return (CLASS * classes + both) / (num_targets * plan.groups)
