"""Drawn boxes: where they are, their colors, and labels that can be read."""

import numpy as np
import pytest
from PIL import ImageDraw

from detection.drawing import NAME_LENGTH, Box, color_of, draw_boxes, shorten

NAMES = ["cat", "dog", "a class whose name goes on and on and on"]


@pytest.fixture
def rectangles(monkeypatch) -> list[tuple[tuple, tuple | None]]:
    """The rectangles that are drawn: (corners, color that fills them or None)."""
    seen = []
    original = ImageDraw.ImageDraw.rectangle

    def noted(self, corners, fill=None, outline=None, width=1):
        seen.append((tuple(corners), fill))
        original(self, corners, fill, outline, width)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", noted)
    return seen


def blank(width: int = 400, height: int = 300) -> np.ndarray:
    return np.full((height, width, 3), 90, np.uint8)


def test_a_box_of_an_annotation_has_no_score(monkeypatch):
    said = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **how: said.append(text))
    draw_boxes(blank(), [Box(0, None, 50, 50, 90, 90), Box(1, 0.5, 200, 50, 90, 90)], NAMES, 400, 300)
    assert said == ["cat", "dog 50%"]


def test_a_box_is_drawn_where_it_is_in_the_resized_picture():
    pixels = np.asarray(draw_boxes(blank(), [Box(0, 0.9, 100, 120, 50, 60)], NAMES, 800, 600))
    assert pixels.shape == (600, 800, 3)
    for y, x in ((300, 200), (300, 300), (240, 290), (360, 250)):
        assert pixels[y, x].tolist() == list(color_of(0))
    assert pixels[300, 250].tolist() == [90, 90, 90] and pixels[300, 320].tolist() == [90, 90, 90]


def test_the_picture_itself_is_not_changed():
    image = blank()
    draw_boxes(image, [Box(0, 0.9, 100, 120, 50, 60)], NAMES, 400, 300)
    assert (image == 90).all()


def test_eighty_classes_have_eighty_colors():
    colors = np.array([color_of(label) for label in range(80)])
    assert ((colors >= 0) & (colors <= 255)).all()
    distances = np.abs(colors[:, None] - colors[None]).max(axis=-1) + 255 * np.eye(80, dtype=int)
    assert distances.min() >= 4
    assert np.abs(colors[:20, None] - colors[None, :20]).max(axis=-1)[~np.eye(20, dtype=bool)].min() > 20


@pytest.mark.parametrize("label", range(40))
def test_the_text_stands_out_from_its_label(label):
    names = [str(k) for k in range(40)]
    pixels = np.asarray(draw_boxes(blank(), [Box(label, 0.9, 100, 120, 90, 60)], names, 400, 300)).astype(float)
    area = pixels[106:119, 101:130].reshape(-1, 3) @ [0.299, 0.587, 0.114]
    assert area.max() - area.min() > 90


def test_labels_are_inside_the_picture_and_none_covers_another(rectangles):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-20, 390, 60), rng.uniform(-20, 290, 60)
    boxes = [Box(k % 3, 1 - k / 100, x[k], y[k], *rng.uniform(0, 200, 2)) for k in range(60)]
    draw_boxes(blank(), boxes, NAMES, 400, 300)
    labels = [corners for corners, fill in rectangles if fill is not None]
    assert 10 < len(labels) < 60 and len(rectangles) == 60 + len(labels)
    for k, (left, top, right, bottom) in enumerate(labels):
        assert left >= 0 and right <= 401 and top >= 0 and bottom <= 300
        for other in labels[:k]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_the_best_has_the_label_and_lies_on_top(rectangles):
    same = [Box(0, 0.9, 100, 100, 60, 80), Box(1, 0.8, 100, 100, 60, 80)]
    pixels = np.asarray(draw_boxes(blank(), [*same, *same[1:] * 4], NAMES, 400, 300))
    assert pixels[140, 100].tolist() == list(color_of(0))
    fills = [fill for _, fill in rectangles if fill is not None]
    assert fills[0] == color_of(0) and len(fills) == 3  # above, inside, below


def test_boxes_outside_and_without_size_are_drawn_at_the_border(rectangles):
    odd = [(-50, -50, 20, 20), (500, 400, 20, 20), (100, 100, 0, 0), (-1e6, -1e6, 2e6, 2e6)]
    draw_boxes(blank(), [Box(0, 0.5, *box) for box in odd], NAMES, 400, 300)
    for (left, top, right, bottom), fill in rectangles:
        assert fill is not None or (0 <= left < right <= 399 and 0 <= top < bottom <= 299)


@pytest.mark.parametrize("size", [(1, 1), (2, 500), (500, 2), (12, 12)])
def test_pictures_too_small_for_a_label_are_drawn(size):
    width, height = size
    assert draw_boxes(blank(width, height), [Box(2, 0.5, 0, 0, width, height)], NAMES, width, height).size == size


def test_two_thousand_boxes_are_drawn():
    rng = np.random.default_rng(0)
    boxes = [Box(k % 3, 0.9, *rng.uniform(0, 280, 2), *rng.uniform(1, 20, 2)) for k in range(2000)]
    assert draw_boxes(blank(), boxes, NAMES, 400, 300).size == (400, 300)


def test_names_are_one_line_of_so_many_letters():
    assert shorten("traffic  light\nred") == "traffic light red"
    assert shorten("x" * 100) == "x" * (NAME_LENGTH - 3) + "..."
    assert shorten("") == ""
