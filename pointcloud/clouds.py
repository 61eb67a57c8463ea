"""A user's own point cloud: read (.ply, .pcd, .txt, .xyz, .npy), checked, and written with labels.

    cloud = read_cloud(Path("scan.ply"))                  # positions (N, 3) float64, colors (N, 3) uint8 or None
    write_cloud(path, positions, colors, label, confidence)

numpy reads what a header describes. open3d, which writes, and unpacks a compressed .pcd, never raises: a missing file
is an empty cloud, a cut one or one with a word among its numbers is filled with whatever lies in memory, a missing z is
0. Not here: rooms with labels (`s3dis.py`).
"""

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.files import appearing, require_file
from pointcloud.s3dis import colors_of, read_array, read_points, refuse_non_finite

SUFFIXES = (".ply", ".pcd", ".txt", ".xyz", ".npy")
HEADER_BYTES = 1 << 16
MAX_COLUMNS = 32  # of a table of points; one with more is transposed
PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
PLY_TYPES |= {"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"}
PLY_TYPES |= {"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"}
PLY_FORMATS = {"ascii": ("ascii", "<"), "binary_little_endian": ("binary", "<"), "binary_big_endian": ("binary", ">")}
PCD_TYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f4", "f8"}
PCD_FORMATS = {"ascii": "ascii", "binary": "binary", "binary_compressed": "compressed"}
COLORS = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))
ROUNDING = 1e-4  # meters that a written coordinate may be off by
REMEDY = "remove such points, or save the cloud again"
TABLE = "lines must be numbers x y z, or x y z r g b, separated by blanks, with a point for decimals and no title"


class UserCloud(NamedTuple):
    """What a file holds."""

    xyz: np.ndarray  # (N, 3) float64
    rgb: np.ndarray | None  # (N, 3) uint8
    resolution: float = 0.0  # how far apart the numbers are, of the file's kind, that are as large as the largest one
    note: str = ""  # which columns of a table were taken, where it has others than x y z (r g b)


class Header(NamedTuple):
    """What a .ply or .pcd says of its points."""

    num_points: int
    fields: list[tuple[str, str, int]]  # name in small letters, numpy's type, how many of it
    kind: str  # "ascii", "binary" or "compressed"
    start: int  # bytes before the first point


def import_open3d() -> Any:
    """open3d, or an ImportError that says what it lacks."""
    try:
        import open3d
    except ImportError as error:
        raise ImportError(
            f"writing point clouds, and reading compressed .pcd, need open3d ({error}): pip install 'dr2net[engine]', "
            "and Debian's libusb-1.0-0 (apt-get install libusb-1.0-0)"
        ) from error
    return open3d


def read_cloud(path: Path) -> UserCloud:
    """A cloud of x y z and, if the file has them, colors. FileNotFoundError, or ValueError naming the file for what is
    empty, cut, not finite or of an unknown kind.
    """
    require_file(path, f"give a point cloud ({', '.join(SUFFIXES)})")
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(f"{path}: is none of {', '.join(SUFFIXES)}; convert it")
    if kind in (".ply", ".pcd"):
        return _read_described(path)
    if kind == ".npy":
        values = read_array(path, "save it again with numpy.save")
    else:
        values, notes = read_points(path, columns=None, remedy=TABLE)
        for note in notes:
            warnings.warn(note, stacklevel=2)
    if values.ndim != 2 or not 3 <= values.shape[1] <= MAX_COLUMNS or not len(values):
        raise ValueError(f"{path}: has shape {values.shape}; it must have a row per point, with at least x y z")
    columns = values.shape[1]
    taken = values[:, : 6 if columns >= 6 else 3]
    refuse_non_finite(path, taken, REMEDY)
    rgb = colors_of(path, taken[:, 3:].astype(np.float64)) if columns >= 6 else None
    note = "" if columns in (3, 6) else f"of its {columns} columns the first {taken.shape[1]} are taken, as "
    note += ("x y z r g b" if columns >= 6 else "x y z") if note else ""
    return _cloud(taken[:, :3], rgb, note)


def _cloud(xyz: np.ndarray, rgb: np.ndarray | None, note: str = "") -> UserCloud:
    floats = xyz.dtype if xyz.dtype.kind == "f" else np.dtype(np.float64)
    resolution = float(np.spacing(np.abs(xyz).max().astype(floats)))
    return UserCloud(xyz.astype(np.float64), rgb, resolution, note)


