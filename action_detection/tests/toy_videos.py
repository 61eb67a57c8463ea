"""A small untrimmed data set whose frames tell their time: `make_data` writes it, `annotate` changes it."""

import json
from pathlib import Path

import numpy as np

from action_detection.configs import Data
from engine.data.video import write_video

FPS, SIZE = 10, 32
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def frames_of(seconds: float, width: int = SIZE) -> np.ndarray:
    """A video at FPS that gets brighter by 3 gray values per frame; its left half is darker."""
    frames = np.zeros((round(seconds * FPS), SIZE, width, 3), np.uint8)
    frames += (20 + 3 * np.arange(len(frames)) % 180).astype(np.uint8)[:, None, None, None]
    frames[:, :, width // 2 :] += 40
    return frames


def entry(duration: float, subset: str, *annotations: tuple[str, float, float]) -> dict:
    items = [{"label": label, "segment": [start, end]} for label, start, end in annotations]
    return {"duration": duration, "subset": subset, "annotations": items}


DATABASE = {
    "a": entry(6.0, "training", ("jump", 1.0, 2.5), ("run", 4.0, 5.0)),
    "b": entry(4.0, "training", ("run", 0.5, 1.5)),
    "c": entry(3.0, "training", ("jump", 0.0, 2.0)),
    "d": entry(5.0, "validation", ("jump", 2.0, 4.5)),
    "e": entry(1.0, "validation", ("run", 0.2, 0.7)),
}


def annotate(root: Path, database: dict, name: str = "activity_net.v1-3.min.json") -> None:
    (root / name).write_text(json.dumps({"database": database, "taxonomy": [], "version": "test"}))


def make_data(root: Path) -> Data:
    """The videos of DATABASE and their annotations; windows of 8 steps of 2 frames at 5 frames a second: 3.2 s."""
    (root / "videos").mkdir()
    for name, video in DATABASE.items():
        write_video(root / "videos" / f"v_{name}.mp4", frames_of(video["duration"]), FPS, crf=5)
    annotate(root, DATABASE)
    return Data(root=root, num_classes=2, num_times=8, image_size=SIZE, fps=5.0, **PLAIN)
