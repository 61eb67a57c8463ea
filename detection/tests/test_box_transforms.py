"""Boxes follow the pixels through every view; the rule of the sizes; what is dropped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection import transforms
from detection.configs import COCO, SHAPES, TREES, Data
from detection.tests.toy_pictures import draw
from detection.transforms import augment, picture_boxes, resized_size, shrink_or_grow

VIEWS = {
    "detr": replace(SHAPES, sizes=(96, 128), crop_sizes=(100, 140), crop_range=(60, 120), max_size=200),
    "window": replace(TREES, window=96, scale=(0.5, 2.0), color_jitter=0.0),
    "none": replace(SHAPES, crop="none", sizes=(64, 150), max_size=180),
}
EDGE = 1.01  # pixels: half a pixel of a threshold, and half of rounding a size down
THICK = 4  # pixels: a thinner rest is too faint, after antialiasing, to be measured


def picture(width, height, boxes):
    image = torch.from_numpy(draw(width, height, boxes)).permute(2, 0, 1)
    return image, picture_boxes(np.array(boxes, dtype=np.float64).reshape(-1, 4), height, width)


def box_of_pixels(channel: torch.Tensor) -> list[int]:
    ys, xs = torch.nonzero(channel > 127, as_tuple=True)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


@st.composite
def pictures(drawing):
    width, height = drawing(st.integers(40, 260)), drawing(st.integers(40, 260))
    boxes = []
    for _ in range(drawing(st.integers(0, 3))):
        x, y = drawing(st.integers(0, width - 20)), drawing(st.integers(0, height - 20))
        w, h = drawing(st.integers(20, width - x)), drawing(st.integers(20, height - y))
        boxes.append([x, y, w, h])
    return width, height, boxes


@pytest.mark.parametrize("name", VIEWS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn=pictures(), seed=st.integers(0, 2**62))
def test_boxes_follow_pixels_in_training(name, drawn, seed):
    image, boxes = picture(*drawn)
    seen, found, kept = augment(image, boxes, VIEWS[name], np.random.default_rng(seed))
    height, width = seen.shape[-2:]
    assert found.canvas_size == (height, width) and len(found) == len(kept)
    for k, box in zip(kept.tolist(), found.tolist(), strict=True):
        assert 0 <= box[0] < box[2] <= width + 1e-3 and 0 <= box[1] < box[3] <= height + 1e-3
        if min(box[2] - box[0], box[3] - box[1]) >= THICK:
            assert box_of_pixels(seen[k]) == pytest.approx(box, abs=EDGE)
    if name != "window":  # what is dropped cannot be seen
        for k in set(range(len(boxes))) - set(kept.tolist()):
            assert seen[k].max() <= 127


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn=pictures(), size=st.integers(32, 300), longest=st.integers(300, 500))
def test_boxes_follow_pixels_in_evaluation(drawn, size, longest):
    image, boxes = picture(*drawn)
    seen, found = shrink_or_grow(image, boxes, size, longest)
    assert seen.shape[-2:] == resized_size(*image.shape[-2:], size, longest)
    for k, box in enumerate(found.tolist()):
        if min(box[2] - box[0], box[3] - box[1]) >= THICK:
            assert box_of_pixels(seen[k]) == pytest.approx(box, abs=EDGE)


def published_size(width: int, height: int, size: int, max_size: int | None) -> tuple[int, int]:
    """The rule as a formula in floating point, for images as (width, height); returns (height, width)."""
    short, long = float(min(width, height)), float(max(width, height))
    if max_size is not None and long / short * size > max_size:
        size = int(round(max_size * short / long))  # noqa: RUF046
    if width < height:
        return (height, width) if width == size else (int(size * height / width), size)
    return (height, width) if height == size else (size, int(size * width / height))


def test_sizes_follow_the_published_rule():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(30, 2000, (3000, 2)).tolist():
        for size, max_size in ((800, 1333), (int(rng.choice(COCO.sizes)), 1333), (400, None)):
            assert resized_size(height, width, size, max_size) == published_size(width, height, size, max_size)
    assert resized_size(480, 640, 800, 1333) == (800, 1066)  # 1066.67 is rounded down
    assert resized_size(427, 640, 800, 1333) == (800, 1199)
    assert resized_size(300, 640, 800, 1333) == (625, 1333)
    assert resized_size(800, 801, 800, 1333) == (800, 801)


def test_pictures_of_extreme_size_and_shape_stay_within_bounds():
    assert resized_size(20, 20, 800, 1333) == (800, 800)
    assert resized_size(10_000, 10_000, 800, 1333) == (800, 800)
    assert resized_size(1, 10_000, 800, 1333) == (1, 10_000)  # of a side of one pixel nothing can be taken
    assert resized_size(3, 10_000, 800, 1333) == (1, 3333)
    for name, view in VIEWS.items():
        for width, height in ((1, 1), (20, 20), (2, 3000), (3000, 5)):
            image, boxes = picture(width, height, [[0, 0, width, height]])
            seen, found, _ = augment(image, boxes, view, np.random.default_rng(3))
            assert min(seen.shape[-2:]) >= 1 and seen.numel() < 3 * 500 * 3000, name
            assert len(found) in (0, 1)


def test_a_small_picture_is_enlarged_before_a_window_is_cut():
    image, boxes = picture(20, 20, [[2, 2, 10, 10]])
    for seed in range(10):
        seen, _, _ = augment(image, boxes, VIEWS["window"], np.random.default_rng(seed))
        assert min(seen.shape[-2:]) >= transforms.LEAST_SIDE


def test_a_window_drops_what_is_less_than_half_visible_and_a_published_crop_what_is_gone():
    image, boxes = picture(100, 100, [[0, 0, 40, 40], [50, 0, 50, 50]])
    _, cut, kept = transforms._cut(image, boxes, 0, 0, 100, 60, visible=0.5)  # 10 of 50 columns remain
    assert kept.tolist() == [0] and cut.tolist() == [[0, 0, 40, 40]]
    _, cut, kept = transforms._cut(image, boxes, 0, 0, 100, 60, visible=0.0)
    assert kept.tolist() == [0, 1] and cut.tolist()[1] == [50, 0, 60, 50]
    _, cut, kept = transforms._cut(image, boxes, 0, 0, 100, 50, visible=0.0)  # touches
    assert kept.tolist() == [0]
    _, cut, kept = transforms._cut(image, boxes, 0, 0, 100, 75, visible=0.5)  # half exactly
    assert kept.tolist() == [0, 1]


def test_windows_have_their_side_and_all_eight_ways_to_lie():
    pixels = np.zeros((300, 300, 3), np.uint8)
    pixels[:150, :150, 0] = pixels[:150, 150:, 1] = pixels[150:, :150, 2] = 255
    image, boxes = torch.from_numpy(pixels).permute(2, 0, 1), picture_boxes(np.zeros((0, 4)), 300, 300)
    view = replace(VIEWS["window"], window=300, scale=(1.0, 1.0))
    seen = set()
    for seed in range(60):
        window, _, _ = augment(image, boxes, view, np.random.default_rng(seed))
        assert window.shape == (3, 300, 300)
        corners = window[:, [10, 10, -10], [10, -10, 10]].T.tolist()
        seen.add(str(corners))
    assert len(seen) == 8


def test_half_of_the_pictures_are_cut_and_half_are_mirrored():
    image, boxes = picture(200, 200, [[0, 0, 200, 200], [0, 0, 100, 200]])
    view = replace(VIEWS["detr"], crop_range=(60, 90))
    cut = mirrored = 0
    for seed in range(300):
        _, found, kept = augment(image, boxes, view, np.random.default_rng(seed))
        uncut = len(kept) == 2 and found[1, 2] - found[1, 0] == pytest.approx(float(found[0, 2] - found[0, 0]) / 2)
        cut += not uncut
        mirrored += bool(uncut and found[1, 0] > 0)
    assert cut == pytest.approx(150, abs=35)  # four standard deviations
    assert mirrored == pytest.approx((300 - cut) / 2, abs=35)


@pytest.mark.parametrize("view", VIEWS.values(), ids=str)
def test_a_view_is_a_function_of_its_seed(view: Data):
    view = replace(view, color_jitter=0.3)
    image, boxes = picture(150, 120, [[10, 10, 80, 80]])
    first = augment(image, boxes, view, np.random.default_rng(5))
    torch.rand(2), np.random.default_rng().random()
    again = augment(image, boxes, view, np.random.default_rng(5))
    other = augment(image, boxes, view, np.random.default_rng(6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
    assert torch.equal(image, picture(150, 120, [[10, 10, 80, 80]])[0])  # the picture itself stays as it was
