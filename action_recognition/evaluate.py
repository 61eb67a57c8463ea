"""Top-1 and top-5 accuracy over views, VideoMAE's protocol: softmax per view, mean of probabilities per video.

    python -m action_recognition.evaluate runs/action_recognition/motion_tiny_dr2net/seed0

prints the metrics, in percent, over all test views and writes predictions.json into the run's folder. A tie counts
against the prediction: a network that gives every class the same probability scores 0, not 100. Not here: which views
there are (`data.py`).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from action_recognition.configs import Config
from action_recognition.data import class_names
from action_recognition.head import merge_views
from engine.files import write_text
from engine.task import Batch, Model


@dataclass(frozen=True)
class View:
    """The network's answer to one view of one video."""

    name: str
    view: int
    label: int
    probabilities: Tensor  # (K,) float32, on the CPU


@dataclass(frozen=True)
class Prediction:
    """The answer to one video, merged over its views."""

    name: str
    label: int
    num_views: int
    probabilities: Tensor  # (K,)


def read_truth(config: Config) -> list[str]:
    """The class names; the labels come with the samples. Errors as `data.class_names`."""
    return class_names(config)


def collect(model: Model, batch: Batch, config: Config) -> list[View]:
    """One View per sample. batch: video (B, 3, T, H, W), label (B,), view (B,), name [B]."""
    probabilities = model(batch)["logits"].float().softmax(dim=-1).cpu()
    found = zip(batch["name"], batch["view"], batch["label"], probabilities, strict=True)
    return [View(name, int(view), int(label), row) for name, view, label, row in found]


def score(rows: Sequence[View], truth: list[str], config: Config) -> dict[str, float]:
    """top1, top5 over merged views, top1_single_view of each view alone, in percent; views: how many a video has."""
    merged = [(prediction.probabilities, prediction.label) for prediction in merge(rows)]
    single = [(view.probabilities, view.label) for view in {(view.name, view.view): view for view in rows}.values()]
    if not merged:
        raise ValueError("nothing to evaluate: the validation loader is empty")
    return {
        "top1": _top(merged, 1),
        "top5": _top(merged, 5),
        "top1_single_view": _top(single, 1),
        "views": len(single) / len(merged),
    }


def write(folder: Path, rows: Sequence[View], truth: list[str], config: Config) -> Path:
    """predictions.json: per video its label and the five most probable classes, best first."""
    entries = {}
    for prediction in merge(rows):
        top = prediction.probabilities.topk(min(5, len(truth)))
        entries[prediction.name] = {
            "label": truth[prediction.label],
            "views": prediction.num_views,
            "top5": [[truth[k], round(float(p), 6)] for p, k in zip(top.values, top.indices.tolist(), strict=True)],
        }
    path = folder / "predictions.json"
    write_text(path, json.dumps(entries, indent=1) + "\n")
    return path


def merge(views: Iterable[View]) -> list[Prediction]:
    """Views grouped by video name, in order of first appearance. The same (name, view) twice counts once.

    ValueError if the views of a video disagree in their label, or a probability is not finite.
    """
    videos: dict[str, dict[int, View]] = {}
    for view in views:
        videos.setdefault(view.name, {})[view.view] = view
    predictions = []
    for name, own in videos.items():
        labels = {view.label for view in own.values()}
        probabilities = merge_views(torch.stack([own[number].probabilities for number in sorted(own)]))
        if len(labels) > 1:
            raise ValueError(f"video {name!r} has labels {sorted(labels)} in different views; names must be unique")
        if not torch.isfinite(probabilities).all():
            raise ValueError(f"the network's answer to video {name!r} is not finite; has training diverged?")
        predictions.append(Prediction(name, labels.pop(), len(own), probabilities))
    return predictions


def _top(rows: list[tuple[Tensor, int]], k: int) -> float:
    """Percentage of rows whose label is among the k most probable classes."""
    for probabilities, label in rows:
        if not 0 <= label < len(probabilities):
            raise ValueError(f"label {label}, but the network has {len(probabilities)} classes: set data.num_classes")
    hits = [int((probabilities >= probabilities[label]).sum()) <= k for probabilities, label in rows]
    return 100.0 * sum(hits) / len(hits)


if __name__ == "__main__":
    from action_recognition import data, evaluate, model
    from engine import commands

    commands.evaluate(Config, model, data, evaluate)
