"""One's own data in YOLO's form: a list of classes, pictures, and a text file of boxes beside each.

    <root>/data.yaml                         names: [cat, dog], or a table {0: cat, 1: dog}
    <root>/images/<split>/a.jpg              of any format that images.py reads; also <root>/<split>/images/a.jpg
    <root>/labels/<split>/a.txt              lines `class x y width height`: center and size as shares of the picture

A picture without a text file has no boxes. A line with more numbers is a polygon, of which the box is taken. Boxes are
those of the picture as a viewer shows it, turned as EXIF says. Image ids are counted from 1 in the order of the names.
Where the folder of a split is not there, the one that data.yaml names for it (train, val) is taken.
"""

import math
import os
import reprlib
from collections import Counter
from pathlib import Path

import numpy as np
import yaml

from detection.configs import Data
from detection.images import SUFFIXES, shown_size
from detection.pictures import Category, Faults, Picture, inside, is_clipped
from engine.files import read_text

CLASSES = "data.yaml"
REMEDY = "want `names:`, a list of class names or a table from 0, 1, 2, ... to them"
# Pictures that cannot be read, and whose labels would be told to have none.
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".npy")
SLACK = 0.05  # share of the picture by which a box may reach past it; more is another unit


def read_classes(file: Path) -> tuple[Category, ...]:
    """The classes of data.yaml, ids from 0. FileNotFoundError, or ValueError naming the file for another form."""
    table = _read_table(file)
    names = table.get("names")
    if isinstance(names, dict):
        keys = sorted(key for key in names if type(key) is int)
        if keys != list(range(len(names))):
            raise ValueError(f"{file}: the classes have the numbers {reprlib.repr(list(names))[:80]}; {REMEDY}")
        names = [names[key] for key in keys]
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int | float) for name in names):
        raise ValueError(f"{file}: has no list of classes ({reprlib.repr(names)[:60]}); {REMEDY}")
    if any(isinstance(name, bool) for name in names):
        raise ValueError(f"{file}: a class is yes, no, on, off, true or false, truth values in YAML: put it in quotes")
    said = table.get("nc", len(names))
    if said != len(names):
        raise ValueError(f"{file}: has {len(names)} names, but says nc: {reprlib.repr(said)[:40]}; make them agree")
    return tuple(Category(number, str(name)) for number, name in enumerate(names))


def read_pictures(data: Data, split: str, num_classes: int, faults: Faults) -> dict[int, Picture]:
    """The pictures of a split, at most `num_images`, by their new ids; the header of each file is read for its size.

    Raises FileNotFoundError for missing folders; and, or with on_broken="skip" leaves out: a picture that cannot be
    opened or whose label file cannot, two pictures of one name, a folder of pictures among them, a label file without a
    picture, a line that is no box.
    Hidden files, as ._a.jpg of macOS, are not looked at.
    """
    folder, labels = _folders(data, split)
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    files = [name for name in names if name.lower().endswith(SUFFIXES)]
    for name in sorted(set(names) - set(files)):
        if name.lower().endswith(UNREAD):
            faults.leave_out(f"{folder / name} is in a format that is not read: convert it to JPEG or PNG")
        elif any(inner.suffix.lower() in SUFFIXES for inner in _inside(folder / name)):
            faults.leave_out(f"the pictures in {folder / name} are in a folder below the split's: move them up")
    stems: dict[str, str] = {}
    for name in files:
        stem = Path(name).stem
        if stem in stems:
            faults.leave_out(f"the pictures {stems[stem]} and {name} in {folder} share the labels {stem}.txt")
        else:
            stems[stem] = name
    texts = {entry.stem: entry for entry in _texts(labels)}
    for stem in sorted(texts.keys() - stems.keys() - {"classes"}):  # labelling tools leave a classes.txt
        faults.leave_out(f"the labels {texts[stem]} have no picture in {folder}")
    num_boxes = 0
    pictures: dict[int, Picture] = {}
    for number, (stem, name) in enumerate(list(stems.items())[: data.num_images], start=1):
        try:
            height, width = shown_size(folder / name)
            lines = read_text(texts[stem], "mend it").splitlines() if stem in texts else []
        except (OSError, ValueError) as error:
            if data.on_broken == "raise":
                raise
            faults.leave_out(str(error))
            continue
        rows = _boxes(texts.get(stem, labels), lines, width, height, num_classes, faults)
        boxes = np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4)
        num_boxes += len(boxes)
        pictures[number] = Picture(
            number,
            folder / name,
            width,
            height,
            np.array([row[0] for row in rows], dtype=np.int64),
            boxes,
            np.zeros(len(rows), dtype=bool),
            boxes[:, 2] * boxes[:, 3],
        )
    faults.look_for_corners(num_boxes)
    return pictures


