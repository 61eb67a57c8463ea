"""A picture and its boxes, resized, cut, mirrored and turned together.

    image, boxes, kept = augment(image, boxes, data, np.random.default_rng(seed))      # training
    image, boxes = shrink_or_grow(image, boxes, data.test_size, data.max_size)         # evaluation

image: uint8 (3, H, W); boxes: tv_tensors.BoundingBoxes (n, 4) float32, corners x0, y0, x1, y1 in pixels, of the canvas
(H, W). Resizing, cutting and mirroring are torchvision's; the rule of the sizes is DINO's (datasets/transforms.py, as
in DETR), from which torchvision's own differs by a pixel for a quarter of the sizes. All randomness comes from the
given generator. Not here: normalization, padding to a batch, labels (data.py).
"""

import math

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detection.configs import Data
from engine.data.transforms import color_jitter, resized_size

VISIBLE = 0.5  # window: a box of which less remains is dropped
LEAST_SIDE = 32  # window: a smaller picture is enlarged so far
LONGEST = 8  # times `max_size`: where the published rule sets no limit, for pictures of extreme shape


def picture_boxes(boxes: np.ndarray, height: int, width: int) -> tv_tensors.BoundingBoxes:
    """Boxes (n, 4) x, y, width, height in pixels as corners on a canvas of this size."""
    corners = torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)).float()
    return _boxes(corners, height, width)


def shrink_or_grow(
    image: Tensor, boxes: tv_tensors.BoundingBoxes, size: int, max_size: int | None
) -> tuple[Tensor, tv_tensors.BoundingBoxes]:
    """Resized by the rule of `resized_size`, bilinear, antialiased."""
    return _resize(image, boxes, *resized_size(image.shape[-2], image.shape[-1], size, max_size))


def augment(
    image: Tensor, boxes: tv_tensors.BoundingBoxes, data: Data, rng: np.random.Generator
) -> tuple[Tensor, tv_tensors.BoundingBoxes, Tensor]:
    """The training view of a picture, by `data.crop`; boxes, those that are left, and their places before (k,) long.

    detr: of half of the pictures a random rectangle; every box of which something remains is kept, clipped. window: a
    square of `window` pixels, or less where the picture ends; a box of which less than half remains is dropped.
    """
    kept = torch.arange(len(boxes))
    if data.crop == "window":
        image, boxes, kept = _window(image, boxes, data, rng)
    if rng.random() < data.flip:
        image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
    if data.crop == "detr" and rng.random() < 0.5:
        least = int(rng.choice(data.crop_sizes))
        image, boxes = shrink_or_grow(image, boxes, least, LONGEST * data.max_size)
        sides = []
        for side in image.shape[-2:]:
            low, high = (min(bound, side) for bound in data.crop_range)
            sides.append(int(rng.integers(min(low, high), high + 1)))
        top, left = (int(rng.integers(side - cut + 1)) for side, cut in zip(image.shape[-2:], sides, strict=True))
        image, boxes, kept = _cut(image, boxes, top, left, *sides, visible=0.0)
    if data.crop != "window":
        image, boxes = shrink_or_grow(image, boxes, int(rng.choice(data.sizes)), data.max_size)
    return color_jitter(image, data.color_jitter, rng), boxes, kept


def _window(
    image: Tensor, boxes: tv_tensors.BoundingBoxes, data: Data, rng: np.random.Generator
) -> tuple[Tensor, tv_tensors.BoundingBoxes, Tensor]:
    """A square of the scaled picture, turned by quarters. Cut first, then scaled: the rest costs nothing."""
    height, width = image.shape[-2:]
    scale = math.exp(rng.uniform(*np.log(data.scale)))
    scale = max(scale, min(LEAST_SIDE, data.window) / min(height, width))
    place, cut, out = [], [], []
    for side in (height, width):
        share = min(max(round(data.window / scale), 1), side)
        place.append(int(rng.integers(side - share + 1)))
        cut.append(share)
        out.append(data.window if share < side else min(max(round(side * scale), 1), data.window))
    image, boxes, kept = _cut(image, boxes, *place, *cut, visible=VISIBLE)
    image, boxes = _resize(image, boxes, *out)
    return *_turn(image, boxes, int(rng.integers(4))), kept


def _cut(
    image: Tensor, boxes: tv_tensors.BoundingBoxes, top: int, left: int, height: int, width: int, *, visible: float
) -> tuple[Tensor, tv_tensors.BoundingBoxes, Tensor]:
    """A rectangle of the picture; boxes clipped to it, those with nothing or less than the share `visible` dropped."""
    areas = _area(boxes)
    image, boxes = F.crop(image, top, left, height, width), F.crop(boxes, top, left, height, width)
    boxes = F.clamp_bounding_boxes(boxes)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = torch.nonzero((sides > 0).all(1) & (_area(boxes) >= visible * areas * (1 - 1e-5))).flatten()
    return image, _boxes(boxes[kept], height, width), kept


def _resize(
    image: Tensor, boxes: tv_tensors.BoundingBoxes, height: int, width: int
) -> tuple[Tensor, tv_tensors.BoundingBoxes]:
    if image.shape[-2:] == (height, width):
        return image, boxes
    return F.resize(image, [height, width], antialias=True), F.resize(boxes, [height, width])


def _turn(image: Tensor, boxes: tv_tensors.BoundingBoxes, quarters: int) -> tuple[Tensor, tv_tensors.BoundingBoxes]:
    """Turned counterclockwise, exactly."""
    for _ in range(quarters):
        height, width = image.shape[-2:]
        x0, y0, x1, y1 = boxes.as_subclass(Tensor).unbind(1)
        image = image.rot90(1, (-2, -1))
        boxes = _boxes(torch.stack([y0, width - x1, y1, width - x0], 1), width, height)
    return image, boxes


def _area(boxes: Tensor) -> Tensor:
    sides = boxes.as_subclass(Tensor)[:, 2:] - boxes.as_subclass(Tensor)[:, :2]
    return sides.prod(1)


def _boxes(corners: Tensor, height: int, width: int) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(
        corners.as_subclass(Tensor),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=(height, width),
    )
