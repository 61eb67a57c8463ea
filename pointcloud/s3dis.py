"""S3DIS on disk: rooms, classes in one order, the faults of the official files, and a cache of what was read.

    rooms = find_rooms(data, [5])                 # Room(area 5, "hallway_6", ...), in order of their names
    points = load_room(rooms[0])                  # POINT records: xyz float32, rgb uint8, label uint8
    voxels = load_voxels(rooms[0], 0.04)          # one of the points of each cube

Only `Annotations/<class>_<number>.txt` is read: the room files have most of the faults and no labels. The six known
damaged lines are one cleared bit each (0x20), which is put back in memory and told by file and line; the user's files
are never changed. Two orders of classes are in use; ours is KPConv's, in which Pix4Point's checkpoints are, and files
in PointNet's order (its npy, Pointcept's) are permuted by name. Reading 1.4 million lines takes a second and a half, so
each room is kept below `<root>/.dr2net` under the names, sizes and times of its files. Not here: crops (`data.py`).
"""

import codecs
import hashlib
import io
import json
import os
import re
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.data import busy
from engine.files import make_folder, publish, read_json, require_file, write_text
from engine.synthetic.write import STAMP
from pointcloud.configs import Data

# KPConv's order
CLASSES = (
    *("ceiling", "floor", "wall", "beam", "column", "window", "door"),
    *("chair", "table", "bookcase", "sofa", "board", "clutter"),
)
POINTNET_CLASSES = (*CLASSES[:7], "table", "chair", "sofa", "bookcase", *CLASSES[11:])  # PointNet's, Pointcept's
FROM_POINTNET = np.array([CLASSES.index(name) for name in POINTNET_CLASSES])  # ours = FROM_POINTNET[theirs]
ALSO = {"stairs": "clutter"}  # the one other name in the official files
ROOMS_PER_AREA = {1: 44, 2: 40, 3: 23, 4: 49, 5: 68, 6: 48}
AREA_5 = {"WC": 2, "conferenceRoom": 3, "hallway": 15, "lobby": 1, "office": 42, "pantry": 1, "storage": 4}
POINT = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3), ("label", "u1")])  # 16 bytes
VERSION = 2  # of what is kept; another one is read anew
FARTHEST = 8192.0  # meters from the origin: beyond, float32 numbers are a millimeter apart
WIDEST = 200.0  # meters that a room hardly has
MAX_REPAIRS = 8  # cleared bits in a file; one with more is no text
CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
REMEDY = "unpack it again from the official zip"
AGAIN = "prepare the room again"
COMPOSE = "write the rooms: python -m pointcloud.prepare --preset tiny (or laptop)"
GET = {
    "official": "get it with bash scripts/download_s3dis.sh {root}, or say where it is: --data.root FOLDER",
    "composed": COMPOSE,
    "any": "pointcloud/README.md, Data, shows the layouts",
}


@dataclass(frozen=True)
class Room:
    """One room: where it is, and the files that it is read from."""

    root: Path
    kind: str
    area: int
    name: str
    files: tuple[Path, ...]

    @property
    def title(self) -> str:
        return f"Area_{self.area}/{self.name}"


def find_rooms(data: Data, areas: Iterable[int]) -> list[Room]:
    """The rooms of these areas in the layout of `data.kind`, by area and name.

    FileNotFoundError for an area without any; ValueError if they are not the rooms that `data.rooms` asks for.
    """
    found = []
    for area in areas:
        rooms = rooms_of_area(data, area)
        if not rooms:
            raise FileNotFoundError(
                f"{data.root}: no rooms of Area_{area} in the layout {data.kind!r}; "
                + GET[data.rooms].format(root=data.root)
            )
        if problem := wrong_rooms(data, area, rooms):
            raise ValueError(
                f"{data.root}: {problem}. Numbers of other rooms are not those of the area: complete it, move away "
                "what does not belong there, or give --data.rooms any"
            )
        found += rooms
    return found


