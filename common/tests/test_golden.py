"""Five training steps of each tiny row and method on made batches: losses, gradients and peak are what they were.

    python common/tests/test_golden.py      # prints the table anew; commit it only with the reason for the change

The batches are a pure function of numpy's generator, the backbones have their committed pretrained weights, the heads
are drawn from seed 0. A move of code leaves every number; a change of numbers shows here first.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dr2net import memory
from engine.config import METHODS
from engine.training.devices import set_seed
from engine.training.finetuning import apply_method, coefficients, set_mode
from engine.training.optimization import build_optimizer, set_learning_rate

FILE = Path(__file__).with_name("golden.json")
FAMILIES = ("motion_tiny", "untrimmed_tiny")
NUM_STEPS = 5
SAME = 1e-5  # relative; kernels of another processor add in another order


def build(name: str) -> tuple[Any, nn.Module, Any, list[dict]]:
    """Config, model, losses(outputs, batch) and five batches of a row."""
    rng = np.random.default_rng(0)
    if name.startswith("motion"):
        from action_recognition.configs import row
        from action_recognition.head import build_criterion
        from action_recognition.model import build_model, example_batch

        config = row(name)
        losses = build_criterion(num_classes=config.data.num_classes, label_smoothing=config.label_smoothing)
    else:
        from action_detection.configs import row
        from action_detection.model import build_model, example_batch

        config = row(name)
        losses = None
    set_seed(0)
    model = build_model(config)
    batches = []
    for _ in range(NUM_STEPS):
        batch = example_batch(config)
        batch["video"] = torch.from_numpy(rng.standard_normal(batch["video"].shape, dtype=np.float32))
        if "label" in batch:
            batch["label"] = torch.from_numpy(rng.integers(0, config.data.num_classes, len(batch["label"])))
        batches.append(batch)
    return config, model, losses or model.head.losses, batches


def five_steps(name: str) -> dict[str, Any]:
    """Loss and gradient norms of each step, and the peak in bytes of the second."""
    config, model, losses, batches = build(name)
    apply_method(model.backbone, config.finetuning)
    optimizer = build_optimizer(model, config.optimization)
    found: dict[str, Any] = {"loss": [], "gradient": [], "peak": 0}

    def step(index: int) -> None:
        batch = {key: value.clone() if hasattr(value, "clone") else value for key, value in batches[index].items()}
        value = sum(losses(model(batch), batch).values())
        value.backward()
        found["loss"].append(value.item())
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        found["gradient"].append(torch.stack(squares).sum().sqrt().item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for index in range(NUM_STEPS):
        set_seed(0, 1 + index)
        set_mode(model, config.finetuning)
        alpha, beta = coefficients(config.finetuning, index / NUM_STEPS)
        if alpha is not None:
            import dr2net

            dr2net.set_coefficients(model.backbone, alpha, beta)
        set_learning_rate(optimizer, 1e-4)
        if index == 1:
            found["peak"] = memory.measure(lambda: step(1), model, optimizer).peak
        else:
            step(index)
    return found


ROWS = [f"{family}_{method}" for family in FAMILIES for method in METHODS]


@pytest.mark.parametrize("name", ROWS)
def test_five_steps_of_a_row_are_what_they_were(name: str) -> None:
    golden, found = json.loads(FILE.read_text())[name], five_steps(name)
    assert found["loss"] == pytest.approx(golden["loss"], rel=SAME)
    assert found["gradient"] == pytest.approx(golden["gradient"], rel=SAME)
    assert found["peak"] == golden["peak"]


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: five_steps(name) for name in ROWS}, indent=1) + "\n")
