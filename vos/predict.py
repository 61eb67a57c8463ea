"""Where in a video is what a sentence says: masks as PNG, drawn over the video, and on a contact sheet.

    python -m vos.predict runs/vos/referring_small_dr2net/seed0 video.mp4 --query "the red star" --query "the disc"

writes predictions/video.mp4 (each sentence in a color of its own, below it how sure the network is),
predictions/video.png (some frames, and a strip for each sentence), predictions/video.json (scores) and
predictions/video_masks/<number>_<sentence>/<frame>.png, 0 and 255 at the video's size, frames counted from 0. The
video passes in windows of `data.window` frames, of which the last reaches back, a short video's last frame repeated; in
each window a sentence has the masks of its best query, of the best mean score, also where the object is not there: with
--min-score a window below it has empty ones. --every 5 looks at each fifth frame, as Ref-YouTube-VOS does, and the copy
has those alone. Not here: scores against annotations (evaluate.py).
"""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import tyro

from engine import commands
from engine.backbones.text import Text, build_text
from engine.data.loader import to_device
from engine.data.video import VideoInfo, probe, read_frames, write_frames
from engine.data.workers import tracked
from engine.files import make_folder, write_text
from engine.settings import Count, Share
from engine.task import Model
from engine.training.finetuning import autocast
from engine.visual import annotated_copy, even_size, save_stack
from vos.annotations import normalize_sentence
from vos.configs import Config
from vos.data import collate, sample_of_frames
from vos.drawing import colors_of, draw_legend, draw_masks, draw_strip, lacking_letters, spread, thumbnail_width
from vos.head import Frames
from vos.submission import as_png

MIN_WIDTH = 480  # of the annotated copy; smaller videos are enlarged, so that the legend can be read
SLUG = 40  # letters of a sentence in a folder's name


@dataclass(frozen=True)
class Arguments(commands.Prediction):
    """See the module's docstring."""

    query: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # a sentence; again for each further one
    every: Count = 1  # look at each so manieth frame only
    min_score: Share = 0.0  # of a window in which a sentence has masks


class Seen(NamedTuple):
    """A frame and what was found in it."""

    place: int  # in the video
    picture: np.ndarray  # uint8 (H, W, 3)
    masks: np.ndarray  # (N, H, W) boolean, of each sentence
    scores: list[float]  # N, of its window


def predict(config: Config, model: Model, arguments: Arguments) -> list[Path]:
    """Print what was found and write the annotated copy, the contact sheet, the JSON and the masks; returns the paths.

    Raises engine.data.video.BrokenVideo for a file that cannot be decoded, ValueError for no sentence or an empty one.
    """
    video, output = arguments.input, arguments.output
    queries = [normalize_sentence(query) for query in arguments.query]
    if not queries or not all(queries):
        raise ValueError('say what to look for: --query "the red star", again for each further sentence')
    if letters := lacking_letters(queries):
        where = f"their masks are in {video.stem}_masks/<number>, as {video.stem}.json says"
        warnings.warn(f"the font of the pictures has boxes for {letters[:20]!r}; {where}", stacklevel=2)
    info, copy = probe(video), annotated_copy(video, output)
    make_folder(output)
    indices = list(range(0, info.num_frames, arguments.every))
    folders = mask_folders(output / f"{video.stem}_masks", queries)
    sheet = Sheet(video.name, queries, [indices[k] for k in spread(len(indices))], info)
    scores: list[list[float]] = []

    def pictures() -> Iterator[np.ndarray]:
        for seen in segment(config, model, video, indices, queries, arguments.min_score):
            scores.append(seen.scores)
            for folder, mask in zip(folders, seen.masks, strict=True):
                (folder / f"{seen.place:05d}.png").write_bytes(as_png(mask))
            sheet.add(seen)
            yield draw_frame(seen, queries, info)

    write_frames(copy, pictures(), max(info.fps / arguments.every, 1.0))
    table, picture = output / f"{video.stem}.json", output / f"{video.stem}.png"
    sheet.save(picture)
    found = [
        {"query": query, "masks": folder.relative_to(output).as_posix(), "scores": list(own)}
        for query, folder, own in zip(queries, folders, zip(*scores, strict=True), strict=True)
    ]
    lines = [f'"video": {json.dumps(video.name)}', f'"frames": {indices}']
    rows = ",\n".join(map(json.dumps, found))
    write_text(table, "{" + ",\n".join(lines) + f',\n"found": [\n{rows}\n]}}\n')
    for query, own in zip(queries, zip(*scores, strict=True), strict=True):
        print(f"{np.mean(own):6.1%}  {query}")
    return [copy, picture, table, folders[0].parent]


def segment(
    config: Config, model: Model, video: Path, indices: Sequence[int], queries: Sequence[str], min_score: float
) -> Iterator[Seen]:
    """The frames with these indices and the masks of each sentence in them, one window in memory at a time."""
    text = build_text(config.data.text, config.data.max_words)
    text.prepare(queries)
    for window, new in tracked("looking", windows(len(indices), config.data.window)):
        own = [indices[k] for k in window]
        frames = read_frames(video, own)
        name = f"{video.name}, frames {own[0]} to {own[-1]}"
        masks, scores = segment_window(config, model, text, frames, queries, name)
        masks[np.array(scores) < min_score] = False
        for k in new:
            yield Seen(own[k], frames[k], masks[:, k], scores)


