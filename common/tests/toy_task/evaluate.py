"""Accuracy and loss of the toy task: python -m toy_task.evaluate RUN."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.nn import functional as F

from engine.task import Batch, Model
from toy_task.configs import Config
from toy_task.data import class_names


class Answer(NamedTuple):
    """The network's answer to one sample."""

    name: str
    predicted: int
    label: int
    loss: float


def read_truth(config: Config) -> list[str]:
    """The class names."""
    return class_names(config)


def collect(model: Model, batch: Batch, config: Config) -> list[Answer]:
    """One Answer per sample."""
    outputs = model(batch)
    losses = F.cross_entropy(outputs, batch["label"], reduction="none").tolist()
    return list(map(Answer, batch["name"], outputs.argmax(1).tolist(), batch["label"].tolist(), losses))


def score(rows: Sequence[Answer], truth: list[str], config: Config) -> dict[str, float]:
    """Accuracy in percent, how many samples, their mean loss."""
    assert len({row.name for row in rows}) == len(rows), "a sample was scored twice"
    hits = sum(row.predicted == row.label for row in rows)
    return {
        "accuracy": 100 * hits / len(rows),
        "num_samples": len(rows),
        "val_loss": sum(row.loss for row in rows) / len(rows),
    }


def write(folder: Path, rows: Sequence[Answer], truth: list[str], config: Config) -> Path:
    """predictions.json: name -> class."""
    path = folder / "predictions.json"
    path.write_text(json.dumps({row.name: truth[row.predicted] for row in rows}) + "\n")
    return path


if __name__ == "__main__":
    from engine import commands
    from toy_task import data, evaluate, model

    commands.evaluate(Config, model, data, evaluate)
