"""Sentences and the objects they name: A2D-Sentences, JHMDB-Sentences, Ref-YouTube-VOS, in their official layouts.

    a2d       <root>/Release/videoset.csv, <root>/Release/clips320H/<video>.mp4 (or CLIPS320), and below
              <root>/text_annotations: a2d_annotation.txt, a2d_missed_videos.txt,
              a2d_annotation_with_instances/<video>/<frame>.h5
    jhmdb     <root>/jhmdb_sentences_samples_metadata.json (MTTR's, which says which frames count),
              <root>/Rename_Images/<action>/<video>/<frame>.png, <root>/puppet_mask/<action>/<video>/puppet_mask.mat
    refytvos  <root>/{train,valid}/JPEGImages/<video>/<frame>.jpg, <root>/{train,valid}/Annotations/<video>/<frame>.png,
              <root>/meta_expressions/{train,valid,test}/meta_expressions.json

Ids of frames count from 1 in a2d and jhmdb, and are places in a video's list of frames, from 0, in refytvos. Not here:
pixels (data.py), the files of masks (masks.py).
"""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.data.workers import first_of, tracked
from engine.files import read_csv, read_json, read_text
from vos.configs import Data
from vos.masks import BrokenVideo, read_h5, read_h5_ids, read_mat, read_palette

CLIP_FOLDERS = ("clips320H", "CLIPS320")  # as it is packed, and as MTTR's README has it
REMEDY = {
    "a2d": "get it with scripts/download_a2d.sh, or set --data.root",
    "jhmdb": "get it with scripts/download_jhmdb.sh, or set --data.root",
    "refytvos": "get it with scripts/download_refytvos.sh, or set --data.root",
}
MANY = 2000  # sentences, from which on a progress bar is shown
SPLITS = {"train": "train", "test": "valid"}  # of Ref-YouTube-VOS


@dataclass(frozen=True)
class Clip:
    """A sentence, the video it is about, and where its object has masks."""

    video: str
    sentence: str  # lower-cased, single blanks
    expression: str  # its id within the video
    instance: str  # id of the object; "" where nobody says which (Ref-YouTube-VOS, valid)
    path: Path  # the video file, or the folder of its frames
    masks: Path  # folder of a2d's and refytvos' files, or jhmdb's one
    frames: tuple[int, ...]  # in which the object is annotated
    labelled: tuple[int, ...] = ()  # in which any object of the video is
    names: tuple[str, ...] = ()  # refytvos: of the listed frames, in order
    length: int = 0  # jhmdb: of the frames, so many have masks


@dataclass(frozen=True)
class Annotations:
    """The clips in the order of the files, and the files that say so."""

    clips: list[Clip]
    files: list[Path]


@dataclass
class Faults:
    """What is odd in annotations: notes are handled as documented, problems stop a training or are left out."""

    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_annotations(data: Data, split: Literal["train", "test"]) -> Annotations:
    """The clips of a split, of its first `num_videos` videos.

    What is known to be odd in the official files is left out with a warning that names it: a2d's row whose instance is
    "1 (copy)", of whatever split, so that a run says it once; sentences of an instance that has no mask. Raises
    FileNotFoundError, or ValueError naming file, entry and remedy: another form, a split without clips; and, or with
    on_broken="skip" a warning and the entry left out: an empty sentence, a video that is listed nowhere or has no file
    or no folder of masks, a broken file of masks.
    """
    faults = Faults()
    found = read_with_faults(data, split, faults)
    for note in faults.notes:
        warnings.warn(note, stacklevel=1)  # one place for all callers: each is shown once
    if faults.problems:
        more = f"; and {len(faults.problems) - 10} more" if len(faults.problems) > 10 else ""
        message = f"{data.root}: {len(faults.problems)} entries cannot be used: {'; '.join(faults.problems[:10])}{more}"
        if data.on_broken == "raise":
            raise ValueError(f"{message}; mend them, or leave them out with --data.on-broken skip")
        warnings.warn(f"{message}; left out", stacklevel=1)
    return found


def read_with_faults(data: Data, split: Literal["train", "test"], faults: Faults) -> Annotations:
    """As `read_annotations`, without its warnings and errors about entries: they stand in `faults`."""
    if data.kind == "jhmdb" and split == "train":
        raise ValueError("jhmdb is for evaluation alone, nobody trains on it: evaluate a run of a2d on it")
    readers = {"a2d": _read_a2d, "jhmdb": _read_jhmdb, "refytvos": _read_refytvos}
    clips, files = readers[data.kind](data, split, faults)
    videos: dict[str, None] = {}
    kept = []
    for clip in clips:
        if clip.video not in videos and data.num_videos is not None and len(videos) == data.num_videos:
            continue
        videos[clip.video] = None
        kept.append(clip)
    if not kept:
        first = f" ({faults.problems[0]})" if faults.problems else ""
        raise ValueError(f"{data.root}: no sentence of the {split} split can be used{first}; {REMEDY[data.kind]}")
    return Annotations(kept, files)


