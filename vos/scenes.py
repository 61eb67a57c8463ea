"""Composed scenes with moving things, their masks, and for each thing a sentence that no other one in it fits.

    scene = build_scene([0, 7], (96, 96), 16, kind="twins", group="train", annotated=range(16))
    frames, masks = render(scene, rng)          # uint8 (T, H, W, 3), bool (T, things, H, W)

Three kinds of scenes: twins are the same picture twice, so that only their motion tells which is meant; in `looks` all
move alike; in `free` anything goes. Sentences name looks, motion, or where a thing is beside another one. Each sentence
belongs to one group by its checksum, so training and test share words but no sentence, nor a pair of shape and texture.
Deterministic in the key. Not here: files (synthetic.py).
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from engine.synthetic.motion import MOTIONS, Track, draw_track, halve_again, place_object, smooth_curve
from engine.synthetic.sprites import Group, draw_background, draw_object, objects_of

Kind = Literal["twins", "looks", "free"]
About = Literal["looks", "motion", "relation"]
ABOUT: tuple[About, ...] = ("looks", "motion", "relation")
KINDS: tuple[Kind, ...] = ("twins", "looks", "free")
STILL = "standing still"
EVERY_MOTION = (*MOTIONS, STILL)
SHRINK = 0.6  # of the drawn radius: .10 to .20 of the frame, at 96 pixels the size of things in the pretraining clips
REST = 0.05  # at most this share of the time a thing stands before and after its motion
LEAST_PIXELS = 20  # of a thing that counts as seen
APART = 0.8  # of the sum of two radii: nearer things cover each other
MARGIN = 0.08  # of the frame, for "left of" and the like
TEST_SHARE = 5  # one sentence in so many belongs to the test
RELATIONS = {
    "left of": (-1, 0),
    "to the left of": (-1, 0),
    "right of": (1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
Traits = frozenset[str]


class Thing(NamedTuple):
    """What it is, and where it is in each frame."""

    color: str
    texture: str
    shape: str
    motion: str
    pyramid: list[Image.Image]
    track: Track  # in shares of the frame

    def traits(self) -> Traits:
        """The words that are true of it."""
        return frozenset((self.color, self.texture, self.shape, self.motion))


class Sentence(NamedTuple):
    """A sentence, what it is about, and what must be true of the thing it names."""

    text: str
    about: About
    traits: Traits
    relation: tuple[int, int] | None = None  # direction x, y from the thing `other`
    other: Traits = frozenset()


@dataclass(frozen=True)
class Scene:
    """One video before it is rendered; things from back to front, a sentence for each."""

    things: list[Thing]
    sentences: list[str]
    background: np.ndarray
    light: np.ndarray  # (T,) brightness of everything
    noise: float
    size: tuple[int, int]  # height, width


def build_scene(
    key: Sequence[int],
    size: tuple[int, int],
    num_frames: int,
    *,
    kind: Kind,
    group: Group,
    annotated: Sequence[int],
    count: int = 3,
    shrink: float = SHRINK,
    about: Sequence[About] = ABOUT,
) -> Scene:
    """Everything about one video; `annotated`: the frames, from 0, in which what a sentence says must hold."""
    for attempt in range(200):
        rng = np.random.default_rng([*key, attempt])
        things = _things(rng, num_frames, kind, group, count, shrink)
        sentences = _sentences(rng, things, group, annotated, about)
        if sentences is not None:
            background = draw_background(rng, max(size))[: size[0], : size[1]]
            light = 1 + 0.06 * rng.uniform(0, 1) * smooth_curve(rng, num_frames)
            return Scene(things, sentences, background, light, float(rng.uniform(1, 4)), size)
    raise AssertionError(f"no scene of kind {kind} for {key}")


def render(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The video uint8 (T, H, W, 3), and where each thing is seen, bool (T, things, H, W). rng: of the sensor noise."""
    height, width = scene.size
    length = len(scene.light)
    frames = np.empty((length, height, width, 3), np.uint8)
    masks = np.zeros((length, len(scene.things), height, width), bool)
    for t in range(length):
        canvas = scene.background.astype(np.float32)
        for number, thing in enumerate(scene.things):
            track = thing.track
            x, y, radius = track.x[t] * width, track.y[t] * height, track.radius[t] * min(scene.size)
            # Only the square around it is drawn: the rest of the frame stays.
            side = 2 * int(np.ceil(radius)) + 4
            top, left = int(y) - side // 2, int(x) - side // 2
            patch = place_object(thing.pyramid, side, x - left, y - top, radius, track.angle[t])
            rows, columns = slice(max(top, 0), top + side), slice(max(left, 0), left + side)
            layer = patch[rows.start - top :, columns.start - left :][: height - rows.start, : width - columns.start]
            canvas[rows, columns] = canvas[rows, columns] * (1 - layer[..., 3:] / 255) + layer[..., :3]
            solid = layer[..., 3] > 127.5
            masks[t, :number, rows, columns] &= ~solid
            masks[t, number, rows, columns] = solid
        noise = rng.standard_normal((height, width, 3), dtype=np.float32) * np.float32(scene.noise)
        frames[t] = np.clip(canvas * np.float32(scene.light[t]) + noise + 0.5, 0, 255)
    return frames, masks


