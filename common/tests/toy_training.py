"""A tiny residual network, data set and config with which the tests of the training half run the real engine.

python common/tests/toy_training.py OUTPUT [overrides as JSON]     # one run, for tests that kill it or start it by
torchrun
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Finetuning, Optimization, Run
from engine.data.loader import Loaders, build_loader, gather
from engine.records.record import Record
from engine.training.devices import set_seed
from engine.training.fit import fit

NUM_CLASSES = 3
WIDTH = 8


@dataclass(frozen=True)
class Config:
    row: str = "toy_vit_conventional"
    preset: str = "tiny"
    dropout: float = 0.1
    finetuning: Finetuning = field(default_factory=lambda: Finetuning(method="conventional"))
    optimization: Optimization = field(
        default_factory=lambda: Optimization(
            epochs=3,
            warmup_epochs=1,
            global_batch=8,
            learning_rate=0.02,
            clip_norm=1.0,
            ema_decay=0.9,
            precision="fp32",
        )
    )
    run: Run = field(default_factory=lambda: Run(micro_batch=4, num_workers=0, device="cpu"))


class Points:
    """Clouds around three centres; the noise of a training sample comes from `draw`. `bad` is the index of a NaN
    sample.
    """

    def __init__(self, num_samples: int, bad: int | None = None) -> None:
        self.num_samples, self.bad = num_samples, bad

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, draw = key
        label = index % NUM_CLASSES
        noise = np.random.default_rng([draw, index]).normal(size=(4, WIDTH)) * 0.3
        x = np.eye(NUM_CLASSES, WIDTH)[label] + noise
        if index == self.bad:
            x[:] = np.nan
        return {"x": torch.tensor(x, dtype=torch.float32), "label": label, "name": f"sample{index}"}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "x": torch.stack([item["x"] for item in items]),
        "label": torch.tensor([item["label"] for item in items]),
        "name": [item["name"] for item in items],
    }


class Backbone(nn.Module):
    """Blocks of a timm ViT on tokens (B, N, WIDTH)."""

    def __init__(self, depth: int, dropout: float) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.blocks = nn.Sequential(*[Block(WIDTH, 2, qkv_bias=True, proj_drop=dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))


class Toy(nn.Module):
    """Backbone, mean over tokens, linear head."""

    def __init__(self, num_classes: int = NUM_CLASSES, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = Backbone(depth, dropout)
        self.head = nn.Linear(WIDTH, num_classes)
        self.num_layers = depth + 1

    def layer_of(self, name: str) -> int:
        if name.startswith("backbone.blocks."):
            return int(name.split(".")[2]) + 1
        return self.num_layers

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.head(self.backbone(batch["x"]).mean(1))


def criterion(outputs: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
    return {"cross_entropy": F.cross_entropy(outputs, batch["label"]), "size": 1e-3 * outputs.square().mean()}


def evaluate(model: nn.Module, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    rows = []
    for batch in batches:
        outputs = model(batch)
        hits = (outputs.argmax(1) == batch["label"]).tolist()
        losses = F.cross_entropy(outputs, batch["label"], reduction="none").tolist()
        rows += list(zip(batch["name"], hits, losses, strict=True))
    names, hits, losses = zip(*gather(rows), strict=True)
    assert len(set(names)) == len(names), "a sample was scored twice"
    return {
        "accuracy": 100 * sum(hits) / len(names),
        "num_samples": len(names),
        "val_loss": sum(losses) / len(names),
    }


def build_loaders(config: Config, num_train: int = 32, num_val: int = 13, bad: int | None = None) -> Loaders:
    shared = {"batch_size": config.run.micro_batch, "seed": config.run.seed, "num_workers": config.run.num_workers}
    return Loaders(
        train=build_loader(Points(num_train, bad), train=True, collate=collate, **shared),
        val=build_loader(Points(num_val), train=False, collate=collate, **shared),
    )


def toy_config(output: Path, changes: dict[str, Any] | None = None) -> Config:
    """The toy config with changes such as {"finetuning": {"method": "dr2net"}, "run": {"seed": 1}}."""
    config = Config()
    config = replace(config, run=replace(config.run, output=output))
    for part, values in (changes or {}).items():
        value = replace(getattr(config, part), **values) if isinstance(values, dict) else values
        config = replace(config, **{part: value})
    return replace(config, row=f"toy_vit_{config.finetuning.method}")


def train(config: Config, bad: int | None = None) -> Record:
    set_seed(config.run.seed)
    return fit(config, Toy(dropout=config.dropout), criterion, build_loaders(config, bad=bad), evaluate)


if __name__ == "__main__":
    import toy_training as toy  # under its own name, so that Records and code hash say where the config is from

    torch.set_num_threads(1)
    toy.train(toy.toy_config(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else None))
