"""Windows of videos, a sentence, and the masks of the object that it names among others.

    build_dataset(config, "train")     # a2d: each annotated frame of each sentence, or each sentence with one at random
    build_dataset(config, "test")      # each pair once; refytvos: each expression once, with all listed frames

A batch, in training and evaluation alike:

    video (B, 3, T, H, W) float32, normalized, zero at right and bottom where there is none    padding (B, H, W) bool
    text (B, S, D) float32 features of tokens, or with data.text "words" (B, S) long, ids    text_padding (B, S) bool
    annotated (B, T) bool: frames with masks, T' of a sample    masks: B tensors (M, T', H, W) uint8, M >= 1 objects
    referred (B,) long: the object that is meant, among the M    visible: B tensors (T',) bool: whether it is there
    num_targets: float, sum of M T'    frame: list[int], of the T' the one that is evaluated; -1: all of them
    name, skipped: list[str]    original_size, size: lists of (height, width): of the masks in the files, of the resized
    frames without padding

A window is MTTR's: frames f - 1 - T // 2 ... f - 1 + (T + 1) // 2 - 1 around the annotated frame f, which counts from
1; before the first and past the last frame these are repeated. A sample is a pure function of its key (index, sample
seed). Not here: files of annotations and masks (annotations.py, masks.py), the metric (evaluate.py).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.backbones.text import Text, build_text
from engine.config import Split
from engine.data.fingerprint import Files
from engine.data.transforms import normalize, resize, resized_size
from engine.data.video import BrokenVideo, FrameCache, read_usable
from engine.detr.padding import pad_images
from vos.annotations import Annotations, Clip, normalize_sentence, read_annotations, read_masks
from vos.configs import Config, Data
from vos.masks import read_pixels
from vos.sentences import mirror_sentence

TEXT_FOLDER = "text_features"  # below the data set's root: what the encoder said
SHAPE_SLACK = 0.03  # a mask of other sides than the frame's, but for this of their ratio, is resized
Masks = dict[str, np.ndarray]


class Samples:
    """Samples by (index, sample seed), of at least one clip."""

    def __init__(self, data: Data, annotations: Annotations, text: Text, *, train: bool) -> None:
        self.data, self.annotations, self.text, self.train = data, annotations, text, train
        self.clips = annotations.clips
        self.cache = FrameCache(int(data.cache_gib * 2**30))
        self.items = [(i, place) for i, clip in enumerate(self.clips) for place in _places(data, clip, train)]
        # Of each item its video, of each video its first item: where one is broken, so are all of its items.
        order = {name: i for i, name in enumerate(dict.fromkeys(clip.video for clip in self.clips))}
        self.video_of = [order[self.clips[i].video] for i, _ in self.items]
        first: dict[int, int] = {}
        for item, video in enumerate(self.video_of):
            first.setdefault(video, item)
        self.first_of = [first[video] for video in range(len(order))]
        sentences = [clip.sentence for clip in self.clips]
        text.prepare(sentences + ([mirror_sentence(s) for s in sentences] if train and data.flip else []))

    def files(self) -> Files:
        """The annotations, and the first and last files of frames and masks of each clip."""
        found: dict[Path, None] = {}
        for clip in self.clips:
            frames = clip.frames or range(len(clip.names))
            for frame in frames[:: max(len(frames) - 1, 1)]:
                found |= dict.fromkeys(_files_of(self.data, clip, frame))
            found |= dict.fromkeys([clip.path] if self.data.kind == "a2d" else [])
        return Files(self.annotations.files, list(found))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The sample. With on_broken="skip", of an unusable file: in training one of the next usable video, in
        evaluation a gray one, so that the metric sees each sample once.
        """
        index, sample_seed = key
        if self.train:
            first = self.video_of[index]

            def place_of(video: int) -> int:
                return index if video == first else self.first_of[video]

            sample, _, skipped = read_usable(
                lambda video: self._training(place_of(video), sample_seed),
                first,
                len(self.first_of),
                lambda video: self._name(*self.items[place_of(video)]),
                self.data.on_broken,
                self.data.root,
            )
            return sample | {"skipped": skipped}
        clip, place = self.clips[self.items[index][0]], self.items[index][1]
        try:
            return self._evaluated(clip, place) | {"skipped": []}
        except (BrokenVideo, OSError) as error:
            if self.data.on_broken == "raise":
                raise
            warnings.warn(f"skipped: {error}", stacklevel=2)
            return self._blank(clip, place) | {"skipped": [self._name(*self.items[index])]}

    def _name(self, index: int, place: int) -> str:
        clip = self.clips[index]
        return sample_name(clip, 0 if self.data.kind == "refytvos" else place)

    def _training(self, index: int, sample_seed: int) -> dict[str, Any]:
        data, rng = self.data, np.random.default_rng([sample_seed, 0])
        clip, place = self.clips[self.items[index][0]], self.items[index][1]
        if data.kind == "refytvos":
            window, masks = self._seen_window(clip, place)
            frames = list(dict.fromkeys(window))
            annotated, at, name = [window.index(frame) for frame in frames], -1, sample_name(clip)
            pixels = self._frames(clip, window)
        else:
            frame = place or int(rng.choice(clip.frames))
            window = centered_window(frame, data.window)
            near = [f for f in clip.labelled if window[0] < f <= window[-1] + 1]
            frames = near if data.supervise == "all" else [frame]
            annotated, at, name = [f - 1 - window[0] for f in frames], frames.index(frame), sample_name(clip, frame)
            masks = [read_masks(data, clip, frame) for frame in frames]
            pixels = self._frames(clip, window, max(frames))
        flipped, files = rng.random() < data.flip, [_mask_file(data, clip, frame) for frame in frames]
        return make_sample(data, self.text, clip, pixels, annotated, masks, at, name, flipped, files)

    def _seen_window(self, clip: Clip, place: int) -> tuple[list[int], list[Masks]]:
        """Refytvos: the listed frames of the window that begins at `place`, the last repeated in a short video, and the
        masks of each once; of the next window if the object is not in this one.
        """
        starts = _places(self.data, clip, train=True)
        for start in [*starts[starts.index(place) :], *starts[: starts.index(place)]]:
            frames = list(range(start, min(start + self.data.window, len(clip.names))))
            masks = [read_masks(self.data, clip, frame) for frame in frames]
            if any(clip.instance in found for found in masks):
                return frames + [frames[-1]] * (self.data.window - len(frames)), masks
        problem = f"has no frame with object {clip.instance}, which {clip.sentence!r} is about"
        raise BrokenVideo(clip.masks, problem, "leave it out with --data.on-broken skip")

    def _evaluated(self, clip: Clip, place: int) -> dict[str, Any]:
        data = self.data
        if data.kind == "refytvos":
            window = annotated = list(range(len(clip.names)))
            pixels, at, name = self._frames(clip, window), -1, sample_name(clip)
            known = set(clip.labelled)
            masks = [read_masks(data, clip, frame) if frame in known else {} for frame in window]
            files = [_mask_file(data, clip, frame) for frame in window]
        else:
            pixels, at, name = (
                self._frames(clip, centered_window(place, data.window), place),
                0,
                sample_name(clip, place),
            )
            annotated, masks = [data.window // 2], [read_masks(data, clip, place)]
            files = [_mask_file(data, clip, place)]
        return make_sample(data, self.text, clip, pixels, annotated, masks, at, name, files=files)

    def _blank(self, clip: Clip, place: int) -> dict[str, Any]:
        """Gray frames of the size of the masks, if these can be read; else without a mask."""
        whole = self.data.kind == "refytvos"
        length = len(clip.names) if whole else self.data.window
        annotated = list(range(length)) if whole else [length // 2]
        try:
            masks = [read_masks(self.data, clip, frame) for frame in (clip.labelled if whole else (place,))]
        except (BrokenVideo, OSError):
            masks = []
        masks = masks if len(masks) == len(annotated) else [{} for _ in annotated]
        side = self.data.image_size
        size = next((mask.shape for found in masks for mask in found.values()), (side, side))
        gray, name = np.full((length, *size, 3), 127, np.uint8), self._name(self.clips.index(clip), place)
        return make_sample(self.data, self.text, clip, gray, annotated, masks, -1 if whole else 0, name)

    def _frames(self, clip: Clip, window: Sequence[int], last: int = 0) -> np.ndarray:
        """The pixels of a window (places from 0), uint8 (T, H, W, 3). last: the last annotated frame, from 1."""
        if self.data.kind == "a2d":
            count = self.cache.probe(clip.path).num_frames
            if last > count:
                problem = f"has {count} frames, annotated is frame {last}"
                raise BrokenVideo(clip.path, problem, "is it the right video? Download it again")
            return self.cache.read_frames(clip.path, np.clip(window, 0, count - 1))
        if self.data.kind == "jhmdb":
            names = [f"{place + 1:05d}.png" for place in np.clip(window, 0, clip.length - 1).tolist()]
        else:
            names = [f"{clip.names[place]}.jpg" for place in window]
        read = {name: read_pixels(clip.path / name) for name in dict.fromkeys(names)}
        first = read[names[0]].shape
        for name, frame in read.items():
            if frame.shape != first:
                sizes = f"is {frame.shape[1]} x {frame.shape[0]}, the first frame {first[1]} x {first[0]}"
                raise BrokenVideo(clip.path / name, sizes, "get the frames of this video again")
        return np.stack([read[name] for name in names])


def build_dataset(config: Config, split: Split) -> Samples:
    """The samples of a split (val and test are the same). Errors as `read_annotations` and `build_text`, and ValueError
    where the encoder's features are not of the model's `text_width`.
    """
    data, train = config.data, split == "train"
    annotations = read_annotations(data, "train" if train else "test")
    text = build_text(data.text, data.max_words, cache=Path(data.root) / TEXT_FOLDER)
    if text.width not in (0, config.model.text_width):
        wanted = config.model.text_width
        raise ValueError(f"--model.text-width {wanted}: the encoder {data.text} has {text.width} channels; set it so")
    return Samples(data, annotations, text, train=train)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of unequal sizes -> one batch, see the top of this file. ValueError for unequal numbers of frames, as the
    videos of refytvos' evaluation have them.
    """
    lengths = {sample["video"].shape[1] for sample in samples}
    if len(lengths) > 1:
        raise ValueError(f"videos of {min(lengths)} to {max(lengths)} frames in a batch; use --run.evaluation-batch 1")
    flat, padding = pad_images([sample["video"].flatten(0, 1) for sample in samples])
    height, width = flat.shape[-2:]
    longest = max(len(sample["text"]) for sample in samples)
    masks = [sample["masks"] for sample in samples]
    return {
        "video": flat.unflatten(1, (3, -1)),
        "padding": padding,
        "text": torch.stack([_padded(sample["text"], longest) for sample in samples]),
        "text_padding": torch.stack([torch.arange(longest) >= len(sample["text"]) for sample in samples]),
        "annotated": torch.stack([sample["annotated"] for sample in samples]),
        "masks": [F.pad(mask, (0, width - mask.shape[-1], 0, height - mask.shape[-2])) for mask in masks],
        "referred": torch.tensor([sample["referred"] for sample in samples]),
        "visible": [sample["visible"] for sample in samples],
        "num_targets": float(sum(mask.shape[0] * mask.shape[1] for mask in masks)),
        "frame": [sample["frame"] for sample in samples],
        "name": [sample["name"] for sample in samples],
        "skipped": [name for sample in samples for name in sample["skipped"]],
        "original_size": [sample["original_size"] for sample in samples],
        "size": [sample["size"] for sample in samples],
    }


def class_names(config: Config) -> list[str]:
    """The one class."""
    return ["referred"]


def sample_of_frames(data: Data, text: Text, frames: np.ndarray, sentence: str, name: str) -> dict[str, Any]:
    """Frames without annotations as a sample for `collate`, all of them to be looked at. frames: uint8 (T, H, W, 3)."""
    clip = Clip(name, normalize_sentence(sentence), "", "", Path(name), Path(name), ())
    if not clip.sentence:
        raise ValueError("the sentence is empty; say which object is meant")
    annotated = list(range(len(frames)))
    return make_sample(data, text, clip, frames, annotated, [{} for _ in annotated], -1, name) | {"skipped": []}


def sample_name(clip: Clip, frame: int = 0) -> str:
    """The key of a sample; frame: from 1, of a2d and jhmdb."""
    return f"{clip.video} {frame} {clip.expression}" if frame else f"{clip.video} {clip.expression}"


def centered_window(frame: int, length: int) -> list[int]:
    """The places, from 0, of the frames around frame number `frame`, from 1; they may lie outside the video."""
    first = frame - 1 - length // 2
    return list(range(first, first + length))


def make_sample(
    data: Data,
    text: Text,
    clip: Clip,
    pixels: np.ndarray,
    annotated: list[int],
    masks: list[Masks],
    frame: int,
    name: str,
    flipped: bool = False,
    files: Sequence[Path] = (),
) -> dict[str, Any]:
    """A sample for `collate`, but for `skipped`. pixels: uint8 (T, H, W, 3); annotated: the places of `masks` in it.

    files: that the masks stand in, for messages. Raises BrokenVideo for a mask that is not of the frames' shape, as one
    that was stored the other way round is not.
    """
    shape = (pixels.shape[1], pixels.shape[2])
    objects = sorted({*(key for found in masks for key in found), clip.instance}, key=lambda key: (len(key), key))
    original = next((mask.shape for found in masks for mask in found.values()), shape)
    stack = np.zeros((len(objects), len(masks), *original), np.uint8)
    for t, found in enumerate(masks):
        for key, mask in found.items():
            if mask.shape != original or not has_shape(mask.shape, shape):
                have, want = (f"{size[1]} x {size[0]}" for size in (mask.shape, shape))
                turned = ": were they stored the other way round?" if mask.shape == shape[::-1] else ""
                problem = f"has a mask of {have} for frames of {want} (width x height){turned}"
                if has_shape(mask.shape, shape):
                    problem = f"has a mask of {have}, of {original[1]} x {original[0]} before (width x height)"
                raise BrokenVideo(files[t] if files else clip.masks, problem, "get the masks of this video again")
            stack[objects.index(key), t] = mask
    referred = objects.index(clip.instance)
    size = resized_size(*shape, data.image_size, data.max_size)
    video = resize(torch.from_numpy(pixels).permute(0, 3, 1, 2), *size)
    small = F.interpolate(torch.from_numpy(stack), size=size, mode="nearest")
    sentence = clip.sentence
    if flipped:
        video, small, sentence = video.flip(-1), small.flip(-1), mirror_sentence(sentence)
    marked = torch.zeros(len(pixels), dtype=torch.bool)
    marked[annotated] = True
    return {
        "video": normalize(video, data.mean, data.std),
        "text": text.features(sentence),
        "annotated": marked,
        "masks": small,
        "referred": referred,
        "visible": torch.from_numpy(stack[referred].any((1, 2))),
        "frame": frame,
        "name": name,
        "original_size": (int(original[0]), int(original[1])),
        "size": size,
    }


def has_shape(mask: tuple[int, ...], frame: tuple[int, int]) -> bool:
    """Whether a mask's sides are the frame's, or in nearly the same proportion."""
    return mask == frame or abs(mask[0] * frame[1] / (mask[1] * frame[0]) - 1) <= SHAPE_SLACK


def _places(data: Data, clip: Clip, train: bool) -> list[int]:
    """What a clip has a sample for: annotated frames, from 1, or 0 for a random one; refytvos: where windows begin."""
    if data.kind == "refytvos":
        last = max(len(clip.names) - data.window, 0)
        return [*range(0, last, data.window), last] if train else [0]
    return [0] if train and data.samples == "sentences" else list(clip.frames)


def _files_of(data: Data, clip: Clip, frame: int) -> list[Path]:
    """The files of pixels and masks of a frame."""
    own = _mask_file(data, clip, frame)
    if data.kind == "a2d":
        return [own]
    return [clip.path / (f"{frame:05d}.png" if data.kind == "jhmdb" else f"{clip.names[frame]}.jpg"), own]


def _mask_file(data: Data, clip: Clip, frame: int) -> Path:
    if data.kind == "jhmdb":
        return clip.masks
    return clip.masks / (f"{frame:05d}.h5" if data.kind == "a2d" else f"{clip.names[frame]}.png")


def _padded(text: Tensor, length: int) -> Tensor:
    """(S, ...) with zeros up to `length`."""
    return torch.cat([text, text.new_zeros(length - len(text), *text.shape[1:])])
