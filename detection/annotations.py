"""Annotations of boxes: COCO's JSON, read by our own checked reader, and YOLO's text files (yolo.py).

    coco  <root>/annotations/instances_<split>.json, <root>/<split>/<file_name>
        {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
         "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height], "area", "iscrowd"}]}
    yolo  <root>/data.yaml, <root>/images/<split>/*, <root>/labels/<split>/*.txt

Category ids may have gaps: a label is the place in their sorted order, and the way back is `Annotations.categories`.
Everything is read in one pass, nothing is kept on the disk. Not here: pixels (images.py), which pictures a run uses
(data.py).
"""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detection import yolo
from detection.configs import Data
from detection.images import MAX_PIXELS
from detection.pictures import (
    MAX_SIDE,
    Annotations,
    Category,
    Faults,
    Picture,
    as_coco,
    inside,
    is_clipped,
    number,
    refuse_shares,
)
from engine.files import read_json

__all__ = [
    "Annotations",
    "Category",
    "Picture",
    "annotation_file",
    "as_coco",
    "read_annotations",
    "read_categories",
    "read_with_faults",
]

REMEDY = (
    "get it with scripts/download_coco.sh, mend it, or say where yours is: --data.root, --data.train-split and "
    "--data.test-split (of other commands --root, of prepare also --train-split, --test-split)"
)
UNUSED = ("segmentation", "coco_url", "flickr_url", "date_captured")  # most of the file's size
FORM = "want the form of COCO's instances_*.json"
# Tables and keys of the other files that stand in COCO's annotation folder.
OTHERS = {"caption": "captions", "segments_info": "panoptic segments"}


def annotation_file(data: Data, split: Literal["train", "test"]) -> Path:
    """Where the annotations of a split stand: COCO's JSON, or the list of classes of YOLO's form."""
    if data.kind == "yolo":
        return Path(data.root) / yolo.CLASSES
    return Path(data.root) / "annotations" / f"instances_{_name(data, split)}.json"


def read_annotations(data: Data, split: Literal["train", "test"]) -> Annotations:
    """The pictures of a split, at most `num_images`, with all their boxes; pictures without boxes stay.

    A box past the border is clipped, one without width or height, or outside the picture, dropped, with a warning that
    names it; a missing area is that of the box, a missing iscrowd 0. Raises FileNotFoundError, or ValueError naming
    file, entry and remedy: another form, other than `num_classes` classes, a split without pictures; and, or with
    on_broken="skip" a warning and the entry left out: an image id twice or without name and size, a file name that
    leaves the folder, an annotation id below 1 or twice, an unknown category or image, a box that is not four finite
    numbers or of negative size, a file under two image ids.
    """
    faults = Faults(annotation_file(data, split), data.on_broken)
    annotations = read_with_faults(data, split, faults, counted=True)
    faults.tell()
    return annotations


def read_with_faults(data: Data, split: Literal["train", "test"], faults: Faults, *, counted: bool) -> Annotations:
    """As `read_annotations`, without its warnings: what is odd stands in `faults`. counted: ask for `num_classes`."""
    file = annotation_file(data, split)
    tables = {} if data.kind == "yolo" else _tables(file)
    categories = yolo.read_classes(file) if data.kind == "yolo" else _categories(file, tables)
    if counted:
        _check_number(data, file, categories)
    if data.kind == "yolo":
        pictures = yolo.read_pictures(data, _name(data, split), len(categories), faults)
    else:
        pictures = _pictures(data, split, tables, categories, faults)
    if not pictures:
        raise ValueError(f"{file}: no picture of the split {_name(data, split)!r} can be used; {REMEDY}")
    return Annotations(file, categories, pictures)


def read_categories(data: Data) -> tuple[Category, ...]:
    """The classes, sorted by id, of the test split's file, which is the smaller one. Errors as `read_annotations`."""
    file = annotation_file(data, "test")
    categories = yolo.read_classes(file) if data.kind == "yolo" else _categories(file, _tables(file))
    _check_number(data, file, categories)
    return categories


