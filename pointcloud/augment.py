"""What is done at random to a training crop, in the order of Pix4Point's recipe, and the normalization of colors.

    stretch of contrast, scale per axis, rotation about the vertical, jitter, dropped colors; then normalization

Everything is drawn from the sample's generator, always the same number of times. The recipe has no mirror image. Not
here: which points are in the crop (`data.py`).
"""

import numpy as np

from pointcloud.configs import Data


def augment_crop(
    position: np.ndarray, color: np.ndarray, data: Data, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """position: (N, 3) float32, meters from the crop's center; color: (N, 3) float32 in 0 to 255. Returns both anew."""
    stretched, share, dropped = rng.random(3)
    scale = rng.uniform(*data.scale, 3).astype(np.float32)
    angle = rng.uniform(-np.pi, np.pi) if data.rotate else 0.0
    noise = rng.standard_normal(position.shape, np.float32)
    if stretched < data.contrast:
        color = stretch_contrast(color, share)
    position = rotate_about_vertical(position * scale, angle)
    position = position + np.clip(noise, -4, 4) * np.float32(data.jitter)
    if dropped < data.color_drop:
        color = np.zeros_like(color)
    return position, color


def stretch_contrast(color: np.ndarray, share: float) -> np.ndarray:
    """Each channel stretched to 0 to 255, mixed with the original by `share`. A channel of one value stays as it is."""
    low, high = color.min(axis=0), color.max(axis=0)
    span = np.where(high > low, high - low, 255)
    stretched = np.where(high > low, (color - low) * (255 / span), color)
    return (share * stretched + (1 - share) * color).astype(np.float32)


def rotate_about_vertical(position: np.ndarray, angle: float) -> np.ndarray:
    """Turned by `angle` radians, counterclockwise seen from above."""
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)
    return position.astype(np.float32) @ turn


def normalize_colors(color: np.ndarray, data: Data) -> np.ndarray:
    """0 to 255 -> float32 with the mean and standard deviation of the data set."""
    return ((color / 255 - np.asarray(data.mean)) / np.asarray(data.std)).astype(np.float32)
