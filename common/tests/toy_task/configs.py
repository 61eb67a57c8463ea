"""The rows of the toy task."""

from dataclasses import dataclass, field
from pathlib import Path

from engine import config as engine_config
from engine.config import Finetuning, Method, Optimization, Run
from engine.rows import rows_of
from engine.settings import Count, Settings, Share


@dataclass(frozen=True, kw_only=True)
class Data(engine_config.Data):
    """Made on the fly, but for files in `root`: labels.json, and count, how many training samples there are."""

    kind: str = "points"
    root: Path = Path("data/toy")
    num_classes: Count = 3
    num_train: Count = 32
    num_val: Count = 13
    bad: int | None = None  # the index of a sample that is NaN
    weights: str | None = None  # a file that nothing reads


@dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """A few blocks of a timm ViT."""

    depth: Count = 2
    dropout: Share = 0.1


@dataclass(frozen=True, kw_only=True)
class Config(engine_config.Config):
    """Everything that determines a run."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)


def toy_vit(method: Method) -> Config:
    """Twelve steps of eight clouds."""
    return Config(
        preset="tiny",
        finetuning=Finetuning(method=method),
        optimization=Optimization(
            epochs=3,
            warmup_epochs=1,
            global_batch=8,
            learning_rate=0.02,
            clip_norm=1.0,
            ema_decay=0.9,
            precision="fp32",
        ),
        run=Run(micro_batch=4, num_workers=0, device="cpu"),
    )


ROWS = rows_of(toy_vit)
