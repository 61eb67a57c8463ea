"""Composed scenes without end, for pretraining: things from above and drawn shapes on a ground, with exact boxes.

    scene = compose(7)                    # scene.image (256, 256, 3) uint8, scene.boxes (n, 4), scene.labels (n,)

Most things are small. Some scenes are a jumble of all classes, others a stand of one: clustered, in rows or touching,
of one color, with the long shadows of one sun. The ground is noise in earthy colors, with furrows, slopes of light,
paths and fallen sticks, or a piece of a given photograph. Never more than half of a thing is hidden, and its box is
that of what is seen. A pure function of the seed. Not here: files (`synthetic.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from detection.grounds import draw_grain, draw_ground, photograph
from detection.objects import (
    CLASSES,
    COLORS,
    HEIGHTS,
    KINDS,
    SPRITE_HEIGHT,
    Thing,
    colored,
    place,
    things_of,
)
from engine.synthetic.sprites import Group
from engine.visual import TABLEAU, save_stack

COUNT, EXTENT = (3, 25), (8.0, 96.0)  # things in 256 x 256 pixels, and the longest side of their boxes in pixels
FOREST, FOREST_COUNT, FOREST_EXTENT = ("crown", "conifer", "bush"), (5, 60), (18.0, 80.0)
SUNNY = (0.5, 1.6)  # reach of their shadows
LEAST_SEEN = 0.5  # of a thing's own pixels
SOLID = 128  # coverage of 255 from which on a pixel belongs to a thing


class Scene(NamedTuple):
    """A picture and what is in it, from back to front."""

    image: np.ndarray  # (H, W, 3) uint8
    boxes: np.ndarray  # (n, 4) float64, left, top, right, bottom in pixels, of the visible pixels
    labels: np.ndarray  # (n,) int64, into CLASSES
    owner: np.ndarray  # (H, W) int16: the thing that is seen there, -1 for the ground


class Layer(NamedTuple):
    """A thing that has found its place: pixels [top, top + h) x [left, left + w) of the picture."""

    thing: Thing
    patch: np.ndarray  # (h, w, 4), as `place` gives it, cut at the border
    top: int
    left: int
    radius: float


class Plan(NamedTuple):
    """What the things of a scene have in common."""

    labels: np.ndarray  # classes to draw from
    common: float | None  # the longest side of most things, if they have one
    points: np.ndarray  # (m, 2) x, y: where they are, tried in this order
    sun: np.ndarray  # (2,)
    relief: float
    reach: float  # of the shadows, times the things' heights
    colors: dict[str, tuple[np.ndarray, np.ndarray]]  # kind -> dark and light


def compose(
    seed: int | Sequence[int],
    size: tuple[int, int] = (256, 256),
    *,
    group: Group = "train",
    photographs: Sequence[np.ndarray] = (),
    labels: Sequence[int] | None = None,
    count: tuple[int, int] | None = None,
    extent: tuple[float, float] = EXTENT,
    leafy: bool = False,
) -> Scene:
    """Compose a scene.

    size: height and width in pixels; group: whose examples of the classes; photographs: uint8 (H, W, 3), the ground of
    half of the scenes; labels: the classes that may occur, None: all; count: the least and the most things that are
    tried, None: 3 to 25 in proportion to the area (at least 1 to 3); extent: of the longest side, pixels;
    leafy: in the sun, with a grain as of leaves and grass.
    """
    rng = np.random.default_rng(seed)
    if count is None:
        share = size[0] * size[1] / 256**2
        count = (max(1, round(COUNT[0] * share)), max(3, round(COUNT[1] * share)))
    number = int(rng.integers(count[0], count[1] + 1))
    plan = _plan(rng, size, number, np.arange(len(CLASSES)) if labels is None else np.asarray(labels), extent)
    if leafy:
        plan = plan._replace(reach=float(rng.uniform(*SUNNY)))
    layers, owner = _arrange(rng, size, number, plan, group, extent)
    canvas = draw_ground(rng, size, photographs)
    if leafy:  # the ground is lit as the trees are, and then shaded
        canvas *= draw_grain(rng, size)
    _cast_shadows(rng, canvas, layers, plan)
    for layer in layers:
        _paint(rng, canvas, layer, plan)
    if leafy:
        canvas = np.where((owner >= 0)[..., None], canvas * draw_grain(rng, size), canvas)
    boxes = np.array([_box(owner, index, layer) for index, layer in enumerate(layers)], np.float64).reshape(-1, 4)
    found = np.array([layer.thing.label for layer in layers], np.int64)
    return Scene(photograph(rng, canvas), boxes, found, owner)


def compose_forest(
    seed: int | Sequence[int],
    size: tuple[int, int] = (256, 256),
    *,
    group: Group = "train",
    photographs: Sequence[np.ndarray] = (),
) -> Scene:
    """A dense scene of crowns, conifers and bushes only, as large as trees are at 10 cm per pixel."""
    labels = [CLASSES.index(kind) for kind in FOREST]
    share = size[0] * size[1] / 256**2
    count = (max(1, round(FOREST_COUNT[0] * share)), max(3, round(FOREST_COUNT[1] * share)))
    return compose(
        seed,
        size,
        group=group,
        photographs=photographs,
        labels=labels,
        count=count,
        extent=FOREST_EXTENT,
        leafy=True,
    )


def _plan(
    rng: np.random.Generator, size: tuple[int, int], number: int, labels: np.ndarray, extent: tuple[float, float]
) -> Plan:
    """Half of the scenes are a jumble, the others a stand of one class or two."""
    stand = rng.random() < 0.5
    common = None
    if stand:
        above = labels[labels >= len(CLASSES) - len(KINDS)]  # as seen from above: more often than drawn shapes
        labels = above if len(above) > 1 and rng.random() < 0.6 else labels
        labels = rng.choice(labels, min(len(labels), int(rng.integers(1, 3))), replace=False)
        low, high = max(extent[0], 10.0), min(extent[1], 64.0)
        common = float(np.exp(rng.uniform(np.log(low), np.log(max(low, high)))))
        common = min(common, max(low, 0.8 * float(np.sqrt(size[0] * size[1] / max(number, 1)))))
    direction = rng.uniform(0, 2 * np.pi)
    pale = rng.random() < 0.3  # an overcast day
    return Plan(
        labels=labels,
        common=common,
        points=_points(rng, size, 4 * number, common),
        sun=np.array([np.cos(direction), np.sin(direction)], np.float32),
        relief=float(rng.uniform(0.2, 0.6) if pale else rng.uniform(0.6, 1.4)),
        reach=0.0 if pale else float(rng.uniform(0.2, 1.3)),
        colors={kind: _colors(rng, kind) for kind in KINDS},
    )


def _points(rng: np.random.Generator, size: tuple[int, int], number: int, common: float | None) -> np.ndarray:
    """Where things are tried, (number, 2): anywhere, or in a stand also in clusters or in rows."""
    span = np.array([size[1], size[0]], np.float64)
    anywhere = rng.uniform(0, 1, (number, 2)) * span
    pattern = rng.random() if common is not None else 0.0
    if common is None or pattern < 0.4:
        return anywhere
    if pattern < 0.8:
        middles = rng.uniform(0, 1, (int(rng.integers(1, 4)), 2)) * span
        near = middles[rng.integers(len(middles), size=number)] + rng.standard_normal((number, 2)) * common * 1.3
        return np.where(rng.random((number, 1)) < 0.75, near, anywhere)
    step, angle = common * rng.uniform(1.0, 1.8), rng.uniform(0, np.pi)
    grid = np.stack(np.meshgrid(np.arange(-20, 21), np.arange(-20, 21)), axis=-1).reshape(-1, 2) * step
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    rows = grid @ turn + span * rng.uniform(0.3, 0.7, 2) + rng.standard_normal(grid.shape) * 0.06 * common
    rows = rows[((rows > 0) & (rows < span)).all(1)]
    return np.concatenate([rng.permutation(rows), anywhere])


def _colors(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Dark and light color of a kind, seldom any colors at all."""
    choice = COLORS[kind][int(rng.integers(len(COLORS[kind])))]
    dark, light = (np.array(color, np.float32) + rng.normal(0, 12, 3).astype(np.float32) for color in choice)
    if rng.random() < 0.1:
        dark, light = (rng.uniform(low, high, 3).astype(np.float32) for low, high in ((10, 110), (110, 250)))
    return np.clip(dark, 4, 250), np.clip(light, 8, 252)


