"""Boxes drawn into a picture: a color per class, labels that can be read.

    draw_boxes(image, [Box(0, 0.9, 10, 20, 30, 40)], ["cat"], width=480, height=320)     # a PIL picture

Not here: where boxes come from, files (predict.py).
"""

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from engine.visual import TABLEAU, resized

if TYPE_CHECKING:
    from PIL import Image, ImageFont

Corners = tuple[float, float, float, float]  # left, top, right, bottom

NAME_LENGTH = 24  # letters of a class in a label
MARGIN = 3  # pixels between the label's border and its text
BRIGHT = 140  # of 255; on a brighter color the text is black


class Box(NamedTuple):
    """A detection, in pixels of the picture."""

    label: int  # index into the classes
    score: float | None  # None: of an annotation
    x: float
    y: float
    width: float
    height: float


def draw_boxes(image: np.ndarray, boxes: Sequence[Box], names: Sequence[str], width: int, height: int) -> "Image.Image":
    """The picture, uint8 (H, W, 3), resized to width and height, with its boxes, best first in `boxes`, on top in it.

    A label stands above its box, else inside, else below (of a box that it would hide: below, else inside); where
    better ones are in all these places, it is left out.
    """
    from PIL import ImageDraw, ImageFont

    picture, side = resized(image, width, height), min(width, height)
    draw, line = ImageDraw.Draw(picture), max(2, round(side / 300))
    font = cast("ImageFont.FreeTypeFont", ImageFont.load_default(float(np.clip(side / 32, 12, 40))))
    across, down = width / image.shape[1], height / image.shape[0]
    text_height = sum(font.getmetrics()) + 2.0
    taken: list[Corners] = []
    drawn: list[tuple[Corners, tuple[int, int, int], str, Corners | None]] = []
    for box in boxes:
        corners = _inside(box, across, down, width, height)
        text = shorten(names[box.label]) + ("" if box.score is None else f" {box.score:.0%}")
        text_width = draw.textlength(text, font=font) + 2 * MARGIN
        left = max(min(corners[0], width - text_width), 0.0)
        within, below = corners[1], corners[3]
        hidden = corners[3] - corners[1] < 2 * text_height
        tops = (corners[1] - text_height, *((below, within) if hidden else (within, below)))
        free = [(left, top, left + text_width, top + text_height) for top in tops if 0 <= top <= height - text_height]
        place = next((one for one in free if not any(_overlap(one, other) for other in taken)), None)
        if place is not None:
            taken.append(place)
        drawn.append((corners, color_of(box.label), text, place))
    for corners, color, _, _ in drawn[::-1]:
        draw.rectangle(corners, outline=color, width=line)
    for _, color, text, place in drawn:
        if place is not None:
            draw.rectangle(place, fill=color)
            ink = (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > BRIGHT else (255, 255, 255)
            draw.text((place[0] + MARGIN, place[1] + 1), text, fill=ink, font=font)
    return picture


def color_of(label: int) -> tuple[int, int, int]:
    """A color for a class: Tableau's for the first ten, then hues a golden angle apart, in three brightnesses."""
    from PIL import ImageColor

    if label < len(TABLEAU):
        red, green, blue, *_ = ImageColor.getrgb(TABLEAU[label])
        return red, green, blue
    k = label - len(TABLEAU)
    shares = colorsys.hsv_to_rgb(k * 0.618034 % 1, 1 - 0.3 * (k % 2), 1 - 0.25 * (k % 3))
    return round(255 * shares[0]), round(255 * shares[1]), round(255 * shares[2])


def shorten(name: str) -> str:
    """A class in a label: one line, at most NAME_LENGTH letters."""
    text = " ".join(name.split())
    return text if len(text) <= NAME_LENGTH else text[: NAME_LENGTH - 3] + "..."


def _inside(box: Box, across: float, down: float, width: int, height: int) -> Corners:
    """The corners of a box in the resized picture, inside it, at least a pixel apart."""
    left = min(max(box.x * across, 0.0), width - 2.0)
    top = min(max(box.y * down, 0.0), height - 2.0)
    right = min(max((box.x + box.width) * across, left + 1), width - 1.0)
    bottom = min(max((box.y + box.height) * down, top + 1), height - 1.0)
    return left, top, right, bottom


def _overlap(one: Corners, other: Corners) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
