"""Masks drawn over frames: a color per sentence, its outline, a legend below, and sheets of frames side by side.

    picture = draw_masks(frame, masks, colors_of(2), width=480, height=320)      # uint8 (320, 480, 3)
    legend = draw_legend(["the red star"], [0.8], colors_of(1), width=480)       # a PIL picture

Not here: where masks come from, files (predict.py).
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, cast

import numpy as np

from engine.visual import DARK, LIGHT, TABLEAU, draw_bar, film_strip, resized

if TYPE_CHECKING:
    from PIL import Image, ImageFont

Color = tuple[int, int, int]

FONT = "DejaVu Sans"
OPACITY = 0.5  # of a mask's inside
LINE = 24  # pixels of the legend for a sentence
BAR = 90  # pixels for the bar of its score
TRACK = (70, 70, 70)
ABOVE = 20  # pixels for the title of a strip
GAP = 2  # between its frames
MAX_COLUMNS = 8  # frames of a sheet side by side


def colors_of(count: int) -> list[Color]:
    """A color for each of so many sentences; Tableau's ten, over and over. Brown, gray and green come last."""
    from PIL import ImageColor

    order = (1, 0, 3, 6, 4, 5, 8, 2, 7, 9)  # the first few as far apart as they can be
    colors = [ImageColor.getrgb(TABLEAU[order[k % len(order)]])[:3] for k in range(count)]
    return cast("list[Color]", colors)


def draw_masks(frame: np.ndarray, masks: np.ndarray, colors: Sequence[Color], width: int, height: int) -> np.ndarray:
    """The frame, uint8 (H, W, 3), at this size with its masks, (N, H, W) boolean, the first on top; (height, width, 3).

    Where several overlap, the color is that of the first and each outline is seen.
    """
    picture = np.asarray(resized(frame, width, height)).astype(np.float32)
    thick = min(max(1, round(min(width, height) / 80)), 4)
    large = [enlarge(mask, width, height) for mask in masks]
    covered = np.zeros((height, width), bool)
    for mask, color in zip(large, colors, strict=True):
        mask, covered = mask & ~covered, covered | mask
        picture[mask] = (1 - OPACITY) * picture[mask] + OPACITY * np.asarray(color)
    for mask, color in list(zip(large, colors, strict=True))[::-1]:
        picture[outline(mask, thick)] = color
    return picture.round().clip(0, 255).astype(np.uint8)


def enlarge(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """A mask (H, W) at another size, nearest pixels; boolean (height, width)."""
    rows = (np.arange(height) * mask.shape[0] + mask.shape[0] // 2) // height
    columns = (np.arange(width) * mask.shape[1] + mask.shape[1] // 2) // width
    return mask[rows.clip(max=mask.shape[0] - 1)][:, columns.clip(max=mask.shape[1] - 1)].astype(bool)


def outline(mask: np.ndarray, thick: int) -> np.ndarray:
    """The pixels of a mask (H, W) within `thick` of what is outside it; the frame's border is no outside."""
    inner = mask.copy()
    for _ in range(thick):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def draw_legend(
    sentences: Sequence[str], scores: Sequence[float], colors: Sequence[Color], width: int
) -> "Image.Image":
    """A line per sentence: its color, how sure the network is as a bar and a number, its words, shortened to fit."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, LINE * len(sentences) + 8), DARK)
    draw, font = ImageDraw.Draw(picture), font_of(14)
    for line, (sentence, score, color) in enumerate(zip(sentences, scores, colors, strict=True)):
        top = LINE * line + 5
        draw_bar(draw, 6, top, 6 + BAR, score, color, TRACK)
        draw.text((12, top + 2), f"{score:.0%}", fill=LIGHT, font=font)
        text = " ".join(sentence.split())
        while draw.textlength(text, font=font) > width - BAR - 22 and len(text) > 4:
            text = text[:-4] + "..." if not text.endswith("...") else text[:-4].rstrip(".") + "..."
        draw.text((BAR + 16, top + 2), text, fill=LIGHT, font=font)
    return picture


def draw_strip(frames: Sequence[np.ndarray], title: str, color: Color | None = None) -> "Image.Image":
    """Frames of one size side by side below a title, with a square of the color before it."""
    from PIL import ImageDraw

    strip = film_strip(frames, above=ABOVE, gap=GAP)
    draw, left = ImageDraw.Draw(strip), 4
    if color is not None:
        draw.rectangle((4, 5, 14, 15), fill=color)
        left = 20
    draw.text((left, 2), " ".join(title.split()), fill=(0, 0, 0), font=font_of(13))
    return strip


def spread(count: int, most: int = MAX_COLUMNS) -> list[int]:
    """At most so many of `count` indices, evenly, the first and the last among them."""
    shown = min(count, most)
    return [round(k * (count - 1) / max(shown - 1, 1)) for k in range(shown)]


def thumbnail_width(width: int, height: int, columns: int) -> int:
    """Of a frame in a sheet, pixels: readable, and together no wider than a screen."""
    return min(max(96, math.floor(1600 / columns)), max(width, 192), round(300 * width / height))


def lacking_letters(sentences: Sequence[str]) -> str:
    """The letters, each once, for which the pictures' font has boxes only, as those of Chinese and Japanese."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    font = FT2Font(findfont(FONT))
    letters = dict.fromkeys("".join("".join(sentence.split()) for sentence in sentences))
    return "".join(letter for letter in letters if not font.get_char_index(ord(letter)))


@cache
def font_of(size: int) -> "ImageFont.FreeTypeFont":
    """Matplotlib's DejaVu, which has Latin, Greek and Cyrillic letters; Pillow's own has Latin only."""
    from matplotlib.font_manager import findfont
    from PIL import ImageFont

    return ImageFont.truetype(findfont(FONT), size)