def group_of(sentence: str) -> Group:
    """To which group a sentence belongs."""
    return "validation" if zlib.crc32(sentence.encode()) % TEST_SHARE == 0 else "train"


def fits(things: Sequence[Thing], sentence: Sentence, annotated: Sequence[int]) -> list[int]:
    """The things that a sentence could mean: for which it holds in any of the annotated frames."""
    found = [i for i, thing in enumerate(things) if sentence.traits <= thing.traits()]
    if sentence.relation is None:
        return found
    others = [i for i, thing in enumerate(things) if sentence.other <= thing.traits()]
    return [i for i in found if any(_beside(things, i, j, sentence.relation, annotated).any() for j in others)]


def _beside(
    things: Sequence[Thing], i: int, j: int, direction: tuple[int, int], annotated: Sequence[int]
) -> np.ndarray:
    """In which annotated frames thing i is clearly in this direction from thing j, (frames,) bool."""
    one, other, where = things[i].track, things[j].track, list(annotated)
    along = direction[0] * (one.x - other.x)[where] + direction[1] * (one.y - other.y)[where]
    return along > MARGIN if i != j else np.zeros(len(where), bool)


def _things(
    rng: np.random.Generator, num_frames: int, kind: Kind, group: Group, count: int, shrink: float
) -> list[Thing]:
    looks: list[tuple[list[Image.Image], str, str, str]] = []
    pairs = objects_of(group)
    while len(looks) < count:
        shape, texture = pairs[int(rng.integers(len(pairs)))]
        if all(shape != other[1] for other in looks):
            sprite, name = draw_object(rng, shape, texture)
            looks.append((halve_again(sprite), shape, texture, name.split()[0]))
    if kind == "twins" and count > 1:
        looks[1] = looks[0]
    if kind == "looks" and count > 1 and rng.random() < 0.5:  # one shape twice: then color or texture tells
        alike = [pair for pair in pairs if pair[0] == looks[0][1] and pair[1] != looks[0][2]]
        shape, texture = alike[int(rng.integers(len(alike)))]
        sprite, name = draw_object(rng, shape, texture)
        looks[1] = (halve_again(sprite), shape, texture, name.split()[0])
    if kind == "looks":
        motions = [str(rng.choice(EVERY_MOTION))] * count
    else:
        motions = [str(motion) for motion in rng.choice(EVERY_MOTION, count, replace=False)]
    tracks: list[Track] = []
    for motion in motions:
        drawn = [_track(rng, motion, num_frames, shrink) for _ in range(12)]
        tracks.append(min(drawn, key=lambda track: _crowding(track, tracks)))
    order = rng.permutation(count).tolist()
    return [Thing(looks[i][3], looks[i][2], looks[i][1], motions[i], looks[i][0], tracks[i]) for i in order]


