"""Boxes as tensors (..., 4): center and size (cx, cy, w, h), or corners (x0, y0, x1, y1); and how much two overlap.

Not here: suppression of duplicates (`torchvision.ops.nms`), COCO's (x, y, w, h), which lives in files only.
"""

import torch
from torch import Tensor

GIOU_EPSILON = 1e-6  # in both denominators, in the boxes' own units, as in official DINO: a perfect box of 4 px of 1000
# has a generalized IoU of .94


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (x0, y0, x1, y1)."""
    center, size = boxes.split(2, dim=-1)
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def to_centers(boxes: Tensor) -> Tensor:
    """(x0, y0, x1, y1) -> (cx, cy, w, h)."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def generalized_iou(a: Tensor, b: Tensor, epsilon: float = GIOU_EPSILON) -> Tensor:
    """Generalized IoU of corners a (..., 4) and b (..., 4), which broadcast; returns (...), in -1..1.

    a (N, 1, 4) and b (M, 4) give all pairs. Rezatofighi et al., "Generalized Intersection over Union", 2019.
    """
    area_a, area_b = _area(a), _area(b)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    common = (high - low).clamp(min=0).prod(dim=-1)
    union = area_a + area_b - common
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(dim=-1)
    return common / (union + epsilon) - (hull - union) / (hull + epsilon)


def inverse_sigmoid(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """The logit of x in 0..1; what is nearer to 0 or 1 than epsilon counts as if it were not, as in official DINO."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=epsilon) / (1 - x).clamp(min=epsilon))


def _area(corners: Tensor) -> Tensor:
    return (corners[..., 2:] - corners[..., :2]).prod(dim=-1)
