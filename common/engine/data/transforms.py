"""Which frames of a video make a clip, and what is done to the clip's pixels.

Sampling: `segment_indices` (TSN: one frame from each of T equal segments; Something-Something) and `dense_indices` (T
frames a fixed time apart; Kinetics). Pixels: one crop, one flip, one policy for the whole clip, never one per frame.
All randomness comes from the given numpy generator. Not decoding (video.py), not mixing of samples (the task's
data.py).
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


def segment_indices(
    num_frames_in_video: int, num_frames: int, rng: np.random.Generator | None, view: int = 0, num_views: int = 1
) -> np.ndarray:
    """Temporal segment networks: split the video into `num_frames` equal segments, take one frame of each.

    Returns (num_frames,) int64, ascending. With `rng`: a random place in each segment. Without: the same place in
    each, (view + 1/2) / num_views of it, so that one view takes the centers and two views take the quarters. A video
    shorter than the clip repeats frames.
    """
    place = rng.random(num_frames) if rng is not None else np.full(num_frames, (view + 0.5) / num_views)
    indices = np.floor((np.arange(num_frames) + place) * num_frames_in_video / num_frames).astype(np.int64)
    return np.clip(indices, 0, num_frames_in_video - 1)


def dense_indices(
    timestamps: Sequence[float],
    seconds: float,
    num_frames: int,
    stride: int,
    rng: np.random.Generator | None,
    view: int = 0,
    num_views: int = 1,
) -> np.ndarray:
    """A clip of frames `stride` mean frame durations apart, by time, so that a variable frame rate changes nothing.

    timestamps: (F,) start of each frame in seconds; seconds: duration of the video. Returns (num_frames,) int64,
    ascending. With `rng`: a random start; one view: the middle; more: pytorchvideo's ConstantClipsPerVideoSampler.
    (Its random sampler draws from Python's global generator, which could not be resumed.) A video shorter than the
    clip is read to its end, and its last frame repeated.
    """
    times = np.asarray(timestamps)
    frame = seconds / len(times)
    span = (num_frames - 1) * stride + 1  # of the clip, like `latest` and `start` in mean frame durations
    latest = max(len(times) - span, 0)
    if rng is not None:
        start = int(rng.integers(0, latest + 1))
    elif num_views == 1:
        start = latest // 2
    else:
        from pytorchvideo.data.clip_sampling import ConstantClipsPerVideoSampler

        sampler = ConstantClipsPerVideoSampler(Fraction(span), num_views)
        start = 0
        for _ in range(view + 1):
            start = int(sampler(0, Fraction(len(times)), {}).clip_start_sec)
    # The frame on screen half a frame after each instant: the nearest one, and exact where the rate is constant.
    wanted = (start + np.arange(num_frames) * stride + 0.5) * frame
    return np.clip(np.searchsorted(times, wanted, side="right") - 1, 0, len(times) - 1)


def random_resized_crop(
    clip: Tensor,
    size: int,
    scale: tuple[float, float],
    rng: np.random.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Crop a random share `scale` of the area at a random aspect ratio, resize to (size, size).

    clip: uint8 (T, 3, H, W). Returns uint8 (T, 3, size, size).
    """
    height, width = clip.shape[-2:]
    if scale == (1.0, 1.0) and height == width:
        return resize(clip, size, size)
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return resize(clip[..., top : top + h, left : left + w], size, size)
    return view_crop(clip, size, 0, 1)


def view_crop(clip: Tensor, size: int, crop: int, num_crops: int) -> Tensor:
    """Resize the short side to `size`; take crop number `crop` of `num_crops` along the long side.

    One crop: the center. clip: uint8 (T, 3, H, W). Returns (T, 3, size, size).
    """
    height, width = clip.shape[-2:]
    short = min(height, width)
    height, width = round(height * size / short), round(width * size / short)
    clip = resize(clip, height, width)
    place = crop / (num_crops - 1) if num_crops > 1 else 0.5
    top, left = round((height - size) * place), round((width - size) * place)
    return clip[..., top : top + size, left : left + size]


def resized_size(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """(height, width) after resizing: the short side becomes `size`, or less if the long one would pass `max_size`.

    size = round(max_size * short / long) where it would; the long side is rounded down. At least one pixel.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = max(round(max_size * short / long), 1)
    if short == size:
        return height, width
    other = size * long // short
    return (size, other) if height <= width else (other, size)


def resize(clip: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with antialiasing; the clip itself if it has that size already. uint8 (T, 3, H, W)."""
    from torchvision.transforms.v2 import functional as F

    if clip.shape[-2:] == (height, width):
        return clip
    return F.resize(clip, [height, width], antialias=True)


def rand_augment(clip: Tensor, num_ops: int, magnitude: int, rng: np.random.Generator) -> Tensor:
    """torchvision's RandAugment, the same operations on all frames. clip: uint8 (T, 3, H, W).

    It draws from torch's global CPU generator; that is seeded for the call and put back after it.
    """
    from torchvision.transforms import v2

    if num_ops == 0:
        return clip
    policy = v2.RandAugment(num_ops=num_ops, magnitude=magnitude, interpolation=v2.InterpolationMode.BILINEAR)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**62)))
        return policy(clip)


def color_jitter(clip: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation, each by a factor in 1 +- strength, in this order. clip: uint8 (T, 3, H, W)."""
    from torchvision.transforms.v2 import functional as F

    if strength == 0:
        return clip
    low, high = max(0.0, 1 - strength), 1 + strength
    clip = F.adjust_brightness(clip, rng.uniform(low, high))
    clip = F.adjust_contrast(clip, rng.uniform(low, high))
    return F.adjust_saturation(clip, rng.uniform(low, high))


def normalize(clip: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (T, 3, H, W) -> float32 (3, T, H, W), (value / 255 - mean) / std."""
    scale = 1 / (255 * torch.tensor(std))
    shift = torch.tensor(mean) / torch.tensor(std)
    video = clip.permute(1, 0, 2, 3).float()
    return video.mul_(scale[:, None, None, None]).sub_(shift[:, None, None, None])


def random_erase(video: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """With `probability`, fill one random box, the same in all frames, with unit noise.

    video: (3, T, H, W), normalized. Area 1/50 to 1/3 of the frame, aspect ratio 0.3 to 3.3 (Zhong et al., Random
    Erasing, with VideoMAE's setting of one box).
    """
    if rng.random() >= probability:
        return video
    height, width = video.shape[-2:]
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
        h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            noise = rng.standard_normal((3, video.shape[1], h, w), dtype=np.float32)
            video = video.clone()
            video[..., top : top + h, left : left + w] = torch.from_numpy(noise)
            return video
    return video


def cutmix_box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box (top, bottom, left, right) of about `share` of the area around a random center, cut at the border."""
    h, w = int(height * np.sqrt(share)), int(width * np.sqrt(share))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return max(y - h // 2, 0), min(y + h - h // 2, height), max(x - w // 2, 0), min(x + w - w // 2, width)
