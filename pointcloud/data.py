"""Crops of rooms: in training one at random places, in evaluation as many as it takes to see every voxel of a room.

    build_dataset(config, "train")     # samples_per_epoch crops, spread evenly over all floors
    build_dataset(config, "val")       # one sample per room of the test area; "test": the same

A training batch is {"position": (B, N, 3), "features": (B, N, 7), "label": (B, N), "name": [...]} and the indices of
`ops.build_levels`, (B, ...) each. Position is relative to the crop's center, in meters, z up; features are position,
normalized color, height above the floor. An evaluation batch is {"name": [...], "rooms": [EvaluationRoom]}, whose crops
are made when they are needed: memory does not depend on the room. Not here: files (`s3dis.py`), indices (`ops.py`),
augmentation (`augment.py`).
"""

import functools
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config import Split
from engine.data.fingerprint import Files
from engine.synthetic.write import STAMP
from pointcloud.augment import augment_crop, normalize_colors
from pointcloud.configs import Config, Data
from pointcloud.ops import build_levels
from pointcloud.s3dis import CLASSES, Room, find_rooms, is_aligned, load_room, load_voxels

Sample = dict[str, Any]


def build_dataset(config: Config, split: Split) -> "Crops | Rooms":
    """Training crops, or the rooms of the test area. FileNotFoundError or ValueError, with the remedy, for rooms that
    are missing, and for an area to be put together from aligned rooms.
    """
    data = config.data
    class_names(config)
    if data.unit == "area" and (data.kind != "s3dis" or is_aligned(data.root)):
        kind = "npy files, whose rooms all begin at 0" if data.kind != "s3dis" else "the aligned version"
        raise ValueError(
            f"{data.root}: these are {kind}; rooms put together from them would overlap. Take Stanford3dDataset_v1.2 "
            "(not aligned, with Area_<k>_alignmentAngle.txt), or crops of single rooms: --data.unit room"
        )
    if split == "train":
        return Crops(data, find_rooms(data, data.train_areas))
    return Rooms(data, find_rooms(data, [data.test_area]))


def class_names(config: Config) -> list[str]:
    """The 13 classes of S3DIS, by index. ValueError if the configuration says another number."""
    if config.data.num_classes != len(CLASSES):
        raise ValueError(f"--data.num-classes {config.data.num_classes}: these layouts have {len(CLASSES)} classes")
    return list(CLASSES)


