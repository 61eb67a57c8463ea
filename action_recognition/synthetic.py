"""Write a synthetic data set of real mp4 files in the on-disk layout of Something-Something v2.

    write_dataset(Path("data/motion"), Synthetic())

Its classes are those of engine.synthetic.motion, in which only the motion decides. Training and validation share no
object.
Deterministic in the seed. Not Something-Something: it only borrows the layout, so that the same reader, recipe and
metric run on it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine.data.video import write_video
from engine.data.workers import write_json
from engine.synthetic.motion import MOTIONS, render_clip
from engine.synthetic.sprites import Group
from engine.synthetic.write import write_files
from engine.visual import film_strip, save_stack

VERSION = 2  # raise it when a change of the renderer changes the files
VIDEO_FOLDER = "20bn-something-something-v2"

TEMPLATES = {
    "moving left": "Moving [something] to the left",
    "moving right": "Moving [something] to the right",
    "moving up": "Moving [something] up",
    "moving down": "Moving [something] down",
    "approaching": "[Something] coming closer to the camera",
    "receding": "[Something] going away from the camera",
    "turning clockwise": "Turning [something] clockwise",
    "turning counter-clockwise": "Turning [something] counter-clockwise",
    "bouncing": "Bouncing [something]",
    "shaking": "Shaking [something]",
}


@dataclass(frozen=True)
class Synthetic:
    """What to write. The files are a function of these values alone."""

    num_classes: int = 10  # the first so many motions; 8 are four pairs of time reversals
    num_train: int = 960
    num_validation: int = 400
    size: int = 98  # height and width in pixels, even
    num_frames: tuple[int, int] = (16, 24)  # shortest and longest clip
    fps: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= len(MOTIONS):
            raise ValueError(f"num_classes must be 2 to {len(MOTIONS)}, got {self.num_classes}")
        if self.size % 2 or self.size < 32:
            raise ValueError(f"size must be even and at least 32, got {self.size}")
        if not 2 <= self.num_frames[0] <= self.num_frames[1]:
            raise ValueError(f"num_frames must be (shortest, longest) with 2 <= shortest, got {self.num_frames}")

    def templates(self) -> list[str]:
        """One template per class, in the order of the class indices."""
        return [TEMPLATES[motion] for motion in list(MOTIONS)[: self.num_classes]]


def write_dataset(
    root: Path, synthetic: Synthetic, *, workers: int = 2, on_done: Callable[[], None] | None = None
) -> bool:
    """Write all clips and the three JSON files below `root`. False if they are there already, of the same parameters.

    on_done: called after each clip, for a progress bar. Files of other settings are an error, never overwritten.
    """
    names = [name for _, name, _ in _clips(synthetic)]
    labels = {template.replace("[", "").replace("]", ""): str(i) for i, template in enumerate(synthetic.templates())}
    lists = {split: root / f"something-something-v2-{split}.json" for split in ("train", "validation", "labels")}
    jobs = [(root, synthetic, *clip) for clip in _clips(synthetic)]

    def finish(found: list[dict]) -> None:
        entries: dict[str, list[dict]] = {"train": [], "validation": []}
        for (_, _, split, _, _), entry in zip(jobs, found, strict=True):
            entries[split].append(entry)
        for split, content in {**entries, "labels": labels}.items():
            write_json(lists[split], content)

    return write_files(
        root,
        {"version": VERSION, **asdict(synthetic)},
        [*(root / VIDEO_FOLDER / f"{name}.mp4" for name in names), *lists.values()],
        _write_clip,
        jobs,
        finish,
        workers=workers,
        on_done=on_done,
    )


def write_contact_sheet(path: Path, synthetic: Synthetic, *, columns: int = 8) -> None:
    """A PNG with one validation clip per class, a row each, time from left to right."""
    from PIL import ImageDraw

    rows, bar = [], 14
    for label, template in enumerate(synthetic.templates()):
        frames, name = _render(synthetic, "validation", 1 + synthetic.num_train + label, label)
        row = film_strip(frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)], above=bar)
        ImageDraw.Draw(row).text((2, 1), f"{label}  {template}   ({name})", fill=(0, 0, 0))
        rows.append(row)
    save_stack(path, rows)


def _clips(synthetic: Synthetic) -> list[tuple[str, str, int]]:
    """(split, id, class index) of every clip; classes take turns, so they are balanced to within one."""
    num_classes = len(synthetic.templates())
    return [("train", str(1 + i), i % num_classes) for i in range(synthetic.num_train)] + [
        ("validation", str(1 + synthetic.num_train + i), i % num_classes) for i in range(synthetic.num_validation)
    ]


def _render(synthetic: Synthetic, split: str, number: int, label: int) -> tuple[np.ndarray, str]:
    """One clip. Its key starts with seed and split, so none shares a generator with another."""
    group: Group = "train" if split == "train" else "validation"
    return render_clip(
        list(MOTIONS)[label],
        key=(synthetic.seed, int(split == "validation"), number),
        group=group,
        size=synthetic.size,
        num_frames=synthetic.num_frames,
    )


def _write_clip(job: tuple[Path, Synthetic, str, str, int]) -> dict:
    """Render and write one clip; returns its entry in the official JSON form."""
    root, synthetic, split, name, label = job
    frames, thing = _render(synthetic, split, int(name), label)
    write_video(root / VIDEO_FOLDER / f"{name}.mp4", frames, synthetic.fps)
    template = synthetic.templates()[label]
    text = template.replace("[something]", f"a {thing}").replace("[Something]", f"a {thing}")
    return {"id": name, "label": text.lower(), "template": template, "placeholders": [f"a {thing}"]}
