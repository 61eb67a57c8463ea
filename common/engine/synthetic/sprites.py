"""Drawn objects and backgrounds for synthetic videos: `draw_object`, `draw_background`, `objects_of`.

An object is a shape filled with a texture in two colors, with an off-center mark, so that its angle can be seen.
Which pairs of shape and texture exist for which purpose is fixed by `objects_of`: training and validation share none.
All is a pure function of the given generator. Not a renderer: motion.py moves these.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Group = Literal["train", "validation"]
SHAPES = ("disc", "square", "triangle", "star", "cross", "hexagon", "heart", "arrow", "moon", "blob", "letter", "ring")
TEXTURES = ("plain", "striped", "checked", "shaded", "dotted", "cloudy", "ringed", "halved")
COLORS = {
    "red": (214, 48, 49),
    "orange": (235, 130, 40),
    "yellow": (240, 205, 60),
    "green": (60, 165, 80),
    "teal": (30, 155, 160),
    "blue": (50, 95, 215),
    "purple": (135, 70, 190),
    "pink": (235, 110, 170),
    "brown": (120, 80, 50),
    "white": (240, 240, 235),
    "black": (30, 30, 35),
    "grey": (135, 135, 140),  # as it is written in the files
}


def objects_of(group: Group) -> list[tuple[str, str]]:
    """The (shape, texture) pairs of a group. Every shape occurs in both groups, no pair in two of them."""
    remainders = {"train": (0, 1, 3), "validation": (2,)}[group]
    return [
        (shape, texture)
        for i, shape in enumerate(SHAPES)
        for j, texture in enumerate(TEXTURES)
        if (i + j) % 4 in remainders
    ]


def draw_object(rng: np.random.Generator, shape: str, texture: str, size: int = 96) -> tuple[np.ndarray, str]:
    """One object, anti-aliased. Returns uint8 RGBA (size, size, 4) and its name ("red striped star").

    It fills a circle of the picture's width, so turning does not cut it.
    """
    first, second = rng.choice(len(COLORS), size=2, replace=False)
    names = list(COLORS)
    colors = [np.clip(np.array(COLORS[names[i]]) + rng.integers(-18, 19, 3), 0, 255) for i in (first, second)]
    fill = _texture(rng, texture, size)[..., None]
    color = colors[0] * (1 - fill) + colors[1] * fill
    # The mark: a spot away from the center, in a third color, so that no texture is symmetric under rotation.
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1
    direction = rng.uniform(0, 2 * np.pi)
    distance = np.hypot(x - 0.42 * np.cos(direction), y - 0.42 * np.sin(direction))
    spot = np.clip((0.24 - distance) * size / 2, 0, 1)[..., None]
    mark = np.array(COLORS[names[int(rng.integers(len(names)))]]) if rng.random() < 0.5 else 255 - colors[0]
    color = color * (1 - spot) + mark * spot
    alpha = _mask(rng, shape, size)
    outline = np.asarray(Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.MinFilter(5))) / 255.0
    color = color * (0.35 + 0.65 * outline[..., None])  # a darker rim keeps the object visible on any background
    rgba = np.concatenate([color, alpha[..., None] * 255], axis=-1)
    return np.clip(rgba + 0.5, 0, 255).astype(np.uint8), f"{names[first]} {texture} {shape}"


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A still scene, uint8 (size, size, 3): a gradient or clouds between two near colors."""
    base = rng.integers(40, 216, 3)
    other = np.clip(base + rng.integers(-40, 41, 3), 0, 255)
    mix = _texture(rng, str(rng.choice(["shaded", "cloudy"])), size)[..., None]
    return (base * (1 - mix) + other * mix).astype(np.uint8)


