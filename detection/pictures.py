"""Pictures with their boxes, as both annotation forms give them, and how odd entries are told.

    annotations.pictures[image_id].boxes        # (n, 4) float64 x, y, width, height in pixels, inside the picture
    as_coco(annotations)                        # the dictionary that pycocotools takes, whatever the form was

Not here: reading the files (annotations.py, yolo.py), pixels (images.py).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

MAX_SIDE = 1_000_000  # of a picture, pixels; a coordinate beyond it is a mistake
NAMED = 10  # odd entries that a warning names
CLIPPED = 1.0  # pixels past the border that are told; less is rounding
MANY = 0.25  # share of the boxes; where more of them reach past the border, they may be of another form


@dataclass(frozen=True)
class Category:
    """A class of the annotation file."""

    id: int
    name: str


@dataclass(frozen=True)
class Picture:
    """One picture and its boxes, crowds among them. The file is not opened."""

    id: int
    path: Path
    width: int  # pixels, in which the boxes were drawn
    height: int
    labels: np.ndarray  # (n,) int64, positions in `Annotations.categories`
    boxes: np.ndarray  # (n, 4) float64 x, y, width, height in pixels, clipped to the picture, of positive size
    crowd: np.ndarray  # (n,) bool, many objects in one box: not trained on, neither right nor wrong in the metric
    areas: np.ndarray  # (n,) float64 square pixels; of the mask where the file has it: small, medium or large


@dataclass(frozen=True)
class Annotations:
    """The pictures of one split."""

    file: Path
    categories: tuple[Category, ...]  # sorted by id; a label is a position in here
    pictures: dict[int, Picture]  # by image id, in the file's order


@dataclass
class Faults:
    """Entries that cannot be used: the first is an error, or with on_broken="skip" all are left out and told at once;
    and those that are dropped or changed in either case.
    """

    file: Path
    on_broken: Literal["raise", "skip"]
    broken: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    hint: str = ""  # what all of `changed` may come from

    def leave_out(self, sentence: str) -> None:
        """ValueError, or one more entry that is left out."""
        if self.on_broken == "raise":
            remedy = "mend it, or leave such entries out with --data.on-broken skip"
            raise ValueError(f"{self.file}: {sentence}; {remedy}")
        self.broken.append(sentence)

    def tell(self) -> None:
        """One warning for each of the two kinds."""
        for what, lines in (("entries left out", self.broken), ("boxes dropped or clipped", self.changed)):
            if lines:
                more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
                hint = f"; {self.hint}" if self.hint and lines is self.changed else ""
                warnings.warn(f"{self.file}: {len(lines)} {what}: {'; '.join(lines[:NAMED])}{more}{hint}", stacklevel=2)

    def look_for_corners(self, num_boxes: int) -> None:
        """Give the hint that is due where many of so many boxes were dropped or clipped."""
        if len(self.changed) > max(MANY * num_boxes, 3):
            self.hint = "so many: are they corners x0, y0, x1, y1, or of pictures that were resized later?"


def number(value: Any) -> float | None:
    """A finite number of at most a million, or None for anything else (words, truth values, NaN, 300 digits)."""
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > MAX_SIDE:
        return None
    return float(value)


def inside(box: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float] | None:
    """A box x, y, width, height clipped to the picture, or None where nothing remains."""
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[0] + box[2], float(width)), min(box[1] + box[3], float(height))
    # a width of 1e-9 of a pixel is none in float32
    return (left, top, right - left, bottom - top) if min(right - left, bottom - top) > 1e-3 else None


def refuse_shares(boxes: Sequence[Sequence[float]], where: str) -> None:
    """ValueError where all boxes x, y, width, height lie within the first pixel, as shares of the picture do."""
    within = all(x + width <= 1 and y + height <= 1 for x, y, width, height in boxes)
    if within and any(value % 1 for box in boxes for value in box):
        raise ValueError(
            f"{where}: all boxes are within one pixel, as {list(boxes[0])}; they seem to be shares of the picture: "
            "multiply them with its width and height"
        )


def is_clipped(box: tuple[float, ...], clipped: tuple[float, ...]) -> bool:
    """Whether more than rounding was cut off."""
    return max(abs(a - b) for a, b in zip(clipped, box, strict=True)) > CLIPPED


def as_coco(annotations: Annotations) -> dict[str, Any]:
    """COCO's dictionary of a split, for one metric whatever the form was. Annotation ids are counted from 1.

    An annotation with the id 0 could never be matched by pycocotools, and one without area or crowd is a KeyError.
    """
    images: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    for picture in annotations.pictures.values():
        images.append(
            {"id": picture.id, "file_name": picture.path.name, "width": picture.width, "height": picture.height}
        )
        for label, box, crowd, area in zip(picture.labels, picture.boxes, picture.crowd, picture.areas, strict=True):
            items.append(
                {
                    "id": len(items) + 1,
                    "image_id": picture.id,
                    "category_id": annotations.categories[label].id,
                    "bbox": box.tolist(),
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    categories = [{"id": category.id, "name": category.name} for category in annotations.categories]
    return {"info": {}, "images": images, "annotations": items, "categories": categories}