def wrong_rooms(data: Data, area: int, rooms: Sequence[Room]) -> str:
    """What is wrong with the rooms that an area has, by their names or their number; nothing if they are right."""
    expected, names = expected_rooms(data, area), {room.name for room in rooms}
    for what, some in (("lacks", expected - names), ("has, beside its own,", names - expected if expected else ())):
        if some:
            listed = sorted(some)
            return f"Area_{area} {what} {len(listed)} rooms: {', '.join(listed[:20])}"
    official = ROOMS_PER_AREA.get(area, 0)
    if data.rooms == "official" and len(rooms) != official:
        return f"Area_{area} has {len(rooms)} rooms instead of the official {official}"
    return ""


def expected_rooms(data: Data, area: int) -> set[str]:
    """The names of the rooms that there must be: of S3DIS' area 5, of composed rooms, else none is known."""
    if data.rooms == "official":
        return {f"{kind}_{k}" for kind, count in AREA_5.items() for k in range(1, count + 1)} if area == 5 else set()
    if data.rooms == "composed":
        stamp = read_json(data.root / STAMP, COMPOSE)
        return set(stamp["rooms"].get(f"Area_{area}", []))
    return set()


def rooms_of_area(data: Data, area: int) -> list[Room]:
    """What is there of an area in the layout of `data.kind`, by name; empty if nothing is."""
    folder, root = data.root / f"Area_{area}", data.root
    if data.kind == "npy":
        paths = sorted(root.glob(f"Area_{area}_*.npy"))
        return [Room(root, data.kind, area, path.stem.split("_", 2)[2], (path,)) for path in paths]
    rooms = []
    for place in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not place.is_dir() or place.name.startswith("."):
            continue
        if data.kind == "pointcept":
            files = tuple(place / f"{name}.npy" for name in ("coord", "color", "segment"))
        else:
            files = tuple(sorted((place / "Annotations").glob("*.txt")))
        rooms.append(Room(root, data.kind, area, place.name, files))
    return rooms


def is_aligned(root: Path) -> bool:
    """Whether this is the aligned version, whose rooms cannot be put together to an area: the angles are missing. A
    folder without areas is no version at all.
    """
    return any(Path(root).glob("Area_*")) and not any(Path(root).glob("Area_*/Area_*_alignmentAngle.txt"))


