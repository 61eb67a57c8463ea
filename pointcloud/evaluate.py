"""mIoU, mAcc and OA over all original points of the test area, and mIoU over voxels under its own name.

    python -m pointcloud.evaluate runs/pointcloud/rooms_tiny_dr2net/seed0
    python -m pointcloud.evaluate --weights pix4point.pth --root data/s3dis      # the authors' (pix4point.py)

prints the metrics, in percent, and writes scores.json with the IoU of each class and the confusion matrix. A room is
covered by crops until each of its voxels was seen; logits of overlapping crops are averaged (not probabilities); each
original point takes the class of the nearest voxel of its room. One confusion matrix for all rooms, which must be
complete. The number is that of the last epoch: nothing is chosen on the test area. Not here: formulas (`metric.py`).
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from engine.data.loader import to_device
from engine.data.workers import tracked
from engine.files import write_text
from engine.task import Batch, Model
from pointcloud.configs import Config
from pointcloud.data import EvaluationRoom, class_names, stack
from pointcloud.metric import absent_classes, confusion_matrix, scores
from pointcloud.s3dis import find_rooms, load_voxels

PIECE = 1 << 20  # points projected at a time: memory does not depend on the room


@dataclass(frozen=True)
class RoomCounts:
    """What the network did in one room."""

    name: str
    points: np.ndarray  # (K, K) int64 confusion of the original points
    voxels: np.ndarray  # (K, K) int64 confusion of the voxels


@dataclass(frozen=True)
class Truth:
    """The classes, and the rooms that must be there; the labels come with the rooms."""

    classes: list[str]
    rooms: list[str]


def read_truth(config: Config) -> Truth:
    """Errors as `data.class_names` and `s3dis.find_rooms`: a test area that is not complete is refused here, and so is
    a room that cannot be read. Those not read before are read now, into the cache.
    """
    data, classes = config.data, class_names(config)
    rooms = find_rooms(data, [data.test_area])
    for room in tracked("reading rooms", rooms):
        load_voxels(room, data.voxel)
    return Truth(classes, [room.title for room in rooms])


def collect(model: Model, batch: Batch, config: Config) -> list[RoomCounts]:
    """One RoomCounts per room of the batch."""
    return [count_room(model, room, config) for room in batch["rooms"]]


def count_room(model: Model, room: EvaluationRoom, config: Config) -> RoomCounts:
    """The confusion matrices of a room."""
    predicted = predict_voxels(model, room, config).argmax(axis=1)
    num_classes, cloud = config.data.num_classes, room.cloud
    voxels = confusion_matrix(cloud.label[room.own], predicted, num_classes)
    points = np.zeros((num_classes, num_classes), np.int64)
    original = room.points()
    for piece, nearest in project(original["xyz"], cloud.xyz[room.own] + room.offset):
        points += confusion_matrix(original["label"][piece], predicted[nearest], num_classes)
    return RoomCounts(room.room.title, points, voxels)


@torch.no_grad()
def predict_voxels(
    model: Model, room: EvaluationRoom, config: Config, on_seen: Callable[[int], None] | None = None
) -> np.ndarray:
    """(V, K) float32, the mean logits of the room's voxels over all crops that have them. ValueError if not finite.

    on_seen is called with the number of voxels that each group of crops saw for the first time.
    """
    device = next(model.parameters()).device
    total = np.zeros((len(room.cloud.xyz), config.data.num_classes), np.float32)
    count = np.zeros(len(total), np.int64)
    crops = room.crops()
    while group := list(islice(crops, config.run.micro_batch)):
        batch = to_device(stack([sample for _, sample in group]), device)
        logits, seen = model(batch)["logits"].float().cpu().numpy(), 0
        for (index, _), values in zip(group, logits, strict=True):
            seen += int((count[index] == 0).sum())
            total[index] += values[: len(index)]  # what follows repeats points
            count[index] += 1
        if on_seen is not None:
            on_seen(seen)
    mean = total[room.own] / count[room.own, None]
    if not np.isfinite(mean).all():
        raise ValueError(f"the network's answer to {room.room.title} is not finite; has training diverged?")
    return mean


def project(points: np.ndarray, voxels: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(points of a piece, index of the nearest voxel of each), piece by piece. points: (N, 3), voxels: (V, 3)."""
    from scipy.spatial import cKDTree

    tree = cKDTree(voxels, balanced_tree=False)
    for start in range(0, len(points), PIECE):
        piece = slice(start, start + PIECE)
        yield piece, tree.query(points[piece])[1]


def score(rows: Sequence[RoomCounts], truth: Truth, config: Config) -> dict[str, float]:
    """mIoU, mAcc, OA over original points, voxel_mIoU over voxels, in percent. ValueError for missing rooms."""
    found = scores(_sum(rows, truth).points)
    voxels = scores(_sum(rows, truth).voxels)
    return {"mIoU": found["mIoU"], "mAcc": found["mAcc"], "OA": found["OA"], "voxel_mIoU": voxels["mIoU"]}


def write(folder: Path, rows: Sequence[RoomCounts], truth: Truth, config: Config) -> Path:
    """scores.json: metrics, IoU per class (null where a class is absent), the confusion matrix, the rooms."""
    total = _sum(rows, truth).points
    found, absent = scores(total), absent_classes(total)
    iou = {name: None if k in absent else found["IoU"][k] for k, name in enumerate(truth.classes)}
    content = {
        **score(rows, truth, config),
        "IoU": iou,
        "absent": [truth.classes[k] for k in absent],
        "confusion": total.tolist(),
        "rooms": sorted(row.name for row in rows),
    }
    path = folder / "scores.json"
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def _sum(rows: Sequence[RoomCounts], truth: Truth) -> RoomCounts:
    """All rooms together, each once. ValueError for a room that is missing."""
    by_name = {row.name: row for row in rows}
    missing = sorted(set(truth.rooms) - set(by_name))
    if missing:
        raise ValueError(f"{len(missing)} rooms of the test area were not evaluated: {', '.join(missing[:8])}")
    every = [by_name[name] for name in truth.rooms]
    points, voxels = ([getattr(row, kind) for row in every] for kind in ("points", "voxels"))
    return RoomCounts("all", np.sum(points, axis=0), np.sum(voxels, axis=0))


if __name__ == "__main__":
    from engine import commands
    from pointcloud import data, evaluate, model

    if any(word.split("=")[0] == "--weights" for word in sys.argv):
        from pointcloud import pix4point

        pix4point.main()
    else:
        commands.evaluate(Config, model, data, evaluate)