def _read_described(path: Path) -> UserCloud:
    header = read_header(path)
    names = Counter(name for name, _, _ in header.fields)
    for axis in "xyz":
        if names[axis] != 1:
            raise ValueError(f"{path}: its points have {names[axis] or 'no'} {axis}; save it with one x, y and z each")
    three = next((three for three in COLORS if any(names[name] for name in three)), None)
    if three is not None and [names[name] for name in three] != [1, 1, 1]:
        told = ", ".join(f"{names[name]} {name}" for name in three)
        raise ValueError(f"{path}: of colors its points have {told}; save it with one of each, or none")
    if header.kind == "compressed":
        return _read_compressed(path, header)
    points = _read_ascii(path, header) if header.kind == "ascii" else _read_binary(path, header)
    xyz = np.stack([points[axis] for axis in "xyz"], axis=1)
    refuse_non_finite(path, xyz, REMEDY)
    packed = next((name for name in ("rgb", "rgba") if names[name]), None)
    rgb = None
    if three is not None:
        colors = np.stack([points[name] for name in three], axis=1)
        refuse_non_finite(path, colors, REMEDY)
        rgb = colors_of(path, colors)
    elif packed and path.suffix.lower() == ".pcd":
        rgb = _unpacked(path, np.ascontiguousarray(points[packed]), written=header.kind == "ascii")
    return _cloud(xyz, rgb)


def _unpacked(path: Path, packed: np.ndarray, *, written: bool) -> np.ndarray:
    """(N, 3) uint8 of PCL's colors, 0x00RRGGBB in four bytes, which are called an integer or a float.

    written: as text, in which a float that is no number says nothing.
    """
    if packed.ndim != 1 or packed.dtype.itemsize != 4:
        raise ValueError(f"{path}: its rgb is {packed.dtype} instead of four bytes; save it again")
    if packed.dtype.kind == "f" and written and not np.isfinite(packed).all():
        raise ValueError(f"{path}: has colors whose numbers are not finite; save it in binary form")
    codes = packed.view(np.uint32)
    return np.stack([codes >> shift & 255 for shift in (16, 8, 0)], axis=1).astype(np.uint8)


def _structure(header: Header) -> np.dtype:
    names: Counter[str] = Counter()
    fields = []
    for name, kind, many in header.fields:  # padding of a .pcd is called _ each time
        names[name] += 1
        fields.append((name if names[name] == 1 else f"{name} {names[name]}", kind, (many,) if many > 1 else ()))
    return np.dtype(fields)


def _read_binary(path: Path, header: Header) -> np.ndarray:
    structure = _structure(header)
    if path.stat().st_size - header.start < header.num_points * structure.itemsize:
        raise _cut(path, header)
    points = np.fromfile(path, structure, header.num_points, offset=header.start)
    native = [(name, structure[name].newbyteorder("=")) for name in structure.names or ()]
    return points if structure.isnative else points.astype(np.dtype(native))


def _read_ascii(path: Path, header: Header) -> np.ndarray:
    structure, columns = _structure(header), sum(many for _, _, many in header.fields)
    if path.stat().st_size - header.start < 2 * header.num_points * columns - 1:  # a digit and what separates it
        raise _cut(path, header)
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty lines, which are not counted
        file.seek(header.start)
        try:
            table = np.loadtxt(file, np.float64, comments=None, ndmin=2, max_rows=header.num_points)
        except ValueError as error:
            raise ValueError(f"{path}: its points cannot be read as numbers ({error}); save it again") from error
    if len(table) < header.num_points:
        raise _cut(path, header)
    if table.shape[1] != columns:
        raise ValueError(f"{path}: its points have {table.shape[1]} numbers, by its header {columns}; save it again")
    points, column = np.empty(len(table), structure), 0
    for name, (_, _, many) in zip(structure.names or (), header.fields, strict=True):
        if many == 1:
            points[name] = _as_type(path, table[:, column], structure[name])
        column += many
    return points


def _as_type(path: Path, values: np.ndarray, kind: np.dtype) -> np.ndarray:
    """As the header says. ValueError for a number that is none of this type."""
    if kind.kind in "iu":
        ends = np.iinfo(kind)
        if not ((values >= ends.min) & (values <= ends.max) & (values == np.floor(values))).all():
            raise ValueError(f"{path}: has numbers that are no {kind}, which its header says; save it again")
    return values.astype(kind)


def _read_compressed(path: Path, header: Header) -> UserCloud:
    with open(path, "rb") as file:  # begins with two numbers: bytes in the file, bytes unpacked
        file.seek(header.start)
        packed, unpacked = (int.from_bytes(file.read(4), "little") for _ in range(2))
    if path.stat().st_size - header.start < 8 + packed:
        raise _cut(path, header)
    if unpacked != header.num_points * _structure(header).itemsize:
        raise ValueError(f"{path}: is damaged, {unpacked} bytes are not {header.num_points} points; copy it again")
    try:
        cloud = import_open3d().t.io.read_point_cloud(str(path))
        found = len(cloud.point.positions) if "positions" in cloud.point else 0
    except RuntimeError as error:
        raise ValueError(f"{path}: open3d cannot read it; save it again, not compressed") from error
    if found != header.num_points:
        raise ValueError(f"{path}: has {found} of the {header.num_points} points that its header says; copy it again")
    xyz = cloud.point.positions.numpy()
    refuse_non_finite(path, xyz, REMEDY)
    return _cloud(xyz, colors_of(path, cloud.point.colors.numpy()) if "colors" in cloud.point else None)