def read_masks(data: Data, clip: Clip, frame: int) -> dict[str, np.ndarray]:
    """Instance -> mask bool (H, W), of a frame of `clip.labelled`. Raises FileNotFoundError or BrokenVideo."""
    if data.kind == "a2d":
        return read_h5(clip.masks / f"{frame:05d}.h5")
    if data.kind == "refytvos":
        return read_palette(clip.masks / f"{clip.names[frame]}.png")
    masks = read_mat(clip.masks)
    if not 1 <= frame <= len(masks):
        raise BrokenVideo(clip.masks, f"has masks of frames 1 to {len(masks)}, asked for {frame}", REMEDY["jhmdb"])
    return {clip.instance: masks[frame - 1]}


def normalize_sentence(text: str) -> str:
    """Lower-cased, with single blanks: what MTTR gives to the encoder."""
    return " ".join(text.lower().split())


def _read_a2d(data: Data, split: str, faults: Faults) -> tuple[Iterator[Clip], list[Path]]:
    root, remedy = Path(data.root), REMEDY["a2d"]
    texts = root / "text_annotations"
    listed, written = root / "Release" / "videoset.csv", texts / "a2d_annotation.txt"
    missed_file = texts / "a2d_missed_videos.txt"
    files = [listed, written, *([missed_file] if missed_file.is_file() else [])]
    missed = set(read_text(missed_file, remedy).split()) if missed_file.is_file() else set()
    splits = _videoset(listed, remedy, faults)
    rows = read_csv(written, remedy)
    if not rows or [word.strip() for word in rows[0][1]] != ["video_id", "instance_id", "query"]:
        raise ValueError(f"{written}: the first line is not video_id,instance_id,query; {remedy}")
    folders = [root / "Release" / name for name in CLIP_FOLDERS if (root / "Release" / name).is_dir()]
    if not folders:
        raise FileNotFoundError(f"{root / 'Release'}: has no folder {' or '.join(CLIP_FOLDERS)}; {remedy}")
    return _a2d_clips(written, rows[1:], splits, missed, split, folders[0], faults), files


def _videoset(file: Path, remedy: str, faults: Faults) -> dict[str, str]:
    """Split ("train", "test") of each video."""
    splits: dict[str, str] = {}
    for number, row in read_csv(file, remedy):
        if len(row) != 9 or row[8].strip() not in ("0", "1"):
            raise ValueError(f"{file}: line {number} is not of 9 columns with the split, 0 or 1, as the last; {remedy}")
        video, split = row[0].strip(), "train" if row[8].strip() == "0" else "test"
        if video in splits:
            faults.notes.append(f"{file}: line {number}: video {video} is listed twice")
        if splits.setdefault(video, split) != split:
            raise ValueError(f"{file}: line {number}: video {video} is in training and test; take one line out")
    return splits


def _a2d_clips(
    file: Path,
    rows: Sequence[tuple[int, list[str]]],
    splits: dict[str, str],
    missed: set[str],
    split: str,
    folder: Path,
    faults: Faults,
) -> Iterator[Clip]:
    there = set(os.listdir(folder))
    present: dict[str, dict[int, list[str]] | None] = {}  # video -> frame -> instances; None: cannot be used
    counts: dict[tuple[str, str], int] = {}
    absent, copies = [], []
    # A file of masks is opened for each annotated frame: minutes where the disk is far.
    for number, row in tracked(f"reading {file.name}", rows) if len(rows) > MANY else rows:
        if len(row) != 3:
            raise ValueError(
                f"{file}: line {number} has {len(row)} columns, want 3; a comma in a sentence needs quotes"
            )
        video, instance, sentence = row[0].strip(), row[1].strip(), normalize_sentence(row[2])
        if video in missed:
            continue
        if not re.fullmatch(r"[0-9]{1,9}", instance) and video in splits:
            copies.append(f"{video} {instance!r}")
            continue
        if splits.get(video, split) != split:
            continue
        where = f"{file.name} line {number} ({video} {instance})"
        if video not in splits:
            faults.problems.append(f"{where}: the video is not in videoset.csv")
            continue
        if not sentence:
            faults.problems.append(f"{where}: the sentence is empty")
            continue
        if video not in present:
            present[video] = _a2d_frames(file.parent, folder, there, video, faults)
        instances = present[video]
        if instances is None:
            continue
        instance = str(int(instance))
        frames = tuple(frame for frame, ids in instances.items() if instance in ids)
        if not frames:
            absent.append(f"{video} {instance}")
            continue
        repeat = counts[video, instance] = counts.get((video, instance), 0) + 1
        yield Clip(
            video=video,
            sentence=sentence,
            expression=instance if repeat == 1 else f"{instance}.{repeat}",
            instance=instance,
            path=folder / f"{video}.mp4",
            masks=_h5_folder(file.parent, video),
            frames=frames,
            labelled=tuple(instances),
        )
    if copies:
        faults.notes.append(f"{file}: left out, as the instance is no number: {', '.join(copies[:10])}")
    if absent:
        some = first_of(absent, 10)
        faults.notes.append(f"{file}: {len(absent)} sentences left out, whose instance has no mask: {some}")


