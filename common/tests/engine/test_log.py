"""A log that cannot be written is lost; the run is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy_processes import SCRIPT
from toy_training import toy_config, train

from engine.records import record as results
from engine.training import fit as fit_module
from engine.training.log import Log


def curves(folder: Path) -> list[int]:
    """Steps of the training loss that tensorboard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")]


def talk(log: Log, steps: range) -> None:
    for step in steps:
        log.step(step, {"loss": 1.0}, 0.1, None, None)
        log.epoch(step, step, {"epoch": step, "step": step, "loss": 1.0})


@pytest.mark.parametrize("moment", ["before the first step", "between two steps"])
def test_curves_go_on_in_a_new_folder_when_theirs_was_deleted(tmp_path, moment):
    with Log(tmp_path, "row", total=4, done=0, samples=8, every=1, speak=True) as log:
        if moment == "between two steps":
            talk(log, range(1, 3))
        shutil.rmtree(tmp_path, ignore_errors=True)
        talk(log, range(3, 5))
    assert curves(tmp_path) == [3, 4]


def test_curves_that_cannot_be_written_are_a_warning(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with Log(tmp_path, "row", total=2, done=0, samples=8, every=1, speak=True) as log:
        talk(log, range(1, 2))
        (tmp_path / "tensorboard").unlink()
        talk(log, range(2, 3))
    assert "warning: the curves of step 1 are lost" in capsys.readouterr().out
    assert curves(tmp_path) == [2]


def test_a_toy_run_ends_with_its_record_though_its_curves_are_deleted_all_the_time(tmp_path, monkeypatch):
    config = toy_config(tmp_path, {"run": {"log_every_steps": 1}})
    update = fit_module.set_learning_rate

    def delete_first(*arguments):
        shutil.rmtree(results.run_folder(config) / "tensorboard", ignore_errors=True)
        update(*arguments)

    monkeypatch.setattr(fit_module, "set_learning_rate", delete_first)
    assert len(train(config).curve) == 3


@pytest.mark.parametrize("where", ["a full disk", "a reader that has gone", "a closed stream"])
def test_a_command_succeeds_with_its_record_though_nobody_can_hear_it(tmp_path, where):
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    words = ["toy_vit_conventional", "--run.output", str(tmp_path), "--run.log-every-steps", "1"]
    command = [sys.executable, "-m", "toy_task.train", *words]
    if where == "a full disk":
        if not os.path.exists("/dev/full"):
            pytest.xfail("this system has no /dev/full")
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    if where == "a closed stream":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=stdout, stderr=subprocess.PIPE, text=True
    )
    os.close(stdout)
    assert done.returncode == 0, done.stderr
    record = results.read_record(results.run_folder(toy_config(tmp_path)) / "record.json")
    assert record.curve[-1]["step"] == 12 and record.metrics
