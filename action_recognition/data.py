"""Data sets of video files in their official layouts.

    build_dataset(config, "train")     # clips drawn anew each time; "val": one center view of each video
    build_dataset(config, "test")      # all views: test_segments x test_crops samples per video

A batch is {"video": (B, 3, T, H, W) float32, "label": (B,) long, "name": list[str], "skipped": list[str]}, in training
with mixing also "target": (B, K), in evaluation also "view": (B,) long. A sample is a pure function of its key (index,
sample seed). That is why mixup and cutmix take their partner by index and not from the batch: how a batch is split over
devices and accumulation steps must not change what is learned. Not here: decoding (video.py) and pixel operations
(engine.data.transforms).
"""

import os
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from action_recognition.configs import Config, Data
from engine.config import Split
from engine.data import transforms
from engine.data.fingerprint import Files
from engine.data.video import FrameCache, VideoInfo, read_usable
from engine.files import read_csv, read_json

Subset = Literal["train", "validation"]
REMEDY = "download it again (`python -m action_recognition.prepare`), or set --data.root"
MAX_CLASSES = 100_000  # a list with larger class numbers has something else in that column
MAX_COUNT_DIGITS = 9


class Entry(NamedTuple):
    """One video: its name (unique in the split), file and class index."""

    name: str
    path: str
    label: int


def build_dataset(config: Config, split: Split) -> "Clips":
    """The clips of a split: training ones drawn anew each time; one center view of each validation video (val), or all
    its test_segments x test_crops views, one after the other (test). Errors as `read_entries`.
    """
    data = config.data
    if split == "train":
        return Clips(data, "train", train=True)
    segments, crops = (data.test_segments, data.test_crops) if split == "test" else (1, 1)
    return Clips(data, "validation", train=False, segments=segments, crops=crops)


def class_names(config: Config) -> list[str]:
    """The name of each class, by index. ValueError where the label file is odd or has not `num_classes` classes."""
    return _checked_names(config.data)


def _checked_names(data: Data) -> list[str]:
    """The name of each class, by index. ValueError where the label file is odd or has not `num_classes` classes."""
    file, names = read_class_names(data)
    if len(names) != data.num_classes:
        found = f"{file}: has {len(names)} classes, the configuration says {data.num_classes}"
        remedy = "to train on it, or give the data set with which the checkpoint was trained"
        raise ValueError(f"{found}; set --data.num-classes {len(names)} {remedy}")
    return names


def read_class_names(data: Data) -> tuple[Path, list[str]]:
    """Where the class names stand, and the names by index, however many."""
    root = Path(data.root)
    if data.kind == "ssv2":
        file = root / "something-something-v2-labels.json"
        labels = read_json(file, REMEDY)
        if not isinstance(labels, dict) or not all(_is_count(str(index)) for index in labels.values()):
            raise ValueError(f"{file}: is not a table of class names and indices; download the label file again")
        names = sorted(labels, key=lambda name: int(labels[name]))
        if [int(labels[name]) for name in names] != list(range(len(names))):
            raise ValueError(f"{file}: class indices are not 0 to {len(names) - 1}; download the label file again")
    elif data.kind == "folder":
        file = root / "train"
        if not file.is_dir():
            raise FileNotFoundError(f"{file}: no such folder; expected train/<class>/<video> and val/<class>/<video>")
        names = sorted(folder.name for folder in file.iterdir() if folder.is_dir() and not _is_hidden(folder.name))
    else:
        file = root / "train.csv"
        names = sorted({row["label"] for row in _load_csv(file, data.kind)})
        if data.kind == "csv" and names and all(name.isascii() and name.isdecimal() for name in names):
            largest = max(names, key=lambda name: (len(name), name))  # the classes are numbered already
            if len(largest) > MAX_COUNT_DIGITS or int(largest) >= MAX_CLASSES:
                remedy = "number the classes from 0, or name them with words"
                raise ValueError(f"{file}: class number {largest[:40]} is too large; {remedy}")
            names = [str(i) for i in range(max(map(int, names)) + 1)]
    return file, names


def annotation_file(data: Data, subset: Subset) -> Path:
    """Where the videos of a subset are listed; for the layout `folder` the folder itself."""
    short = "train" if subset == "train" else "val"
    names = {"ssv2": f"something-something-v2-{subset}.json", "folder": short}
    return Path(data.root) / names.get(data.kind, f"{short}.csv")


