"""Five training steps of each tiny row and method on made batches: losses, gradients and peak are what they were.

    python common/tests/test_golden.py      # prints the table anew; commit it only with the reason for the change

The batches are a pure function of numpy's generator, the backbones have their committed pretrained weights, the heads
are drawn from seed 0. A move of code leaves every number; a change of numbers shows here first.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dr2net import memory
from engine.config import METHODS, Config
from engine.rows import find_row
from engine.task import Batch, Model
from engine.training.devices import set_seed
from engine.training.finetuning import apply_method, set_coefficients, set_mode
from engine.training.optimization import build_optimizer, set_learning_rate

FILE = Path(__file__).with_name("golden.json")
FAMILIES = {
    "motion_tiny": "action_recognition",
    "untrimmed_tiny": "action_detection",
    "shapes_tiny": "detection",
    "rooms_tiny": "pointcloud",
    "referring_tiny": "vos",
}
INPUTS = ("image", "video", "position", "features")  # of a batch: what is drawn
NUM_STEPS = 5
# Relative, of the first step; kernels of another processor add in another order.
FIRST = {"motion_tiny": 1e-5, "untrimmed_tiny": 1e-4, "shapes_tiny": 5e-3, "rooms_tiny": 1e-4, "referring_tiny": 1e-4}
# Of the later steps: Adam turns a last bit of a small gradient into a whole step, and where queries are matched it
# matches another. Seen between two processors, one of them with AMX: 2e-7, 2e-4, 1e-2, 3e-3.
LATER = {"motion_tiny": 1e-5, "untrimmed_tiny": 1e-3, "shapes_tiny": 0.05, "rooms_tiny": 0.02, "referring_tiny": 0.05}
COMPARED = {"shapes_tiny": 3, "referring_tiny": 3}  # steps, where queries are matched


def build(name: str) -> tuple[Config, Model, list[Batch]]:
    """Config, model and five batches of a row."""
    task = next(task for family, task in FAMILIES.items() if name.startswith(family))
    configs, models = (import_module(f"{task}.{module}") for module in ("configs", "model"))
    config = find_row(configs.ROWS, name)
    set_seed(0)
    model = models.build_model(config)
    rng, batches = np.random.default_rng(0), []
    for _ in range(NUM_STEPS):
        batch = models.example_batch(config)
        for key in (key for key in INPUTS if key in batch):
            batch[key] = torch.from_numpy(rng.standard_normal(batch[key].shape, dtype=np.float32))
        if "label" in batch:
            batch["label"] = torch.from_numpy(rng.integers(0, config.data.num_classes, batch["label"].shape))
        batches.append(batch)
    return config, model, batches


def five_steps(name: str) -> dict[str, Any]:
    """Loss and gradient norm of each step, and the peak in bytes of the second."""
    config, model, batches = build(name)
    apply_method(model, config.finetuning)
    optimizer = build_optimizer(model, config.optimization)
    found: dict[str, Any] = {"loss": [], "gradient": [], "peak": 0}

    def step(index: int) -> None:
        batch = {key: value.clone() if hasattr(value, "clone") else value for key, value in batches[index].items()}
        value = sum(model.losses(model(batch), batch).values())
        value.backward()
        found["loss"].append(value.item())
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        found["gradient"].append(torch.stack(squares).sum().sqrt().item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for index in range(NUM_STEPS):
        set_seed(0, 1 + index)
        set_mode(model, config.finetuning)
        set_coefficients(model, config.finetuning, index / NUM_STEPS)
        set_learning_rate(optimizer, 1e-4)
        if index == 1:
            found["peak"] = memory.measure(lambda: step(1), model, optimizer).peak
        else:
            step(index)
    return found


ROWS = [
    row
    for family, task in FAMILIES.items()
    for row in (f"{family}_{method}" for method in METHODS)
    if row in import_module(f"{task}.configs").ROWS
]


@pytest.mark.parametrize("name", ROWS)
def test_five_steps_of_a_row_are_what_they_were(name: str) -> None:
    golden, found = json.loads(FILE.read_text())[name], five_steps(name)
    family = next(family for family in FAMILIES if name.startswith(family))
    for key in ("loss", "gradient"):
        assert found[key][0] == pytest.approx(golden[key][0], rel=FIRST[family])
        later = slice(1, COMPARED.get(family, NUM_STEPS))
        assert found[key][later] == pytest.approx(golden[key][later], rel=LATER[family])
    assert found["peak"] == golden["peak"]


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: five_steps(name) for name in ROWS}, indent=1) + "\n")
