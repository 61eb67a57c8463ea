"""Write a small data set of composed scenes in A2D-Sentences' real form, with what makes real files difficult.

    write_dataset(Path("data/referring_tiny"), Synthetic())
    # Release/{videoset.csv,clips320H/*.mp4}, text_annotations/{a2d_annotation.txt,a2d_missed_videos.txt,
    # a2d_annotation_with_instances/*/*.h5}: transposed masks, for every frame in training, for three in the test

Odd on purpose: a video that was missed, with a sentence and no files; a row whose instance is "1 (copy)"; in each split
a video in which an instance stands twice in every frame, the second time without a pixel, and one with a single thing,
whose masks have no first axis; things that are hidden in a frame stand not in its file. Deterministic in the seed. Not
A2D: it only borrows the layout, so that the same reader, recipe and metric run on it. The scenes: `scenes.py`.
"""

import csv
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageColor, ImageDraw

from engine.data.video import write_video
from engine.files import sync, write_text
from engine.synthetic.sprites import Group
from engine.synthetic.write import write_files
from engine.visual import TABLEAU, film_strip, save_stack
from vos.scenes import ABOUT, KINDS, LEAST_PIXELS, SHRINK, About, Kind, Scene, build_scene, render

VERSION = 1  # raise it when a change of the scenes changes the files
GROUPS: dict[str, Group] = {"train": "train", "test": "validation"}
ANNOTATION = "a2d_annotation.txt"
MISSED = "composedmiss"  # the id of the video without files
TWICE, ALONE = 0, 1  # numbers of the odd videos in each split


