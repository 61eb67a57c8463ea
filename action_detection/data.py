"""Untrimmed videos in their official layouts, cut into windows.

    build_dataset(config, "train")     # one random window per video
    build_dataset(config, "test")      # all windows of the test subset, those of a video one after the other

A window has N times of `frames_per_time` frames; time i covers [i, i + 1), seconds = start + times * seconds_per_time.
A batch, in training and evaluation alike:

    video (B, 3, T, H, W) float32, normalized, zero where there is no frame    mask (B, N) bool, True where there is one
    segments: B tensors (M, 2) in times, inside the window    labels: B tensors (M,) long, indices of the class names
    name: list[str]    window (B,) long    start, seconds_per_time, duration (B,) float32 seconds    skipped: list[str]

A sample is a pure function of its key (index, sample seed). Frames are taken by presentation time, so a variable frame
rate changes nothing, and only those of the window are decoded. Not here: decoding and pixel operations (`engine.data`),
the metric (evaluate.py).
"""

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_detection.annotations import LABELS, Annotations, Video, read_blocked, read_database, warn_of_unknown
from action_detection.configs import Config, Data
from engine.config import Split
from engine.data import transforms
from engine.data.fingerprint import Files
from engine.data.video import BrokenVideo, FrameCache, read_usable

ANNOTATIONS = {"activitynet": "activity_net.v1-3.min.json", "thumos": "thumos_14_anno.json"}
VIDEO_FOLDER = "videos"
SUFFIXES = (".mp4", ".mkv", ".webm")
MAX_CHUNK_BYTES = 1 << 28  # decoded frames at full size in memory at once
MAX_WINDOWS = 100_000  # of one video; 20 days where a window moves on by 17 seconds
MAX_RATIO = 100  # of the annotated to the true duration, beyond which it is one in milliseconds
ON_SCREEN = 1e-4  # seconds; so that rounding never shows the frame before


def annotation_file(data: Data) -> Path:
    """Where the annotations of a data set stand."""
    return Path(data.root) / ANNOTATIONS[data.kind]


def read_annotations(data: Data) -> Annotations:
    """The videos of the two subsets, at most `num_videos` of each, with all their segments.

    activitynet  <root>/activity_net.v1-3.min.json, <root>/videos/v_<id>.mp4, .mkv or .webm
    thumos       <root>/thumos_14_anno.json (OpenTAD's), <root>/videos/video_validation_*.mp4 and video_test_*.mp4

    Both: {"database": {id: {"duration", "subset", "annotations": [{"label", "segment": [start, end]}]}}}. The classes
    are the labels of the whole file, or the lines of <root>/category_idx.txt. A segment past the end of its video is
    clipped and one without length dropped, with a warning that names it. Repeated annotations stay: the official metric
    counts them. Videos without annotations stay. Raises FileNotFoundError, or ValueError naming file, entry and remedy
    for: another form, a video listed twice, no duration, an unknown class, other than `num_classes` classes, a subset
    without videos.
    """
    file = annotation_file(data)
    names, database = read_database(file)
    if len(names) != data.num_classes:
        remedy = f"set --data.num-classes {len(names)} to train on it, or give the data set of the checkpoint"
        raise ValueError(f"{file}: has {len(names)} classes, the configuration says {data.num_classes}; {remedy}")
    indices, videos, odd = {name: i for i, name in enumerate(names)}, {}, []
    taken = {data.train_subset: 0, data.test_subset: 0}
    blocked = set() if data.blocked is None else read_blocked(data.blocked)
    warn_of_unknown(blocked, database, file)
    for name, entry in database.items():
        subset = entry["subset"]
        if name in blocked or subset not in taken or (data.num_videos is not None and taken[subset] == data.num_videos):
            continue
        taken[subset] += 1
        duration, segments, labels = float(entry["duration"]), [], []
        for item in entry["annotations"]:
            start, end = (min(max(float(value), 0.0), duration) for value in item["segment"])
            if end <= start:
                odd.append(f"{name} {item['segment']} ({item['label']}): without length in a video of {duration} s")
                continue
            if [start, end] != item["segment"]:
                odd.append(f"{name} {item['segment']} ({item['label']}): clipped to [{start}, {end}]")
            segments.append([start, end])
            labels.append(indices[item["label"]])
        videos[name] = Video(
            duration,
            subset,
            torch.tensor(segments, dtype=torch.float64).reshape(-1, 2),
            torch.tensor(labels, dtype=torch.long),
        )
    if odd:
        more = f"; and {len(odd) - 10} more" if len(odd) > 10 else ""
        warnings.warn(f"{file}: {len(odd)} segments: {'; '.join(odd[:10])}{more}", stacklevel=2)
    for subset, count in taken.items():
        if count == 0:
            have = ", ".join(sorted({entry["subset"] for entry in database.values()})) or "none"
            raise ValueError(f"{file}: no video of the subset {subset!r}, there are: {have}; set --data.*-subset")
    return Annotations(names, videos)


