"""Synthetic motion clips: one drawn object moves before a drawn scene, and only the motion tells the class.

    frames, name = render_clip("moving left", key=(seed, 7), group="train", size=98)

Each clip has a slight brightness flicker and sensor noise. Position, size, angle, speed, object and background are
drawn alike for all classes. Four pairs of classes are time reversals of each other: the clip of "moving left" *is* the
clip of "moving right" with the same key, played backwards,
so no single frame, and no unordered set of frames, tells the two apart. Everything is a pure function of the key. Pure
numpy and Pillow.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from engine.synthetic.sprites import Group, draw_background, draw_object, objects_of

# class -> (what is rendered, whether it is played backwards)
MOTIONS: dict[str, tuple[str, bool]] = {
    "moving left": ("right", True),
    "moving right": ("right", False),
    "moving up": ("down", True),
    "moving down": ("down", False),
    "approaching": ("grow", False),
    "receding": ("grow", True),
    "turning clockwise": ("turn", False),
    "turning counter-clockwise": ("turn", True),
    "bouncing": ("bounce", False),
    "shaking": ("shake", False),
}
_RANGE = (0.17, 0.83)  # where the object's center may be, in units of the frame
_SIZES = (0.16, 0.34)  # the object's radius, in units of the frame


@dataclass(frozen=True)
class Track:
    """The object in each frame, all (T,): center and radius in units of the frame, angle in radians, clockwise."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray


def render_clip(
    motion: str,
    *,
    key: tuple[int, ...],
    group: Group,
    size: int = 98,
    num_frames: tuple[int, int] = (16, 24),
) -> tuple[np.ndarray, str]:
    """Render one clip. Returns uint8 (T, size, size, 3) and the object's name.

    motion: a key of MOTIONS; key: non-negative integers, the seed of everything random; group: which objects may occur;
    num_frames: T is drawn from this range, ends included. Raises ValueError for an unknown motion.
    """
    if motion not in MOTIONS:
        raise ValueError(f"unknown motion {motion!r}; one of {', '.join(MOTIONS)}")
    kind, backwards = MOTIONS[motion]
    rng = np.random.default_rng(key)
    length = int(rng.integers(num_frames[0], num_frames[1] + 1))
    pairs = objects_of(group)
    shape, texture = pairs[int(rng.integers(len(pairs)))]
    sprite, name = draw_object(rng, shape, texture)
    background = draw_background(rng, size).astype(np.float32)
    track = draw_track(rng, kind, length)
    flicker = 1 + 0.06 * rng.uniform(0, 1) * smooth_curve(rng, length)
    noise_level = rng.uniform(1, 5)

    pyramid = halve_again(sprite)
    frames = np.empty((length, size, size, 3), np.uint8)
    for t in range(length):
        layer = place_object(
            pyramid, size, track.x[t] * size, track.y[t] * size, track.radius[t] * size, track.angle[t]
        )
        canvas = background * (1 - layer[..., 3:] / 255) + layer[..., :3]
        noise = rng.standard_normal((size, size, 3), dtype=np.float32) * noise_level
        frames[t] = np.clip(canvas * flicker[t] + noise + 0.5, 0, 255)
    return (frames[::-1].copy() if backwards else frames), name


