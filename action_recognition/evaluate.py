"""Top-1 and top-5 accuracy over views, VideoMAE's protocol: softmax per view, mean of probabilities per video.

    python -m action_recognition.evaluate runs/action_recognition/motion_tiny_dr2net/seed0

prints the metrics, in percent, over all test views and writes predictions.json into the run's folder. A tie counts
against the prediction: a network that gives every class the same probability scores 0, not 100. Not here: which views
there are (`data.py`).
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from action_recognition.configs import Config
from action_recognition.data import build_test_loader, class_names
from action_recognition.head import merge_views
from action_recognition.model import ActionRecognizer, build_model, without_weights
from engine.commands import config_of_checkpoint, run_command
from engine.data.loader import gather
from engine.data.workers import tracked
from engine.training.finetuning import autocast, load_trained


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


def evaluate(model: nn.Module, batches: Iterable[dict]) -> dict[str, float]:
    """Metrics of a model in eval mode over a validation loader; over all devices' shares under DDP."""
    return score(gather(predict_views(model, batches)))


def predict_views(model: nn.Module, batches: Iterable[dict]) -> list[View]:
    """One View per sample of this device's share. batch: video (B, 3, T, H, W), label (B,), view (B,), name [B]."""
    views = []
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in batches:
            video = batch["video"].to(device)
            probabilities = model({**batch, "video": video})["logits"].float().softmax(dim=-1).cpu()
            rows = zip(batch["name"], batch["view"], batch["label"], probabilities, strict=True)
            views += [View(name, int(view), int(label), row) for name, view, label, row in rows]
    return views


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


def score(views: list[View]) -> dict[str, float]:
    """top1, top5 over merged views, top1_single_view of each view alone, in percent; views: how many a video has."""
    merged = [(prediction.probabilities, prediction.label) for prediction in merge(views)]
    single = [(view.probabilities, view.label) for view in {(view.name, view.view): view for view in views}.values()]
    if not merged:
        raise ValueError("nothing to evaluate: the validation loader is empty")
    return {
        "top1": _top(merged, 1),
        "top5": _top(merged, 5),
        "top1_single_view": _top(single, 1),
        "views": len(single) / len(merged),
    }


def _top(rows: list[tuple[Tensor, int]], k: int) -> float:
    """Percentage of rows whose label is among the k most probable classes."""
    for probabilities, label in rows:
        if not 0 <= label < len(probabilities):
            raise ValueError(f"label {label}, but the network has {len(probabilities)} classes: set data.num_classes")
    hits = [int((probabilities >= probabilities[label]).sum()) <= k for probabilities, label in rows]
    return 100.0 * sum(hits) / len(hits)


def write_predictions(path: Path, predictions: list[Prediction], class_names: list[str]) -> None:
    """JSON: per video its label and the five most probable classes, best first."""
    entries = {}
    for prediction in predictions:
        top = prediction.probabilities.topk(min(5, len(class_names)))
        entries[prediction.name] = {
            "label": class_names[prediction.label],
            "views": prediction.num_views,
            "top5": [
                [class_names[k], round(float(p), 6)] for p, k in zip(top.values, top.indices.tolist(), strict=True)
            ],
        }
    path.write_text(json.dumps(entries, indent=1) + "\n")


def load_recognizer(run: Path, device: torch.device) -> tuple[Config, ActionRecognizer]:
    """The Config and the trained network, in eval mode, of a run. FileNotFoundError or ValueError if unusable."""
    folder = run / "checkpoint" if (run / "checkpoint").is_dir() else run
    config = config_of_checkpoint(folder, Config)
    model = build_model(without_weights(config))
    load_trained(model, config.finetuning, folder)
    return config, model.to(device)


def main(words: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or a checkpoint folder")
    parser.add_argument("--root", type=Path, help="the data set's folder, if it has moved since training")
    arguments = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, model = load_recognizer(arguments.run, device)
    if arguments.root is not None:
        config = replace(config, data=replace(config.data, root=arguments.root))
    with autocast(config.optimization.precision, device):
        views = predict_views(model, tracked("evaluating", build_test_loader(config)))
    metrics = ", ".join(f"{name} {value:.1f}" for name, value in score(views).items())
    print(f"{config.row} seed {config.run.seed}: {metrics}")
    write_predictions(arguments.run / "predictions.json", merge(views), class_names(config.data))
    print(arguments.run / "predictions.json")


if __name__ == "__main__":
    run_command(main)
