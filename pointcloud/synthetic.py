"""Rooms of boxes in S3DIS's real form on disk, with its known faults: the tiny preset, and the shell of others.

    write_dataset(Path("data/rooms_tiny"), Synthetic())
    Area_<k>/<type>_<n>/Annotations/<class>_<i>.txt, <type>_<n>.txt, Area_<k>_alignmentAngle.txt

A room has ceiling, floor, four walls with openings, doors, windows, a board, beams, columns, and furniture of a few
boxes each; surfaces are sampled evenly and blurred by some millimeters. Colors are those of a thing, not of a class.
Rooms of an area stand side by side in one frame, so areas may be put together. Planted into Area_1, as in the official
zip: a cleared bit in a number, a `stairs_1.txt`, a `.DS_Store`. Not here: furniture of real models (`furniture.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.files import write_text
from engine.synthetic.write import write_files
from pointcloud.s3dis import CLASSES

VERSION = 1
KINDS = ("office", "conferenceRoom", "hallway", "lobby", "storage")
AREAS = (1, 2, 3, 4, 5, 6)
BLUR = 0.004  # meters, standard deviation of a scanned point
WALL_GAP = 0.4  # meters between rooms of an area


class Thing(NamedTuple):
    """One annotated object: (N, 3) meters in its room, (N, 3) colors in 0 to 255."""

    name: str
    xyz: np.ndarray
    rgb: np.ndarray


@dataclass(frozen=True)
class Synthetic:
    """What is written."""

    seed: int = 0
    train_rooms: int = 4  # per training area
    test_rooms: int = 6
    density: float = 120.0  # points per square meter
    faults: bool = True

    def rooms(self) -> dict[str, list[str]]:
        """Names of the rooms by area folder."""
        found = {}
        for area in AREAS:
            count = self.test_rooms if area == 5 else self.train_rooms
            names = [KINDS[k % len(KINDS)] for k in range(count)]
            found[f"Area_{area}"] = [f"{name}_{names[: k + 1].count(name)}" for k, name in enumerate(names)]
        return found


Furnish = Callable[["Room", np.random.Generator], list[Thing]]


@dataclass(frozen=True)
class Room:
    """A room's shell: width, depth, height in meters, and how densely its surfaces are sampled."""

    size: np.ndarray
    density: float
    kind: str
    light: np.ndarray = field(default_factory=lambda: np.ones(3))  # what a lamp does to all colors

    def sample(self, corner: np.ndarray, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(N, 3) points of the parallelogram from `corner` along u and v."""
        area = float(np.linalg.norm(np.cross(u, v)))
        at = rng.random((rng.poisson(area * self.density), 2))
        return corner + at[:, :1] * u + at[:, 1:] * v

    def box(self, low: np.ndarray, high: np.ndarray, rng: np.random.Generator, skip: str = "") -> np.ndarray:
        """(N, 3) points of the faces of a box; skip: faces that nobody sees, of "bottom", "top"."""
        extent, pieces = high - low, []
        for axis in range(3):
            u, v = np.zeros(3), np.zeros(3)
            u[(axis + 1) % 3], v[(axis + 2) % 3] = extent[(axis + 1) % 3], extent[(axis + 2) % 3]
            for side, name in ((low, "bottom"), (high, "top")):
                if axis == 2 and name in skip:
                    continue
                corner = low.copy()
                corner[axis] = side[axis]
                pieces.append(self.sample(corner, u, v, rng))
        return np.concatenate(pieces)

    def thing(self, name: str, pieces: list[np.ndarray], color: np.ndarray, rng: np.random.Generator) -> Thing:
        """An object of one color, with noise in place and color."""
        xyz = np.concatenate(pieces)
        xyz = xyz + rng.normal(0, BLUR, xyz.shape)
        shade = rng.normal(0, 8, (len(xyz), 1)) + rng.normal(0, 3, (len(xyz), 3))
        return Thing(name, xyz, np.clip(color * self.light + shade, 0, 255))


def compose_room(seed: tuple[int, ...], kind: str, density: float, furnish: Furnish) -> list[Thing]:
    """All objects of a room; a pure function of its arguments."""
    rng = np.random.default_rng(seed)
    wide = {"hallway": (1.8, 2.4), "lobby": (5.0, 7.0)}.get(kind, (3.0, 4.5))
    size = np.array([rng.uniform(*wide), rng.uniform(4.0, 6.0), rng.uniform(2.5, 3.1)])
    room = Room(size, density, kind, rng.uniform(0.85, 1.0, 3))
    return [thing for thing in [*shell(room, rng), *furnish(room, rng)] if len(thing.xyz)]


def shell(room: Room, rng: np.random.Generator) -> list[Thing]:
    """Ceiling, floor, walls with their openings, beams, columns."""
    width, depth, height = room.size
    x, y, z = np.eye(3)
    pale, warm = rng.uniform(180, 235, 3), rng.uniform(60, 200, 3)
    things = [
        room.thing("ceiling", [room.sample(z * height, x * width, y * depth, rng)], rng.uniform(190, 240, 3), rng),
        room.thing("floor", [room.sample(np.zeros(3), x * width, y * depth, rng)], warm, rng),
    ]
    sides = [
        (np.zeros(3), x * width, y),
        (y * depth, x * width, -y),
        (np.zeros(3), y * depth, x),
        (x * width, y * depth, -x),
    ]
    fillings = ["door", "window", "board", ""]
    for number, place in enumerate(rng.permutation(4)):
        corner, along, inward = sides[place]
        things += wall(room, corner, along, inward, fillings[number], pale, rng)
    if rng.random() < 0.7:
        at, thick = rng.uniform(0.25, 0.75) * width, rng.uniform(0.2, 0.4)
        low, high = np.array([at, 0, height - rng.uniform(0.2, 0.4)]), np.array([at + thick, depth, height])
        things.append(room.thing("beam", [room.box(low, high, rng, "top")], pale, rng))
    if rng.random() < 0.5:
        side = rng.uniform(0.25, 0.5)
        low = np.array([rng.choice([0, width - side]), rng.uniform(0.3, 0.7) * depth, 0])
        high = low + np.array([side, side, height])
        things.append(room.thing("column", [room.box(low, high, rng, "bottom top")], pale * rng.uniform(0.8, 1), rng))
    return things


def wall(
    room: Room,
    corner: np.ndarray,
    along: np.ndarray,
    inward: np.ndarray,
    filling: str,
    color: np.ndarray,
    rng: np.random.Generator,
) -> list[Thing]:
    """A wall from `corner` along `along`, with a door or window set back in it, a board before it, or nothing."""
    length, height, up = float(np.linalg.norm(along)), room.size[2], np.array([0.0, 0.0, 1.0])
    direction = along / length
    points = room.sample(corner, along, up * height, rng)
    if not filling:
        return [room.thing("wall", [points], color, rng)]
    wide = min(rng.uniform(*{"door": (0.8, 1.1), "window": (1.0, 2.0), "board": (1.2, 2.4)}[filling]), 0.8 * length)
    low, high = {"door": (0.0, 2.05), "window": (0.9, 2.1), "board": (0.9, 2.0)}[filling]
    left = rng.uniform(0.1, 0.9) * (length - wide)
    at = (points - corner) @ direction
    inside = (at > left) & (at < left + wide) & (points[:, 2] > low) & (points[:, 2] < high)
    depth = {"door": -0.08, "window": -0.15, "board": 0.03}[filling]
    panel = room.sample(corner + direction * left + up * low + inward * depth, direction * wide, up * (high - low), rng)
    tint = {"door": (90, 200), "window": (120, 220), "board": (200, 250)}[filling]
    return [
        room.thing("wall", [points[~inside]], color, rng),
        room.thing(filling, [panel], rng.uniform(*tint, 3), rng),
    ]


def furnish_with_boxes(room: Room, rng: np.random.Generator) -> list[Thing]:
    """Tables with chairs, a bookcase, a sofa, clutter: each of a few boxes, turned by right angles."""
    width, depth, _ = room.size
    things = []
    wanted = {"hallway": 3, "storage": 8}.get(room.kind, 12)
    for _ in range(wanted):
        name = rng.choice(["table", "chair", "chair", "bookcase", "sofa", "clutter", "clutter"])
        pieces, footprint = MAKERS[name](rng)
        if rng.random() < 0.5:  # a quarter turn
            pieces = [(low[[1, 0, 2]], high[[1, 0, 2]]) for low, high in pieces]
            footprint = footprint[::-1]
        free = np.array([width, depth]) - footprint
        if (free < 0.1).any():
            continue
        at = np.append(rng.uniform(0.05, 0.95, 2) * free, 0.0)
        if name in ("bookcase", "sofa"):  # along a wall
            at[0] = 0.03 if rng.random() < 0.5 else free[0] - 0.03
        faces = [room.box(low + at, high + at, rng) for low, high in pieces]
        things.append(room.thing(str(name), faces, rng.uniform(30, 220, 3), rng))
    return things


Boxes = tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]


def _boxes(*corners: tuple[float, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array(six[:3]), np.array(six[3:])) for six in corners]


def _legs(w: float, d: float, h: float, t: float = 0.05) -> list[tuple[np.ndarray, np.ndarray]]:
    return _boxes(*((a, b, 0, a + t, b + t, h) for a in (0, w - t) for b in (0, d - t)))


def _table(rng: np.random.Generator) -> Boxes:
    w, d, h = rng.uniform(1.0, 1.8), rng.uniform(0.6, 0.9), rng.uniform(0.68, 0.8)
    return [*_boxes((0, 0, h - 0.04, w, d, h)), *_legs(w, d, h)], np.array([w, d])


def _chair(rng: np.random.Generator) -> Boxes:
    w, h = rng.uniform(0.42, 0.55), rng.uniform(0.42, 0.5)
    back = rng.uniform(0.35, 0.5)
    return [*_boxes((0, 0, h - 0.05, w, w, h), (0, 0, h, 0.05, w, h + back)), *_legs(w, w, h, 0.04)], np.array([w, w])


def _bookcase(rng: np.random.Generator) -> Boxes:
    w, d, h = rng.uniform(0.8, 1.4), rng.uniform(0.28, 0.4), rng.uniform(1.6, 2.2)
    shelves = _boxes(*((0, 0, z, d, w, z + 0.03) for z in np.linspace(0, h - 0.03, int(rng.integers(4, 7)))))
    return [*shelves, *_boxes((0, 0, 0, d, 0.03, h), (0, w - 0.03, 0, d, w, h), (0, 0, 0, 0.02, w, h))], np.array(
        [d, w]
    )


def _sofa(rng: np.random.Generator) -> Boxes:
    w, d, h = rng.uniform(1.4, 2.0), rng.uniform(0.75, 0.95), rng.uniform(0.38, 0.45)
    parts = _boxes(
        (0, 0, 0, d, w, h), (0, 0, h, 0.2, w, h + 0.4), (0, 0, h, d, 0.18, h + 0.2), (0, w - 0.18, h, d, w, h + 0.2)
    )
    return parts, np.array([d, w])


def _clutter(rng: np.random.Generator) -> Boxes:
    a, b, c = rng.uniform(0.15, 0.5, 3)
    base = rng.choice([0.0, 0.0, rng.uniform(0.7, 1.5)])
    return _boxes((0, 0, base, a, b, base + c)), np.array([a, b])


MAKERS: dict[str, Callable[[np.random.Generator], Boxes]] = {
    "table": _table, "chair": _chair, "bookcase": _bookcase, "sofa": _sofa, "clutter": _clutter,
}  # fmt: skip


class Job(NamedTuple):
    """A room to write."""

    root: Path
    area: str
    name: str
    number: int  # in its area: where it stands


def write_dataset(
    root: Path,
    synthetic: Synthetic,
    furnish: Callable[[str], Furnish] = lambda area: furnish_with_boxes,
    *,
    workers: int = 1,
    on_done: Callable[[], None] | None = None,
) -> bool:
    """Write the rooms; False if they are all there. ValueError if the folder holds other data.

    furnish: for an area, what puts furniture into its rooms (training and test areas may have other models).
    """
    rooms = synthetic.rooms()
    jobs = [Job(root, area, name, k) for area, names in rooms.items() for k, name in enumerate(names)]
    stamp = {"version": VERSION, "rooms": rooms, **vars(synthetic), "furniture": getattr(furnish, "title", "boxes")}
    files = [root / area / name / f"{name}.txt" for area, names in rooms.items() for name in names]
    write_one = partial(write_room, synthetic=synthetic, furnish=furnish)
    return write_files(
        root, stamp, files, write_one, jobs, lambda _: _finish(root, rooms), workers=workers, on_done=on_done
    )


def write_room(job: Job, synthetic: Synthetic, furnish: Callable[[str], Furnish]) -> None:
    """One room: its annotations, then the file of all its points, whose presence says that it is complete."""
    area = int(job.area.split("_")[1])
    kind = job.name.split("_")[0]
    things = compose_room((synthetic.seed, area, job.number), kind, synthetic.density, furnish(job.area))
    place = np.array([job.number * (8.0 + WALL_GAP) + 10.0 * area, -5.0 * area, 0.0])
    folder = job.root / job.area / job.name
    counts = dict.fromkeys(CLASSES, 0)
    everything = []
    for thing in things:
        counts[thing.name] += 1
        xyz, rgb = thing.xyz + place, np.rint(thing.rgb)
        lines = [
            f"{a:.3f} {b:.3f} {c:.3f} {r:.0f} {g:.0f} {d:.0f}" for (a, b, c), (r, g, d) in zip(xyz, rgb, strict=True)
        ]
        text = "\n".join(lines) + "\n"
        everything.append(text)
        write_text(folder / "Annotations" / f"{thing.name}_{counts[thing.name]}.txt", text)
    if synthetic.faults and area == 1 and job.number == 0:
        _plant_faults(folder / "Annotations")
    write_text(folder / f"{job.name}.txt", "".join(everything))


def _plant_faults(folder: Path) -> None:
    """What is wrong in the official files: one cleared bit, a class that is none, what a desktop leaves behind."""
    ceiling = folder / "ceiling_1.txt"
    content = bytearray(ceiling.read_bytes())
    place = content.index(b" ", len(content) // 2)
    content[place] &= ~0x20  # a space becomes a zero byte, as in Area_5/hallway_6 of the aligned version
    ceiling.write_bytes(content)
    (folder / "clutter_1.txt").rename(folder / "stairs_1.txt") if (folder / "clutter_1.txt").exists() else None
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")


def _finish(root: Path, rooms: dict[str, list[str]]) -> None:
    """The angles of the unaligned version, all 0: rooms share a frame."""
    for area, names in rooms.items():
        lines = ["## Global alignment angle per disjoint space", "## [Disjoint Space Name] [Global Alignment Angle]"]
        lines += [f"{name} 0" for name in names]
        write_text(root / area / f"{area}_alignmentAngle.txt", "\n".join(lines) + "\n")