@dataclass
class Cloud:
    """Voxels that crops are cut from, a room's or an area's. xyz: (V, 3) float32, meters from the lowest corner."""

    name: str
    xyz: np.ndarray
    rgb: np.ndarray  # (V, 3) uint8
    label: np.ndarray  # (V,) uint8

    @functools.cached_property
    def tree(self) -> Any:
        """A kd-tree of the voxels."""
        from scipy.spatial import cKDTree

        return cKDTree(self.xyz, balanced_tree=False)  # balanced ones degenerate where points are equal

    def places(self, step: float) -> np.ndarray:
        """(P,) one voxel of each occupied cube of `step` meters: where a crop may be centered."""
        cells = np.floor(self.xyz / step).astype(np.int64)
        return np.sort(np.unique(cells, axis=0, return_index=True)[1])

    def nearest(self, center: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
        """Indices and distances of the crop at `center`, nearest first: at most num_points, at least one."""
        count = min(data.num_points, len(self.xyz))
        distance, index = self.tree.query(center, k=count)
        distance, index = np.atleast_1d(distance), np.atleast_1d(index)
        inside = max(1, int(np.searchsorted(distance, data.radius, side="right")) if data.radius else count)
        return index[:inside], distance[:inside]


def cloud_of(rooms: list[Room], data: Data) -> tuple[Cloud, np.ndarray]:
    """One cloud of these rooms, its coordinates from its lowest corner; and for each voxel the number of its room."""
    pieces = [load_voxels(room, data.voxel) for room in rooms]
    voxels = np.concatenate(pieces)
    number = np.repeat(np.arange(len(rooms)), [len(piece) for piece in pieces])
    xyz = voxels["xyz"] - voxels["xyz"].min(axis=0)
    name = rooms[0].title if len(rooms) == 1 else f"Area_{rooms[0].area}"
    return Cloud(name, xyz, voxels["rgb"], voxels["label"]), number


def units_of(rooms: list[Room], unit: str) -> list[list[Room]]:
    """The rooms that make a cloud: each alone, or those of an area together."""
    if unit == "room":
        return [[room] for room in rooms]
    return [[room for room in rooms if room.area == area] for area in sorted({room.area for room in rooms})]


def crop_of(cloud: Cloud, center: np.ndarray, index: np.ndarray, data: Data, rng: np.random.Generator | None) -> Sample:
    """The sample of the points `index` around `center`, filled up to num_points by repeating some of them.

    rng: augmented, in random order; None: as they are, the nearest first.
    """
    missing = data.num_points - len(index)
    if missing > 0:
        chosen = (rng or np.random.default_rng(len(index))).integers(0, len(index), missing)
        index = np.concatenate([index, index[chosen]])
    if rng is not None:
        index = rng.permutation(index)
    position, color = cloud.xyz[index] - center.astype(np.float32), cloud.rgb[index].astype(np.float32)
    height = cloud.xyz[index, 2:]
    if rng is not None:
        position, color = augment_crop(position, color, data, rng)
    features = np.concatenate([position, normalize_colors(color, data), height], axis=1)
    label = cloud.label[index].astype(np.int64)
    arrays = {"position": position, "features": features, "label": label}
    return {**arrays, **build_levels(position, data.ratios, data.neighbors)}


class Crops:
    """Training crops. Each epoch goes once over the floors of all clouds: sample i is centered in the i-th of
    samples_per_epoch equal parts of all places, at a random one, moved by about a tenth of a crop.
    """

    def __init__(self, data: Data, rooms: list[Room]) -> None:
        self.data, self.rooms = data, rooms

    def __len__(self) -> int:
        return self.data.samples_per_epoch

    @functools.cached_property
    def clouds(self) -> list[Cloud]:
        """Read when the first sample is asked for."""
        found = []
        for unit in units_of(self.rooms, self.data.unit):
            readable = [room for room in unit if self._can_be_read(room)]
            if readable:
                found.append(cloud_of(readable, self.data)[0])
        if not found:
            raise ValueError(f"{self.data.root}: no room of the training areas can be read")
        return found

    def _can_be_read(self, room: Room) -> bool:
        if self.data.on_broken == "raise":
            return True
        try:
            load_voxels(room, self.data.voxel)
        except (ValueError, OSError) as error:
            warnings.warn(f"{room.title} is left out: {error}", stacklevel=2)
            return False
        return True

    @functools.cached_property
    def places(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """How many places the clouds up to each one have, and the places of each."""
        step = (self.data.radius or 2.0) / 10
        places = [cloud.places(step) for cloud in self.clouds]
        return np.cumsum([len(p) for p in places]), places

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, seed = key
        rng = np.random.default_rng([seed, index])
        ends, places = self.places
        place = min(int((index + rng.random()) / len(self) * ends[-1]), int(ends[-1]) - 1)
        number = int(np.searchsorted(ends, place, side="right"))
        cloud = self.clouds[number]
        voxel = places[number][place - (int(ends[number - 1]) if number else 0)]
        center = cloud.xyz[voxel] + rng.normal(0, (self.data.radius or 2.0) / 10, 3)
        points, _ = cloud.nearest(center, self.data)
        return {**crop_of(cloud, center, points, self.data, rng), "name": f"{cloud.name}@{index}"}

    def files(self) -> Files:
        return _files(self.rooms, self.data)


@dataclass
class EvaluationRoom:
    """A room to be evaluated: its voxels are in `own` of the cloud, its points are read when they are compared."""

    room: Room
    data: Data
    own: np.ndarray = field(repr=False)  # (V,) indices of the room's voxels in the cloud
    cloud: Cloud = field(repr=False)
    offset: np.ndarray = field(repr=False)  # (3,) float32, from the cloud's coordinates to those of the files

    def crops(self) -> Iterator[tuple[np.ndarray, Sample]]:
        """(indices of the crop's points in the cloud, sample) until each voxel of the room was in one.

        Each crop is centered at the voxel, of those not seen yet, that lies farthest from earlier centers by the
        potential of KPConv and Pix4Point. Neither batches nor devices change them.
        """
        rng = np.random.default_rng(zlib.crc32(self.room.title.encode()))
        potential = np.full(len(self.cloud.xyz), np.inf)
        potential[self.own] = rng.random(len(self.own)) * 1e-3
        unseen = np.isfinite(potential)
        while unseen.any():
            candidates = np.flatnonzero(unseen)
            voxel = candidates[potential[candidates].argmin()]
            center = self.cloud.xyz[voxel].astype(np.float64)
            index, distance = self.cloud.nearest(center, self.data)
            if voxel not in index:  # of more equal points than a crop has, the nearest may be others
                index[-1] = voxel
            reach = self.data.radius or max(float(distance[-1]), 1e-6)
            potential[index] += (1 - np.minimum(distance / reach, 1) ** 2) ** 2
            unseen[index] = False
            yield index, crop_of(self.cloud, center, index, self.data, None)

    def points(self) -> np.ndarray:
        """All points of the room as in its files, POINT records."""
        return load_room(self.room)


class Rooms:
    """The rooms of the test area, one sample each: a room stays on one device."""

    def __init__(self, data: Data, rooms: list[Room]) -> None:
        self.data, self.rooms = data, rooms
        self._area: tuple[Cloud, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.rooms)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, _ = key
        room = self.rooms[index]
        if self.data.unit == "room":
            cloud, number = cloud_of([room], self.data)
            own = np.arange(len(number))
        else:
            if self._area is None:
                self._area = cloud_of(self.rooms, self.data)
            cloud, number = self._area
            own = np.flatnonzero(number == index)
        offset = load_voxels(room, self.data.voxel)["xyz"][0] - cloud.xyz[own[0]]
        return {"name": room.title, "room": EvaluationRoom(room, self.data, own, cloud, offset)}

    def files(self) -> Files:
        return _files(self.rooms, self.data)


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Crops to one batch of tensors; rooms to a list."""
    names = {"name": [sample["name"] for sample in samples], "skipped": []}
    if "room" in samples[0]:
        return {"rooms": [sample["room"] for sample in samples], **names}
    return {**stack([{k: v for k, v in sample.items() if k != "name"} for sample in samples]), **names}


def stack(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Arrays of equal shapes to tensors (B, ...)."""
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}


def _files(rooms: list[Room], data: Data) -> Files:
    stamp: list[Path] = [data.root / STAMP] if (data.root / STAMP).is_file() else []
    return Files(annotations=stamp, samples=[path for room in rooms for path in room.files])
