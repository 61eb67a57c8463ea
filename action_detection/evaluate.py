"""Average mAP over temporal IoU, ActivityNet's metric (`metric.py`), of a network, a run or a prediction file.

    python -m action_detection.evaluate runs/action_detection/untrimmed_tiny_dr2net/seed0
    python -m action_detection.evaluate --ground-truth gt.json --predictions detections.json --tiou 0.5:0.95:10

The first writes detections.json, in the form that the ActivityNet server takes, into the run's folder and prints the
metrics in percent; the second prints those of any such file. From the network's candidates to detections: the windows
of a video together, each once, then suppression (`ops.py`), then, for a class-agnostic network, the classes from
`detection.class_scores`. Not here: which windows there are (`data.py`), their candidates (`head.py`).
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from action_detection.annotations import Annotations, ClassScores, read_blocked, read_class_scores
from action_detection.configs import Config, Detection
from action_detection.data import read_annotations
from action_detection.metric import Rows, evaluate_files, evaluate_rows
from action_detection.ops import Window, soft_nms
from engine.command_line import parse, run_command
from engine.files import write_text
from engine.settings import Arguments
from engine.task import Batch, Model


class Detected(NamedTuple):
    """The detections of one video, best first."""

    segments: Tensor  # (M, 2) seconds
    scores: Tensor  # (M,)
    labels: Tensor  # (M,) index into the class names


class Truth(NamedTuple):
    """What the metric needs besides the candidates."""

    annotations: Annotations
    class_scores: ClassScores | None


def read_truth(config: Config) -> Truth:
    """The ground truth of the test subset.

    FileNotFoundError or ValueError if annotations or class scores are missing or do not fit.
    """
    annotations = read_annotations(config.data)
    class_scores = class_scores_of(config, annotations)
    if not any(len(video.labels) for video in test_videos(config, annotations).values()):
        raise ValueError(f"subset {config.data.test_subset!r} has no annotated actions: set data.test_subset")
    return Truth(annotations, class_scores)


def collect(model: Model, batch: Batch, config: Config) -> list[Window]:
    """The candidates in each window of the batch."""
    return cast(Any, model).head.detect(model(batch), batch, config.detection)


def score(rows: Sequence[Window], truth: Truth, config: Config) -> dict[str, float]:
    """average_mAP, then mAP at each of config.detection.tious, in percent."""
    found = detections(rows, config.detection, truth.class_scores)
    videos, names = test_videos(config, truth.annotations), truth.annotations.class_names
    actions = {
        name: Detected(video.segments, torch.zeros(len(video.labels)), video.labels) for name, video in videos.items()
    }
    result = evaluate_rows(as_rows(actions, names), as_rows(found, names), config.detection.tious)
    return named(result, config.detection.tious)


def write(folder: Path, rows: Sequence[Window], truth: Truth, config: Config) -> Path:
    """detections.json, in the form that the ActivityNet server takes."""
    path = folder / "detections.json"
    write_detections(path, detections(rows, config.detection, truth.class_scores), truth.annotations.class_names)
    return path


def test_videos(config: Config, annotations: Annotations) -> dict[str, Any]:
    """The videos of the test subset by name."""
    return {name: video for name, video in annotations.videos.items() if video.subset == config.data.test_subset}


def detections(
    windows: Iterable[Window], settings: Detection, class_scores: ClassScores | None = None
) -> dict[str, Detected]:
    """Windows merged by video, suppressed, with classes. The same (name, window) twice counts once."""
    videos: dict[str, dict[int, Window]] = {}
    for window in windows:
        videos.setdefault(window.name, {})[window.window] = window
    found = {}
    for name, own in videos.items():
        parts = [own[number] for number in sorted(own)]
        try:
            kept = soft_nms(
                torch.cat([part.segments for part in parts]),
                torch.cat([part.scores for part in parts]),
                torch.cat([part.labels for part in parts]),
                method=settings.nms,
                sigma=settings.sigma,
                iou_threshold=settings.iou_threshold,
                min_score=settings.min_score,
                max_detections=settings.max_detections,
                multi_class=settings.multi_class,
                vote_threshold=settings.vote_threshold or 0.0,
            )
        except ValueError as error:
            raise ValueError(f"video {name!r}: {error}") from error
        found[name] = Detected(*kept)
        if class_scores is not None:
            found[name] = with_classes(found[name], class_scores[name], settings.class_scores_top)
    return found


def with_classes(actions: Detected, class_scores: np.ndarray, top: int) -> Detected:
    """Each detection once per best class of its video, its score multiplied by the class's; best first.

    class_scores: (K,). Up to `top` times as many detections come out. The square root that some recipes take of the
    product changes no order, hence no metric.
    """
    best = torch.from_numpy(np.argsort(-class_scores, kind="stable")[:top])
    scores = actions.scores[:, None] * torch.from_numpy(class_scores)[best].to(actions.scores.dtype)
    segments = actions.segments[:, None].expand(-1, len(best), 2).reshape(-1, 2)
    order = scores.flatten().argsort(descending=True, stable=True)
    return Detected(segments[order], scores.flatten()[order], best.repeat(len(actions.scores))[order])


def as_rows(videos: dict[str, Detected], class_names: tuple[str, ...]) -> Rows:
    """What the metric takes."""
    own = videos.values()
    return Rows(
        names=list(videos),
        video=np.repeat(np.arange(len(videos)), [len(one.labels) for one in own]),
        labels=[class_names[label] for one in own for label in one.labels.tolist()],
        segments=np.concatenate([np.zeros((0, 2)), *(one.segments.double().numpy() for one in own)]),
        scores=np.concatenate([np.zeros(0), *(one.scores.double().numpy() for one in own)]),
    )


def named(result: dict[str, Any], tiou: Iterable[float]) -> dict[str, float]:
    """What `evaluate_files` returns, in percent and with names."""
    per_threshold = {f"mAP@{t:.2f}": 100 * value for t, value in zip(tiou, result["mAP"], strict=True)}
    return {"average_mAP": 100 * result["average_mAP"], **per_threshold}


def parse_tiou(text: str) -> tuple[float, ...]:
    """ "0.5:0.95:10", first, last and how many, evenly spaced as by the official script; or "0.3,0.5". ValueError."""
    try:
        if ":" in text:
            first, last, count = text.split(":")
            return tuple(np.linspace(float(first), float(last), int(count)).tolist())
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise ValueError(f"--tiou {text}: want first:last:count or numbers with commas, as 0.5:0.95:10") from error


def class_scores_of(config: Config, annotations: Annotations) -> ClassScores | None:
    """Outside class scores of the test videos; None for a network that knows its classes.

    Raises as `read_class_scores`, and ValueError where only one of the two is configured.
    """
    path = config.detection.class_scores
    if (path is not None) != config.model.class_agnostic:
        raise ValueError(
            "model.class_agnostic and detection.class_scores need each other: "
            f"they are {config.model.class_agnostic} and {path}"
        )
    if path is None:
        return None
    videos = list(test_videos(config, annotations))
    return read_class_scores(path, annotations.class_names, videos, config.detection.class_scores_sha256)


def write_detections(path: Path, found: dict[str, Detected], class_names: tuple[str, ...]) -> None:
    """The official submission format: {"version", "results": {id: [{label, score, segment}]}, "external_data"}."""
    results = {
        name: [
            {"label": class_names[label], "score": value, "segment": segment}
            for label, value, segment in zip(
                own.labels.tolist(), own.scores.tolist(), own.segments.tolist(), strict=True
            )
        ]
        for name, own in found.items()
    }
    write_text(path, json.dumps({"version": "VERSION 1.3", "results": results, "external_data": {}}) + "\n")


@dataclass(frozen=True)
class Files(Arguments):
    """Score a prediction file, in the official submission format."""

    ground_truth: Path  # annotations, in ActivityNet's form
    predictions: Path  # detections
    subset: str = "validation"
    tiou: str = "0.5:0.95:10"  # first:last:count, or numbers with commas
    drop_duplicates: bool = False  # of the ground truth, as OpenTAD does
    blocked: Path | None = None  # JSON list of videos to leave out, such as OpenTAD's blocked.json


def score_files(words: list[str]) -> None:
    """The command line that compares two files."""
    files = parse(Files, words)
    tiou = parse_tiou(files.tiou)
    blocked = read_blocked(files.blocked) if files.blocked else ()
    result = evaluate_files(
        *(files.ground_truth, files.predictions, tiou, files.subset),
        drop_duplicates=files.drop_duplicates,
        blocked=blocked,
    )
    for name, value in named(result, tiou).items():
        print(f"{name} {value:.2f}")


if __name__ == "__main__":
    from action_detection import data, evaluate, model
    from engine import commands

    if any(word.startswith(("--ground-truth", "--predictions")) for word in sys.argv):
        run_command(score_files)
    else:
        commands.evaluate(Config, model, data, evaluate)
