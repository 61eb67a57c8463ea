"""When which action happens in a video file: the detections as JSON, on a timeline, and in an annotated copy.

    python -m action_detection.predict runs/action_detection/untrimmed_tiny_dr2net/seed0 video.mp4 --output predictions

writes predictions/video.json (the official submission format), predictions/video.png (frames, the annotated actions if
--annotations FILE has the video, the detected ones below, a lane per class, the score as opacity) and
predictions/video.mp4 (what is detected, while it lasts). Windows and frames pass through one piece at a time, so that
the length of the video does not matter to memory. JSON has all detections, the pictures those of at least --min-score.
A class-agnostic network names no class: it finds "action". Not here: streaming from a camera.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from action_detection.annotations import read_database
from action_detection.configs import Config
from action_detection.data import class_names, collate, windows_of_file
from action_detection.evaluate import Detected, collect, detections, write_detections
from engine import commands
from engine.data.loader import to_device
from engine.data.video import VideoInfo, probe, read_frames, write_frames
from engine.data.workers import tracked
from engine.files import appearing
from engine.settings import Share
from engine.task import Model
from engine.training.finetuning import autocast
from engine.visual import DARK, LIGHT, TABLEAU, annotated_copy, draw_bar, even_size, resized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

MAX_LANES = 12  # classes in a picture, those with the best scores
MAX_PIECE_BYTES = 1 << 26  # of decoded frames in memory at once
TRACK, BACKGROUND = (70, 70, 70), 38


class Action(NamedTuple):
    """An action in a picture."""

    label: str
    start: float  # seconds
    end: float
    score: float = 1.0


@dataclass(frozen=True)
class Arguments(commands.Prediction):
    """See the module's docstring."""

    annotations: Path | None = None  # a file in ActivityNet's form that has this video
    min_score: Share = 0.2  # of the actions in the pictures


def predict(config: Config, model: Model, arguments: Arguments) -> tuple[Path, Path, Path]:
    """Print the best detections and write JSON, timeline and annotated video; returns their paths.

    Raises engine.data.video.BrokenVideo for a file that cannot be decoded, ValueError if the annotations lack it.
    """
    video, output, annotations, min_score = (
        arguments.input,
        arguments.output,
        arguments.annotations,
        arguments.min_score,
    )
    names = ("action",) if config.model.class_agnostic else tuple(class_names(config))
    name, info = video.stem.removeprefix("v_"), probe(video)
    truth = None if annotations is None else annotated_actions(annotations, name)
    found = detect(config, model, video)
    actions = [
        Action(names[label], start, end, score)
        for label, (start, end), score in zip(
            found.labels.tolist(), found.segments.tolist(), found.scores.tolist(), strict=True
        )
        if score >= min_score
    ]
    print(f"{len(found.scores)} detections, {len(actions)} with a score of at least {min_score}")
    for action in actions[:10]:
        print(f"{action.score:6.1%} {action.start:8.1f} to {action.end:6.1f} s  {action.label}")
    output.mkdir(parents=True, exist_ok=True)
    table, timeline = (output / f"{video.stem}.{suffix}" for suffix in ("json", "png"))
    annotated = annotated_copy(video, output)
    write_detections(table, {name: found}, names)
    colors = colors_of([*(truth or []), *actions])
    draw_timeline(timeline, video, info, actions, truth, colors, title=f"{video.name}, {config.row}")
    write_frames(annotated, annotate(video, info, actions, colors), output_fps(info))
    return table, timeline, annotated


def detect(config: Config, model: Model, video: Path) -> Detected:
    """The detections in a video file, best first, as in evaluation; one window in memory at a time."""
    device = next(model.parameters()).device
    # A training row may keep whole decoded videos in memory; here the video is read once, and may be long.
    samples = windows_of_file(replace(config.data, cache_gib=0.0), video)
    batches = (collate([samples[index, 0]]) for index in tracked("detecting", range(len(samples))))
    with autocast(config.optimization.precision, device):
        windows = [window for batch in batches for window in collect(model, to_device(batch, device), config)]
    return detections(windows, config.detection)[video.stem]


