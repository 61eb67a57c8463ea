"""Runs that are killed, interrupted or spread over processes end with the weights of the undisturbed run.

Real processes, real signals; each costs a few seconds of imports, so there are few.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_training import toy_config, train

from engine.records import record as results
from engine.training import checkpoint

HERE = Path(__file__).parents[1]
SCRIPT = HERE / "toy_training.py"
PATIENCE_SECONDS = 120
# Two processes sum gradients in another order, and Adam amplifies it (see test_training_engine.py).
SPLIT_TOLERANCE = 1e-4

# Long enough to be killed in the middle; moving coefficients, averages and dropout make every kind of state matter.
LONG = {
    "finetuning": {
        "method": "dr2net",
        "path": "together",
        "start": [0.75, 0.25],
        "end": [0.25, 0.75],
        "guard_every_epochs": 5,
    },
    "optimization": {"epochs": 15},
    "run": {"save_every_steps": 3, "evaluate_every_epochs": 5},
}
NUM_STEPS = 60  # 15 epochs of 32 samples, 8 to a step


@pytest.fixture(autouse=True)
def one_thread():
    """As in the other processes: the number of threads decides in which order sums are taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(output: Path, changes: dict, *launcher: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(output), json.dumps(changes)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    text, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, text
    return text


def folder_of(output: Path, changes: dict) -> Path:
    return results.run_folder(toy_config(output, changes)) / "checkpoint"


def wait_for_checkpoint(folder: Path, process: subprocess.Popen, beyond: int = 0) -> None:
    """Until a step later than `beyond` is saved."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if checkpoint.exists(folder) and checkpoint.read_state(folder)["step"] > beyond:
            return
        time.sleep(0.005)
    pytest.fail(f"no checkpoint appeared: {process.communicate()[0]}")


def assert_same_end(one: Path, other: Path) -> None:
    first, second = checkpoint.load(one), checkpoint.load(other)
    assert first.state["step"] == second.state["step"]
    assert first.state["curve"] == second.state["curve"]
    for kind in ("model", "optimizer", "ema"):
        assert first.tensors[kind].keys() == second.tensors[kind].keys()
        for name, value in first.tensors[kind].items():
            assert torch.equal(value, second.tensors[kind][name]), f"{kind} {name} differs"


def test_a_run_killed_at_random_moments_and_stopped_by_ctrl_c_ends_bit_for_bit_the_same(tmp_path):
    output, moments = tmp_path / "disturbed", random.Random()
    folder, last = folder_of(output, LONG), 0
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        process = start(output, LONG)
        wait_for_checkpoint(folder, process, beyond=last)
        time.sleep(moments.uniform(0, 0.1))
        assert process.poll() is None, "the run ended before it could be disturbed: make LONG longer"
        process.send_signal(number)
        text = finish(process, code=130 if number == signal.SIGINT else -number)
        last = checkpoint.load(folder).state["step"]
        if number == signal.SIGINT:
            assert f"stopped after step {last} of {NUM_STEPS}, saved in" in text
            assert "To resume: " in text and "toy_training.py" in text
            assert "Traceback" not in text
    assert f"continuing from step {last} " in finish(start(output, LONG))
    train(toy_config(tmp_path / "undisturbed", LONG))
    assert_same_end(folder_of(tmp_path / "undisturbed", LONG), folder)


def test_two_processes_train_like_one(tmp_path):
    changes = {"dropout": 0.0, "run": {"micro_batch": 2}, "finetuning": {"method": "dr2net"}}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = start(tmp_path / "two", changes, *launcher)
    one = train(toy_config(tmp_path / "one", changes))
    finish(two)
    found = results.read_record(folder_of(tmp_path / "two", changes).parent / "record.json")
    assert found.metrics["num_samples"] == 13  # 7 on one process, 6 on the other, none twice
    assert found.metrics == pytest.approx(one.metrics, abs=SPLIT_TOLERANCE)
    losses = [[entry["loss"] for entry in record.curve] for record in (found, one)]
    assert losses[0] == pytest.approx(losses[1], abs=SPLIT_TOLERANCE)
    heads = [checkpoint.load(folder_of(tmp_path / n, changes)).tensors["model"]["head.weight"] for n in ("one", "two")]
    assert torch.allclose(*heads, atol=SPLIT_TOLERANCE, rtol=0)