def _h5_folder(texts: Path, video: str) -> Path:
    return texts / "a2d_annotation_with_instances" / video


def _a2d_frames(texts: Path, clips: Path, there: set[str], video: str, faults: Faults) -> dict[int, list[str]] | None:
    """Frame -> instances, in order of frames; None with a problem told for a video that cannot be used."""
    if f"{video}.mp4" not in there:
        faults.problems.append(f"{clips / video}.mp4: no such video")
        return None
    folder = _h5_folder(texts, video)
    if not folder.is_dir():
        faults.problems.append(f"{folder}: no such folder of masks")
        return None
    found: dict[int, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if not (match := re.fullmatch(r"([0-9]{1,8})\.h5", name)) or int(match[1]) < 1:
            continue
        if name != f"{int(match[1]):05d}.h5":
            faults.problems.append(f"{folder / name}: a frame's name has five digits")
            continue
        try:
            found[int(match[1])] = read_h5_ids(folder / name)
        except (BrokenVideo, OSError) as error:
            faults.problems.append(str(error))
    if not found:
        faults.problems.append(f"{folder}: has no usable file of masks, as 00001.h5")
        return None
    return found


def _read_jhmdb(data: Data, split: str, faults: Faults) -> tuple[Iterator[Clip], list[Path]]:
    root, remedy = Path(data.root), REMEDY["jhmdb"]
    file = root / "jhmdb_sentences_samples_metadata.json"
    content = read_json(file, f"{remedy}; it comes from MTTR's repository and says which frames are evaluated")
    if not isinstance(content, list) or not content:
        raise ValueError(f"{file}: is not a list of [video, frame, masks, number of frames, sentence]; {remedy}")
    return _jhmdb_clips(root, file, content, faults), [file]


def _jhmdb_clips(root: Path, file: Path, content: list[Any], faults: Faults) -> Iterator[Clip]:
    grouped: dict[tuple[str, str], tuple[Path, Path, int, list[int]]] = {}
    for number, entry in enumerate(content):
        where = f"{file.name} entry {number}"
        if not isinstance(entry, list) or len(entry) != 5 or not all(isinstance(entry[i], str) for i in (0, 1, 2, 4)):
            raise ValueError(f"{file}: entry {number} is not [video, frame, masks, number of frames, sentence]")
        video, picture, mat, length, sentence = entry
        # Paths carry a prefix of the machine where they were listed: only their ends count.
        ends, mat_ends = picture.split("/")[-3:], mat.split("/")[-3:]
        shown = re.fullmatch(r"([0-9]{1,8})\.png", ends[-1])
        if len(ends) != 3 or len(mat_ends) != 3 or ".." in (*ends, *mat_ends) or shown is None:
            raise ValueError(f"{file}: entry {number}: {picture!r} or {mat!r} does not end in <action>/<video>/<file>")
        if type(length) is not int or not 1 <= int(shown[1]) <= length:
            faults.problems.append(f"{where}: frame {shown[1]} of {length!r} frames")
            continue
        if not (sentence := normalize_sentence(sentence)):
            faults.problems.append(f"{where} ({video}): the sentence is empty")
            continue
        folder, masks = root.joinpath("Rename_Images", *ends[:2]), root.joinpath("puppet_mask", *mat_ends)
        if missing := [path for path in (folder / ends[-1], masks) if not path.is_file()]:
            faults.problems.append(f"{missing[0]}: no such file")
            continue
        *known, frames = grouped.setdefault((video, sentence), (folder, masks, length, []))
        if known != [folder, masks, length]:
            faults.problems.append(f"{where} ({video}): other files or another length than in the video's first entry")
        elif int(shown[1]) not in frames:
            frames.append(int(shown[1]))
    counts: dict[str, int] = {}
    for (video, sentence), (folder, masks, length, found) in grouped.items():
        repeat = counts[video] = counts.get(video, 0) + 1
        expression, wanted = "1" if repeat == 1 else f"1.{repeat}", tuple(found)
        yield Clip(video, sentence, expression, "1", folder, masks, wanted, wanted, length=length)


def _read_refytvos(data: Data, split: str, faults: Faults) -> tuple[Iterator[Clip], list[Path]]:
    root, part, remedy = Path(data.root), SPLITS[split], REMEDY["refytvos"]
    file, others = (root / "meta_expressions" / name / "meta_expressions.json" for name in (part, "test"))
    files, videos = [file], _videos(file, remedy)
    if split == "test" and others.is_file():  # the official list of valid has the videos of test, too
        files.append(others)
        tested = _videos(others, remedy)
        videos = {name: entry for name, entry in videos.items() if name not in tested}
    elif split == "test":
        faults.notes.append(
            f"{others}: not there, so the videos of test, if {part} lists them too, are taken for its own"
        )
    return _refytvos_clips(root / part, file, videos, split, faults), files


def _videos(file: Path, remedy: str) -> dict[str, Any]:
    content = read_json(file, remedy)
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, dict):
        raise ValueError(f'{file}: has no table "videos"; {remedy}')
    return videos


