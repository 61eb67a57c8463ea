"""J and F of masks against numbers known beforehand, and F against a plain loop over pixels."""

import math

import numpy as np
import pytest

from vos.metric import boundary, boundary_accuracy, region_similarity


def square(top: int = 20, left: int = 20, height: int = 20, width: int = 20, side: int = 100) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[top : top + height, left : left + width] = True
    return mask


@pytest.mark.parametrize(
    "shift, region, accuracy",
    [
        (0, 1, 1),
        (1, 19 / 21, 1),
        (2, 18 / 22, 1),
        (3, 17 / 23, 0.55),
        (4, 16 / 24, 0.525),
        (5, 0.6, 0.5),
        (10, 1 / 3, 0.375),
    ],
)
def test_a_square_shifted_by_so_many_pixels(shift, region, accuracy):
    for moved in (square(left=20 + shift), square(top=20 + shift)):
        assert region_similarity(moved, square()) == pytest.approx(region, abs=1e-12)
        assert boundary_accuracy(moved, square()) == pytest.approx(accuracy, abs=1e-12)


def test_a_small_square_inside_and_full_frames():
    assert region_similarity(square(25, 25, 10, 10), square()) == 0.25
    assert boundary_accuracy(square(25, 25, 10, 10), square()) == 0
    full = np.ones((100, 100), bool)
    assert not boundary(full).any() and boundary_accuracy(full, full) == 1
    assert region_similarity(square(), full) == 0.04 and boundary_accuracy(square(), full) == 0


def test_boundaries_have_the_pixels_of_davis():
    assert boundary(square()).sum() == 80
    assert boundary(square(80, 80)).sum() == 41  # at the bottom right corner
    assert boundary(square(50, 50, 1, 1)).sum() == 4


def test_empty_masks():
    empty = np.zeros((100, 100), bool)
    assert region_similarity(empty, empty) == boundary_accuracy(empty, empty) == 1
    for one, other in ((empty, square()), (square(), empty)):
        assert region_similarity(one, other) == boundary_accuracy(one, other) == 0


@pytest.mark.parametrize(
    "size, radius",
    [((56, 56), 1), ((64, 64), 1), ((96, 96), 2), ((240, 320), 4), ((320, 568), 6), ((480, 854), 8), ((720, 1280), 12)],
)
def test_the_tolerance_grows_with_the_diagonal(size, radius):
    """A line a tolerance away is near, one pixel more is not."""
    assert math.ceil(0.008 * math.hypot(*size)) == radius
    halves = np.zeros((3, *size), bool)
    for k, row in enumerate((20, 20 + radius, 21 + radius)):
        halves[k, :row] = True
    assert boundary_accuracy(halves[0], halves[1]) == 1 and boundary_accuracy(halves[0], halves[2]) == 0


def plain_accuracy(ours: np.ndarray, theirs: np.ndarray) -> float:
    """F pixel by pixel."""
    height, width = ours.shape
    radius = math.ceil(0.008 * math.hypot(height, width))

    def edge(mask: np.ndarray) -> set[tuple[int, int]]:
        found = set()
        for y in range(height):
            for x in range(width):
                others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
                if any(mask[y, x] != mask[o] for o in others if o[0] < height and o[1] < width):
                    found.add((y, x))
        return found

    def share(pixels: set[tuple[int, int]], others: set[tuple[int, int]]) -> float:
        near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in pixels]
        return sum(near) / len(near)

    one, other = edge(ours), edge(theirs)
    if not one or not other:
        return float(not one and not other)
    precision, recall = share(one, other), share(other, one)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_random_masks_give_the_accuracy_of_a_plain_loop():
    rng = np.random.default_rng(0)
    for size in [(9, 14)] * 20 + [(20, 13)] * 10 + [(8, 300)] * 3:
        one, other = (rng.random((2, *size)) < rng.random()).astype(bool)
        other[: size[0] // 2] = one[: size[0] // 2]
        assert boundary_accuracy(one, other) == pytest.approx(plain_accuracy(one, other), abs=1e-12)


def test_masks_that_cannot_be_compared_are_refused():
    for measure in (region_similarity, boundary_accuracy):
        with pytest.raises(ValueError, match="a prediction of 100 x 90 pixels, the truth has 100 x 100"):
            measure(square()[:, :90], square())
        with pytest.raises(ValueError, match="values other than 0 and 1"):
            measure(square() * 255, square())