def _arrange(
    rng: np.random.Generator,
    size: tuple[int, int],
    number: int,
    plan: Plan,
    group: Group,
    extent: tuple[float, float],
) -> tuple[list[Layer], np.ndarray]:
    """Find places, one thing over the others, so that of each at least LEAST_SEEN is seen; who is seen where."""
    owner = np.full(size, -1, np.int16)
    layers: list[Layer] = []
    whole: list[int] = []  # pixels of each, hidden ones and those beyond the border included
    seen: list[int] = []
    things = things_of(group)
    for x, y in plan.points:
        if len(layers) == number:
            break
        examples = things[int(rng.choice(plan.labels))]
        thing = examples[int(rng.integers(len(examples)))]
        if plan.common is None or rng.random() < 0.1:
            side = extent[0] * (extent[1] / extent[0]) ** (rng.random() ** 1.6)
        else:
            side = plan.common * np.exp(0.25 * rng.standard_normal())
        radius = float(np.clip(side, *extent)) / 1.8  # drawn things fill nine tenths of their squares
        stretch = np.exp(rng.uniform(-0.15, 0.15))
        offset = (x % 1 - 0.5, y % 1 - 0.5)
        patch = place(thing, (radius * min(stretch, 1), radius / max(stretch, 1)), rng.uniform(0, 2 * np.pi), offset)
        reach = len(patch) // 2
        total = int((patch[..., 3] >= SOLID).sum())
        top, left = int(y) - reach, int(x) - reach
        patch = patch[max(-top, 0) : max(size[0] - top, 0), max(-left, 0) : max(size[1] - left, 0)]
        top, left = max(top, 0), max(left, 0)
        solid = patch[..., 3] >= SOLID
        area = int(solid.sum())
        if area < max(LEAST_SEEN * total, 12):
            continue
        view = owner[top : top + len(patch), left : left + patch.shape[1]]
        hidden = np.bincount(view[solid] + 1, minlength=len(layers) + 1)[1:]
        if any(s - h < LEAST_SEEN * w for s, h, w in zip(seen, hidden.tolist(), whole, strict=True) if h):
            continue
        view[solid] = len(layers)
        seen = [s - h for s, h in zip(seen, hidden.tolist(), strict=True)] + [area]
        whole.append(total)
        layers.append(Layer(thing, patch, top, left, radius))
    return layers, owner


