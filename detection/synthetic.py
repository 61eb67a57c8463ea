"""Write a small data set of composed scenes in COCO's real form, with what makes real files difficult.

    write_dataset(Path("data/shapes"), Synthetic())
    # data/shapes/{train2017,val2017}/000000000139.jpg ..., data/shapes/annotations/instances_{train2017,val2017}.json

Five classes with COCO's kind of ids, of which most are missing. The first pictures of each split are odd on purpose
(`ODDITIES`): gray, CMYK, turned by EXIF, a PNG of 16 bits, without annotations, with a crowd; in training also a box
without height and one that reaches past the border. Areas are those of the masks. Training and validation share no
example of a thing. Deterministic in the seed. Not COCO: it only borrows the form, so that the same reader, recipe and
metric run on it. The scenes themselves: `scenes.py`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from detection.drawing import Box, draw_boxes
from detection.objects import CLASSES
from detection.scenes import Scene, compose
from engine.data.workers import write_json
from engine.files import publish
from engine.synthetic.sprites import Group
from engine.synthetic.write import write_files
from engine.visual import save_stack

VERSION = 1  # raise it when a change of the scenes changes the files
SPLITS: dict[str, Group] = {"train2017": "train", "val2017": "validation"}
CATEGORIES = {1: "disc", 3: "star", 18: "cross", 44: "heart", 90: "crown"}  # names in CLASSES
EXTENT, COUNT = (8.0, 64.0), (2, 6)  # pixels, things
ODDITIES = {
    "train2017": ("gray", "turned", "empty", "crowd", "flat", "deep", "beyond", "cmyk"),
    "val2017": ("gray", "turned", "empty", "crowd", "deep", "cmyk"),
}
ORIENTATION, QUARTER = 0x0112, 6  # EXIF: to be shown, turn the stored picture by a quarter, clockwise
QUALITY = 92  # of the JPEG files
SHEET_ZOOM, SHEET_TITLE, SHEET_GAP = 2, 14, 8  # of the contact sheet: times the pictures' size, and pixels
PAST = 7.0  # pixels beyond the border


@dataclass(frozen=True)
class Synthetic:
    """What determines the files. The first pictures of a split are odd, so each has at least 8."""

    num_train: int = 64
    num_validation: int = 24
    height: int = 128  # pixels, on average: sizes vary by a fifth
    width: int = 160
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_train", 8), ("num_validation", 8), ("height", 80), ("width", 80)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def pictures(self) -> list[tuple[str, int]]:
        """(split, number) of every picture, numbers from 0 in each split."""
        counts = dict(zip(SPLITS, (self.num_train, self.num_validation), strict=True))
        return [(split, number) for split, count in counts.items() for number in range(count)]


class Drawn(NamedTuple):
    """A picture before it becomes a file."""

    scene: Scene
    oddity: str  # "" for an ordinary one
    image_id: int

    @property
    def file_name(self) -> str:
        """As COCO numbers its files."""
        return f"{self.image_id:012d}.{'png' if self.oddity == 'deep' else 'jpg'}"


def write_dataset(
    root: Path, synthetic: Synthetic, *, workers: int = 2, on_done: Callable[[], None] | None = None
) -> bool:
    """Write pictures and annotations below `root`. False if they are there already, of the same parameters.

    Pictures that an interrupted call left are kept. on_done: called after each one, for a progress bar. Files of other
    settings are an error, never overwritten.
    """
    pictures = synthetic.pictures()
    paths = [root / split / _file_name(split, number) for split, number in pictures]
    jobs = [(synthetic, split, number, path) for (split, number), path in zip(pictures, paths, strict=True)]
    targets = [annotation_file(root, split) for split in SPLITS]

    def finish(entries: list[dict[str, Any]]) -> None:
        for split, target in zip(SPLITS, targets, strict=True):
            own = [entry for job, entry in zip(jobs, entries, strict=True) if job[1] == split]
            write_json(target, _instances(own))

    stamp = {"version": VERSION, **asdict(synthetic)}
    return write_files(root, stamp, [*paths, *targets], _write_one, jobs, finish, workers=workers, on_done=on_done)


def annotation_file(root: Path, split: str) -> Path:
    """Where COCO has the boxes of a split."""
    return root / "annotations" / f"instances_{split}.json"


def draw(synthetic: Synthetic, split: str, number: int) -> Drawn:
    """One picture of the data set, as a function of its key."""
    key = [synthetic.seed, 100 + list(SPLITS).index(split), number]
    rng = np.random.default_rng([*key, 1])
    height, width = (int(side * rng.uniform(0.8, 1.2)) for side in (synthetic.height, synthetic.width))
    oddity = dict(enumerate(ODDITIES[split])).get(number, "")
    labels = [CLASSES.index(name) for name in CATEGORIES.values()]
    count = COUNT
    if oddity == "empty":
        count = (0, 0)
    if oddity == "crowd":
        labels, count = [CLASSES.index("disc"), CLASSES.index("crown")], (9, 12)
    for attempt in range(100):  # whatever is odd about it, it is about things that are there
        scene = compose(
            [*key, 2, attempt], (height, width), group=SPLITS[split], labels=labels, count=count, extent=EXTENT
        )
        if len(scene.labels) >= count[0] and (oddity != "beyond" or _touches_border(scene) is not None):
            return Drawn(scene, oddity, _image_id(split, number))
    raise AssertionError(f"no scene for {split} {number}")


def write_contact_sheet(path: Path, synthetic: Synthetic, *, rows: int = 6, columns: int = 6) -> None:
    """A PNG with the first pictures of validation, their boxes and the names of the classes, above what is odd."""
    labels, names = [CLASSES.index(name) for name in CATEGORIES.values()], list(CATEGORIES.values())
    width, height = (round(1.2 * SHEET_ZOOM * side) + SHEET_GAP for side in (synthetic.width, synthetic.height))
    tiles = []
    for number in range(min(rows * columns, synthetic.num_validation)):
        drawn = draw(synthetic, "val2017", number)
        things = zip(drawn.scene.boxes.tolist(), drawn.scene.labels.tolist(), strict=True)
        boxes = [Box(labels.index(label), None, x0, y0, x1 - x0, y1 - y0) for (x0, y0, x1, y1), label in things]
        sides = (SHEET_ZOOM * drawn.scene.image.shape[1], SHEET_ZOOM * drawn.scene.image.shape[0])
        tile = Image.new("RGB", (width, height + SHEET_TITLE), (255, 255, 255))
        ImageDraw.Draw(tile).text((2, 2), drawn.oddity, fill=(20, 20, 20))
        tile.paste(draw_boxes(drawn.scene.image, boxes, names, *sides), (0, SHEET_TITLE))
        tiles.append(np.asarray(tile))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    lines = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    save_stack(path, [Image.fromarray(line) for line in lines])


def _image_id(split: str, number: int) -> int:
    """Ids have gaps, as COCO's; no picture of one split has that of another's."""
    return 139 + 17 * number + (400_000 if split == "val2017" else 0)


def _file_name(split: str, number: int) -> str:
    oddity = dict(enumerate(ODDITIES[split])).get(number, "")
    return f"{_image_id(split, number):012d}.{'png' if oddity == 'deep' else 'jpg'}"


def _touches_border(scene: Scene) -> int | None:
    """The thing whose box ends at the right border, if any."""
    found = np.flatnonzero(scene.boxes[:, 2] >= scene.image.shape[1])
    return int(found[0]) if len(found) else None


def _write_one(job: tuple[Synthetic, str, int, Path]) -> dict[str, Any]:
    """Write one picture if it is not there; returns its entries, without annotation ids."""
    synthetic, split, number, path = job
    drawn = draw(synthetic, split, number)
    if not path.is_file():
        _save(drawn, path)
    height, width = drawn.scene.image.shape[:2]
    image = {
        "license": 1,
        "file_name": drawn.file_name,
        "coco_url": "",
        "height": height,  # as the picture is shown: a reader that ignores EXIF finds the sides exchanged
        "width": width,
        "date_captured": "2020-01-01 00:00:00",
        "flickr_url": "",
        "id": drawn.image_id,
    }
    return {"image": image, "annotations": _annotations(drawn)}


def _save(drawn: Drawn, path: Path) -> None:
    picture, oddity = Image.fromarray(drawn.scene.image), drawn.oddity
    temporary = path.with_name(f".{path.name}.tmp")
    if oddity == "deep":
        levels = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        Image.fromarray(levels).save(temporary, "PNG")
    elif oddity == "turned":
        exif = Image.Exif()
        exif[ORIENTATION] = QUARTER
        picture.transpose(Image.Transpose.ROTATE_90).save(temporary, "JPEG", quality=QUALITY, exif=exif)
    else:
        mode = {"gray": "L", "cmyk": "CMYK"}.get(oddity, "RGB")
        picture.convert(mode).save(temporary, "JPEG", quality=QUALITY)
    publish(temporary, path)


def _annotations(drawn: Drawn) -> list[dict[str, Any]]:
    """In COCO's form; ids are given when all are together."""
    scene = drawn.scene
    category_ids = {CLASSES.index(name): category for category, name in CATEGORIES.items()}
    found: list[dict[str, Any]] = []
    for index, (box, label) in enumerate(zip(scene.boxes, scene.labels.tolist(), strict=True)):
        mask = scene.owner == index
        found.append(
            {
                "segmentation": [outline(mask)],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "image_id": drawn.image_id,
                "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
                "category_id": category_ids[label],
            }
        )
    if drawn.oddity == "crowd":  # all things of the class of the first but itself are one crowd
        label = scene.labels[0]
        members = [index for index in range(1, len(found)) if scene.labels[index] == label]
        mask = np.isin(scene.owner, members)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
        crowd = {**found[0], "segmentation": run_lengths(mask), "area": int(mask.sum()), "iscrowd": 1, "bbox": box}
        found = [entry for index, entry in enumerate(found) if index not in members] + [crowd]
    if drawn.oddity == "flat":
        x, y, w, _ = found[0]["bbox"]
        flat = {"segmentation": [[x, y, x + w, y, x + w, y]], "area": 0, "bbox": [x, y, w, 0.0]}
        found.append({**found[0], **flat})
    if drawn.oddity == "beyond":
        entry = found[_touches_border(scene) or 0]
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x, y, w + PAST, h]
    return found