def read_points(path: Path, columns: int | None = 6, remedy: str = REMEDY) -> tuple[np.ndarray, list[str]]:
    """(N, columns) float64 of a text file of numbers, None: any number; and one sentence per repaired byte.

    ValueError naming file and line for anything else: empty, another number of columns, not numbers, not finite.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FileNotFoundError(f"{path}: no such file; {remedy}") from None
    busy.alive(path)
    notes = []
    damaged = [match.start() for match in CONTROL.finditer(content)] if CONTROL.search(content) else []
    if len(damaged) > MAX_REPAIRS:
        raise ValueError(f"{path}: is not text, it has {len(damaged)} control bytes; {remedy}")
    if damaged:
        fixed = bytearray(content)
        for place in damaged:
            line = content.count(b"\n", 0, place) + 1
            fixed[place] |= 0x20  # the bit that is cleared in each of the known faults
            start, stop = content.rfind(b"\n", 0, place) + 1, content.find(b"\n", place)
            was, now = content[start : stop if stop >= 0 else None], bytes(fixed[start : stop if stop >= 0 else None])
            notes.append(f"{path}: line {line}: {was.decode('latin1')!r} was read as {now.decode('latin1')!r}")
        content = bytes(fixed)
    if not content.strip():
        raise ValueError(f"{path}: has no points; {remedy}")
    try:
        values = np.loadtxt(io.BytesIO(content), dtype=np.float64, comments=None, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as numbers ({error}); {remedy}") from error
    if columns is not None and values.shape[1] != columns:
        raise ValueError(f"{path}: has {values.shape[1]} columns instead of the {columns} of x y z r g b; {remedy}")
    if columns is not None:
        refuse_non_finite(path, values, remedy)
    return values, notes


def refuse_non_finite(path: Path, values: np.ndarray, remedy: str = REMEDY) -> None:
    """ValueError, naming the first row, if a value of a point is NaN or infinite."""
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if bad.any():
        raise ValueError(f"{path}: point {int(bad.argmax()) + 1} has a value that is not finite; {remedy}")


def colors_of(path: Path, colors: np.ndarray) -> np.ndarray:
    """(N, 3) uint8 of colors in 0 to 255, or in 0 to 1 if none is larger. ValueError for others, naming the file."""
    if len(colors) == 0:
        return np.zeros((0, 3), np.uint8)
    low, high = float(colors.min()), float(colors.max())
    if not 0 <= low <= high <= 255:
        raise ValueError(f"{path}: colors from {low:g} to {high:g}; they must be in 0 to 255, or in 0 to 1")
    scale = 255.0 if high <= 1 and colors.dtype.kind == "f" else 1.0
    return np.rint(np.asarray(colors, np.float64) * scale).astype(np.uint8)


def class_of(path: Path) -> int | None:
    """The class of an annotation by its file name; None for a name that is not <class>_<number>.txt: a stray copy.

    ValueError for an unknown class.
    """
    match = re.fullmatch(r"([A-Za-z]+)_(\d+)\.txt", path.name)
    if match is None:
        return None
    name = ALSO.get(match[1], match[1])
    if name not in CLASSES:
        raise ValueError(f"{path}: {match[1]!r} is not a class; the classes are {', '.join(CLASSES)}")
    return CLASSES.index(name)


def load_room(room: Room) -> np.ndarray:
    """All points of a room, (N,) POINT; from the cache, or read and kept there.

    FileNotFoundError or ValueError, naming the file, for a room that cannot be read. Warns of what was repaired, each
    time.
    """
    points, notes = _kept(room, "rooms", lambda: _read(room))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return points


def load_voxels(room: Room, size: float) -> np.ndarray:
    """One point of each occupied cube of `size` meters, (V,) POINT, the same each time."""

    def make() -> tuple[np.ndarray, list[str]]:
        points = load_room(room)
        rng = np.random.default_rng(zlib.crc32(room.title.encode()))
        try:
            return points[voxelize(points["xyz"], size, rng)], []
        except ValueError as error:
            raise ValueError(f"{room.root / room.title}: {error}") from error

    return _kept(room, f"voxels_{size:g}", make)[0]


def voxelize(xyz: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    """Indices (V,) int64 of one random point of each occupied cube floor(xyz / size), by cube. xyz: (N, 3) meters.

    ValueError where the points reach so far that cubes cannot be numbered: are these meters?
    """
    cells = np.divide(xyz, size, dtype=np.float64)
    np.floor(cells, out=cells)
    low = cells.min(axis=0)
    extent = cells.max(axis=0) - low + 1
    if not (extent < 2**20).all():
        raise ValueError(
            f"points reach over {(extent * size).max():.3g} m, too far for cubes of {size:g} m: coordinates must be in "
            "meters, or --data.voxel larger"
        )
    cells -= low
    key = np.zeros(len(cells), np.int64)  # below 2^60, where floats would no longer tell neighbors apart
    for axis in range(3):
        key = key * int(extent[axis]) + cells[:, axis].astype(np.int64)
    del cells
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    count = np.diff(np.append(first, len(key)))
    return order[first + np.floor(rng.random(len(first)) * count).astype(np.int64)]


def read_array(path: Path, remedy: str) -> np.ndarray:
    """The numbers in a .npy file; nothing in it is run. ValueError, naming the file, for anything else."""
    require_file(path, remedy)
    busy.alive(path)
    try:
        # mapped: a header that promises more than there is allocates nothing
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, OverflowError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{path}: cannot be read as npy ({error}); {remedy}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise ValueError(f"{path}: is not an array of numbers; {remedy}")
    return np.array(values, dtype=values.dtype.newbyteorder("="))


def _read(room: Room) -> tuple[np.ndarray, list[str]]:
    """A room from its files, and one sentence for each thing that was mended or is odd."""
    if room.kind == "npy":
        (path,) = room.files
        values = read_array(path, AGAIN)
        if values.ndim != 2 or values.shape[1] != 7:
            raise ValueError(f"{path}: has shape {values.shape} instead of (N, 7): x y z r g b label")
        xyz, rgb, label = values[:, :3], values[:, 3:6], values[:, 6]
    elif room.kind == "pointcept":
        path = room.files[0].parent
        xyz, rgb, label = (read_array(file, AGAIN) for file in room.files)
        count = len(xyz) if xyz.ndim else 0
        if xyz.shape != (count, 3) or rgb.shape != (count, 3) or label.shape not in ((count,), (count, 1)):
            raise ValueError(
                f"{path}: has coord {xyz.shape}, color {rgb.shape} and segment {label.shape} instead of (N, 3), (N, 3) "
                "and (N,) or (N, 1)"
            )
        label = label.reshape(-1)
    else:
        return _read_annotations(room)
    if not len(xyz):
        raise ValueError(f"{path}: has no points; {AGAIN}")
    for values in (xyz, rgb, label):
        refuse_non_finite(path, values, AGAIN)
    if not 0 <= label.min() <= label.max() < len(CLASSES) or (label != np.floor(label)).any():
        raise ValueError(f"{path}: labels from {label.min():g} to {label.max():g}; there are classes 0 to 12")
    return _records(path, xyz, colors_of(path, rgb), FROM_POINTNET[label.astype(np.int64)])


def _read_annotations(room: Room) -> tuple[np.ndarray, list[str]]:
    pieces, notes = [], []
    for path in room.files:
        if path.name.startswith("."):  # what macOS leaves beside a file
            continue
        label = class_of(path)
        if label is None:
            notes.append(f"{path}: is not named <class>_<number>.txt and was left out; it may repeat another file")
            continue
        values, repairs = read_points(path)
        notes += repairs
        pieces.append((path, values, label))
    if not pieces:
        raise FileNotFoundError(f"{room.root / room.title}: has no Annotations/<class>_<number>.txt; {REMEDY}")
    colors = np.concatenate([values[:, 3:] for _, values, _ in pieces])  # 0 to 1 or to 255 is the room's, not a file's
    place = room.root / room.title
    rgb = colors_of(place, colors)
    labels = np.concatenate([np.full(len(values), label) for _, values, label in pieces])
    points, odd = _records(place, np.concatenate([values[:, :3] for _, values, _ in pieces]), rgb, labels)
    return points, notes + odd


def _records(path: Path, xyz: np.ndarray, rgb: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """POINT, and what is odd. ValueError for places too far away for float32."""
    reach, extent = float(np.abs(xyz).max()), float(np.ptp(xyz, axis=0).max())
    if reach > FARTHEST:
        raise ValueError(
            f"{path}: coordinates up to {reach:.8g} m are kept to a millimeter only below {FARTHEST:g} m; subtract the "
            "same offset from all rooms (and are these meters?)"
        )
    points = np.empty(len(xyz), POINT)
    points["xyz"], points["rgb"], points["label"] = xyz, rgb, label
    return points, [f"{path}: reaches over {extent:.3g}; are these meters?"] if extent > WIDEST else []


def source_of(files: Sequence[Path], top: Path) -> str:
    """A word that changes when a file is added, removed, renamed or written again."""
    found = [(path, path.stat() if path.exists() else None) for path in files]
    names = [(str(path.relative_to(top)), status and (status.st_size, status.st_mtime_ns)) for path, status in found]
    return hashlib.sha256(json.dumps([VERSION, *names]).encode()).hexdigest()


def _kept(room: Room, folder: str, make: Callable[[], tuple[np.ndarray, list[str]]]) -> tuple[np.ndarray, list[str]]:
    """What `make` returns, from the cache if that is whole and of these files. A cache that cannot be written is said
    once and done without.
    """
    path = room.root / ".dr2net" / folder / f"Area_{room.area}_{room.name}.npy"
    note, source = path.with_suffix(".json"), source_of(room.files, room.root)
    if note.is_file() and path.is_file():
        try:
            known, points = read_json(note, "it is made anew"), np.load(path, allow_pickle=False)
            if isinstance(known, dict) and isinstance(points, np.ndarray) and points.dtype == POINT:
                now = {"source": source, "crc32": zlib.crc32(points.tobytes()), "notes": known.get("notes")}
                if known == now and isinstance(known["notes"], list):
                    return points, known["notes"]
        except (ValueError, OSError, EOFError, OverflowError, SyntaxError, tokenize.TokenError):
            pass  # damaged: made anew
    points, notes = make()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_folder(path.parent)
        with open(temporary, "wb") as file:
            np.save(file, points)
        publish(temporary, path)
        known = {"source": source, "crc32": zlib.crc32(points.tobytes()), "notes": notes}
        write_text(note, json.dumps(known, indent=1) + "\n")
    except OSError as error:
        warnings.warn(f"{path.parent}: rooms cannot be kept there ({error}); they are read each time", stacklevel=2)
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
    return points, notes
