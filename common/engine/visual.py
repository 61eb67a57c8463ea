"""Pictures of videos: palettes, film strips and sheets of them, bars, sizes of annotated copies.

    strip = film_strip(frames, above=14)           # a PIL picture, the frames side by side below a white margin
    save_stack(Path("sheet.png"), [strip, ...])    # one below the other

Frames are uint8 (H, W, 3), RGB. Not here: what a task writes and draws into them (its predict.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.files import appearing

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Color = tuple[int, int, int] | str
# Tableau's ten, readable side by side; classes beyond repeat them.
TABLEAU = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7", "#6b6b6b")
# Okabe and Ito's, which the color-blind can tell apart.
OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
}
DARK, LIGHT = (20, 20, 20), (255, 255, 255)
BAR_HEIGHT = 20


def film_strip(
    frames: Sequence[np.ndarray] | np.ndarray, *, above: int = 0, below: int = 0, gap: int = 0
) -> "Image.Image":
    """Frames of one size side by side, so many pixels apart, with white margins of so many to write into."""
    from PIL import Image

    height, width = frames[0].shape[:2]
    strip = Image.new("RGB", (len(frames) * (width + gap) - gap, above + height + below), LIGHT)
    for k, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame), (k * (width + gap), above))
    return strip


def save_stack(path: Path, strips: Sequence["Image.Image"]) -> None:
    """Pictures of one width, one below the other, as a PNG."""
    from PIL import Image

    with appearing(path) as temporary:
        Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips], axis=0)).save(temporary)


def resized(frame: np.ndarray, width: int, height: int | None = None) -> "Image.Image":
    """The frame as a picture of this width; without a height it keeps its shape."""
    from PIL import Image

    if height is None:
        height = max(1, round(width * frame.shape[0] / frame.shape[1]))
    return Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)


def even_size(width: int, height: int, min_width: int) -> tuple[int, int]:
    """(width, height), enlarged to `min_width` if smaller, both even, as video codecs want them."""
    scale = max(1.0, min_width / width)
    return max(2 * round(scale * width / 2), 2), max(2 * round(scale * height / 2), 2)


def draw_bar(
    draw: "ImageDraw.ImageDraw",
    left: float,
    top: float,
    right: float,
    share: float,
    color: Color,
    track: Color | None = None,
) -> None:
    """A bar that fills this share, at most 1, of the place from left to right; what it leaves has the track's color."""
    if track is not None:
        draw.rectangle((left, top, right, top + BAR_HEIGHT), fill=track)
    draw.rectangle((left, top, left + (right - left) * min(share, 1.0), top + BAR_HEIGHT), fill=color)


def annotated_copy(video: Path, output: Path) -> Path:
    """Where the annotated copy of a video goes in the folder `output`; never onto the video itself."""
    path = output / f"{video.stem}.mp4"
    return path.with_stem(f"{video.stem}_annotated") if path.resolve() == video.resolve() else path
