"""Tiny rooms and networks that several test files share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from pointcloud import pix4point
from pointcloud.configs import ROWS, Config
from pointcloud.s3dis import CLASSES

WIDE = 2.0  # meters


def write_room(
    folder: Path, *, count: int = 60, seed: int = 0, classes: tuple[str, ...] = ("floor", "wall", "chair")
) -> None:
    """A room in S3DIS's form: `count` points of each class, in its own part of a cube."""
    rng = np.random.default_rng(seed)
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(classes):
        xyz = rng.random((count, 3)) * WIDE
        xyz[:, 2] = (k + rng.random(count)) * WIDE / len(classes)
        rgb = rng.integers(0, 256, (count, 3))
        lines = [f"{x:.3f} {y:.3f} {z:.3f} {r} {g} {b}" for (x, y, z), (r, g, b) in zip(xyz, rgb, strict=True)]
        (folder / "Annotations" / f"{name}_1.txt").write_text("\n".join(lines) + "\n")


def write_rooms(root: Path, *, aligned: bool = False, count: int = 60) -> Path:
    """One room in each area, two in Area_5."""
    for area in range(1, 7):
        for k in range(2 if area == 5 else 1):
            write_room(root / f"Area_{area}" / f"office_{k + 1}", seed=10 * area + k, count=count)
        if not aligned:
            (root / f"Area_{area}" / f"Area_{area}_alignmentAngle.txt").write_text("## a\n## b\noffice_1 0\n")
    return root


def tiny_config(root: Path, method: str = "conventional", **data: object) -> Config:
    """The tiny row on those rooms, with crops of 64 points."""
    config = ROWS[f"rooms_tiny_{method}"]()
    changes = {"root": root, "rooms": "any", "num_points": 64, "neighbors": 4, "samples_per_epoch": 12, **data}
    return replace(config, data=replace(config.data, **changes), run=replace(config.run, micro_batch=4))


def label_of(name: str) -> int:
    return CLASSES.index(name)


def official(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model` as the authors' code would have saved it: built from the names in its classes."""
    state = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] in ("cls_token", "cls_pos", "norm"):
            name = f"encoder.{key}"
        elif parts[0] == "pos_embed":
            name = f"encoder.pos_embed.{'0.0' if parts[1] == '0' else '1'}.{parts[2]}"
        elif parts[0] == "backbone":
            name = f"encoder.{'.'.join(parts[1:])}"
        elif parts[0] == "tokenizer":
            place = {ours: theirs for theirs, ours in pix4point.LAYERS.items()}[parts[3]]
            name = f"encoder.patch_embed.convs.{parts[2]}.{place}.{parts[4]}"
            value = value[..., None, None] if value.dim() == 2 else value
        elif parts[1] == "propagations":
            place = {"first": "0.0", "first_norm": "0.1", "second": "1.0", "second_norm": "1.1"}[parts[3]]
            name = f"decoder.decoder.{parts[2]}.0.convs.{place}.{parts[-1]}"
            value = value[..., None] if value.dim() == 2 else value
        else:
            place = {"hidden": "0.0", "norm": "0.1", "linear": "2.0"}[parts[2]]
            name = f"head.head.{place}.{parts[3]}"
            value = value[..., None] if value.dim() == 2 else value
        state[name] = value.clone()
    return state
