"""Average precision over box IoU, COCO's metric (`metric.py`), of a network, a run or a prediction file.

    python -m detection.evaluate runs/detection/shapes_tiny_dr2net/seed0
    python -m detection.evaluate coco_swinl_conventional --model.weights checkpoint0011_4scale_swin.pth
    python -m detection.evaluate --ground-truth instances_val2017.json --predictions detections.json

The first writes detections.json, in the form that the COCO server takes, into the run's folder and prints the metrics
in percent; the second does so with a detector of others, as the row has it, untrained by us; the third prints those of
any such file. The network's classes become the category ids of the annotation
file here and nowhere else. A size without ground truth has no metric: a dash. Rows take one image at a time, as the
padding of a batch changes what a network sees. Not here: which detections an image has (`head.py`).
"""

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np

from detection.annotations import annotation_file, as_coco, read_annotations
from detection.configs import ROWS, Config
from detection.metric import (
    MAX_DETECTIONS,
    GroundTruth,
    Prediction,
    check_ground_truth,
    check_predictions,
    evaluate_boxes,
    evaluate_files,
    in_order,
    read_ground_truth,
)
from engine import commands
from engine.command_line import parse, run_command
from engine.data.workers import first_of
from engine.files import write_text
from engine.settings import Arguments, Count
from engine.task import Batch, Model


class Found(TypedDict):
    """The detections of one image, best first."""

    image_id: int
    boxes: np.ndarray  # (k, 4) float32, x, y, width, height in pixels of the image as it was
    scores: np.ndarray  # (k,) float32
    labels: np.ndarray  # (k,) int64, index into the classes


class Truth(NamedTuple):
    """What the metric needs besides the detections."""

    boxes: GroundTruth
    category_ids: tuple[int, ...]  # of each class of the network


def read_truth(config: Config) -> Truth:
    """The ground truth of the test split.

    FileNotFoundError or ValueError if annotations are missing, not as configured, or have no object.
    """
    annotations = read_annotations(config.data, "test")
    if config.data.kind == "coco" and config.data.on_broken == "raise":
        # The boxes as the file has them, not clipped to the picture: what the COCO server compares with.
        file = annotation_file(config.data, "test")
        boxes = read_ground_truth(file).of_images(annotations.pictures)
    else:
        file = annotations.file
        boxes = check_ground_truth(as_coco(annotations), str(file))
    if all(annotation["iscrowd"] for annotation in boxes.annotations):
        raise ValueError(f"{file}: the split {config.data.test_split!r} has no objects to find: set --data.test-split")
    return Truth(boxes, tuple(category.id for category in annotations.categories))


def collect(model: Model, batch: Batch, config: Config) -> list[Found]:
    """The detections in each image of the batch. ValueError naming an image for which they are not finite."""
    own = config.detection
    detected = cast(Any, model).head.detect(
        model(batch), batch["original_size"], own.max_detections, max_overlap=own.max_overlap
    )
    rows = []
    for image_id, name, one in zip(batch["image_id"], batch["name"], detected, strict=True):
        boxes, scores = one.boxes.float().numpy(), one.scores.float().numpy()
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(
                f"{name}: the network's boxes or scores are not finite; its weights or precision are at fault"
            )
        row = Found(image_id=int(image_id), boxes=as_widths(boxes), scores=scores, labels=one.labels.numpy())
        rows.append(row)
    return rows


def score(rows: Sequence[Found], truth: Truth, config: Config) -> dict[str, float]:
    """AP, AP50, AP75, AP_S, AP_M, AP_L, AR100 in percent, less those of a size that the ground truth does not have."""
    lacking = sorted(set(truth.boxes.images) - {row["image_id"] for row in rows})
    if lacking:
        some = f"ids {first_of(map(str, lacking))}"
        warnings.warn(f"{len(lacking)} of {len(truth.boxes.images)} images were not looked at ({some})", stacklevel=2)
    predictions = check_predictions(as_predictions(rows, truth.category_ids), truth.boxes, "detections")
    metrics = evaluate_boxes(truth.boxes, predictions, MAX_DETECTIONS)
    return {name: value for name, value in metrics.items() if value is not None}


