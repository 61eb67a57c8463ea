"""Runs of the toy task (toy_task/), as the tests of the engine need them.

python common/tests/toy_training.py OUTPUT [overrides as JSON]     # one run, for tests that kill it or start it by
torchrun
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from toy_task import data, evaluate
from toy_task.configs import Config, toy_vit
from toy_task.model import build_model

from dr2net import Options, Schedule
from engine.data.loader import Loaders
from engine.records.record import Record
from engine.task import Model
from engine.training.devices import set_seed
from engine.training.fit import build_loaders, fit


def toy_config(output: Path, changes: dict[str, Any] | None = None) -> Config:
    """The toy row with changes such as {"finetuning": {"method": "dr2net"}, "run": {"seed": 1}}."""
    changes = dict(changes or {})
    finetuning = dict(changes.pop("finetuning", {}))
    config = toy_vit("conventional")
    if isinstance(finetuning.get("schedule"), dict):  # from JSON
        schedule = finetuning["schedule"]
        finetuning["schedule"] = Schedule(**{k: tuple(v) if isinstance(v, list) else v for k, v in schedule.items()})
    if isinstance(finetuning.get("options"), dict):
        finetuning["options"] = Options(**{"tolerance": 1e-2, **finetuning["options"]})
    config = replace(config, finetuning=replace(config.finetuning, **finetuning))
    config = replace(config, run=replace(config.run, output=output))
    for part, values in changes.items():
        config = replace(config, **{part: replace(getattr(config, part), **values)})
    return replace(config, row=f"toy_vit_{config.finetuning.method}")


def loaders_of(config: Config) -> Loaders:
    """Training and validation clouds."""
    return build_loaders(config, data)


@torch.no_grad()
def metrics_of(model: Model, config: Config) -> dict[str, float]:
    """Of the validation clouds."""
    rows = [row for batch in loaders_of(config).val for row in evaluate.collect(model.eval(), batch, config)]
    return evaluate.score(rows, evaluate.read_truth(config), config)


def train(config: Config) -> Record:
    """One run, or what is left of it."""
    set_seed(config.run.seed)
    return fit(config, build_model(config), loaders_of(config), evaluate)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(toy_config(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else None))
