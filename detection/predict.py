"""What is where in a picture, in a folder of pictures or in a video: boxes with class and score, drawn and as JSON.

    python -m detection.predict runs/detection/shapes_tiny_dr2net/seed0 street.jpg --output predictions

writes predictions/street.png and predictions/street.json; of a folder a PNG each and detections.json for all; of a
video an annotated mp4 and a JSON. A JSON is a list in COCO's results form, in pixels of the input, with the names of
class and file beside the ids: {"image_id", "category_id", "bbox", "score", "category", "file_name"}; image_id counts
the pictures from 1, or is the number of a video's frame. All have the detections of at least --min-score. What cannot
be read in a folder is named and left out, or with --on-broken raise the end. Pictures and frames pass one at a time.

Not here: scores against annotations (evaluate.py), tracks of objects through a video.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO

import numpy as np
import torch

from detection.annotations import Category, read_categories
from detection.configs import Config
from detection.data import collate, sample_of_image
from detection.drawing import Box, draw_boxes, shorten
from detection.evaluate import collect
from detection.images import SUFFIXES, BrokenImage, read_image
from engine import commands
from engine.data.loader import to_device
from engine.data.video import VideoInfo, probe, read_frames, write_frames
from engine.data.workers import first_of, tracked
from engine.files import make_folder, publish
from engine.settings import Share
from engine.task import Model
from engine.training.finetuning import autocast
from engine.visual import annotated_copy, even_size

MAX_PIECE_BYTES = 1 << 26  # of decoded frames in memory at once
MIN_SIDE = 480  # of an annotated copy, the longer one; smaller pictures are enlarged, so that labels can be read
MAX_FPS = 30.0


@dataclass(frozen=True)
class Arguments(commands.Prediction):
    """See the module's docstring."""

    min_score: Share = 0.3  # of the detections that are drawn and written
    on_broken: Literal["raise", "skip"] = "skip"  # a picture of a folder that cannot be read


def predict(config: Config, model: Model, arguments: Arguments) -> list[Path]:
    """Print what was found and write the annotated copies and the JSON; returns their paths (of a folder, the JSON and
    the folder of the copies).

    Raises BrokenImage or BrokenVideo for a file that cannot be decoded, ValueError for a folder without a usable one.
    """
    given, output = arguments.input, arguments.output
    categories = read_categories(config.data)
    make_folder(output)
    if given.is_dir():
        return [_predict_folder(config, model, arguments, categories), output]
    results = Results(output / f"{given.stem}.json", categories)
    if given.suffix.lower() in SUFFIXES:
        copy = copies_of([given], output)[given]
        with results:
            _predict_picture(config, model, given, _read(given), 1, arguments.min_score, results, copy)
        return [copy, results.path]
    info, copy = probe(given), annotated_copy(given, output)
    with results:
        frames = annotate(config, model, given, info, arguments.min_score, results)
        write_frames(copy, frames, output_fps(info))
    print(f"{given.name}: {info.num_frames} frames, {in_words(results.counts, categories)}")
    return [copy, results.path]


def detect(config: Config, model: Model, image: np.ndarray, name: str, min_score: float) -> list[Box]:
    """The detections in a picture, uint8 (H, W, 3), of at least this score, best first; as in evaluation."""
    device = next(model.parameters()).device
    pixels = torch.tensor(image).permute(2, 0, 1)  # a copy: frames may be read-only
    batch = to_device(collate([sample_of_image(config.data, pixels, name)]), device)
    with autocast(config.optimization.precision, device):
        (found,) = collect(model, batch, config)
    boxes = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
    return [Box(label, score, *box) for label, score, box in boxes if score >= min_score]


