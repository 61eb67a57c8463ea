"""A row with a budget of memory trains within it, with options that its Record names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_task import model as toy
from toy_training import toy_config, train

from dr2net import Options, Schedule
from engine import commands, rows
from engine.config import Finetuning
from engine.training.budget import within_budget
from engine.training.plan import plan_row

DEPTH, BATCH = 3, 512  # blocks, of two branches each; samples, beside which states of random generators are small


def row(folder: Path, **finetuning: Any) -> Any:
    changes = {
        "model": {"depth": DEPTH},
        "data": {"num_train": 2 * BATCH},
        "optimization": {"ema_decay": None, "epochs": 1, "global_batch": BATCH},
        "run": {"micro_batch": BATCH},
        "finetuning": {"method": "dr2net", "check_every_epochs": None, **finetuning},
    }
    return toy_config(folder, changes)


def chosen(config: Any) -> Any:
    return within_budget(config, lambda: toy.build_model(config), lambda: toy.example_batch(config))


def peak(config: Any) -> int:
    return plan_row(config, toy.build_model(config), lambda: toy.example_batch(config)).memory["peak"]


@pytest.fixture
def half(tmp_path: Path) -> int:
    """Bytes between those of a row that keeps nothing and one that keeps all."""
    least, most = (peak(row(tmp_path, options=Options(keep=keep))) for keep in (0, 2 * DEPTH))
    assert least < most
    return (least + most) // 2


def test_the_row_trains_within_it_and_its_record_says_how(tmp_path: Path, half: int) -> None:
    config = chosen(row(tmp_path, budget=f"{half}B"))
    options = config.finetuning.options
    assert 0 < options.keep < 2 * DEPTH and options.tolerance == row(tmp_path).finetuning.options.tolerance
    more = replace(config, finetuning=replace(config.finetuning, options=replace(options, keep=options.keep + 1)))
    assert peak(config) <= half < peak(more)
    record = train(config)
    assert record.config["finetuning"]["budget"] == f"{half}B"
    assert record.config["finetuning"]["options"]["keep"] == options.keep
    assert 0.9 * half < record.memory["peak"] <= half
    assert train(config) == record  # finished: the same command gives the same options


def test_without_a_budget_a_row_is_as_it_is(tmp_path: Path) -> None:
    config = row(tmp_path)
    assert within_budget(config, lambda: 1 / 0, lambda: 1 / 0) is config  # type: ignore[arg-type, return-value]


def test_averages_and_gradients_that_wait_count(tmp_path: Path, half: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = chosen(row(tmp_path, budget=f"{half}B"))
    keep, tight = config.finetuning.options.keep, f"{peak(config)}B"
    config = row(tmp_path, budget=tight)
    for changes in ({"ema_decay": 0.9}, {"global_batch": 2 * BATCH}):
        waiting = replace(config, optimization=replace(config.optimization, **changes))
        assert chosen(waiting).finetuning.options.keep < keep
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = replace(config, optimization=replace(config.optimization, global_batch=2 * BATCH))
    assert chosen(shared).finetuning.options.keep < keep  # DDP has the gradients a second time


def test_the_worst_phase_of_a_schedule_fits(tmp_path: Path, half: int) -> None:
    still = chosen(row(tmp_path, budget=f"{half}B", schedule=Schedule.constant(0.0, 1.0)))
    moving = Schedule(start=(0.0, 1.0), end=(0.0, 0.5), until=1.0)  # the last phase keeps a bit
    found = chosen(row(tmp_path, budget=f"{peak(still)}B", schedule=moving))
    assert found.finetuning.options.keep < still.finetuning.options.keep


def test_what_cannot_be_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"within it; the leanest needs \d+\.\d MiB: lower --run.micro-batch"):
        chosen(row(tmp_path, budget="10KiB"))
    with pytest.raises(ValueError, match="'20 apples' is not a size"):
        Finetuning(budget="20 apples")
    with pytest.raises(ValueError, match="the method checkpointed has nothing to choose"):
        Finetuning(method="checkpointed", budget="20GiB")


def test_a_tiny_row_takes_it_on_the_command_line() -> None:
    from action_recognition import configs, model

    name = "motion_tiny_dr2net"

    def peak_of(config: Any) -> int:
        built = model.build_model(config, pretrained=False)
        return plan_row(config, built, lambda: model.example_batch(config)).memory["peak"]

    plain = replace(rows.find_row(configs.ROWS, name), row=name)
    once = replace(plain.optimization, global_batch=plain.run.micro_batch, ema_decay=None)
    plain = replace(plain, optimization=once, run=replace(plain.run, device="cuda"))  # autocast's lists, as plan_row's
    kept = replace(plain, finetuning=replace(plain.finetuning, options=Options(keep=100)))
    budget = (peak_of(plain) + peak_of(kept)) // 2
    parsed = commands.parse_config(configs.ROWS, [name, "--finetuning.budget", f"{budget}B"])
    assert parsed.finetuning.budget == f"{budget}B"
    asked = replace(parsed, optimization=plain.optimization, run=plain.run)
    found = within_budget(asked, lambda: model.build_model(asked, pretrained=False), lambda: model.example_batch(asked))
    assert found.finetuning.options.keep > 0 and peak_of(found) <= budget