def label_files(data: Data, split: str) -> list[Path]:
    """The text files of a split, sorted: what its boxes stand in. Raises as `read_pictures`."""
    return _texts(_folders(data, split)[1])


def _inside(folder: Path) -> list[Path]:
    """What a folder holds; nothing where it is none."""
    return list(folder.iterdir()) if folder.is_dir() else []


def _texts(folder: Path) -> list[Path]:
    """What is visible in it and ends in .txt or .TXT, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".txt" and path.name[0] != ".")


class _Loader(yaml.SafeLoader):
    """Also refuses a key that is listed twice, of which YAML's own would lose the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        counts = Counter(str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1:
                raise ValueError(f"{key[:40]!r} is listed twice")
        return super().construct_mapping(node, deep)


def _read_table(file: Path) -> dict:
    text = read_text(file, "put a data.yaml there, or set --data.root")
    try:
        table = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:  # !!int ""
        problem = " ".join(str(error).split())[:120]
        raise ValueError(f"{file}: cannot be read as YAML ({problem}); {REMEDY}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{file}: is no table; {REMEDY}")
    return table


def _folders(data: Data, split: str) -> tuple[Path, Path]:
    """The folders of the pictures and of the labels of a split."""
    root = Path(data.root)
    tried = [(root / "images" / split, root / "labels" / split), (root / split / "images", root / split / "labels")]
    named = _read_table(root / CLASSES).get("train" if split == data.train_split else "val")
    if isinstance(named, str) and named:
        # Exporters write ../train/images, which is meant from a folder beside data.yaml.
        parts = [part for part in Path(named).parts if part not in ("..", ".")]
        if Path(named).is_absolute() or "images" not in parts:
            parts = []
        own = ["labels" if part == "images" else part for part in parts]
        tried += [(root.joinpath(*parts), root.joinpath(*own))] if parts else []
    for images, labels in tried:
        if images.is_dir():
            if not labels.is_dir():
                raise FileNotFoundError(f"{images}: its labels are missing, there is no folder {labels}")
            return images, labels
    places = ", ".join(str(images) for images, _ in tried)
    raise FileNotFoundError(
        f"{root}: no pictures of the split {split!r}, looked in {places}; name the folders that are there with "
        "--data.train-split and --data.test-split (of prepare: --train-split, --test-split), such as train and val"
    )


def _boxes(
    file: Path, lines: list[str], width: int, height: int, num_classes: int, faults: Faults
) -> list[tuple[int, tuple[float, ...]]]:
    """Label and box x, y, width, height in pixels of each usable line."""
    rows: list[tuple[int, tuple[float, ...]]] = []
    for count, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        where = f"{file}: line {count}"
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = [math.nan]
        if not all(math.isfinite(value) for value in values) or not (
            len(values) == 5 or (len(values) > 6 and len(values) % 2)
        ):
            faults.leave_out(f"{where} is not `class x y width height`: {line.strip()[:60]!r}")
            continue
        label = values[0]
        if label != int(label) or not 0 <= label < num_classes:
            faults.leave_out(f"{where} has the class {words[0][:20]}, not one of 0 to {num_classes - 1}")
            continue
        if len(values) > 5:
            xs, ys = values[1::2], values[2::2]
            left, top, w, h = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
        else:
            w, h = values[3:]
            left, top = values[1] - w / 2, values[2] - h / 2
        if w < 0 or h < 0 or min(left, top) < -SLACK or max(left + w, top + h) > 1 + SLACK:
            what = "not shares of the picture (are they pixels?)"
            if max(values[1:]) <= 1 and min(values[1:]) >= 0:
                what = "which reaches far past the picture (are they corners, not center and size?)"
            faults.leave_out(f"{where} has {' '.join(words[1:5])[:60]}, {what}")
            continue
        given = (left * width, top * height, w * width, h * height)
        box = inside(given, width, height)
        if box is None:
            faults.changed.append(f"{where}: the box has no width or height inside the picture")
            continue
        if is_clipped(given, box):
            faults.changed.append(f"{where}: the box reaches past the picture, clipped")
        rows.append((int(label), box))
    return rows
