"""Write a composed data set of real mp4 files in the on-disk layout of Something-Something v2.

    write_dataset(Path("data/motion"), Composition())

Its classes are those of engine.synthetic.motion, in which only the motion decides. Training and validation share no
object.
Deterministic in the seed. Not Something-Something: it only borrows the layout, so that the same reader, recipe and
metric run on it.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine.data.video import write_video
from engine.data.workers import run_jobs, write_json
from engine.synthetic.motion import MOTIONS, render_clip
from engine.synthetic.sprites import Group

VERSION = 2  # raise it when a change of the renderer changes the files
VIDEO_FOLDER = "20bn-something-something-v2"
STAMP = "composition.json"  # written last: its presence says that the data set is complete

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
class Composition:
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
    root: Path, composition: Composition, *, workers: int = 2, on_clip: Callable[[], None] | None = None
) -> bool:
    """Write all clips and the three JSON files below `root`. False if they are there already, of the same parameters.

    on_clip: called after each clip, for a progress bar. Files of another composition are an error, never overwritten.
    """
    root = Path(root)
    stamp = json.loads(json.dumps({"version": VERSION, **asdict(composition)}))
    if (root / STAMP).is_file():
        found = json.loads((root / STAMP).read_text())
        if found != stamp:
            raise ValueError(f"{root}: holds another composed data set ({found}); choose another --root or delete it")
        if all((root / VIDEO_FOLDER / f"{name}.mp4").is_file() for _, name, _ in _clips(composition)):
            return False
    elif (root / "something-something-v2-labels.json").exists():
        raise ValueError(f"{root}: holds a data set that was not composed here; choose another --root")
    (root / VIDEO_FOLDER).mkdir(parents=True, exist_ok=True)
    jobs = [(root, composition, *clip) for clip in _clips(composition)]
    results = run_jobs(_write_clip, jobs, workers=workers, on_done=on_clip)
    entries: dict[str, list[dict]] = {"train": [], "validation": []}
    for (_, _, split, _, _), entry in zip(jobs, results, strict=True):
        entries[split].append(entry)
    for split, items in entries.items():
        write_json(root / f"something-something-v2-{split}.json", items)
    labels = {template.replace("[", "").replace("]", ""): str(i) for i, template in enumerate(composition.templates())}
    write_json(root / "something-something-v2-labels.json", labels)
    write_json(root / STAMP, stamp)
    return True


def write_contact_sheet(path: Path, composition: Composition, *, columns: int = 8) -> None:
    """A PNG with one validation clip per class, a row each, time from left to right."""
    from PIL import Image, ImageDraw

    rows, bar = [], 14
    for label, template in enumerate(composition.templates()):
        frames, name = _render(composition, "validation", 1 + composition.num_train + label, label)
        chosen = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)]
        row = Image.new("RGB", (columns * composition.size, composition.size + bar), (255, 255, 255))
        row.paste(Image.fromarray(np.concatenate(list(chosen), axis=1)), (0, bar))
        ImageDraw.Draw(row).text((2, 1), f"{label}  {template}   ({name})", fill=(0, 0, 0))
        rows.append(np.asarray(row))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def _clips(composition: Composition) -> list[tuple[str, str, int]]:
    """(split, id, class index) of every clip; classes take turns, so they are balanced to within one."""
    num_classes = len(composition.templates())
    return [("train", str(1 + i), i % num_classes) for i in range(composition.num_train)] + [
        ("validation", str(1 + composition.num_train + i), i % num_classes) for i in range(composition.num_validation)
    ]


def _render(composition: Composition, split: str, number: int, label: int) -> tuple[np.ndarray, str]:
    """One clip. Its key starts with seed and split, so none shares a generator with another."""
    group: Group = "train" if split == "train" else "validation"
    return render_clip(
        list(MOTIONS)[label],
        key=(composition.seed, int(split == "validation"), number),
        group=group,
        size=composition.size,
        num_frames=composition.num_frames,
    )


def _write_clip(job: tuple[Path, Composition, str, str, int]) -> dict:
    """Render and write one clip; returns its entry in the official JSON form."""
    root, composition, split, name, label = job
    frames, thing = _render(composition, split, int(name), label)
    write_video(root / VIDEO_FOLDER / f"{name}.mp4", frames, composition.fps)
    template = composition.templates()[label]
    text = template.replace("[something]", f"a {thing}").replace("[Something]", f"a {thing}")
    return {"id": name, "label": text.lower(), "template": template, "placeholders": [f"a {thing}"]}