def _track(rng: np.random.Generator, motion: str, num_frames: int, shrink: float) -> Track:
    kind, backwards = MOTIONS.get(motion, ("still", False))
    path = draw_track(rng, kind, num_frames, rest=REST)
    step = -1 if backwards else 1
    return Track(path.x[::step], path.y[::step], path.radius[::step] * shrink, path.angle[::step])


def _crowding(track: Track, others: list[Track]) -> float:
    """How much a thing is covered by others or covers them, in radii, summed over the frames."""
    total = 0.0
    for other in others:
        reach = APART * (track.radius + other.radius)
        distance = np.hypot(track.x - other.x, track.y - other.y)
        total += float((np.clip(reach - distance, 0, None) / np.minimum(track.radius, other.radius)).sum())
    return total


def _sentences(
    rng: np.random.Generator, things: list[Thing], group: Group, annotated: Sequence[int], about: Sequence[About]
) -> list[str] | None:
    """One for each thing, that names it alone; None where one has none."""
    chosen = []
    for number, thing in enumerate(things):
        able: dict[str, list[str]] = {}
        for sentence in _candidates(things, number):
            if (
                sentence.about not in about
                or group_of(sentence.text) != group
                or fits(things, sentence, annotated) != [number]
            ):
                continue
            if sentence.relation is not None and not _holds(things, number, sentence, annotated):
                continue
            able.setdefault(sentence.about, []).append(sentence.text)
        has_twin = sum(other.pyramid is thing.pyramid for other in things) > 1
        if has_twin and "motion" in able:
            able = {"motion": able["motion"]}
        if not able:
            return None
        texts = able[str(rng.choice(sorted(able)))]
        chosen.append(str(rng.choice(texts)))
    return chosen


def _holds(things: Sequence[Thing], number: int, sentence: Sentence, annotated: Sequence[int]) -> bool:
    """Whether a relation holds in every annotated frame, to a thing that its words name alone."""
    others = [i for i, thing in enumerate(things) if sentence.other <= thing.traits()]
    if len(others) != 1 or sentence.relation is None:
        return False
    return bool(_beside(things, number, others[0], sentence.relation, annotated).all())


def _nouns(thing: Thing) -> list[tuple[str, Traits]]:
    """Ways to name what a thing is, from vague to exact."""
    color, texture, shape = thing.color, thing.texture, thing.shape
    return [
        (shape, frozenset((shape,))),
        (f"{color} {shape}", frozenset((color, shape))),
        (f"{texture} {shape}", frozenset((texture, shape))),
        (f"{color} {texture} {shape}", frozenset((color, texture, shape))),
    ]


def _candidates(things: Sequence[Thing], number: int) -> Iterator[Sentence]:
    """What could be said of a thing, true or not of it alone."""
    thing = things[number]
    nouns = _nouns(thing)
    exact = nouns[-1][1]
    for text, traits in nouns:
        yield Sentence(f"the {text}", "looks", traits)
        yield Sentence(f"there is the {text}", "looks", traits)
    yield Sentence(f"the {thing.shape}, {thing.color} and {thing.texture}", "looks", exact)
    yield Sentence(f"the {thing.shape} that is {thing.color} and {thing.texture}", "looks", exact)
    anything = ("thing", frozenset[str]())
    for text, traits in [anything, *nouns]:
        told = traits | {thing.motion}
        yield Sentence(f"the {text} {thing.motion}", "motion", told)
        yield Sentence(f"the {text} that is {thing.motion}", "motion", told)
        yield Sentence(f"{thing.motion}, the {text}", "motion", told)
    for (text, traits), other, (words, direction) in product(nouns, things, RELATIONS.items()):
        if other is not thing:
            for name, other_traits in _nouns(other)[:2]:
                yield Sentence(f"the {text} {words} the {name}", "relation", traits, direction, other_traits)
