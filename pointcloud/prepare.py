"""Check S3DIS or rooms of your own, write the composed rooms, or say how S3DIS is got.

    python -m pointcloud.prepare --preset tiny                         # rooms of boxes, 30 MB, in data/rooms_tiny
    python -m pointcloud.prepare --kind s3dis --root data/s3dis --probe    # counts, and reads every room
    python -m pointcloud.prepare --kind s3dis --download               # what to agree to, and where

--probe reads each room into the cache that training uses, and names what was repaired, left out or cannot be read;
without it only names are looked at. Rooms of your own: --rooms any. The exit status is 0 only if everything is there.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from engine import commands
from engine.data.check import Check
from engine.data.workers import name_some, progress_bar
from engine.synthetic.write import STAMP, prepare_files
from pointcloud.configs import ROOMS, ROOMS_TINY, ROWS, Data
from pointcloud.s3dis import (
    CLASSES,
    Room,
    class_of,
    is_aligned,
    load_room,
    rooms_of_area,
    wrong_rooms,
)
from pointcloud.synthetic import AREAS, Synthetic, write_dataset

FORM = "https://docs.google.com/forms/d/e/1FAIpQLScDimvNMCGhy_rmBA2gHfDu3naktRm6A8BPwAWWDv-Uhm6Shw/viewform"
LICENSE = """\
S3DIS (Stanford 3D Indoor Spaces, version 1.2, 5.1 GB) is given out for research, not to be passed on. To get it:
  1. Read and agree to the terms in the form: {form}
  2. Run: bash scripts/download_s3dis.sh {root} --accept-license
     It fetches Stanford3dDataset_v1.2.zip (not the aligned version), goes on where it stopped, compares the size,
     unpacks it and checks the rooms."""


@dataclass(frozen=True)
class Arguments(commands.Preparation):
    """See the module's docstring."""

    kind: Literal["s3dis", "npy", "pointcept"] | None = None  # the layout to check
    rooms: Literal["official", "any"] = "official"  # those that S3DIS has, or whatever is found
    synthetic: Synthetic = field(default_factory=Synthetic)  # with a preset: what to write


def check(arguments: Arguments) -> Check:
    """Count rooms, points and classes; compare with S3DIS unless the rooms were composed here."""
    assert arguments.kind is not None, "preparation checks a layout that was named"
    root = arguments.root or Data().root
    composed = (root / STAMP).is_file()
    data = Data(kind=arguments.kind, root=root, rooms="composed" if composed else arguments.rooms, unit="room")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder. Get it with: bash scripts/download_s3dis.sh {root}")
    counts, problems, empty = {}, [], []
    every: list[Room] = []
    for area in AREAS:
        rooms = rooms_of_area(data, area)
        counts[f"rooms of Area_{area}"] = len(rooms)
        if problem := wrong_rooms(data, area, rooms):
            problems.append(problem)
        if not rooms:
            empty.append(f"Area_{area}")
        every += rooms
    if arguments.kind == "s3dis" and every and is_aligned(root):
        problems.append("no Area_<k>_alignmentAngle.txt: this is the aligned version; only --data.unit room can use it")
    if arguments.probe:
        points, repaired, broken = probe(every)
        counts |= {"points": int(points.sum())} | {
            f"of {name}": int(n) for name, n in zip(CLASSES, points, strict=True)
        }
        for note in repaired:
            print(f"  {note}")
        lists = arguments.lists
        name_some(problems, broken, None if lists is None else lists / "broken_rooms.txt", "rooms cannot be read")
    else:
        strays, unusable = look(every)
        name_some(problems, strays, None, "files are not named <class>_<number>.txt and are left out")
        name_some(problems, unusable, None, "rooms cannot be read")
    return Check(str(root), counts, problems, empty)


def look(rooms: list[Room]) -> tuple[list[str], list[str]]:
    """By their names alone: files that are no annotations, and what is wrong with rooms that cannot be read."""
    strays, unusable = [], []
    for room in rooms:
        visible = [path for path in room.files if not path.name.startswith(".")]
        if room.kind != "s3dis":
            unusable += [f"{path}: no such file" for path in visible if not path.is_file()]
            continue
        classes: dict[Path, int | None] = {}
        for path in visible:
            try:
                classes[path] = class_of(path)
            except ValueError as error:
                unusable.append(str(error))
        own = [str(path.relative_to(room.root)) for path, label in classes.items() if label is None]
        strays += own
        if len(own) == len(visible):
            unusable.append(f"{room.root / room.title}: has no Annotations/<class>_<number>.txt")
    return strays, unusable


def probe(rooms: list[Room]) -> tuple[np.ndarray, list[str], list[str]]:
    """Points per class, what was repaired or left out, and what is wrong with rooms that cannot be read."""
    points, notes, broken = np.zeros(len(CLASSES), np.int64), [], []
    with progress_bar("reading rooms", len(rooms)) as advance:
        for room in rooms:
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    points += np.bincount(load_room(room)["label"], minlength=len(CLASSES))
                notes += [str(warning.message) for warning in caught]
            except (ValueError, OSError) as error:
                broken.append(str(error))
            advance()
    return points, notes, broken


def fetch(arguments: Arguments) -> None:
    """Say what to agree to. ValueError for other layouts."""
    if arguments.kind != "s3dis":
        raise ValueError(f"--download: there is nothing to download for --kind {arguments.kind}")
    print(LICENSE.format(form=FORM, root=arguments.root or Data().root))


def write_synthetic(arguments: Arguments) -> None:
    """Write the rooms of a preset with a progress bar; says so and returns at once if they are there already."""
    if arguments.preset == "laptop":
        from pointcloud.furniture import write_furnished

        root = arguments.root or ROOMS.root
        write_furnished(root, workers=arguments.workers)
    else:
        root, synthetic = arguments.root or ROOMS_TINY.root, arguments.synthetic
        total = sum(map(len, synthetic.rooms().values()))
        prepare_files(root, total, "rooms", lambda done: write_dataset(root, synthetic, on_done=done))
    if arguments.sheet is not None:
        write_sheet(arguments.sheet, root)


def write_sheet(path: Path, root: Path) -> None:
    """A PNG with the first composed room of the test area at `root`: its colors, and its classes."""
    from pointcloud.predict import draw

    data = Data(kind="s3dis", root=root, rooms="composed", unit="room")
    room = rooms_of_area(data, data.test_area)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what was planted in the files
        cloud = load_room(room)
    labels, names = cloud["label"].astype(np.int64), ("colors", "classes")
    draw(path, cloud["xyz"], cloud["rgb"], labels, list(CLASSES), title=room.name, columns=names)


if __name__ == "__main__":
    commands.prepare(Arguments, ROWS, synthetic=write_synthetic, check=check, download=fetch)