def annotated_actions(file: Path, name: str) -> list[Action]:
    """The actions of one video in an annotation file. ValueError naming both if it is not there."""
    _, database = read_database(file)
    if name not in database:
        raise ValueError(
            f"{file} has no video {name!r}; its {len(database)} names are the files' without v_ and suffix"
        )
    return [Action(item["label"], *map(float, item["segment"])) for item in database[name]["annotations"]]


def colors_of(actions: list[Action]) -> dict[str, str]:
    """A color for each class of a picture, at most MAX_LANES, those with the best scores, in the order of time."""
    best: dict[str, float] = {}
    for action in actions:
        best[action.label] = max(action.score, best[action.label]) if action.label in best else action.score
    kept = sorted(best, key=lambda label: -best[label])[:MAX_LANES]
    kept.sort(key=lambda label: min(action.start for action in actions if action.label == label))
    return {label: TABLEAU[k % len(TABLEAU)] for k, label in enumerate(kept)}


def draw_timeline(
    path: Path,
    video: Path,
    info: VideoInfo,
    actions: list[Action],
    truth: list[Action] | None,
    colors: dict[str, str],
    *,
    title: str,
) -> None:
    """Frames of the video, the annotated actions if given, the detected ones; a lane per class, over seconds."""
    from matplotlib.figure import Figure

    panels = [("detected", actions)] if truth is None else [("annotated", truth), ("detected", actions)]
    lanes = [[label for label in colors if any(a.label == label for a in own)] for _, own in panels]
    num_frames = min(12, info.num_frames)
    width, strip = 11.0, min(1.6, 11.0 / num_frames * info.height / info.width)
    heights = [strip, *(0.3 * max(len(own), 1) + 0.12 for own in lanes)]
    figure = Figure(figsize=(width, sum(heights) + 0.75 + 0.25 * len(panels)), dpi=130, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)  # a name may hold $
    times = (np.arange(num_frames) + 0.5) * info.seconds / num_frames
    indices = np.searchsorted(info.timestamps, times, side="right") - 1
    for index, middle in zip(indices, times, strict=True):  # one by one: frames of a film do not fit into memory
        half = 0.485 * info.seconds / num_frames
        frame = np.asarray(resized(read_frames(video, [index])[0], 200))
        axes[0].imshow(frame, extent=(middle - half, middle + half, 0, 1), aspect="auto", interpolation="bilinear")
    axes[0].set_ylim(0, 1)
    axes[0].axis("off")
    for panel, (name, own), labels in zip(axes[1:], panels, lanes, strict=True):
        for lane, label in enumerate(labels):
            mine = [action for action in own if action.label == label]
            _draw_lane(panel, lane, mine, colors[label], info.seconds, with_scores=own is actions)
        panel.set_yticks(range(len(labels)), [shorten(label, 32) for label in labels], fontsize=8)
        panel.set_ylim(max(len(labels), 1) - 0.5, -0.5)
        panel.set_title(name if labels else f"{name}: nothing", fontsize=9, loc="left", pad=3)
        panel.tick_params(axis="x", labelsize=8, labelbottom=panel is axes[-1])
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", alpha=0.25)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlim(0, info.seconds)
    axes[-1].set_xlabel("seconds", fontsize=8)
    with appearing(path) as temporary:
        figure.savefig(temporary)


def _draw_lane(
    panel: "Axes", lane: int, actions: list[Action], color: str, seconds: float, *, with_scores: bool
) -> None:
    """A bar for each action, the best on top; what it covers does not shine through. Scores where there is room."""
    for action in sorted(actions, key=lambda action: action.score):
        length = max(action.end - action.start, 0.002 * seconds)
        panel.barh(lane, length, 0.62, action.start, color="white", linewidth=0)
        panel.barh(lane, length, 0.62, action.start, color=color, alpha=min(action.score, 1.0), linewidth=0)
        panel.barh(lane, length, 0.62, action.start, fill=False, edgecolor=color, linewidth=0.9)
    room = 0.035 * seconds
    written: list[float] = []
    for action in sorted(actions, key=lambda action: -action.score) if with_scores else ():
        middle = (action.start + action.end) / 2
        if action.end - action.start > room and all(abs(middle - other) > room for other in written):
            written.append(middle)
            ink = "white" if action.score > 0.55 else "#222222"
            panel.text(middle, lane, f"{action.score:.2f}", fontsize=7, color=ink, ha="center", va="center")


