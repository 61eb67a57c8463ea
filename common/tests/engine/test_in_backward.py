"""The optimizer in backward: the numbers of the ordinary step, and gradients that are never all alive."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_task.data import WIDTH
from toy_task.model import Backbone, Toy
from toy_training import toy_config, train

from dr2net import Options, memory
from engine import task
from engine.config import METHODS, Finetuning, Optimization
from engine.records import record as results
from engine.training import checkpoint
from engine.training.finetuning import apply_method
from engine.training.optimization import build_optimizer, refuse_in_backward, set_learning_rate, step_in_backward
from engine.training.plan import plan_row

ONE_FORWARD = {"micro_batch": 8}  # the global batch


def config_of(folder: Path, method: str, in_backward: bool = True, **run: int) -> Any:
    recipe = {"in_backward": in_backward, "clip_norm": None, "layer_decay": 0.5, "epochs": 2}
    options = Options(tolerance=1e-2, chunk_mib=0.01 if method == "checkpointed_chunks" else None)
    changes = {
        "finetuning": {"method": method, "options": options},
        "optimization": recipe,
        "run": {**ONE_FORWARD, **run},
    }
    return toy_config(folder, changes)


def assert_same_end(one: Any, other: Any) -> None:
    for kind in ("model", "optimizer", "ema"):
        first, second = (checkpoint.load(results.run_folder(c) / "checkpoint").tensors[kind] for c in (one, other))
        assert first.keys() == second.keys() and first
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_bit_for_bit_those_of_the_ordinary_step(tmp_path: Path, method: str) -> None:
    ours, ordinary = (config_of(tmp_path / str(on), method, on) for on in (True, False))
    record, expected = train(ours), train(ordinary)
    assert_same_end(ours, ordinary)
    assert (record.curve, record.gradient_checks) == (expected.curve, expected.gradient_checks)


def test_a_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole, short = (config_of(tmp_path / name, "dr2net") for name in ("whole", "short"))
    train(whole)
    train(replace(short, run=replace(short.run, max_steps=3)))
    train(short)
    assert_same_end(whole, short)


def test_it_is_refused_where_gradients_belong_together(tmp_path: Path) -> None:
    split = config_of(tmp_path, "dr2net", micro_batch=4)
    with pytest.raises(ValueError, match="in_backward cannot be on: 2 accumulated forward passes"):
        train(split)
    with pytest.raises(ValueError, match="clip_norm 1 needs .*; .* fp16 .*; 2 processes"):
        refuse_in_backward(Optimization(clip_norm=1, precision="fp16"), accumulation=1, world=2)
    refuse_in_backward(Optimization(), accumulation=1, world=1)


@pytest.mark.parametrize("method", ["conventional", "checkpointed", "dr2net"])
def test_gradients_are_never_all_alive_at_once(method: str) -> None:
    model = task.Model()
    model.backbone = Backbone(depth=12, dropout=0.0)
    apply_method(model, Finetuning(method=method))
    optimizer = build_optimizer(model, Optimization())
    set_learning_rate(optimizer, 1e-3)

    def step(in_backward: bool) -> None:
        loss = model.backbone(torch.randn(1, 2, WIDTH)).square().sum()
        if in_backward:
            with step_in_backward(optimizer):
                loss.backward()
            assert all(parameter.grad is None for parameter in model.parameters())
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    step(True)  # makes the optimizer's state
    ours, ordinary = (memory.measure(lambda on=on: step(on), model, optimizer) for on in (True, False))
    one_block = sum(parameter.nbytes for parameter in model.backbone.blocks[0].parameters())
    assert ordinary.gradients == ordinary.parameters == ours.parameters
    assert ours.gradients < one_block < ordinary.gradients / 10
    assert ours.peak < ordinary.peak - 6 * one_block


def test_the_prediction_of_a_row_has_the_optimizer_in_backward_too(tmp_path: Path) -> None:
    def batch() -> dict[str, torch.Tensor]:
        return {"x": torch.randn(8, 4, WIDTH), "label": torch.zeros(8, dtype=torch.long)}

    ours, ordinary = (plan_row(config_of(tmp_path, "checkpointed", on), Toy(depth=12), batch) for on in (True, False))
    assert ours.memory["gradients"] < ordinary.memory["parameters"] / 4
    assert ours.memory["peak"] < ordinary.memory["peak"]