@dataclass(frozen=True)
class Synthetic:
    """What to write; the default is the tiny preset's. The files are a function of these values alone."""

    num_train: int = 40
    num_test: int = 12
    height: int = 96  # pixels, even
    width: int = 96
    num_frames: int = 16
    fps: float = 6.0
    seed: int = 0
    kinds: tuple[Kind, ...] = KINDS  # of scenes, in turn
    about: tuple[About, ...] = ABOUT  # of sentences
    shrink: float = SHRINK  # of things, from the size at which they are drawn

    def __post_init__(self) -> None:
        if self.num_train < 3 or self.num_test < 3:
            raise ValueError(f"num_train and num_test must be at least 3, got {self.num_train} and {self.num_test}")
        if self.height % 2 or self.width % 2 or min(self.height, self.width) < 32:
            raise ValueError(f"height and width must be even and at least 32, got {self.height} and {self.width}")
        if self.num_frames < 8:
            raise ValueError(f"num_frames must be at least 8, or motions cannot be seen; got {self.num_frames}")

    def videos(self) -> list[tuple[str, int]]:
        """(split, number) of every video, numbers from 0 in each split."""
        counts = {"train": self.num_train, "test": self.num_test}
        return [(split, number) for split, count in counts.items() for number in range(count)]

    def annotated(self, split: str) -> list[int]:
        """The frames with masks, from 1."""
        count = self.num_frames
        return list(range(1, count + 1)) if split == "train" else [k * count // 4 + 1 for k in (1, 2, 3)]


LAPTOP = Synthetic(num_train=300, num_test=60)


def video_name(split: str, number: int) -> str:
    """The id of a video."""
    return f"composed{split}{number:04d}"


def write_dataset(
    root: Path, synthetic: Synthetic, *, workers: int = 2, on_done: Callable[[], None] | None = None
) -> bool:
    """Write videos, masks and annotations below `root`. False if they are there already, of the same parameters.

    What an interrupted call left is kept. on_done: called after each video, for a progress bar. Files of other settings
    are an error, never overwritten.
    """
    videos, texts = synthetic.videos(), root / "text_annotations"
    clips = [root / "Release" / "clips320H" / f"{video_name(*video)}.mp4" for video in videos]
    folders = [texts / "a2d_annotation_with_instances" / video_name(*video) for video in videos]
    jobs = [(synthetic, *video, clip, folder) for video, clip, folder in zip(videos, clips, folders, strict=True)]
    listed, missed, written = root / "Release" / "videoset.csv", texts / "a2d_missed_videos.txt", texts / ANNOTATION
    # A folder of masks appears whole: one of its files stands for all.
    masks = [
        folder / f"{synthetic.annotated(split)[-1]:05d}.h5" for (split, _), folder in zip(videos, folders, strict=True)
    ]

    def finish(sentences: list[list[str]]) -> None:
        write_text(listed, _videoset(synthetic))
        write_text(missed, f"{MISSED}\n")
        write_text(written, _annotation(videos, sentences))

    stamp, files = {"version": VERSION, **asdict(synthetic)}, [*clips, *masks, listed, missed, written]
    return write_files(root, stamp, files, _write_one, jobs, finish, workers=workers, on_done=on_done)


def film(synthetic: Synthetic, split: str, number: int) -> tuple[Scene, np.ndarray, np.ndarray]:
    """A video of the data set: its scene, frames and masks as `render` gives them, as functions of its key."""
    key = [synthetic.seed, 400 + list(GROUPS).index(split), number]
    scene = build_scene(
        key,
        (synthetic.height, synthetic.width),
        synthetic.num_frames,
        kind=synthetic.kinds[number % len(synthetic.kinds)],
        group=GROUPS[split],
        annotated=[frame - 1 for frame in synthetic.annotated(split)],
        count=1 if number == ALONE else 3,
        shrink=synthetic.shrink,
        about=synthetic.about,
    )
    return scene, *render(scene, np.random.default_rng([*key, 1000]))


def write_masks(path: Path, masks: np.ndarray, instances: list[int]) -> None:
    """A frame's file in A2D's form. masks: bool (n, H, W) of the instances, n > 0; a single one without first axis."""
    import h5py

    boxes = np.zeros((4, len(masks)))
    for number, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            boxes[:, number] = columns[0], rows[0], columns[-1], rows[-1]
    turned = np.ascontiguousarray(masks.transpose(0, 2, 1)).astype(np.uint8)
    stored = turned[0] if len(turned) == 1 else turned
    # One compressed piece, in the format of HDF5 1.10, whose index of pieces is small: 2.4 kB a file instead of 31.
    with h5py.File(path, "w", libver="v110") as file:
        file["instance"] = np.array(instances, np.float64)
        file.create_dataset("reMask", data=stored, chunks=stored.shape, compression="gzip")
        file["reBBox"] = boxes
        file["reS_id"] = np.array(instances, np.float64)


def write_contact_sheet(path: Path, synthetic: Synthetic, *, rows: int = 6) -> None:
    """A PNG with the first test videos, a row each: every other frame, outlines of the masks, the sentences below."""
    sheet = []
    for number in range(min(rows, synthetic.num_test)):
        scene, frames, masks = film(synthetic, "test", number)
        large = frames.repeat(2, axis=1).repeat(2, axis=2)
        owners = masks.repeat(2, axis=2).repeat(2, axis=3)
        for t, i in np.ndindex(*owners.shape[:2]):
            large[t][_outline(owners[t, i])] = ImageColor.getrgb(TABLEAU[i])
        strip = film_strip(large[::2], below=16 * len(scene.sentences) + 4, gap=2)
        pen = ImageDraw.Draw(strip)
        for i, sentence in enumerate(scene.sentences):
            pen.text((4, large.shape[1] + 2 + 16 * i), sentence, fill=TABLEAU[i], font_size=13)
        sheet.append(strip)
    save_stack(path, sheet)


def _outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (H, W) that have a neighbor outside it."""
    inside = mask.copy()
    inside[1:] &= mask[:-1]
    inside[:-1] &= mask[1:]
    inside[:, 1:] &= mask[:, :-1]
    inside[:, :-1] &= mask[:, 1:]
    return mask & ~inside


def _write_one(job: tuple[Synthetic, str, int, Path, Path]) -> list[str]:
    """Write a video and its masks if they are not there; returns its sentences, by instance."""
    synthetic, split, number, clip, folder = job
    annotated = synthetic.annotated(split)
    names = [f"{frame:05d}.h5" for frame in annotated]
    scene, frames, masks = film(synthetic, split, number)
    if not clip.is_file():
        write_video(clip, frames, synthetic.fps)
    if all((folder / name).is_file() for name in names):
        return scene.sentences
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for frame, name in zip(annotated, names, strict=True):
        seen = [i for i, mask in enumerate(masks[frame - 1]) if mask.sum() >= LEAST_PIXELS]
        found, instances = masks[frame - 1][seen], [i + 1 for i in seen]
        if number == TWICE and seen:
            found, instances = np.concatenate([found, np.zeros_like(found[:1])]), [*instances, instances[0]]
        if not seen:  # as A2D has no file without an instance; number 0 is nobody's
            found, instances = np.zeros_like(masks[frame - 1][:1]), [0]
        write_masks(temporary / name, found, instances)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    sync(folder.parent)
    return scene.sentences


def _videoset(synthetic: Synthetic) -> str:
    rows = []
    for split, number in [*synthetic.videos(), ("train", -1)]:
        name = MISSED if number < 0 else video_name(split, number)
        size = (synthetic.height, synthetic.width, synthetic.num_frames, len(synthetic.annotated(split)))
        rows.append([name, 11, "0:00:00", "0:00:03", *size, int(split == "test")])
    return _csv(rows)


def _annotation(videos: list[tuple[str, int]], sentences: list[list[str]]) -> str:
    rows: list[list[Any]] = [["video_id", "instance_id", "query"]]
    for video, texts in zip(videos, sentences, strict=True):
        rows += [[video_name(*video), instance, text] for instance, text in enumerate(texts, start=1)]
        if video[1] == TWICE:
            rows.append([video_name(*video), "1 (copy)", texts[0]])
    return _csv([*rows, [MISSED, 1, "what nobody has seen"]])


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