def find_files(data: Data, names: list[str]) -> tuple[dict[str, str], list[str]]:
    """The file of each video that is there, and the names of those that are missing. Files are not opened."""
    folder = Path(data.root) / VIDEO_FOLDER
    prefix = "v_" if data.kind == "activitynet" else ""
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    paths = {}
    for name in names:
        for suffix in SUFFIXES:
            if f"{prefix}{name}{suffix}" in there:
                paths[name] = str(folder / f"{prefix}{name}{suffix}")
                break
    return paths, [name for name in names if name not in paths]


class Windows:
    """Samples by (index, sample seed). Training: a random window of video `index`; else window `index` of all videos.

    videos: by name; paths: of those among them that are used, at least one.
    """

    def __init__(self, data: Data, videos: Mapping[str, Video], paths: Mapping[str, str], *, train: bool) -> None:
        self.data, self.train, self.videos, self.paths = data, train, videos, dict(paths)
        self.names = [name for name in videos if name in paths]
        self.cache = FrameCache(int(data.cache_gib * 2**30))
        self.items = [
            (i, number)
            for i, name in enumerate(self.names)
            for number in range(1 if train else len(window_starts(data, videos[name].duration, name)))
        ]

    def files(self) -> Files:
        """The annotations, that of the class names, and the videos."""
        own = [annotation_file(self.data), Path(self.data.root) / LABELS]
        return Files([path for path in own if path.is_file()], [self.paths[name] for name in self.names])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The sample, or with on_broken="skip" one of the next usable video instead of an unusable one."""
        index, sample_seed = key
        data, (first, number) = self.data, self.items[index]

        def read(i: int) -> dict[str, Any]:
            name, window = self.names[i], number if i == first else 0
            sample = read_window(
                data, self.paths[name], self.videos[name], window, sample_seed if self.train else None, self.cache
            )
            return sample | {"name": name, "window": window}

        sample, _, skipped = read_usable(
            read, first, len(self.names), lambda i: self.names[i], data.on_broken, data.root
        )
        return sample | {"skipped": skipped}


def window_seconds(data: Data, duration: float) -> float:
    """How long a window lasts in a video of `duration` seconds."""
    return duration if data.windows == "whole" else data.num_frames / data.fps


def window_starts(data: Data, duration: float, name: str = "") -> list[float]:
    """Where the windows of a test video begin, in seconds. The last one is moved back so that it ends with the video.

    A video not longer than a window has one, padded. ValueError, with its name, for one of which there are too many.
    """
    length = window_seconds(data, duration)
    stride = length * (1 - data.overlap)
    last = max(duration - length, 0.0)
    count = math.ceil(last / stride - 1e-6)
    if count > MAX_WINDOWS:
        what = f"{annotation_file(data)}: video {name}, of {duration:g} seconds, has {count} windows"
        raise ValueError(f"{what}, too many; is it in milliseconds?")
    return [i * stride for i in range(count)] + [last]


def random_start(data: Data, video: Video, rng: np.random.Generator) -> float:
    """Where a training window begins, in seconds: at random among those that hold enough of a random instance.

    Enough is `min_overlap` of its length; an instance too long for that does not count. Anywhere if none does.
    """
    length = window_seconds(data, video.duration)
    last = max(video.duration - length, 0.0)
    fitting = [(s, e) for s, e in video.segments.tolist() if data.min_overlap * (e - s) <= length]
    low, high = 0.0, last
    if fitting:
        start, end = fitting[int(rng.integers(len(fitting)))]
        need = data.min_overlap * (end - start)
        low, high = min(max(start + need - length, 0.0), last), min(max(end - need, 0.0), last)
    return float(rng.uniform(low, high))


def read_window(
    data: Data, path: str, video: Video, number: int, sample_seed: int | None, cache: FrameCache | None = None
) -> dict[str, Any]:
    """One sample but for its name: with `sample_seed` a random window, augmented; else window `number`, center crop.

    The file is opened here, in the worker, and closed again. Raises FileNotFoundError or BrokenVideo.
    """
    cache = cache or FrameCache(0)
    info = cache.probe(path)
    check_duration(path, video.duration, info.seconds)
    rng = None if sample_seed is None else np.random.default_rng([sample_seed, 0])
    start = random_start(data, video, rng) if rng is not None else window_starts(data, video.duration)[number]
    length = window_seconds(data, info.seconds)
    # A file shorter than annotated: the window lies in what there is.
    start = min(start, max(info.seconds - length, 0.0))
    times = start + (np.arange(data.num_frames) + 0.5) * (length / data.num_frames)
    num_real = max(int((times < info.seconds).sum()), 1)
    indices = np.searchsorted(info.timestamps, times[:num_real] + ON_SCREEN, side="right") - 1
    clip = _read_pixels(data, path, indices, sample_seed, cache, info.height * info.width * 3)
    frames = torch.zeros(3, data.num_frames, data.image_size, data.image_size)
    frames[:, :num_real] = transforms.normalize(clip, data.mean, data.std)
    seconds_per_time = length / data.num_times
    segments, labels = visible_instances(
        video, start, num_real * seconds_per_time / data.frames_per_time, data.min_overlap
    )
    return {
        "video": frames,
        "mask": torch.arange(data.num_times) * data.frames_per_time < num_real,
        "segments": ((segments - start) / seconds_per_time).float(),
        "labels": labels,
        "start": start,
        "seconds_per_time": seconds_per_time,
        "duration": video.duration,
    }


def check_duration(path: str, annotated: float, seconds: float) -> None:
    """BrokenVideo for a video that lasts far less than annotated, as one does of which that is in milliseconds."""
    if annotated > MAX_RATIO * seconds:
        problem = f"lasts {seconds:.3g} seconds, annotated are {annotated:.6g}"
        raise BrokenVideo(path, problem, "annotate in seconds, or download it again")


def visible_instances(video: Video, start: float, length: float, min_overlap: float) -> tuple[Tensor, Tensor]:
    """Segments (M, 2) in seconds, clipped to the window, and labels (M,), each once.

    Left out: an instance of which less than the share `min_overlap` is inside.
    """
    clipped = video.segments.clamp(start, start + length)
    inside, whole = clipped[:, 1] - clipped[:, 0], video.segments[:, 1] - video.segments[:, 0]
    seen: dict[tuple[float, float, int], int] = {}
    for i in torch.nonzero((inside > 0) & (inside >= min_overlap * whole - 1e-6)).flatten().tolist():
        seen.setdefault((*video.segments[i].tolist(), int(video.labels[i])), i)
    kept = list(seen.values())
    return clipped[kept], video.labels[kept]


def _read_pixels(
    data: Data, path: str, indices: np.ndarray, sample_seed: int | None, cache: FrameCache, frame_bytes: int
) -> Tensor:
    """Frames cropped and resized, uint8 (T, 3, S, S); decoded in pieces, so that few are in memory at full size."""
    size, pieces = data.image_size, []
    for part in np.array_split(indices, -(-len(indices) * frame_bytes // MAX_CHUNK_BYTES)):
        clip = torch.from_numpy(cache.read_frames(path, part)).permute(0, 3, 1, 2)
        if sample_seed is None:
            pieces.append(transforms.view_crop(clip, size, 0, 1))
        else:  # one crop for the whole window: each piece draws it anew from the same generator
            crop = np.random.default_rng([sample_seed, 1])
            pieces.append(transforms.random_resized_crop(clip, size, data.crop_scale, crop))
    clip = torch.cat(pieces)
    if sample_seed is None:
        return clip
    rng = np.random.default_rng([sample_seed, 2])
    if data.flip and rng.random() < 0.5:
        clip = clip.flip(-1)
    return transforms.color_jitter(clip, data.color_jitter, rng)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> one batch, see the top of this file."""
    return {
        "video": torch.stack([sample["video"] for sample in samples]),
        "mask": torch.stack([sample["mask"] for sample in samples]),
        "segments": [sample["segments"] for sample in samples],
        "labels": [sample["labels"] for sample in samples],
        "name": [sample["name"] for sample in samples],
        "window": torch.tensor([sample["window"] for sample in samples]),
        "start": torch.tensor([sample["start"] for sample in samples], dtype=torch.float32),
        "seconds_per_time": torch.tensor([sample["seconds_per_time"] for sample in samples], dtype=torch.float32),
        "duration": torch.tensor([sample["duration"] for sample in samples], dtype=torch.float32),
        "skipped": [name for sample in samples for name in sample["skipped"]],
    }