def find_videos(data: Data, subset: Subset) -> tuple[Path, list[Entry], list[str]]:
    """The annotation file of a split, the videos in its order, and the names of those that are not on disk.

    Files are not opened.

    ssv2      20bn-something-something-v2/<id>.webm or .mp4 beside something-something-v2-{train,validation,labels}.json
    kinetics  train.csv, val.csv (label,youtube_id,time_start,time_end,split) beside train/ and val/ with
              <id>_<start, 6 digits>_<end, 6 digits>.mp4, directly or in folders; replacement/ takes precedence
    folder    train/<class>/<video>, val/<class>/<video>
    csv       train.csv, val.csv with lines `path,label` (no header), paths relative to the root

    Raises ValueError naming file and entry for an unknown label.
    """
    root, indices = Path(data.root), {name: i for i, name in enumerate(_checked_names(data))}
    source, short = annotation_file(data, subset), "train" if subset == "train" else "val"
    entries: list[Entry] = []
    missing: list[str] = []

    def add(source: Path, name: str, path: str | None, label: str) -> None:
        if label not in indices:
            raise ValueError(f"{source}: video {name} has the label {label!r}, not one of the {len(indices)} classes")
        if path is None:
            missing.append(name)
        else:
            entries.append(Entry(name, path, indices[label]))

    if data.kind == "ssv2":
        folder = root / "20bn-something-something-v2"
        files = {Path(file).stem: file for file in sorted(os.listdir(folder))} if folder.is_dir() else {}
        listed = read_json(source, REMEDY)
        if not isinstance(listed, list):
            raise ValueError(f"{source}: is not a list of videos; {REMEDY}")
        for number, item in enumerate(listed, start=1):
            words = (item.get("id"), item.get("template")) if isinstance(item, dict) else (None,)
            if not all(isinstance(word, str) for word in words):
                problem = f"entry {number} has no id or no template: {str(item)[:200]}"
                raise ValueError(f"{source}: {problem}; download it again")
            file = files.get(item["id"])
            path = None if file is None else str(folder / file)
            add(source, item["id"], path, item["template"].replace("[", "").replace("]", ""))
    elif data.kind == "kinetics":
        tops = (root / short, root / "replacement")
        files = {
            file: os.path.join(folder, file) for top in tops for folder, _, found in os.walk(top) for file in found
        }
        for row in _load_csv(source, data.kind):
            name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
            add(source, name, files.get(f"{name}.mp4"), row["label"])
    elif data.kind == "folder":
        for video in sorted(source.glob("*/*")):
            if not (_is_hidden(video.name) or _is_hidden(video.parent.name)):
                add(source, f"{video.parent.name}/{video.name}", str(video), video.parent.name)
    else:
        for row in _load_csv(source, data.kind):
            video = root / row["path"]
            add(source, row["path"], str(video) if video.is_file() else None, row["label"])
    return source, entries, missing


def read_entries(data: Data, subset: Subset) -> list[Entry]:
    """The videos of a split. Missing ones are an error, or with on_broken="skip" left out with a warning."""
    source, entries, missing = find_videos(data, subset)
    if missing:
        total = len(missing) + len(entries)
        message = f"{source}: {len(missing)} of {total} videos are not below {data.root}: {', '.join(missing[:20])}"
        if data.on_broken == "raise":
            remedy = "run `python -m action_recognition.prepare`, or leave them out with --data.on-broken skip"
            raise FileNotFoundError(f"{message}; {remedy}")
        warnings.warn(f"{message}; left out", stacklevel=2)
    if not entries:
        raise ValueError(f"{source}: no videos; check --data.root {data.root}")
    return entries


class Clips:
    """Samples by (index, sample seed): in training a list of `repeats` samples, in evaluation of one; see `collate`."""

    def __init__(self, data: Data, subset: Subset, *, train: bool, segments: int = 1, crops: int = 1) -> None:
        self.data, self.subset, self.train, self.segments, self.crops = data, subset, train, segments, crops
        self.entries = read_entries(data, subset)
        self.cache = FrameCache(int(data.cache_gib * 2**30))

    def files(self) -> Files:
        """The annotation file, that of the class names, and the videos."""
        sources = (annotation_file(self.data, self.subset), read_class_names(self.data)[0])
        return Files([path for path in sources if path.is_file()], [entry.path for entry in self.entries])

    def __len__(self) -> int:
        return len(self.entries) * (1 if self.train else self.segments * self.crops)

    def __getitem__(self, key: tuple[int, int]) -> list[dict[str, Any]]:
        index, sample_seed = key
        if not self.train:
            index, view = divmod(index, self.segments * self.crops)
            sample, video = self._read(index, None, view)
            return [sample | {"video": video, "view": view}]
        return [self._training_sample(index, np.random.default_rng([sample_seed, i])) for i in range(self.data.repeats)]

    def _training_sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        data = self.data
        sample, video = self._read(index, rng, 0)
        if not (data.mixup or data.cutmix):
            return sample | {"video": video}
        target = torch.zeros(data.num_classes)
        share = 1.0  # of the sample itself; the partner has the rest
        if rng.random() < data.mix_probability:
            partner, other = self._read(int(rng.integers(len(self.entries))), rng, 0)
            cut = bool(data.cutmix) and (not data.mixup or rng.random() < 0.5)
            alpha = data.cutmix if cut else data.mixup
            video, share = mix(video, other, float(rng.beta(alpha, alpha)), cut, rng)
            target[partner["label"]] += 1 - share
            sample["skipped"] = sample["skipped"] + partner["skipped"]
        target[sample["label"]] += share
        return sample | {"video": video, "target": target}

    def _read(self, index: int, rng: np.random.Generator | None, view: int) -> tuple[dict[str, Any], Tensor]:
        """The video at `index`, or with on_broken="skip" the nearest usable one after it."""
        data, entries = self.data, self.entries

        def read(i: int) -> Tensor:
            return read_clip(data, entries[i].path, rng, view, self.segments, self.crops, self.cache)

        video, used, skipped = read_usable(
            read, index, len(entries), lambda i: entries[i].name, data.on_broken, data.root
        )
        return {"name": entries[used].name, "label": entries[used].label, "skipped": skipped}, video