def _box(owner: np.ndarray, index: int, layer: Layer) -> tuple[int, int, int, int]:
    """Of the pixels in which the thing is seen."""
    height, width = layer.patch.shape[:2]
    mine = owner[layer.top : layer.top + height, layer.left : layer.left + width] == index
    rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
    left, top = layer.left, layer.top
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def _cast_shadows(rng: np.random.Generator, canvas: np.ndarray, layers: list[Layer], plan: Plan) -> None:
    """Darken the ground away from the sun, softly: each thing's mask, drawn out over the length of its shadow."""
    if plan.reach == 0 or not layers:
        return
    height, width = canvas.shape[:2]
    shadow = np.zeros((height, width), np.float32)
    for layer in layers:
        kind = layer.thing.kind
        length = plan.reach * layer.radius * (SPRITE_HEIGHT if kind is None else HEIGHTS[kind])
        for part in np.linspace(0, 1, 2 + int(length / max(0.7 * layer.radius, 4))):
            dx, dy = (round(float(v)) for v in -plan.sun * length * part)
            top, left = layer.top + dy, layer.left + dx
            y0, x0 = max(top, 0), max(left, 0)
            y1, x1 = min(top + layer.patch.shape[0], height), min(left + layer.patch.shape[1], width)
            if y0 < y1 and x0 < x1:
                cut = layer.patch[y0 - top : y1 - top, x0 - left : x1 - left, 3]
                np.maximum(shadow[y0:y1, x0:x1], cut, out=shadow[y0:y1, x0:x1])
    soft = Image.fromarray(shadow.astype(np.uint8)).filter(ImageFilter.BoxBlur(float(rng.uniform(0.5, 2.0))))
    depth = np.float32(rng.uniform(0.35, 0.85) / 255) * np.array([1.0, 0.98, 0.88], np.float32)  # sky light is blue
    canvas *= 1 - np.asarray(soft, np.float32)[..., None] * depth


def _paint(rng: np.random.Generator, canvas: np.ndarray, layer: Layer, plan: Plan) -> None:
    """The thing over what is there, in its colors, which vary a little from that of the others."""
    patch, kind = layer.patch, layer.thing.kind
    if kind is None:
        color = patch[..., :3] * rng.uniform(0.8, 1.1, 3).astype(np.float32)
    else:
        swing = (1 + rng.normal(0, 0.1) + rng.normal(0, 0.04, 3)).astype(np.float32)
        dark, light = plan.colors[kind]
        color = colored(patch, dark * swing, light * swing, plan.sun, plan.relief)
    view = canvas[layer.top : layer.top + patch.shape[0], layer.left : layer.left + patch.shape[1]]
    view *= 1 - patch[..., 3:] / 255
    view += color


def write_sheet(path: Path, scenes: Sequence[Scene], *, columns: int = 4) -> None:
    """A PNG with scenes of one size and their boxes, a color per class."""
    pictures = []
    for scene in scenes:
        picture = Image.fromarray(scene.image)
        draw = ImageDraw.Draw(picture)
        for (x0, y0, x1, y1), label in zip(scene.boxes, scene.labels.tolist(), strict=True):
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=TABLEAU[label % len(TABLEAU)])
        pictures.append(np.asarray(picture))
    blank = np.full_like(pictures[0], 255)
    pictures += [blank] * (-len(pictures) % columns)
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    save_stack(path, [Image.fromarray(row) for row in rows])
