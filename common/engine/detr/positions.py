"""Positions as sines: of the cells of a feature map, and of boxes. Normalized: the size of the image has no part.

cells   y = 2 pi (rows above and at the cell + offset) / (rows + 1e-6), x likewise; padding counts for nothing
sine    of p: sin(p / T^(0/F)), cos(p / T^(0/F)), sin(p / T^(2/F)), ... F numbers per coordinate
"""

import math

import torch
from torch import Tensor

BOX_TEMPERATURE = 10000.0


def sine_of_cells(padding: Tensor, width: int, temperature: float, offset: float = 0.0) -> Tensor:
    """padding (B, H, W), True where padded -> (B, H, W, width): width / 2 numbers of y, then of x.

    DETR's PositionEmbeddingSine; official DINO has temperature 20 and offset 0, detrex 10000 and -.5.
    """
    real = (~padding).float()
    y, x = real.cumsum(dim=1), real.cumsum(dim=2)
    y = (y + offset) / (y[:, -1:, :] + 1e-6)
    x = (x + offset) / (x[:, :, -1:] + 1e-6)
    return torch.cat([_sine(y, width // 2, temperature), _sine(x, width // 2, temperature)], dim=-1)


def sine_of_boxes(boxes: Tensor, width: int) -> Tensor:
    """boxes (..., 4), cx, cy, w, h in 0..1 -> (..., 4 * width), in the order y, x, w, h."""
    x, y, w, h = boxes.unbind(dim=-1)
    return torch.cat([_sine(p, width, BOX_TEMPERATURE) for p in (y, x, w, h)], dim=-1)


def _sine(position: Tensor, width: int, temperature: float) -> Tensor:
    """(...) in 0..1 -> (..., width)."""
    exponent = torch.arange(width, device=position.device, dtype=torch.float32) // 2 * 2 / width
    angle = position[..., None] * 2 * math.pi / temperature**exponent
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)