def halve_again(sprite: np.ndarray) -> list[Image.Image]:
    """An object, uint8 RGBA, and its halves down to 8 px, so that shrinking does not alias; for `place_object`."""
    pyramid = [Image.fromarray(sprite).convert("RGBa")]  # premultiplied, so that edges interpolate rightly
    while pyramid[-1].width > 8:
        pyramid.append(pyramid[-1].resize((pyramid[-1].width // 2,) * 2, Image.Resampling.BOX))
    return pyramid


def place_object(pyramid: list[Image.Image], size: int, x: float, y: float, radius: float, angle: float) -> np.ndarray:
    """The object on an empty canvas, float32 (size, size, 4), premultiplied. Center and radius in pixels."""
    level = int(np.clip(np.round(np.log2(pyramid[0].width / (2 * radius))), 0, len(pyramid) - 1))
    picture = pyramid[level]
    scale = picture.width / (2 * radius)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    half = picture.width / 2
    matrix = (cos, sin, half - cos * x - sin * y, -sin, cos, half + sin * x - cos * y)
    return _warp(picture, size, matrix)


def _warp(picture: Image.Image, size: int, matrix: tuple[float, ...]) -> np.ndarray:
    """Sample (size, size, C) float32 from a picture by the affine map from output to input pixels."""
    warped = picture.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(warped, np.float32)


def smooth_curve(rng: np.random.Generator, length: int) -> np.ndarray:
    """A slow random curve within [-1, 1], (T,)."""
    t = np.linspace(0, 1, length)
    return np.sin(2 * np.pi * (t * rng.uniform(0.3, 1.2) + rng.uniform(0, 1)))


def _progress(rng: np.random.Generator, length: int, rest: float) -> np.ndarray:
    """Monotone from 0 to 1, (T,): starts late and ends early, by at most `rest`, and changes its speed at random."""
    t = np.linspace(0, 1, length)
    start, end = rng.uniform(0, rest), rng.uniform(1 - rest, 1)
    p = np.clip((t - start) / (end - start), 0, 1)
    return p + rng.uniform(-0.7, 0.7) * p * (1 - p)


def draw_track(rng: np.random.Generator, kind: str, length: int, *, rest: float = 0.12, repeats: float = 1.0) -> Track:
    """The path of the object for one kind of motion (see MOTIONS), or "still", played forwards, (length,).

    rest: up to this share of the time the object stands at either end; repeats: how many times as long as a clip the
    path is, so that turning, bouncing and shaking keep their speed in a longer one.
    """
    low, high = _RANGE
    p = _progress(rng, length, rest)
    still = np.zeros(length)
    # Every quantity wanders a little in every class, so that standing still is no sign either.
    x = rng.uniform(low, high) + 0.015 * smooth_curve(rng, length)
    y = rng.uniform(low, high) + 0.015 * smooth_curve(rng, length)
    radius = np.exp(rng.uniform(*np.log(_SIZES))) * (1 + 0.02 * smooth_curve(rng, length))
    angle = rng.uniform(0, 2 * np.pi) + 0.05 * smooth_curve(rng, length)
    if kind in ("right", "down"):
        distance = rng.uniform(0.32, high - low)
        path = rng.uniform(low, high - distance) + distance * p
        x, y = (path + still, y) if kind == "right" else (x, path + still)
    elif kind == "grow":
        ratio = rng.uniform(1.7, _SIZES[1] / _SIZES[0])
        smallest = np.exp(rng.uniform(np.log(_SIZES[0]), np.log(_SIZES[1] / ratio)))
        radius = smallest * ratio**p
    elif kind == "turn":
        angle = angle + repeats * rng.uniform(1.9, 3.6) * p  # below 4 rad: 8 sampled frames still show which way
    elif kind == "bounce":
        period = rng.uniform(0.4, 0.65) / repeats
        phase = (np.linspace(0, 1, length) / period + rng.uniform(0, 1)) % 1
        height = rng.uniform(0.3, high - low)
        floor = rng.uniform(low + height, high)
        y = floor - height * 4 * phase * (1 - phase)
    elif kind == "shake":
        cycles, amplitude = repeats * rng.uniform(3.0, 4.5), rng.uniform(0.06, 0.11)
        x = np.clip(x, low + amplitude, high - amplitude)
        x = x + amplitude * np.sin(2 * np.pi * (cycles * np.linspace(0, 1, length) + rng.uniform(0, 1)))
    else:
        assert kind == "still", kind
    return Track(x=x, y=y, radius=radius, angle=angle)
