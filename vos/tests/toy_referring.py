"""Tiny data sets in the three official layouts, of frames of 40 x 60 so that nothing can be exchanged unseen."""

import csv
import json
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from scipy.io import savemat

from engine.data.video import write_video
from vos.annotations import Clip, read_annotations
from vos.configs import Data
from vos.synthetic import write_masks

HEIGHT, WIDTH = 40, 60
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "image_size": 40, "max_size": 64, "text": "words"}


def block(top: int, left: int, height: int = 10, width: int = 20) -> np.ndarray:
    """A mask (40, 60) with one rectangle."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + height, left : left + width] = True
    return mask


A, B = block(2, 4), block(20, 30)


def frames_of(count: int) -> np.ndarray:
    """A video whose frame k has the gray value 20 + 10 k, and a white column at the left."""
    frames = np.zeros((count, HEIGHT, WIDTH, 3), np.uint8)
    frames += (20 + 10 * np.arange(count)).astype(np.uint8)[:, None, None, None]
    frames[:, :, :8] = 255
    return frames


def write_a2d(root: Path) -> Data:
    """Two training videos, one test video, one that was missed; 12 frames each, masks of frames 2, 6 and 12."""
    texts = root / "text_annotations"
    (root / "Release" / "clips320H").mkdir(parents=True)
    videos = {"one": 0, "two": 0, "three": 1, "gone": 0}
    for name in ("one", "two", "three"):
        write_video(root / "Release" / "clips320H" / f"{name}.mp4", frames_of(12), 6, crf=5)
        folder = texts / "a2d_annotation_with_instances" / name
        folder.mkdir(parents=True)
        for frame in (2, 6, 12):
            alone = name == "two" or frame == 12
            write_masks(folder / f"{frame:05d}.h5", np.stack([A] if alone else [A, B]), [0] if alone else [0, 3])
    with (root / "Release" / "videoset.csv").open("w") as file:
        csv.writer(file).writerows([name, 11, 0, 2, 99, 99, 12, 3, split] for name, split in videos.items())
    rows = [
        ["video_id", "instance_id", "query"],
        ["one", "0", "The  dog, on the LEFT"],
        ["one", "3", "the bright cat"],
        ["one", "1 (copy)", "the dog on the left"],
        ["two", "0", "a ball rolling to the right"],
        ["three", "0", "the dog"],
        ["three", "3", "the cat jumping"],
        ["gone", "0", "nobody"],
    ]
    with (texts / "a2d_annotation.txt").open("w") as file:
        csv.writer(file).writerows(rows)
    (texts / "a2d_missed_videos.txt").write_text("gone\n")
    return Data(root=root, window=4, **PLAIN)


def write_jhmdb(root: Path) -> Data:
    """One video of 9 frames, of which the last two have no mask."""
    pictures, masks = root / "Rename_Images" / "run" / "v1", root / "puppet_mask" / "run" / "v1"
    pictures.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number, frame in enumerate(frames_of(9), start=1):
        Image.fromarray(frame).save(pictures / f"{number:05d}.png")
    savemat(masks / "puppet_mask.mat", {"part_mask": np.stack([A] * 5 + [B] * 2, -1).astype(np.uint8)})
    before = "./jhmdb_sentences"
    entries = [
        [
            "v1",
            f"{before}/Rename_Images/run/v1/{f:05d}.png",
            f"{before}/puppet_mask/run/v1/puppet_mask.mat",
            7,
            "a Man ",
        ]
        for f in (1, 6, 7)
    ]
    (root / "jhmdb_sentences_samples_metadata.json").write_text(json.dumps(entries))
    return Data(kind="jhmdb", root=root, window=4, **PLAIN)


def write_refytvos(root: Path) -> Data:
    """A training video of 7 listed frames, in which object 2 is in the last two only; one of valid, one of test."""
    for split, name, count in (("train", "long", 7), ("train", "short", 2), ("valid", "seen", 5)):
        pictures, masks = (root / split / part / name for part in ("JPEGImages", "Annotations"))
        pictures.mkdir(parents=True)
        masks.mkdir(parents=True)
        for place, frame in enumerate(frames_of(count)):
            Image.fromarray(frame).save(pictures / f"{5 * place:05d}.jpg", quality=95)
            index = A.astype(np.uint8) + (2 * B.astype(np.uint8) if place >= count - 2 else 0)
            write_palette(masks / f"{5 * place:05d}.png", index)

    def entry(count: int, **expressions: tuple[str, str | None]) -> dict:
        items = {key: {"exp": text} | ({"obj_id": obj} if obj else {}) for key, (text, obj) in expressions.items()}
        return {"expressions": items, "frames": [f"{5 * place:05d}" for place in range(count)]}

    tested = {"hidden": entry(3, **{"0": ("a secret", None)})}
    content = {
        "train": {"long": entry(7, **{"0": ("a cat on the left", "1"), "1": ("the dog", "2")}),
                  "short": entry(2, **{"0": ("a bird", "1")})},
        "valid": {"seen": entry(5, **{"0": ("a cow", "2"), "1": ("what nobody says", None)}), **tested},
        "test": tested,
    }  # fmt: skip
    for split, videos in content.items():
        folder = root / "meta_expressions" / split
        folder.mkdir(parents=True)
        (folder / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    return Data(kind="refytvos", root=root, window=4, **PLAIN)


def write_palette(path: Path, index: np.ndarray) -> None:
    """A PNG of mode P, whose colors for 1 and 2 are the same gray: only the index tells them apart."""
    picture = Image.fromarray(index)
    picture.putpalette([0, 0, 0, 90, 90, 90, 90, 90, 90])
    picture.save(path)


def texts(data: Data) -> Path:
    """The folder of a2d's sentences and masks."""
    return data.root / "text_annotations"


def h5(data: Data, video: str, frame: int) -> Path:
    return texts(data) / "a2d_annotation_with_instances" / video / f"{frame:05d}.h5"


def add_row(data: Data, *row: str) -> None:
    with (texts(data) / "a2d_annotation.txt").open("a") as file:
        csv.writer(file).writerow(row)


def quietly(data: Data, split: Literal["train", "test"]) -> list[Clip]:
    """The clips of a split, warnings unsaid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_annotations(data, split).clips
