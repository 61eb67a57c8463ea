"""Clouds of four points around three centers; the noise of a sample comes from its seed, its label, where there is one,
from <root>/labels.json.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config import Split
from engine.data.fingerprint import Files
from engine.task import Batch
from toy_task.configs import Config

WIDTH = 8


class Points:
    """Samples by (index, sample seed)."""

    def __init__(self, num_samples: int, num_classes: int, bad: int | None = None, labels: Path | None = None) -> None:
        self.num_samples, self.num_classes, self.bad = num_samples, num_classes, bad
        self.labels_file = labels if labels is not None and labels.exists() else None
        self.labels = json.loads(self.labels_file.read_text()) if self.labels_file else None

    def files(self) -> Files:
        """The labels, where there is a file of them."""
        return Files([self.labels_file] if self.labels_file else [])

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, seed = key
        label = index % self.num_classes if self.labels is None else self.labels[index]
        noise = np.random.default_rng([seed, index]).normal(size=(4, WIDTH)) * 0.3
        x = np.eye(self.num_classes, WIDTH)[label] + noise
        if index == self.bad:
            x[:] = np.nan
        return {"x": torch.tensor(x, dtype=torch.float32), "label": label, "name": f"sample{index}"}


def build_dataset(config: Config, split: Split) -> Points:
    """The clouds of a split."""
    data = config.data
    if split == "train":
        count = data.root / "count"
        num_train = int(count.read_text()) if count.exists() else data.num_train
        return Points(num_train, data.num_classes, data.bad, data.root / "labels.json")
    return Points(data.num_val, data.num_classes, None, data.root / "labels.json")


def collate(samples: list[Any]) -> Batch:
    """x (B, 4, WIDTH), label (B,), name [B]."""
    return {
        "x": torch.stack([sample["x"] for sample in samples]),
        "label": torch.tensor([sample["label"] for sample in samples]),
        "name": [sample["name"] for sample in samples],
    }


def class_names(config: Config) -> list[str]:
    """The centers."""
    return [f"center {k}" for k in range(config.data.num_classes)]
