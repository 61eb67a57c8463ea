"""Lightning's Trainer with the callback: it trains as a loop of one's own, its checkpoints bring the coefficients."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from toy_blocks import build_net
from toy_trainers import Task, batches, coefficients

import dr2net
from dr2net import Schedule
from dr2net.integrations.lightning import Dr2Net

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
]

MOVING = Schedule((0.9, 0.1), (0.6, 0.4), until=1.0)
STEPS = 8  # two epochs of four batches


class LateTask(Task):
    def __init__(self) -> None:
        super().__init__(late=True)

    def configure_model(self) -> None:
        if self.net is None:
            self.net = build_net(2, dtype=torch.float32)


def build_trainer(folder: Path, *callbacks: Any, **arguments: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**settings, **arguments})


def equal(a: nn.Module, b: nn.Module) -> bool:
    a_state, b_state = a.state_dict(), b.state_dict()
    return a_state.keys() == b_state.keys() and all(torch.equal(a_state[name], b_state[name]) for name in a_state)


def warnings_of(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "(alpha, beta)" in str(w.message) or "switched off" in str(w.message)]


@pytest.mark.parametrize("task", [Task, LateTask])
def test_fit_is_a_loop_by_hand_whose_schedule_moves_once_per_step(task: type[Task], tmp_path: Path) -> None:
    model = task()
    build_trainer(tmp_path, Dr2Net(MOVING)).fit(model, batches())

    other = Task()
    dr2net.convert(other)
    optimizer = other.configure_optimizers()
    for step, (x,) in enumerate([*batches()] * 2):
        MOVING.apply(other, step / STEPS)
        optimizer.zero_grad()
        other.net(x).square().mean().backward()
        optimizer.step()
    assert equal(model, other)
    assert model.at == [MOVING.at(step / STEPS) for step in range(STEPS)]


def test_accumulated_batches_have_one_pair_of_coefficients(tmp_path: Path) -> None:
    model = Task()
    build_trainer(tmp_path, Dr2Net(MOVING), accumulate_grad_batches=2, precision="bf16-mixed").fit(model, batches())
    assert model.at == [MOVING.at(step / 4) for step in range(4) for _ in range(2)]


def test_a_resumed_fit_ends_as_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = Task()
    build_trainer(tmp_path, Dr2Net(MOVING)).fit(whole, batches())

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            trainer.should_stop = True

    build_trainer(tmp_path, Dr2Net(MOVING), Stop()).fit(Task(), batches())
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["dr2net"]["sequences"]["net.blocks"]["alpha"] == MOVING.at(3 / 8)[0]
    again = Task()
    trainer = build_trainer(tmp_path, Dr2Net(MOVING))
    assert warnings_of(lambda: trainer.fit(again, batches(), ckpt_path=tmp_path / "half.ckpt")) == []
    assert equal(whole, again) and again.at == whole.at[4:]

    other = build_trainer(tmp_path, Dr2Net(Schedule.constant(0.5, 0.5)))
    messages = warnings_of(lambda: other.fit(Task(), batches(), ckpt_path=tmp_path / "half.ckpt"))
    assert any("half.ckpt was saved with net.blocks at (alpha, beta) = " in message for message in messages)


@pytest.mark.parametrize("task", [Task, LateTask])
def test_a_test_runs_at_the_coefficients_of_its_checkpoint(task: type[Task], tmp_path: Path) -> None:
    model, trainer = Task(), build_trainer(tmp_path, Dr2Net(MOVING))
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (expected,) = trainer.test(model, batches(), verbose=False)

    again, trainer = task(), build_trainer(tmp_path, Dr2Net(MOVING))
    (found,) = trainer.test(again, batches(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert found == expected and coefficients(again) == MOVING.at(7 / 8)

    plain = Task.load_from_checkpoint(tmp_path / "end.ckpt")
    messages = warnings_of(lambda: build_trainer(tmp_path, Dr2Net(MOVING)).test(plain, batches(), verbose=False))
    assert any("where the schedule starts" in message and "ckpt_path" in message for message in messages)


def test_checkpoints_of_other_sequences_and_of_a_plain_model(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path)
    trainer.fit(Task(), batches())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    model = Task()
    build_trainer(tmp_path, Dr2Net(MOVING), max_epochs=3).fit(model, batches(), ckpt_path=tmp_path / "plain.ckpt")
    assert model.at == [MOVING.at(step / 12) for step in range(8, 12)]

    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    saved["dr2net"] = {"format": 9, "version": "7.0"}
    torch.save(saved, tmp_path / "newer.ckpt")
    with pytest.raises(ValueError, match=r"entry 'dr2net' was written by dr2net 7\.0"):
        build_trainer(tmp_path, Dr2Net(MOVING)).test(Task(), batches(), ckpt_path=tmp_path / "newer.ckpt")


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    model = Task()
    model.net.blocks[0].grad_checkpointing = True
    messages = warnings_of(lambda: build_trainer(tmp_path, Dr2Net()).fit(model, batches()))
    assert any("(grad_checkpointing=True) was switched off" in message for message in messages)
    with pytest.raises(ValueError, match="which has no end"):
        build_trainer(tmp_path, Dr2Net(MOVING), max_epochs=-1).fit(Task(), batches())
    converted = Task()
    dr2net.convert(converted, inversion="anchored")
    with pytest.raises(ValueError, match="converted with inversion=anchored before"):
        build_trainer(tmp_path, Dr2Net(MOVING, inversion="exact")).fit(converted, batches())