def _cut(path: Path, header: Header) -> ValueError:
    return ValueError(
        f"{path}: is cut off, it has fewer than the {header.num_points} points of its header; copy it again"
    )


def read_header(path: Path) -> Header:
    """What a .ply or .pcd says of its points. ValueError for a header that says nothing, or nothing that is known."""
    is_ply = path.suffix.lower() == ".ply"
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    end = re.search(rb"(?m)^end_header\r?\n" if is_ply else rb"(?m)^DATA \w+\r?\n", head)
    if not (head.startswith(b"ply") if is_ply else b"FIELDS" in head) or end is None:
        raise ValueError(f"{path}: has no {path.suffix[1:].upper()} header; is it another kind of file?")
    words = [line.split() for line in head[: end.end()].decode("latin1").splitlines() if line.split()]
    try:
        count, fields, kind = _ply(words) if is_ply else _pcd(words)
    except (KeyError, ValueError, IndexError) as error:
        why = "a line of it lacks words" if isinstance(error, IndexError) else error.args[0]
        raise ValueError(f"{path}: its header is damaged or not supported: {why}") from error
    if count < 1:
        raise ValueError(f"{path}: has no points")
    return Header(count, fields, kind, end.end())


def _ply(words: list[list[str]]) -> tuple[int, list[tuple[str, str, int]], str]:
    """Points, their fields, and "ascii" or "binary"; KeyError, ValueError or IndexError for a bad header."""
    kind, order = PLY_FORMATS[next((w[1] for w in words if w[0] == "format"), "no format")]
    words = [w for w in words if w[0] not in ("comment", "obj_info", "format")]
    first = next((k for k, w in enumerate(words) if w[0] == "element"), None)
    if first is None or words[first][1] != "vertex":
        raise ValueError("its first element is not vertex; save it as a point cloud")
    fields = []
    for w in words[first + 1 :]:
        if w[0] != "property":
            break
        if w[1] not in PLY_TYPES:
            raise ValueError(f"points with properties of type {w[1]!r}")
        fields.append((w[2].lower(), order + PLY_TYPES[w[1]], 1))
    return int(words[first][2]), fields, kind


def _pcd(words: list[list[str]]) -> tuple[int, list[tuple[str, str, int]], str]:
    """The same of a PCD header."""
    table = {w[0]: w[1:] for w in words if not w[0].startswith("#")}
    names, sizes, types = table["FIELDS"], table["SIZE"], table["TYPE"]
    counts = [int(word) for word in table.get("COUNT", ["1"] * len(names))]
    if not len(names) == len(sizes) == len(types) == len(counts) or not 1 <= min(counts) <= max(counts) < 1 << 20:
        raise ValueError("FIELDS, SIZE, TYPE and COUNT do not belong together")
    kinds = [f"{kind.lower()}{size}" for kind, size in zip(types, sizes, strict=True)]
    if unknown := [kind for kind in kinds if kind not in PCD_TYPES]:
        raise ValueError(f"numbers of type {unknown[0]}")
    fields = [(n.lower(), f"<{k}", c) for n, k, c in zip(names, kinds, counts, strict=True)]
    return int(table["POINTS"][0]), fields, PCD_FORMATS[table["DATA"][0]]


def write_cloud(path: Path, xyz: np.ndarray, rgb: np.ndarray, label: np.ndarray, confidence: np.ndarray) -> None:
    """A binary PLY with x y z, red green blue (uchar), label (int) and confidence (float) of each point.

    x y z are float, or double where float would move a point by more than a tenth of a millimeter.
    """
    open3d = import_open3d()
    cloud = open3d.t.geometry.PointCloud()
    floats = np.float32 if np.spacing(np.float32(np.abs(xyz).max())) <= 2 * ROUNDING else np.float64
    cloud.point.positions = open3d.core.Tensor(np.ascontiguousarray(xyz, floats))
    cloud.point.colors = open3d.core.Tensor(np.ascontiguousarray(rgb, np.uint8))
    cloud.point["label"] = open3d.core.Tensor(np.ascontiguousarray(label.reshape(-1, 1), np.int32))
    cloud.point["confidence"] = open3d.core.Tensor(np.ascontiguousarray(confidence.reshape(-1, 1), np.float32))
    with appearing(path) as temporary:
        if not open3d.t.io.write_point_cloud(str(temporary), cloud):
            raise OSError(f"{path}: open3d could not write it")
