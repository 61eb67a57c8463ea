"""The things in composed scenes: 20 classes, each a few dozen drawn examples, placed at any size, stretch and angle.

    things = things_of("train")                    # by class index, see CLASSES
    patch = place(things[12][0], radii=(9.0, 11.0), angle=0.3)

The first twelve classes are the shapes of engine.synthetic.sprites, in their own colors. The others look like what is
seen from above: their examples hold a texture, a height and a mask, and take colors and light when they are painted, so
that one scene has one sun and its trees one green. All is a pure function of the seed. Not here: what a scene is
(`scenes.py`).
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.synthetic.sprites import SHAPES, Group, draw_object, objects_of

KINDS = ("crown", "conifer", "bush", "rock", "roof", "car", "pond", "tuft")
CLASSES = (*SHAPES, *KINDS)
SIDE = 96  # pixels of an example
EXAMPLES = {"train": 24, "validation": 12}  # per class

# Dark and light color of a kind, before they are jittered.
LEAVES = (
    ((30, 48, 24), (128, 140, 66)),
    ((24, 40, 32), (92, 120, 70)),
    ((52, 54, 22), (170, 164, 84)),
    ((60, 44, 24), (176, 120, 60)),
    ((66, 62, 58), (172, 166, 158)),
)
COLORS = {
    "crown": LEAVES,
    "conifer": LEAVES,
    "bush": LEAVES,
    "tuft": LEAVES,
    "rock": (((70, 66, 62), (190, 184, 176)), ((84, 60, 44), (190, 150, 116))),
    "roof": (((96, 44, 32), (196, 110, 84)), ((60, 62, 68), (160, 162, 168)), ((130, 126, 118), (244, 240, 232))),
    "car": tuple(((24, 26, 30), color) for color in ((226, 226, 224), (176, 30, 34), (40, 70, 160), (150, 152, 156))),
    "pond": (((14, 26, 34), (48, 74, 84)), ((26, 36, 20), (76, 88, 52))),
}
# Height over the ground in radii: how long the shadow is. Sprites lie flat or hover a little.
HEIGHTS = {"crown": 1.6, "conifer": 2.4, "bush": 0.7, "tuft": 0.5, "rock": 0.4, "roof": 0.8, "car": 0.3, "pond": 0.0}
SPRITE_HEIGHT = 0.3


class Thing(NamedTuple):
    """One example: premultiplied pictures, each half of the one before. Of a sprite the channels are red, green, blue
    and coverage; of a kind texture, height, nothing and coverage.
    """

    label: int
    pyramid: tuple[Image.Image, ...]

    @property
    def kind(self) -> str | None:
        """Its name in KINDS; None for a sprite."""
        return None if self.label < len(SHAPES) else CLASSES[self.label]


@cache
def things_of(group: Group) -> tuple[tuple[Thing, ...], ...]:
    """The examples of each class, in the order of CLASSES; the two groups share none. About a second, once."""
    seed = {"train": 0, "validation": 1}[group]
    found = []
    for label, name in enumerate(CLASSES):
        rng = np.random.default_rng([18, seed, label])
        if name in KINDS:
            pictures = [_draw_kind(rng, name) for _ in range(EXAMPLES[group])]
        else:
            textures = [texture for shape, texture in objects_of(group) if shape == name]
            pictures = [draw_object(rng, name, textures[i % len(textures)], SIDE)[0] for i in range(EXAMPLES[group])]
        found.append(tuple(Thing(label, _halve_again(picture)) for picture in pictures))
    return tuple(found)


def place(thing: Thing, radii: tuple[float, float], angle: float, offset: tuple[float, float] = (0, 0)) -> np.ndarray:
    """The thing on a square just large enough, float32 (d, d, 4), premultiplied, values up to 255, d odd.

    radii: half its width and height in pixels before it is turned; angle: radians; offset: of its middle from that of
    the square, below a pixel.
    """
    reach = int(np.ceil(max(radii))) + 1
    side = 2 * reach + 1
    level = int(np.clip(np.round(np.log2(SIDE / (2 * max(radii)))), 0, len(thing.pyramid) - 1))
    picture = thing.pyramid[level]
    half = picture.width / 2
    cos, sin = np.cos(angle), np.sin(angle)
    middle = (reach + 0.5 + offset[0], reach + 0.5 + offset[1])
    a, b = cos * half / radii[0], sin * half / radii[0]
    d, e = -sin * half / radii[1], cos * half / radii[1]
    matrix = (a, b, half - a * middle[0] - b * middle[1], d, e, half - d * middle[0] - e * middle[1])
    placed = picture.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(placed, np.float32)


def colored(patch: np.ndarray, dark: np.ndarray, light: np.ndarray, sun: np.ndarray, relief: float) -> np.ndarray:
    """Colors of a kind's patch, float32 (d, d, 3), premultiplied: texture between two colors, and light from the sun.

    sun: (2,) where the light comes from, x and y, length 1; relief: how much slopes differ in brightness.
    """
    coverage = patch[..., 3:] / 255
    color = dark * coverage + (light - dark) * (patch[..., :1] / 255)
    height = patch[..., 1] * (len(patch) / (2 * 255))  # pixels
    slope = np.zeros_like(height)
    slope[:, 1:-1] -= (height[:, 2:] - height[:, :-2]) * (sun[0] / 2)
    slope[1:-1] -= (height[2:] - height[:-2]) * (sun[1] / 2)
    return color * np.clip(1 - relief * slope, 0.35, 1.7)[..., None]


def noise(rng: np.random.Generator, height: int, width: int, octaves: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Smooth noise of mean about 0, float32 (height, width): octaves of (pixels of a cell, weight)."""
    field = np.zeros((height, width), np.float32)
    for cell, weight in octaves:
        shape = (max(2, round(height / cell) + 1), max(2, round(width / cell) + 1))
        coarse = Image.fromarray(rng.standard_normal(shape, dtype=np.float32))
        field += np.float32(weight) * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return field


