"""Write synthetic untrimmed videos, real mp4 files in the on-disk layout of ActivityNet-1.3.

    write_dataset(Path("data/untrimmed"), Synthetic())

The classes are the motions of engine.synthetic.motion. In each video objects stand, and now and then one of them acts
for some seconds; the annotated segment is exactly the time of the motion. An object appears before it acts and leaves
later, or acts again; others only stand, drift or pulse; the scene changes at times that have nothing to do with the
actions. So a boundary can be seen by the motion alone. Training and validation share no object. Deterministic in the
seed. Not ActivityNet: it only borrows the layout, so that the same reader, recipe and metric run on it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from action_detection.annotations import LABELS
from engine.data.video import write_video
from engine.data.workers import write_json
from engine.files import write_text
from engine.synthetic.motion import MOTIONS, Track, draw_track, halve_again, place_object, smooth_curve
from engine.synthetic.sprites import Group, draw_background, draw_object, objects_of
from engine.synthetic.write import write_files
from engine.visual import film_strip, save_stack

VERSION = 1  # raise it when a change of the renderer changes the files
ANNOTATIONS = "activity_net.v1-3.min.json"  # written last: its presence says that the data set is complete
VIDEO_FOLDER = "videos"
SUBSETS: dict[str, Group] = {"training": "train", "validation": "validation"}
INSIDE = (0.12, 0.88)  # where the center of an object may get, in units of the frame
RADII = (0.12, 0.4)  # its radius, likewise


@dataclass(frozen=True)
class Synthetic:
    """What to write. The files are a function of these values alone."""

    num_training: int = 110
    num_validation: int = 40
    size: int = 64  # height and width in pixels, even
    fps: float = 12.0
    seconds: tuple[float, float] = (20.0, 60.0)  # shortest and longest video
    action_seconds: tuple[float, float] = (2.0, 6.0)  # shortest and longest action
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size % 2 or self.size < 32:
            raise ValueError(f"size must be even and at least 32, got {self.size}")
        if not self.fps >= 8:
            raise ValueError(f"fps must be at least 8, or shaking cannot be seen; got {self.fps}")
        if not 1 <= self.action_seconds[0] <= self.action_seconds[1]:
            raise ValueError(f"action_seconds must be (shortest, longest), at least 1, got {self.action_seconds}")
        if not self.action_seconds[1] + 6 <= self.seconds[0] <= self.seconds[1]:
            raise ValueError(
                f"seconds must be (shortest, longest), at least 6 more than the longest action, got {self.seconds}"
            )

    def videos(self) -> list[tuple[str, int]]:
        """(subset, number) of every video, numbers from 1 through both subsets."""
        counts = {"training": self.num_training, "validation": self.num_validation}
        subsets = [subset for subset, count in counts.items() for _ in range(count)]
        return [(subset, number) for number, subset in enumerate(subsets, start=1)]


@dataclass(frozen=True)
class Action:
    """One instance: its class and its frames first ... last - 1."""

    motion: str
    first: int
    last: int


@dataclass(frozen=True)
class Thing:
    """An object while it is there, from frame `first` on: its path, opacity and brightness, each (n,)."""

    pyramid: list[Image.Image]
    first: int
    track: Track
    opacity: np.ndarray
    brightness: np.ndarray


@dataclass(frozen=True)
class Scene:
    """One video before it is rendered."""

    num_frames: int
    actions: list[Action]
    things: list[Thing]  # from back to front
    backgrounds: list[tuple[int, np.ndarray]]  # (first frame, picture)
    light: np.ndarray  # (num_frames,) brightness of everything
    noise: float


def video_name(number: int) -> str:
    """The id of a video."""
    return f"composed{number:04d}"


def write_dataset(
    root: Path, synthetic: Synthetic, *, workers: int = 2, on_done: Callable[[], None] | None = None
) -> bool:
    """Write the videos and the annotation file below `root`. False if they are there already, of the same parameters.

    Videos that an interrupted call left are kept. on_done: called after each one, for a progress bar. Files of
    other settings are an error, never overwritten.
    """
    paths = [root / VIDEO_FOLDER / f"v_{video_name(number)}.mp4" for _, number in synthetic.videos()]
    jobs = [(synthetic, *video, path) for video, path in zip(synthetic.videos(), paths, strict=True)]

    def finish(entries: list[dict]) -> None:
        write_text(root / LABELS, "".join(f"{motion}\n" for motion in MOTIONS))
        write_json(
            root / ANNOTATIONS,
            {
                "version": f"composed motions, version {VERSION}",
                "taxonomy": _taxonomy(),
                "database": {video_name(job[2]): entry for job, entry in zip(jobs, entries, strict=True)},
            },
        )

    stamp, files = {"version": VERSION, **asdict(synthetic)}, [*paths, root / LABELS, root / ANNOTATIONS]
    return write_files(root, stamp, files, _write_one, jobs, finish, workers=workers, on_done=on_done)


def build_scene(synthetic: Synthetic, subset: str, number: int) -> Scene:
    """Everything about one video, as a function of its key."""
    rng = np.random.default_rng([synthetic.seed, list(SUBSETS).index(subset), number])
    group, fps = SUBSETS[subset], synthetic.fps
    num_frames = int(rng.uniform(*synthetic.seconds) * fps)
    actions = _schedule(rng, synthetic, num_frames)
    actors = _actors(rng, group, actions, num_frames, fps)
    bystanders = [_bystander(rng, group, num_frames, fps) for _ in range(rng.integers(0, 4))]
    cuts = sorted(rng.integers(1, num_frames, size=rng.integers(0, 3)).tolist())
    return Scene(
        num_frames=num_frames,
        actions=actions,
        things=bystanders + actors,
        backgrounds=[(first, draw_background(rng, synthetic.size)) for first in [0, *cuts]],
        light=_light(rng, num_frames),
        noise=rng.uniform(1, 4),
    )


def render(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """The video, uint8 (T, size, size, 3); rng: of the sensor noise."""
    frames = np.empty((scene.num_frames, size, size, 3), np.uint8)
    cuts = [first for first, _ in scene.backgrounds]
    for t in range(scene.num_frames):
        canvas = scene.backgrounds[int(np.searchsorted(cuts, t, side="right")) - 1][1].astype(np.float32)
        for thing in scene.things:
            i = t - thing.first
            if not 0 <= i < len(thing.opacity) or thing.opacity[i] == 0:
                continue
            track = thing.track
            pose = (track.x[i] * size, track.y[i] * size, track.radius[i] * size, track.angle[i])
            layer = place_object(thing.pyramid, size, *pose) * np.float32(thing.opacity[i])
            canvas = canvas * (1 - layer[..., 3:] / 255) + layer[..., :3] * np.float32(thing.brightness[i])
        noise = rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(scene.noise)
        frames[t] = np.clip(canvas * np.float32(scene.light[t]) + noise + 0.5, 0, 255)
    return frames


def write_contact_sheet(path: Path, synthetic: Synthetic, *, rows: int = 6, columns: int = 16) -> None:
    """A PNG with the first validation videos, a row each, time from left to right, the actions as bars below."""
    from PIL import ImageDraw

    sheet, bar = [], 28
    for subset, number in [video for video in synthetic.videos() if video[0] == "validation"][:rows]:
        scene, frames = _film(synthetic, subset, number)
        chosen = frames[((np.arange(columns) + 0.5) * len(frames) / columns).astype(int)]
        width, row = columns * synthetic.size, film_strip(chosen, below=bar)
        draw = ImageDraw.Draw(row)
        for action in scene.actions:
            left, right = (f * width / scene.num_frames for f in (action.first, action.last))
            color = list(MOTIONS).index(action.motion) * 360 // len(MOTIONS)
            draw.rectangle((left, synthetic.size + 2, right, synthetic.size + 8), fill=f"hsl({color},70%,50%)")
            draw.text((left, synthetic.size + 10), action.motion, fill=(0, 0, 0))
        for first, _ in scene.backgrounds[1:]:
            x = first * width / scene.num_frames
            draw.line((x, synthetic.size, x, synthetic.size + 10), fill=(0, 0, 0))
        sheet.append(row)
    save_stack(path, sheet)


def _schedule(rng: np.random.Generator, synthetic: Synthetic, num_frames: int) -> list[Action]:
    """Which actions when: at least a second of quiet between two, sometimes much more; all classes equally likely."""
    fps, actions = synthetic.fps, []
    deck = [list(MOTIONS)[i] for _ in range(4) for i in rng.permutation(len(MOTIONS))]
    first = int(rng.uniform(1, 5) * fps)
    for motion in deck:
        last = first + int(rng.uniform(*synthetic.action_seconds) * fps)
        if last + fps > num_frames:
            break
        actions.append(Action(motion, first, last))
        quiet = rng.uniform(6, 10) if rng.random() < 0.15 else rng.uniform(1, 4.5)
        first = last + int(np.ceil(quiet * fps))
    return actions


def _actors(rng: np.random.Generator, group: Group, actions: list[Action], num_frames: int, fps: float) -> list[Thing]:
    """The objects that act. One that has acted acts again from where it rests, if the motion has room there."""
    short, half = round(0.35 * fps), round(0.5 * fps)  # a fade, and the least rest around a motion
    actors: list[Thing] = []
    pieces: list[Track] = []
    birth = quiet_since = 0
    for action in actions:
        path = _action_path(rng, action, fps)
        if pieces and rng.random() < 0.6:
            rest = _rest(rng, pieces[-1], action.first - quiet_since, fps)
            again = _start_at(path, rest)
            if _has_room(again):
                pieces += [rest, again]
                quiet_since = action.last
                continue
        if pieces:
            death = int(rng.integers(quiet_since + short + 1, action.first + 1))
            pieces.append(_rest(rng, pieces[-1], death - quiet_since, fps))
            actors.append(_thing(rng, group, birth, pieces, short, num_frames))
        born_before = not actors and rng.random() < 0.5
        birth = 0 if born_before else int(rng.integers(quiet_since, action.first - half))
        pieces = [_rest(rng, path, action.first - birth, fps, backwards=True), path]
        quiet_since = action.last
    left = num_frames - quiet_since
    stay = left if rng.random() < 0.5 else int(rng.integers(short + 1, left + 1))
    pieces.append(_rest(rng, pieces[-1], stay, fps))
    return [*actors, _thing(rng, group, birth, pieces, short, num_frames)]


def _bystander(rng: np.random.Generator, group: Group, num_frames: int, fps: float) -> Thing:
    """An object that never acts: it stands or drifts, perhaps it pulses."""
    length = int(rng.integers(round(3 * fps), num_frames + 1))
    first = int(rng.integers(0, num_frames - length + 1))
    place = np.array([[rng.uniform(*INSIDE)], [rng.uniform(*INSIDE)], [rng.uniform(0.14, 0.3)], [rng.uniform(0, 6.28)]])
    thing = _thing(rng, group, first, [_rest(rng, Track(*place), length, fps)], round(0.35 * fps), num_frames)
    if rng.random() < 0.4:
        seconds = np.arange(length) / fps
        pulse = np.sin(2 * np.pi * (rng.uniform(0.2, 1.0) * seconds + rng.uniform(0, 1)))
        thing.brightness[:] = 1 + rng.uniform(0.1, 0.35) * pulse
    return thing


def _thing(
    rng: np.random.Generator, group: Group, first: int, pieces: list[Track], fade: int, num_frames: int
) -> Thing:
    """A new object on a path; it fades in and out, but not at the ends of the video."""
    pairs = objects_of(group)
    sprite, _ = draw_object(rng, *pairs[int(rng.integers(len(pairs)))])
    track = _join(pieces)
    length = len(track.x)
    opacity = np.ones(length)
    ramp = np.arange(1, fade + 1) / (fade + 1)
    if first > 0:
        opacity[:fade] = ramp
    if first + length < num_frames:
        opacity[-fade:] = ramp[::-1]
    return Thing(halve_again(sprite), first, track, opacity, np.ones(length))


def _action_path(rng: np.random.Generator, action: Action, fps: float) -> Track:
    """A path that moves from its first to its last frame; turning, bouncing and shaking as fast as in a 2 s clip."""
    kind, backwards = MOTIONS[action.motion]
    length = action.last - action.first
    track = draw_track(rng, kind, length, rest=0.0, repeats=length / (2 * fps))
    return Track(*(values[::-1] for values in _values(track))) if backwards else track


def _rest(rng: np.random.Generator, path: Track, length: int, fps: float, *, backwards: bool = False) -> Track:
    """(length,) from the end of a path on, or with `backwards` up to its beginning: at rest, or drifting slowly.

    At most 0.015 frame widths a second and 0.2 in all; the slowest of the motions makes 0.05 a second.
    """
    speed = rng.uniform(-1, 1, 2) * min(0.015, 0.2 * fps / max(length, 1)) * (rng.random() < 0.6)
    steps = np.arange(-length, 0) if backwards else np.arange(1, length + 1)
    x, y, radius, angle = (values[0 if backwards else -1] for values in _values(path))
    still = np.zeros(length)
    return Track(x + speed[0] * steps / fps, y + speed[1] * steps / fps, radius + still, angle + still)


def _start_at(path: Track, rest: Track) -> Track:
    """The path moved, scaled and turned so that it begins where the rest ends."""
    end = [values[-1] for values in _values(rest)]
    scale = end[2] / path.radius[0]
    return Track(
        path.x - path.x[0] + end[0],
        path.y - path.y[0] + end[1],
        path.radius * scale,
        path.angle - path.angle[0] + end[3],
    )


def _has_room(path: Track) -> bool:
    inside = all(INSIDE[0] <= values.min() and values.max() <= INSIDE[1] for values in (path.x, path.y))
    return inside and bool(RADII[0] <= path.radius.min() and path.radius.max() <= RADII[1])


def _light(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """A slow flicker, and in half of the videos one change of the light."""
    light = 1 + 0.06 * rng.uniform(0, 1) * smooth_curve(rng, num_frames)
    if rng.random() < 0.5:
        light[int(rng.integers(1, num_frames)) :] *= rng.uniform(0.8, 1.2)
    return light


def _values(track: Track) -> tuple[np.ndarray, ...]:
    return track.x, track.y, track.radius, track.angle


def _join(pieces: list[Track]) -> Track:
    return Track(*(np.concatenate(values) for values in zip(*map(_values, pieces), strict=True)))


def _film(synthetic: Synthetic, subset: str, number: int) -> tuple[Scene, np.ndarray]:
    scene = build_scene(synthetic, subset, number)
    rng = np.random.default_rng([synthetic.seed, len(SUBSETS), number])
    return scene, render(scene, synthetic.size, rng)


def _write_one(job: tuple[Synthetic, str, int, Path]) -> dict:
    """Render and write one video if it is not there; returns its entry in the official JSON form."""
    synthetic, subset, number, path = job
    if path.is_file():
        scene = build_scene(synthetic, subset, number)
    else:
        scene, frames = _film(synthetic, subset, number)
        write_video(path, frames, synthetic.fps)
    return {
        "duration": round(scene.num_frames / synthetic.fps, 4),
        "subset": subset,
        "resolution": f"{synthetic.size}x{synthetic.size}",
        "url": "",
        "annotations": [
            {
                "label": action.motion,
                "segment": [round(action.first / synthetic.fps, 4), round(action.last / synthetic.fps, 4)],
            }
            for action in scene.actions
        ],
    }


def _taxonomy() -> list[dict]:
    """The classes as leaves below one root, in the official form."""
    root = {"nodeName": "Root", "nodeId": 0, "parentName": None, "parentId": None}
    leaves = [
        {"nodeName": motion, "nodeId": i, "parentName": "Root", "parentId": 0} for i, motion in enumerate(MOTIONS, 1)
    ]
    return [root, *leaves]