class Results:
    """The JSON list of detections, written while it grows; the file appears when it is complete."""

    def __init__(self, path: Path, categories: Sequence[Category]) -> None:
        self.path, self.categories = path, categories
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.counts: Counter[int] = Counter()  # detections by class
        self.file: TextIO

    def __enter__(self) -> "Results":
        self.temporary.unlink(missing_ok=True)  # a link that waits under the name is not followed
        self.file = self.temporary.open("x", encoding="utf-8")
        self.file.write("[")
        return self

    def add(self, boxes: Sequence[Box], image_id: int, name: str) -> None:
        """The detections of one more picture."""
        for box in boxes:
            category = self.categories[box.label]
            entry = {
                "image_id": image_id,
                "category_id": category.id,
                "bbox": list(box[2:]),
                "score": box.score,
                "category": category.name,
                "file_name": name,
            }
            self.file.write((",\n" if self.counts else "") + json.dumps(entry))
            self.counts[box.label] += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self.file:
                self.file.write("]\n")
            if kind is None:
                publish(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


def copies_of(pictures: Sequence[Path], output: Path) -> dict[Path, Path]:
    """Where the annotated copy of each picture goes; never onto a picture, and each to a name of its own."""
    stems = Counter(path.stem for path in pictures)
    taken = {os.path.realpath(path) for path in pictures}  # resolve() dies of a link to itself
    copies = {}
    for path in pictures:
        stem = path.stem if stems[path.stem] == 1 else path.name.replace(".", "_")
        target = output / f"{stem}.png"
        while os.path.realpath(target) in taken:
            target = target.with_stem(f"{target.stem}_annotated")
        taken.add(os.path.realpath(target))
        copies[path] = target
    return copies


def annotate(
    config: Config, model: Model, video: Path, info: VideoInfo, min_score: float, results: Results
) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) of the annotated copy, one by one; what is in each goes to `results`, once."""
    width, height = even_size(info.width, info.height, MIN_SIDE)
    names = [category.name for category in results.categories]
    times = np.arange(max(round(info.seconds * output_fps(info)), 1)) / output_fps(info)
    indices = np.searchsorted(info.timestamps, times + 1e-4, side="right") - 1
    pieces = np.array_split(indices, -(-len(indices) * info.height * info.width * 3 // MAX_PIECE_BYTES))
    last, picture = -1, np.zeros((0, 0, 3), np.uint8)
    progress = iter(tracked("detecting", range(len(indices))))
    for piece in pieces:
        for index, frame in zip(piece.tolist(), read_frames(video, piece), strict=True):
            next(progress)
            if index != last:  # a variable frame rate shows some frames twice
                boxes = detect(config, model, frame, f"{video.name}, frame {index}", min_score)
                results.add(boxes, index, video.name)
                last, picture = index, np.asarray(draw_boxes(frame, boxes, names, width, height))
            yield picture
    next(progress, None)


def output_fps(info: VideoInfo) -> float:
    """The annotated copy's frame rate, constant even where the input's is not."""
    return min(max(info.fps, 1.0), MAX_FPS)


def in_words(counts: Counter[int], categories: Sequence[Category]) -> str:
    """ "3 detections: 2 cat, 1 dog"."""
    total = sum(counts.values())
    some = ", ".join(f"{count} {shorten(categories[label].name)}" for label, count in counts.most_common(8))
    more = f", {len(counts) - 8} more classes" if len(counts) > 8 else ""
    return f"{total} detections{': ' if some else ''}{some}{more}"


def _predict_folder(config: Config, model: Model, arguments: Arguments, categories: Sequence[Category]) -> Path:
    """All pictures of a folder, in the order of their names; returns the JSON."""
    files = sorted(path for path in arguments.input.iterdir() if not path.is_dir() and not path.name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    folders = sorted(path.name for path in arguments.input.iterdir() if path.is_dir() and path.name[0] != ".")
    others = [path.name for path in files if path not in set(pictures)]
    for what, names in (("files that are no pictures left out", others), ("folders not looked into", folders)):
        if names:
            print(f"{len(names)} {what}: {first_of(names, 10)}")
    copies, broken = copies_of(pictures, arguments.output), []
    results = Results(arguments.output / "detections.json", categories)
    with results:
        for image_id, path in enumerate(pictures, 1):
            try:
                image = _read(path)
            except (BrokenImage, OSError) as error:
                if arguments.on_broken == "raise":
                    raise
                # the remedy of an error is the configuration's flag, which is not this command's
                print(f"skipped: {': '.join(error.parts[:2]) if isinstance(error, BrokenImage) else error}")
                broken.append(path.name)
            else:
                _predict_picture(config, model, path, image, image_id, arguments.min_score, results, copies[path])
        if len(broken) == len(pictures):
            kinds = f"{len(pictures)} pictures that cannot be read" if broken else f"no picture ({', '.join(SUFFIXES)})"
            raise ValueError(f"{arguments.input}: has {kinds}; give a folder of pictures, a picture or a video")
    if broken:
        print(f"{len(broken)} of {len(pictures)} pictures skipped: {', '.join(broken[:10])}")
    return results.path


def _predict_picture(
    config: Config,
    model: Model,
    path: Path,
    image: np.ndarray,
    image_id: int,
    min_score: float,
    results: Results,
    copy: Path,
) -> None:
    """One picture: a line, its copy, its part of the JSON."""
    boxes = detect(config, model, image, path.name, min_score)
    height, width = image.shape[:2]
    scale = max(1.0, MIN_SIDE / max(width, height))
    names = [category.name for category in results.categories]
    drawn = draw_boxes(image, boxes, names, max(round(scale * width), 1), max(round(scale * height), 1))
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    try:
        drawn.save(temporary, "PNG")
        publish(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)
    results.add(boxes, image_id, path.name)
    print(f"{path.name}: {in_words(Counter(box.label for box in boxes), results.categories)}")


def _read(path: Path) -> np.ndarray:
    """uint8 (H, W, 3), as a viewer shows it; of several frames the first."""
    return read_image(path).permute(1, 2, 0).numpy()


if __name__ == "__main__":
    from detection import model

    commands.predict(Config, model, predict, Arguments)