def _halve_again(picture: np.ndarray) -> tuple[Image.Image, ...]:
    """Down to 6 px, so that shrinking does not alias; premultiplied, so that edges interpolate rightly."""
    pyramid = [Image.fromarray(picture).convert("RGBa")]
    while pyramid[-1].width > 6:
        pyramid.append(pyramid[-1].resize((pyramid[-1].width // 2,) * 2, Image.Resampling.BOX))
    return tuple(pyramid)


def _draw_kind(rng: np.random.Generator, kind: str) -> np.ndarray:
    """An example, uint8 (SIDE, SIDE, 4): texture, height, 0, mask. It touches no border, so turning does not cut it."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / ((SIDE - 1) / 2) - 1
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    inside, height, texture = _FORMS[kind](rng, x, y, radius, angle)
    mask = np.clip(inside * SIDE / 3 + 0.5, 0, 1)  # soft over some pixels; `inside` is 0 at the edge
    planes = (np.clip(texture, 0, 1), np.clip(height, 0, 1), np.zeros_like(mask), mask)
    return (np.stack(planes, axis=-1) * 255 + 0.5).astype(np.uint8)


Form = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]


def _wavy(rng: np.random.Generator, angle: np.ndarray, size: float, waves: tuple[int, ...], swing: float) -> np.ndarray:
    edge = np.full_like(angle, size)
    for number in waves:
        edge += np.float32(rng.uniform(-swing, swing)) * np.cos(number * angle + np.float32(rng.uniform(0, 6.28)))
    return np.minimum(edge, 0.97)


def _crown(rng, x, y, radius, angle):  # type: ignore[no-untyped-def]
    edge = _wavy(rng, angle, 0.82, (2, 3, 5, 7, 11), 0.07) + 0.05 * noise(rng, SIDE, SIDE, ((10, 1.0), (5, 0.6)))
    rough = noise(rng, SIDE, SIDE, ((22, 0.5), (11, 0.5), (5, 0.35)))
    dome = np.sqrt(np.clip(1 - (radius / edge) ** 2, 0, 1))
    texture = 0.5 + 0.2 * noise(rng, SIDE, SIDE, ((12, 0.6), (6, 0.8), (3, 0.8)))
    return np.minimum(edge, 0.97) - radius, 0.15 + 0.6 * dome + 0.16 * rough, texture + 0.15 * dome - 0.05


def _conifer(rng, x, y, radius, angle):  # type: ignore[no-untyped-def]
    spikes, phase = int(rng.integers(7, 16)), rng.uniform(0, 6.28)
    star = np.cos(spikes * angle + np.float32(phase) + 0.6 * noise(rng, SIDE, SIDE, ((24, 1.0),)))
    edge = np.minimum(_wavy(rng, angle, 0.76, (2, 3), 0.05) + np.float32(rng.uniform(0.06, 0.2)) * star, 0.97)
    cone = np.clip(1 - radius / edge, 0, 1)
    height = 0.1 + 0.65 * cone + 0.1 * star * radius + 0.08 * noise(rng, SIDE, SIDE, ((8, 1.0), (4, 0.6)))
    return edge - radius, height, 0.45 + 0.15 * star * radius + 0.15 * noise(rng, SIDE, SIDE, ((5, 1.0), (3, 0.7)))


def _bush(rng, x, y, radius, angle):  # type: ignore[no-untyped-def]
    edge = _wavy(rng, angle, 0.85, (2, 3, 4), 0.06)
    dome = np.sqrt(np.clip(1 - (radius / edge) ** 2, 0, 1))
    texture = 0.5 + 0.12 * noise(rng, SIDE, SIDE, ((30, 1.0), (4, 0.5)))
    return edge - radius, 0.1 + 0.8 * dome + 0.03 * noise(rng, SIDE, SIDE, ((8, 1.0),)), texture


def _rock(rng, x, y, radius, angle):  # type: ignore[no-untyped-def]
    corners = int(rng.integers(5, 9))
    sides = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * (2 * np.pi / corners)
    planes = [np.float32(rng.uniform(0.62, 0.8)) - x * np.float32(np.cos(t)) - y * np.float32(np.sin(t)) for t in sides]
    inside = np.minimum(np.min(planes, axis=0), 0.95 - radius)
    texture = 0.5 + 0.15 * noise(rng, SIDE, SIDE, ((25, 0.8), (6, 0.8), (3, 0.6)))
    return inside, np.minimum(1.1 * inside, rng.uniform(0.3, 0.7)) + 0.02 * noise(rng, SIDE, SIDE, ((6, 1.0),)), texture


def _roof(rng, x, y, radius, angle):  # type: ignore[no-untyped-def]
    long, wide = rng.uniform(0.62, 0.76), rng.uniform(0.4, 0.62)
    inside = np.minimum(long - abs(x), wide - abs(y))
    hip = np.minimum(wide - abs(y), (long - abs(x)) * rng.choice([1.0, 3.0, 50.0]))
    texture = 0.5 + 0.12 * np.sin(y * np.float32(rng.uniform(30, 50))) + 0.08 * noise(rng, SIDE, SIDE, ((20, 1.0),))
    return inside, 0.9 * hip, texture


def _car(rng, x, y, radius, angle):  # type: ignore[no-untyped-def]
    wide = rng.uniform(0.36, 0.46)
    corner = 0.15
    beyond = np.hypot(np.maximum(abs(x) - 0.85 + corner, 0), np.maximum(abs(y) - wide + corner, 0))
    inside = corner - beyond
    glass = ((x > 0.2) & (x < 0.42)) | ((x > -0.62) & (x < -0.45)) | ((abs(y) > wide - 0.07) & (abs(x) < 0.45))
    texture = np.where(glass & (abs(y) < wide - 0.02), 0.08, 0.92) + 0.03 * noise(rng, SIDE, SIDE, ((20, 1.0),))
    return inside, 0.3 * np.clip(inside * 4, 0, 1) + 0.25 * np.clip(1 - abs(x + 0.1) * 1.7, 0, 0.4), texture


def _pond(rng, x, y, radius, angle):  # type: ignore[no-untyped-def]
    edge = _wavy(rng, angle, 0.75, (2, 3, 4, 5), 0.1)
    return (
        edge - radius,
        np.zeros_like(x),
        0.5 + 0.2 * noise(rng, SIDE, SIDE, ((40, 1.0), (14, 0.4))) - 0.3 * (1 - radius),
    )


def _tuft(rng, x, y, radius, angle):  # type: ignore[no-untyped-def]
    inside, height = np.full_like(x, -1), np.zeros_like(x)
    for _ in range(int(rng.integers(5, 11))):
        at, around, size = rng.uniform(0, 0.6), rng.uniform(0, 6.28), rng.uniform(0.2, 0.38)
        far = np.hypot(x - np.float32(at * np.cos(around)), y - np.float32(at * np.sin(around)))
        inside = np.maximum(inside, size - far)
        height = np.maximum(height, np.sqrt(np.clip(size**2 - far**2, 0, 1)))
    return np.minimum(inside, 0.97 - radius), 1.4 * height, 0.5 + 0.2 * noise(rng, SIDE, SIDE, ((10, 1.0), (4, 0.8)))


_FORMS: dict[str, Form] = {
    "crown": _crown,
    "conifer": _conifer,
    "bush": _bush,
    "rock": _rock,
    "roof": _roof,
    "car": _car,
    "pond": _pond,
    "tuft": _tuft,
}