def _texture(rng: np.random.Generator, texture: str, size: int) -> np.ndarray:
    """A pattern in [0, 1], float (size, size), of random phase, direction and scale."""
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1
    direction, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    u, v = x * np.cos(direction) + y * np.sin(direction), -x * np.sin(direction) + y * np.cos(direction)
    frequency = rng.uniform(6, 12)

    def soft(values: np.ndarray) -> np.ndarray:  # a step with soft edges
        return np.clip(values * 2 + 0.5, 0, 1)

    if texture == "plain":
        return np.zeros((size, size))
    if texture == "striped":
        return soft(np.sin(frequency * u + phase))
    if texture == "checked":
        return soft(np.sin(frequency * u + phase) * np.sin(frequency * v + phase) * 2)
    if texture == "shaded":
        return np.clip(u / 2 + 0.5, 0, 1)
    if texture == "dotted":
        return soft(np.cos(frequency * u) + np.cos(frequency * v) - 0.9)
    if texture == "ringed":
        return soft(np.sin(frequency * np.hypot(x, y) + phase))
    if texture == "halved":
        return soft(u * size / 8)
    if texture == "cloudy":
        field = np.zeros((size, size))
        for cells, weight in ((3, 1.0), (6, 0.6), (12, 0.35)):
            small = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
            field += weight * np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
        return (field - field.min()) / (field.max() - field.min() + 1e-9)
    raise ValueError(f"unknown texture {texture!r}; one of {', '.join(TEXTURES)}")


def _mask(rng: np.random.Generator, shape: str, size: int) -> np.ndarray:
    """The shape's coverage in [0, 1], float (size, size), drawn four times as large and averaged."""
    large = size * 4
    picture = Image.new("L", (large, large), 0)
    draw = ImageDraw.Draw(picture)
    half = large / 2

    def points(radius: Callable[[float], float], count: int) -> list[tuple[float, float]]:
        angles = np.arange(count) / count * 2 * np.pi - np.pi / 2
        return [
            (half + half * radius(a) * float(np.cos(a)), half + half * radius(a) * float(np.sin(a))) for a in angles
        ]

    def polygon(corners: list[tuple[float, float]]) -> None:
        draw.polygon([(half + half * x, half + half * y) for x, y in corners], fill=255)

    if shape in ("disc", "ring", "moon"):
        draw.ellipse([half * 0.1, half * 0.1, half * 1.9, half * 1.9], fill=255)
        if shape == "ring":
            draw.ellipse([half * 0.66, half * 0.66, half * 1.34, half * 1.34], fill=0)
        if shape == "moon":
            draw.ellipse([half * 0.9, half * 0.3, half * 2.1, half * 1.5], fill=0)
    elif shape == "square":
        polygon([(-0.68, -0.68), (0.68, -0.68), (0.68, 0.68), (-0.68, 0.68)])
    elif shape == "triangle":
        draw.polygon(points(lambda a: 0.95, 3), fill=255)
    elif shape == "hexagon":
        draw.polygon(points(lambda a: 0.9, 6), fill=255)
    elif shape == "star":
        corners = [points(lambda a: 0.95, 10)[i] if i % 2 == 0 else points(lambda a: 0.45, 10)[i] for i in range(10)]
        draw.polygon(corners, fill=255)
    elif shape == "cross":
        polygon([(-0.3, -0.9), (0.3, -0.9), (0.3, 0.9), (-0.3, 0.9)])
        polygon([(-0.9, -0.3), (0.9, -0.3), (0.9, 0.3), (-0.9, 0.3)])
    elif shape == "heart":
        t = np.linspace(0, 2 * np.pi, 80)
        x, y = 16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        polygon([(float(a) / 19, float(b) / 19) for a, b in zip(x, y, strict=True)])
    elif shape == "arrow":
        polygon([(0, -0.9), (0.65, -0.1), (0.26, -0.1), (0.26, 0.85), (-0.26, 0.85), (-0.26, -0.1), (-0.65, -0.1)])
    elif shape == "blob":
        waves = [(k, rng.uniform(0.04, 0.13), rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5)]
        draw.polygon(points(lambda a: 0.7 + sum(s * float(np.cos(k * a + p)) for k, s, p in waves), 120), fill=255)
    elif shape == "letter":
        letter = str(rng.choice(list("AEFGJKPR4")))  # letters without rotational symmetry
        draw.text(
            (half, half),
            letter,
            fill=255,
            font=ImageFont.load_default(size=large * 0.9),
            anchor="mm",
            stroke_width=large // 40,
        )
    else:
        raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX)) / 255.0