def outline(mask: np.ndarray) -> list[float]:
    """A polygon x, y, x, y, ... around a mask (H, W): down its left ends, up its right ones. Holes, and gaps within a
    row, are inside it; rows without a pixel take the ends of the row above.
    """
    rows = np.flatnonzero(mask.any(1))
    left: list[tuple[float, float]] = []
    right: list[tuple[float, float]] = []
    for row in range(int(rows[0]), int(rows[-1]) + 1):
        columns = np.flatnonzero(mask[row])
        ends = (float(columns[0]), float(columns[-1] + 1)) if len(columns) else (left[-1][0], right[-1][0])
        left += [(ends[0], float(row)), (ends[0], row + 1.0)]
        right += [(ends[1], float(row)), (ends[1], row + 1.0)]
    return [value for point in (*left, *right[::-1]) for value in point]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: down the columns, of zeros first."""
    flat = mask.T.ravel().astype(np.int8)
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, len(flat)])
    return {"counts": [0] * int(flat[0]) + counts.tolist(), "size": list(mask.shape)}


def _instances(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of an annotation file; annotation ids are counted from 1, since 0 can never be matched."""
    annotations = [annotation for entry in entries for annotation in entry["annotations"]]
    return {
        "info": {
            "description": f"composed scenes, version {VERSION}",
            "url": "",
            "version": str(VERSION),
            "year": 2020,
            "contributor": "dr2net",
            "date_created": "2020/01/01",
        },
        "licenses": [{"url": "", "id": 1, "name": "MIT"}],
        "images": [entry["image"] for entry in entries],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)],
        "categories": [
            {"supercategory": "thing", "id": category, "name": name} for category, name in CATEGORIES.items()
        ],
    }
