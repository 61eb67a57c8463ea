"""Images of unequal sizes as one batch, and what is real of it at every resolution. True is padding, as in DETR."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images (C, H, W), zero-padded at right and bottom: (B, C, H, W) of the largest sides, padding (B, H, W)."""
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        batch[index, :, : image.shape[-2], : image.shape[-1]] = image
        padding[index, : image.shape[-2], : image.shape[-1]] = False
    return batch, padding


def resize_padding(padding: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W) at another resolution, by the nearest cell: (B, *size)."""
    return F.interpolate(padding[:, None].float(), size=size, mode="nearest")[:, 0].bool()


def valid_shares(padding: Tensor) -> Tensor:
    """Which share of width and height is real, of its first row and column: (B, H, W) -> (B, 2), width first."""
    real = ~padding
    width, height = real[:, 0, :].float().mean(dim=1), real[:, :, 0].float().mean(dim=1)
    return torch.stack([width, height], dim=-1)