def shorten(text: str, length: int) -> str:
    """At most so many characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def output_fps(info: VideoInfo) -> float:
    """The annotated copy's frame rate, constant even where the input's is not."""
    return min(max(info.fps, 1.0), 30.0)


def annotate(
    video: Path, info: VideoInfo, actions: list[Action], colors: dict[str, str], *, min_width: int = 480
) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) of the annotated copy, one by one: picture, then the actions of this moment, then all.

    Enlarged to `min_width` if smaller; even height and width.
    """
    width, height = even_size(info.width, info.height, min_width)
    shown = [action for action in actions if action.label in colors]
    overview = draw_overview(shown, colors, info.seconds, width)
    times = np.arange(max(round(info.seconds * output_fps(info)), 1)) / output_fps(info)
    indices = np.searchsorted(info.timestamps, times + 1e-4, side="right") - 1
    pieces = -(-len(indices) * info.height * info.width * 3 // MAX_PIECE_BYTES)
    for part, moments in zip(np.array_split(indices, pieces), np.array_split(times, pieces), strict=True):
        for frame, moment in zip(read_frames(video, part), moments.tolist(), strict=True):
            picture = resized(frame, width, height)
            captions = draw_captions(shown, colors, moment, width)
            cursor = overview.copy()
            x = min(int(moment / info.seconds * width), width - 2)
            cursor.paste(LIGHT, (x, 0, x + 2, overview.height))
            yield np.concatenate([np.asarray(image) for image in (picture, captions, cursor)])


def draw_captions(
    actions: list[Action], colors: dict[str, str], moment: float, width: int, *, lines: int = 3
) -> "Image.Image":
    """The best actions of this moment, a line each: a bar as long as the score, the name, from when to when."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (width, 24 * lines + 8), DARK)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    active: dict[str, Action] = {}
    for action in actions:  # best first
        if action.start <= moment < action.end:
            active.setdefault(action.label, action)
    for line, action in enumerate(list(active.values())[:lines]):
        y = 24 * line + 5
        draw_bar(draw, 0, y, width - 1, action.score, colors[action.label], TRACK)
        when = f"{action.start:.1f} to {action.end:.1f} s"
        right = width - 8 - draw.textlength(when, font=font)
        text = f"{action.score:.0%}  {action.label}"
        while draw.textlength(text, font=font) > right - 16 and len(text) > 8:
            text = shorten(text, len(text) - 1)
        draw.text((8, y + 1), text, fill=LIGHT, font=font)
        draw.text((right, y + 1), when, fill=LIGHT, font=font)
    if len(active) < lines:
        draw.text((8, 24 * lines - 17), f"{moment:.1f} s", fill=(170, 170, 170), font=font)
    return picture


def draw_overview(actions: list[Action], colors: dict[str, str], seconds: float, width: int) -> "Image.Image":
    """All actions over the whole video, a thin lane per class, the score as opacity; even height."""
    from PIL import Image, ImageColor

    lane = 8
    picture = Image.new("RGB", (width, lane * max(len(colors), 1) + 8), (BACKGROUND,) * 3)
    for action in sorted(actions, key=lambda action: action.score):
        y = 4 + lane * list(colors).index(action.label)
        x = int(action.start / seconds * width)
        size = (max(int((action.end - action.start) / seconds * width), 2), lane - 2)
        opacity, color = min(action.score, 1.0), np.array(ImageColor.getrgb(colors[action.label]))
        blended = (opacity * color + (1 - opacity) * BACKGROUND).astype(int).tolist()
        picture.paste(tuple(blended), (x, y, x + size[0], y + size[1]))
    return picture


if __name__ == "__main__":
    from action_detection import model

    commands.predict(Config, model, predict, Arguments)