def windows(count: int, length: int) -> list[tuple[list[int], list[int]]]:
    """Windows of `length` of `count` frames, one after the other: the frames of each, and which places in it are new.

    The last one reaches back; where there are fewer frames than `length`, the last is repeated.
    """
    found = []
    for first in range(0, count, length):
        start = max(min(first, count - length), 0)
        window = [min(start + k, count - 1) for k in range(length)]
        found.append((window, list(range(first - start, min(length, count - start)))))
    return found


def segment_window(
    config: Config, model: Model, text: Text, frames: np.ndarray, queries: Sequence[str], name: str
) -> tuple[np.ndarray, list[float]]:
    """Masks (N, T, H, W) boolean of the best query for each of N sentences, and its mean score.

    frames: uint8 (T, H, W, 3). The backbone sees them once for all sentences. ValueError naming the window for scores
    that are not finite.
    """
    device = next(model.parameters()).device
    head, features = cast(Any, model).head, None
    masks = np.zeros((len(queries), *frames.shape[:3]), bool)
    found = []
    with torch.no_grad(), autocast(config.optimization.precision, device):
        for number, query in enumerate(queries):
            batch = to_device(collate([sample_of_frames(config.data, text, frames, query, name)]), device)
            features = model.backbone(batch["video"]) if features is None else features
            outputs = head(features, batch["padding"], batch["text"], batch["text_padding"], Frames.of(batch))
            (scores,) = head.scores(outputs, batch)
            if not scores.isfinite().all():
                raise ValueError(f"{name}: the network's scores are not finite; its weights or precision are at fault")
            mean = scores.mean(dim=0)
            best = mean.argmax()[None]
            for time, mask in enumerate(head.segment_frames(outputs, batch, 0, best)):
                masks[number, time] = mask[0].numpy()
            found.append(float(mean[best]))
    return masks, found


def mask_folders(root: Path, queries: Sequence[str]) -> list[Path]:
    """A folder for the masks of each sentence, made; masks of an earlier call are gone, of other sentences too."""
    folders = []
    for folder in list(root.iterdir()) if root.is_dir() else []:
        if re.fullmatch(r"[0-9]+(_[a-z0-9_]*)?", folder.name) and folder.is_dir() and not folder.is_symlink():
            for left in list(folder.iterdir()):
                if re.fullmatch(r"[0-9]{5,}\.png", left.name):
                    left.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
    for number, query in enumerate(queries):
        words = re.sub(r"[^a-z0-9]+", "_", query)[:SLUG].strip("_")
        folder = root / f"{number}_{words}".rstrip("_")
        make_folder(folder)
        folders.append(folder)
    return folders


def draw_frame(seen: Seen, queries: Sequence[str], info: VideoInfo) -> np.ndarray:
    """A frame of the annotated copy: the picture with its masks, the legend below; even height and width."""
    width, height = even_size(info.width, info.height, MIN_WIDTH)
    colors = colors_of(len(queries))
    legend = draw_legend(queries, seen.scores, colors, width)
    return np.concatenate([draw_masks(seen.picture, seen.masks, colors, width, height), np.asarray(legend)])


class Sheet:
    """Some frames of the video, then a strip for each sentence."""

    def __init__(self, title: str, queries: Sequence[str], indices: Sequence[int], info: VideoInfo) -> None:
        self.title, self.queries, self.indices = title, queries, indices
        self.width = thumbnail_width(info.width, info.height, len(indices))
        self.height = max(1, round(self.width * info.height / info.width))
        self.strips: list[list[np.ndarray]] = [[] for _ in range(len(queries) + 1)]
        self.scores: list[list[float]] = []

    def add(self, seen: Seen) -> None:
        """One more frame of the video, drawn if it is one of the sheet's."""
        self.scores.append(seen.scores)
        if seen.place not in self.indices:
            return
        size = (self.width, self.height)
        self.strips[0].append(draw_masks(seen.picture, seen.masks[:0], [], *size))
        for strip, mask, color in zip(self.strips[1:], seen.masks, colors_of(len(self.queries)), strict=True):
            strip.append(draw_masks(seen.picture, mask[None], [color], *size))

    def save(self, path: Path) -> None:
        """As a PNG."""
        places = ", ".join(map(str, self.indices))
        strips = [draw_strip(self.strips[0], f"{self.title}, frames {places}")]
        means = np.mean(self.scores, axis=0)
        for own, query, mean, color in zip(
            self.strips[1:], self.queries, means, colors_of(len(self.queries)), strict=True
        ):
            strips.append(draw_strip(own, f"{mean:.0%}  {query}", color))
        save_stack(path, strips)


if __name__ == "__main__":
    from vos import model

    commands.predict(Config, model, predict, Arguments)