def write(folder: Path, rows: Sequence[Found], truth: Truth, config: Config) -> Path:
    """detections.json, in the form that the COCO server takes. Of YOLO's files, whose ids are only ours, with the names
    of file and class, by which any ground truth of these pictures can be compared (renumber.py).
    """
    path, predictions = folder / "detections.json", as_predictions(rows, truth.category_ids)
    if config.data.kind == "yolo":
        files, names = truth.boxes.files, truth.boxes.categories
        for one in predictions:
            one |= {"category": names[one["category_id"]], "file_name": files[one["image_id"]]}
    write_predictions(path, predictions)
    return path


def as_widths(boxes: np.ndarray) -> np.ndarray:
    """x0, y0, x1, y1 to x, y, width, height; (k, 4) both. What is inverted has no width."""
    return np.concatenate([boxes[:, :2], np.maximum(boxes[:, 2:] - boxes[:, :2], 0)], axis=1)


def as_predictions(rows: Sequence[Found], category_ids: Sequence[int]) -> list[Prediction]:
    """COCO's results, by image and score. The same image twice counts once. ValueError for a class that has no id."""
    images = {row["image_id"]: row for row in rows}
    found = []
    for image_id, row in images.items():
        if len(row["labels"]) and not 0 <= row["labels"].min() <= row["labels"].max() < len(category_ids):
            have = f"{len(category_ids)} classes, the network found {row['labels'].min()} to {row['labels'].max()}"
            raise ValueError(f"image {image_id}: the annotations have {have}; set --data.num-classes")
        for box, score, label in zip(
            row["boxes"].tolist(), row["scores"].tolist(), row["labels"].tolist(), strict=True
        ):
            found.append({"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score})
    return in_order(found)


def write_predictions(path: Path, predictions: list[Prediction]) -> None:
    """COCO's results form, a prediction a line."""
    write_text(path, "[" + ",\n".join(map(json.dumps, predictions)) + "]\n")


@dataclass(frozen=True)
class Files(Arguments):
    """Score a prediction file, in COCO's results form."""

    ground_truth: Path  # annotations, in COCO's form
    predictions: Path  # detections
    max_detections: Count = MAX_DETECTIONS  # per image and class; more for dense images


def score_files(words: list[str]) -> None:
    """The command line that compares two files."""
    files = parse(Files, words)
    for name, value in evaluate_files(files.ground_truth, files.predictions, files.max_detections).items():
        print(f"{name} -" if value is None else f"{name} {value:.2f}")


def score_weights(words: list[str]) -> None:
    """The command line that scores a row's pretrained weights, without training.

    Also over several processes, by torchrun. ValueError for a row whose weights are no detector's, or one of other
    classes: layers that stay random have no score.
    """
    from detection import data, evaluate, model

    config = commands.parse_config(ROWS, words)
    if config.model.weights in (None, "imagenet"):
        raise ValueError(f"{config.row}: its weights are no detector's; give --model.weights FILE")
    weights = Path(config.model.weights)
    folder = config.run.output / "detection" / config.row / weights.stem
    network = model.build_model(config)
    if network.fresh:
        raise ValueError(
            f"{weights}: {network.fresh[0]} and {len(network.fresh) - 1} more stay random in this row, so there is "
            "nothing to score; give --data.num-classes and --data.root of the weights, or weights of a whole detector"
        )
    commands.score_network(config, network, data, evaluate, folder, str(weights), device=config.run.device)


def command_of(words: list[str]) -> Callable[[list[str]], None] | None:
    """The function for these words, None for a run's folder."""
    if any(word.startswith(("--ground-truth", "--predictions")) for word in words):
        return score_files
    is_row = words and not words[0].startswith("-") and "/" not in words[0] and not Path(words[0]).exists()
    return score_weights if is_row else None


if __name__ == "__main__":
    from detection import data, evaluate, model

    if (chosen := command_of(sys.argv[1:])) is not None:
        run_command(chosen)
    else:
        commands.evaluate(Config, model, data, evaluate)