def _name(data: Data, split: Literal["train", "test"]) -> str:
    return data.train_split if split == "train" else data.test_split


def _check_number(data: Data, file: Path, categories: tuple[Category, ...]) -> None:
    if len(categories) != data.num_classes:
        remedy = f"set --data.num-classes {len(categories)} to train on it, or give the data set of the checkpoint"
        raise ValueError(
            f"{file}: has {len(categories)} classes, the configuration says {data.num_classes} (num_classes); {remedy}"
        )


def _pictures(
    data: Data,
    split: Literal["train", "test"],
    tables: dict[str, list[Any]],
    categories: tuple[Category, ...],
    faults: Faults,
) -> dict[int, Picture]:
    images, known = _images(data, split, tables["images"], faults)
    places = {category.id: place for place, category in enumerate(categories)}
    found: dict[int, list[tuple[Any, ...]]] = {}
    seen: set[int] = set()
    for item in tables["annotations"]:
        if (read := _box(item, images, known, places, seen, faults)) is not None:
            found.setdefault(read[0], []).append(read[1:])
    refuse_shares([row[1] for rows in found.values() for row in rows], str(faults.file))
    faults.look_for_corners(len(tables["annotations"]))
    pictures = {}
    for image_id, (path, width, height) in images.items():
        rows = found.get(image_id, [])
        pictures[image_id] = Picture(
            image_id,
            path,
            width,
            height,
            np.array([row[0] for row in rows], dtype=np.int64),
            np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4),
            np.array([row[2] for row in rows], dtype=bool),
            np.array([row[3] for row in rows], dtype=np.float64),
        )
    return pictures


def _tables(file: Path) -> dict[str, list[Any]]:
    """The three lists of an annotation file, its entries not yet looked at."""
    content = read_json(file, REMEDY, without=UNUSED)
    if isinstance(content, list):
        raise ValueError(f"{file}: is a list, as files of detections are, not annotations; {FORM}")
    if not isinstance(content, dict):
        raise ValueError(f"{file}: is {str(content)[:40]!r}, not annotations; {FORM}")
    tables = {name: content.get(name) for name in ("images", "annotations", "categories")}
    first = tables["annotations"][0] if isinstance(tables["annotations"], list) and tables["annotations"] else None
    for key, what in OTHERS.items():
        if isinstance(first, dict) and key in first:
            raise ValueError(f"{file}: holds {what}, not boxes; {FORM}")
    if lacking := [name for name, table in tables.items() if not isinstance(table, list)]:
        have = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise ValueError(f"{file}: has no list {' and no list '.join(lacking)} (it has {have[:120]}); {FORM}")
    if empty := [name for name in ("images", "categories") if not tables[name]]:
        raise ValueError(f"{file}: its list {' and its list '.join(empty)} is empty; {FORM}")
    return tables  # type: ignore[return-value]  # just looked at


def _categories(file: Path, tables: dict[str, list[Any]]) -> tuple[Category, ...]:
    found: dict[int, Category] = {}
    for entry in tables["categories"]:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{file}: the category {str(entry)[:60]} lacks a whole number `id` or a `name`; {FORM}")
        if entry["id"] in found:
            names = f"{found[entry['id']].name!r} and {entry['name']!r}"
            raise ValueError(f"{file}: the categories {names} both have the id {entry['id']}; give each its own")
        found[entry["id"]] = Category(entry["id"], entry["name"])
    return tuple(found[key] for key in sorted(found))