def _refytvos_clips(folder: Path, file: Path, videos: dict[str, Any], split: str, faults: Faults) -> Iterator[Clip]:
    form = '{"expressions": {id: {"exp", "obj_id"}}, "frames": [names]}'
    partly: dict[str, str] = {}
    for video, entry in videos.items():
        table: dict[str, Any] = entry if isinstance(entry, dict) else {}
        expressions, frames = table.get("expressions"), table.get("frames")
        named = isinstance(frames, list) and all(isinstance(name, str) for name in frames)
        if not isinstance(expressions, dict) or not frames or not named or Path(video).name != video:
            raise ValueError(f"{file}: video {video!r} is not {form} with at least one frame")
        if bad := [name for name in (*frames, *expressions) if Path(name).name != name]:
            raise ValueError(f"{file}: video {video}: {bad[0]!r}, a frame or expression, cannot be the name of a file")
        if len(set(frames)) < len(frames):
            twice = next(name for name in frames if frames.count(name) > 1)
            raise ValueError(f"{file}: video {video}: frame {twice} is listed twice; {REMEDY['refytvos']}")
        pictures, masks = folder / "JPEGImages" / video, folder / "Annotations" / video
        there = set(os.listdir(pictures)) if pictures.is_dir() else set()
        if lacking := [name for name in frames if f"{name}.jpg" not in there]:
            faults.problems.append(f"{pictures / lacking[0]}.jpg: no such frame, of {len(lacking)} of {len(frames)}")
            continue
        drawn = set(os.listdir(masks)) if masks.is_dir() else set()
        labelled = tuple(place for place, name in enumerate(frames) if f"{name}.png" in drawn)
        for expression, item in expressions.items():
            where = f"{file} video {video} expression {expression}"
            if not isinstance(item, dict) or not isinstance(item.get("exp"), str):
                raise ValueError(f"{where}: is not {form}")
            if not (sentence := normalize_sentence(item["exp"])):
                faults.problems.append(f"{where}: the sentence is empty")
                continue
            instance = _object(item.get("obj_id", ""))
            if instance is None:
                faults.problems.append(f"{where}: obj_id is {item['obj_id']!r}, want the number of an object, from 1")
                continue
            if split == "train" and (not instance or len(labelled) < len(frames)):
                what = f"{len(frames) - len(labelled)} frames have no masks in {masks}" if instance else "has no obj_id"
                faults.problems.append(f"{where}: {what}")
                continue
            known = labelled if instance else ()
            if known and len(known) < len(frames):
                partly[video] = f"{video} ({len(frames) - len(known)} of {len(frames)})"
            yield Clip(
                video,
                sentence,
                str(expression),
                instance if known else "",
                pictures,
                masks,
                known,
                known,
                tuple(frames),
            )
    if partly:
        some = first_of(partly.values(), 10)
        faults.notes.append(f"{folder / 'Annotations'}: frames without masks are not scored: {some}")


def _object(given: Any) -> str | None:
    """The id of an object as masks have it, "" where none is said, None for what is none."""
    text = str(given) if type(given) in (int, str) else "?"
    return "" if text == "" else str(int(text)) if re.fullmatch(r"0{0,3}[1-9][0-9]{0,2}", text) else None