def clip_indices(
    data: Data, info: VideoInfo, rng: np.random.Generator | None, segment: int = 0, segments: int = 1
) -> np.ndarray:
    """The frames of a clip, (num_frames,) int64: at random with `rng`, else number `segment` of `segments`."""
    if data.sampling == "segments":
        return transforms.segment_indices(info.num_frames, data.num_frames, rng, segment, segments)
    args = (info.timestamps, info.seconds, data.num_frames, data.stride)
    return transforms.dense_indices(*args, rng, segment, segments)


def read_clip(
    data: Data,
    path: str | Path,
    rng: np.random.Generator | None,
    view: int = 0,
    segments: int = 1,
    crops: int = 1,
    cache: FrameCache | None = None,
) -> Tensor:
    """One clip of a video, (3, T, H, W) float32: augmented with `rng`, else view number `view` of segments x crops.

    The file is opened here, in the worker, and closed again. Raises FileNotFoundError or BrokenVideo.
    """
    segment, crop = divmod(view, crops)
    cache = cache or FrameCache(0)
    indices = clip_indices(data, cache.probe(path), rng, segment, segments)
    clip = torch.from_numpy(cache.read_frames(path, indices)).permute(0, 3, 1, 2)
    if rng is None:
        return transforms.normalize(transforms.view_crop(clip, data.image_size, crop, crops), data.mean, data.std)
    clip = transforms.random_resized_crop(clip, data.image_size, data.crop_scale, rng)
    if data.flip and rng.random() < 0.5:
        clip = clip.flip(-1)
    clip = transforms.rand_augment(clip, data.rand_augment, data.rand_augment_magnitude, rng)
    clip = transforms.color_jitter(clip, data.color_jitter, rng)
    return transforms.random_erase(transforms.normalize(clip, data.mean, data.std), data.erase, rng)


def mix(video: Tensor, other: Tensor, share: float, cut: bool, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Mixup, or with `cut` cutmix (one box through all frames). Returns the mixture and the share that is `video`'s."""
    if not cut:
        return share * video + (1 - share) * other, share
    height, width = video.shape[-2:]
    top, bottom, left, right = transforms.cutmix_box(height, width, 1 - share, rng)
    video = video.clone()
    video[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return video, 1 - (bottom - top) * (right - left) / (height * width)


def collate(samples: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Lists of samples -> one batch, repeats of a video side by side."""
    views = [view for sample in samples for view in sample]
    batch: dict[str, Any] = {
        "video": torch.stack([view["video"] for view in views]),
        "label": torch.tensor([view["label"] for view in views]),
        "name": [view["name"] for view in views],
        "skipped": [name for view in views for name in view["skipped"]],
    }
    if "target" in views[0]:
        batch["target"] = torch.stack([view["target"] for view in views])
    if "view" in views[0]:
        batch["view"] = torch.tensor([view["view"] for view in views])
    return batch


def _load_csv(path: Path, kind: str) -> list[dict[str, str]]:
    """The rows by column. ValueError naming file and line for another form, FileNotFoundError."""
    columns = {"path", "label"} if kind == "csv" else {"label", "youtube_id", "time_start", "time_end"}
    lines = [fields for _, fields in read_csv(path, REMEDY)]
    names = ["path", "label"] if kind == "csv" else lines.pop(0) if lines else []
    if lacking := columns - set(names):
        raise ValueError(f"{path}: the columns {', '.join(sorted(lacking))} are missing")
    rows = []
    for number, fields in enumerate(lines, start=1):
        row = dict(zip(names, fields, strict=False))
        if columns - row.keys():
            raise ValueError(f"{path}: row {number} is incomplete: {row}")
        if len(fields) > len(names):
            raise ValueError(f"{path}: row {number} has more columns than there are; quote a comma: {str(row)[:200]}")
        if kind == "kinetics" and not (_is_count(row["time_start"]) and _is_count(row["time_end"])):
            raise ValueError(f"{path}: row {number}: the times are not whole seconds: {str(row)[:200]}")
        rows.append(row)
    if kind == "csv" and rows and _is_heading(rows[0], path.parent):
        remedy = "take the line out; if it is a video, give its file a suffix"
        raise ValueError(f"{path}: line 1 ({rows[0]['path']},{rows[0]['label']}) is a heading, not a video; {remedy}")
    return rows


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MAX_COUNT_DIGITS


def _is_heading(row: dict[str, str], root: Path) -> bool:
    """Whether the first line of a list names its columns: without a suffix, and no file."""
    return not Path(row["path"]).suffix and not (root / row["path"]).is_file()


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is one that desktops and notebooks leave everywhere."""
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini", "__MACOSX")