def build_dataset(config: Config, split: Split) -> Windows:
    """The windows of a split: one drawn per training video and epoch; all of each test video, one after the other (val
    and test alike). Errors as `read_annotations`, and FileNotFoundError for missing videos.
    """
    return Windows(config.data, *_usable(config.data, split == "train"), train=split == "train")


def class_names(config: Config) -> list[str]:
    """The name of each class, by index. Errors as `read_annotations`."""
    return list(read_annotations(config.data).class_names)


def windows_of_file(data: Data, path: Path | str) -> Windows:
    """The windows of a video file without annotations, in order, as samples for `collate` by key (index, 0).

    Raises FileNotFoundError or BrokenVideo.
    """
    name = Path(path).stem
    seconds = FrameCache(0).probe(path).seconds
    video = Video(seconds, "", torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, dtype=torch.long))
    return Windows(data, {name: video}, {name: str(path)}, train=False)


def _usable(data: Data, train: bool) -> tuple[dict[str, Video], dict[str, str]]:
    """The videos of a subset and their files. Missing ones are an error, or with on_broken="skip" left out by name.

    Where they are left out of the test, the metric still counts what they hold.
    """
    subset = data.train_subset if train else data.test_subset
    videos = {name: video for name, video in read_annotations(data).videos.items() if video.subset == subset}
    if train and not data.train_on_empty:
        videos = {name: video for name, video in videos.items() if len(video.labels)}
    paths, missing = find_files(data, list(videos))
    if missing:
        folder = Path(data.root) / VIDEO_FOLDER
        message = f"{folder}: {len(missing)} of {len(videos)} {subset} videos are missing: {', '.join(missing[:20])}"
        if data.on_broken == "raise":
            remedy = "run `python -m action_detection.prepare`, or leave them out with --data.on-broken skip"
            raise FileNotFoundError(f"{message}; {remedy}")
        warnings.warn(f"{message}; left out", stacklevel=3)
    if not paths:
        raise ValueError(f"{data.root}: no {subset} videos to use; check --data.root and the subsets")

    return videos, paths