def _images(
    data: Data, split: Literal["train", "test"], entries: list[Any], faults: Faults
) -> tuple[dict[int, tuple[Path, int, int]], set[int]]:
    """Path, width and height of the pictures that are used, by id, and all ids that the file has."""
    folder = Path(data.root) / _name(data, split)
    images: dict[int, tuple[Path, int, int]] = {}
    known: set[int] = set()
    by_name: dict[Path, int] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            faults.leave_out(f"the image {str(entry)[:60]} has no whole number `id`")
            continue
        image_id, name = entry["id"], entry.get("file_name")
        if image_id in known:
            faults.leave_out(f"the image id {image_id} is listed twice, the second time with {str(name)[:60]!r}")
            continue
        known.add(image_id)
        sides: list[Any] = [entry.get(key) for key in ("width", "height")]
        if not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides) or sides[0] * sides[1] > MAX_PIXELS:
            want = f"want whole numbers above 0, at most {MAX_PIXELS} pixels"
            faults.leave_out(f"image {image_id} has the width and height {str(sides)[:60]}, {want}")
        elif not isinstance(name, str) or not Path(name).name.strip() or "\0" in name:
            faults.leave_out(f"image {image_id} has the file_name {str(name)[:60]!r}")
        elif Path(name).is_absolute() or ".." in Path(name).parts:
            faults.leave_out(f"image {image_id} has the file_name {name[:60]!r}, which leaves the folder {folder}")
        elif (other := by_name.setdefault(Path(name), image_id)) != image_id:
            # what is labeled in the one would be taught to be nothing in the other
            faults.leave_out(f"the images {other} and {image_id} are both of the file {name[:60]!r}")
        elif data.num_images is None or len(images) < data.num_images:
            images[image_id] = (folder / name, sides[0], sides[1])
    return images, known


def _box(
    item: Any,
    images: dict[int, tuple[Path, int, int]],
    known: set[int],
    places: dict[int, int],
    seen: set[int],
    faults: Faults,
) -> tuple[int, int, tuple[float, ...], bool, float] | None:
    """Image id, label, box, crowd, area of an annotation; None if it is dropped, left out, or of a picture not used."""
    if not isinstance(item, dict) or not _is_id(item.get("id")) or item["id"] < 1:
        number_one = "the metric could never match it; count from 1"
        faults.leave_out(f"the annotation {str(item)[:80]} has no whole number `id` of at least 1 ({number_one})")
        return None
    name, image_id, category_id = f"annotation {item['id']}", item.get("image_id"), item.get("category_id")
    if item["id"] in seen:
        faults.leave_out(f"the annotation id {item['id']} is listed twice")
        return None
    seen.add(item["id"])
    if not _is_id(image_id) or image_id not in known:
        faults.leave_out(f"{name} is of the image {image_id!r:.40}, which is not in the file")
        return None
    if image_id not in images:
        return None
    if not _is_id(category_id) or category_id not in places:
        faults.leave_out(f"{name} has the category {category_id!r:.40}, which is not in the file")
        return None
    box, area, crowd = item.get("bbox"), item.get("area"), item.get("iscrowd")
    crowd = 0 if crowd is None else crowd
    values = [number(value) for value in box] if isinstance(box, list) and len(box) == 4 else []
    x, y, w, h = (math.nan if value is None else value for value in values or [None] * 4)
    if not (math.isfinite(x + y) and w >= 0 and h >= 0):
        faults.leave_out(f"{name} has the box {str(box)[:80]}, not x, y, width, height in pixels")
        return None
    if crowd not in (0, 1):
        faults.leave_out(f"{name} has the iscrowd {crowd!r:.40}, neither 0 nor 1")
        return None
    _, width, height = images[image_id]
    clipped = inside((x, y, w, h), width, height)
    if clipped is None:
        faults.changed.append(f"{name} of image {image_id}: nothing of {box} is inside {width} x {height}")
        return None
    if is_clipped((x, y, w, h), clipped):
        faults.changed.append(f"{name} of image {image_id}: {box} reaches past {width} x {height}, clipped")
    size = clipped[2] * clipped[3] if area is None else area
    if type(size) not in (int, float) or not 0 <= size <= MAX_SIDE**2:
        faults.leave_out(f"{name} has the area {area!r:.40}, not square pixels")
        return None
    return image_id, places[category_id], clipped, bool(crowd), float(size)


def _is_id(value: Any) -> bool:
    """Whether it is a whole number that fits in 64 bits; True is none."""
    return type(value) is int and abs(value) < 1 << 63
