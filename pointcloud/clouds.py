"""A user's own point cloud: read (.ply, .pcd by open3d; .txt, .xyz, .npy by numpy), checked, and written with labels.

    cloud = read_cloud(Path("scan.ply"))                  # positions (N, 3) float64, colors (N, 3) uint8 or None
    write_cloud(path, positions, colors, label, confidence)

open3d never raises: a missing file is an empty cloud, a cut one is filled with garbage. So what a header promises is
compared with the file before, and the points with the header after. Not here: rooms with labels (`s3dis.py`).
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pointcloud.s3dis import colors_of, read_points, refuse_non_finite

SUFFIXES = (".ply", ".pcd", ".txt", ".xyz", ".npy")
HEADER_BYTES = 1 << 16
PLY_SIZES = {"char": 1, "uchar": 1, "short": 2, "ushort": 2, "int": 4, "uint": 4, "float": 4, "double": 8}
PLY_SIZES |= {"int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "float32": 4, "float64": 8}


class UserCloud(NamedTuple):
    """What a file holds."""

    xyz: np.ndarray  # (N, 3) float64
    rgb: np.ndarray | None  # (N, 3) uint8


def import_open3d() -> Any:
    """open3d, or an ImportError that says what it lacks."""
    try:
        import open3d
    except ImportError as error:
        raise ImportError(
            f"point clouds in .ply and .pcd need open3d ({error}): pip install 'dr2net[engine]', and Debian's "
            "libusb-1.0-0 (apt-get install libusb-1.0-0)"
        ) from error
    return open3d


def read_cloud(path: Path) -> UserCloud:
    """A cloud of x y z and, if the file has them, colors. FileNotFoundError, or ValueError naming the file for what is
    empty, cut, not finite or of an unknown kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: is none of {', '.join(SUFFIXES)}; convert it")
    if path.suffix.lower() == ".npy":
        values = _load_npy(path)
    elif path.suffix.lower() in (".txt", ".xyz"):
        values, _ = read_points(path, columns=None)
    else:
        return _read_with_open3d(path)
    if values.ndim != 2 or values.shape[1] < 3 or not len(values):
        raise ValueError(f"{path}: has shape {values.shape}; it must have points with at least x y z")
    refuse_non_finite(path, values)
    rgb = colors_of(path, values[:, 3:6].astype(np.float64)) if values.shape[1] >= 6 else None
    return UserCloud(values[:, :3].astype(np.float64), rgb)


def _load_npy(path: Path) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as npy ({error})") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise ValueError(f"{path}: is not an array of numbers")
    return values


def _read_with_open3d(path: Path) -> UserCloud:
    promised = promised_points(path)
    open3d = import_open3d()
    cloud = open3d.t.io.read_point_cloud(str(path))
    if "positions" not in cloud.point or len(cloud.point.positions) != promised:
        found = len(cloud.point.positions) if "positions" in cloud.point else 0
        raise ValueError(f"{path}: has {found} of the {promised} points that its header says; copy it again")
    xyz = cloud.point.positions.numpy().astype(np.float64)
    refuse_non_finite(path, xyz)
    if "colors" not in cloud.point:
        return UserCloud(xyz, None)
    colors = cloud.point.colors.numpy()
    return UserCloud(xyz, colors_of(path, colors.astype(np.float64) if colors.dtype.kind == "f" else colors))


def promised_points(path: Path) -> int:
    """How many points a .ply or .pcd says it has. ValueError where the file is too short for them, or no such file."""
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    end = re.search(rb"end_header\r?\n" if path.suffix.lower() == ".ply" else rb"(?m)^DATA \w+\r?\n", head)
    starts = head.startswith(b"ply") if path.suffix.lower() == ".ply" else b"FIELDS" in head
    if not starts or end is None:
        raise ValueError(f"{path}: has no {path.suffix[1:].upper()} header; is it another kind of file?")
    lines = head[: end.end()].decode("latin1").splitlines()
    count, row_bytes, kind = (_ply if path.suffix.lower() == ".ply" else _pcd)(path, lines)
    if count < 1:
        raise ValueError(f"{path}: has no points")
    present, needed = path.stat().st_size - end.end(), count * row_bytes
    if kind == "ascii":
        with open(path, "rb") as file:
            file.seek(end.end())
            present, needed = sum(bool(line.strip()) for line in file), count
    elif kind == "compressed":  # begins with two numbers: bytes in the file, bytes unpacked
        with open(path, "rb") as file:
            file.seek(end.end())
            needed = 8 + int.from_bytes(file.read(4), "little")
    if present < needed:
        raise ValueError(f"{path}: is cut off, it has fewer than the {count} points of its header; copy it again")
    return count


def _ply(path: Path, lines: list[str]) -> tuple[int, int, str]:
    """(points, bytes of one, "ascii" or "binary") of a PLY header."""
    words = [line.split() for line in lines]
    form = next((w[1] for w in words if w[:1] == ["format"] and len(w) > 1), "")
    first = next((k for k, w in enumerate(words) if w[:1] == ["element"]), None)
    if first is None or words[first][1] != "vertex" or not words[first][2].isdecimal():
        raise ValueError(f"{path}: its first element is not vertex; save it as a point cloud")
    size = 0
    for w in words[first + 1 :]:
        if w[:1] != ["property"]:
            break
        if w[1] not in PLY_SIZES:
            raise ValueError(f"{path}: points with properties of type {w[1]!r} are not supported")
        size += PLY_SIZES[w[1]]
    return int(words[first][2]), size, "ascii" if form == "ascii" else "binary"


def _pcd(path: Path, lines: list[str]) -> tuple[int, int, str]:
    """The same of a PCD header."""
    table = {line.split()[0]: line.split()[1:] for line in lines if line.split() and not line.startswith("#")}
    try:
        sizes = [int(word) for word in table["SIZE"]]
        counts = [int(word) for word in table["COUNT"]] if "COUNT" in table else [1] * len(sizes)
        points, kind = int(table["POINTS"][0]), table["DATA"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: its PCD header is damaged ({error})") from error
    row = sum(size * count for size, count in zip(sizes, counts, strict=False))
    return points, row, {"ascii": "ascii", "binary_compressed": "compressed"}.get(kind, "binary")


def write_cloud(path: Path, xyz: np.ndarray, rgb: np.ndarray, label: np.ndarray, confidence: np.ndarray) -> None:
    """A binary PLY with x y z (float), red green blue (uchar), label (int) and confidence (float) of each point."""
    open3d = import_open3d()
    cloud = open3d.t.geometry.PointCloud()
    cloud.point.positions = open3d.core.Tensor(np.ascontiguousarray(xyz, np.float32))
    cloud.point.colors = open3d.core.Tensor(np.ascontiguousarray(rgb, np.uint8))
    cloud.point["label"] = open3d.core.Tensor(np.ascontiguousarray(label.reshape(-1, 1), np.int32))
    cloud.point["confidence"] = open3d.core.Tensor(np.ascontiguousarray(confidence.reshape(-1, 1), np.float32))
    if not open3d.t.io.write_point_cloud(str(path), cloud):
        raise OSError(f"{path}: open3d could not write it")
