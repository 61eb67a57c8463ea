"""Runs that are killed, interrupted or spread over processes end with the weights of the undisturbed run.

Real processes, real signals; each costs a few seconds of imports, so there are few.
"""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from toy_processes import LONG, NUM_STEPS, finish, folder_of, start, wait_for_checkpoint
from toy_training import toy_config, train

from engine.records import record as results
from engine.training import checkpoint

# Two processes sum gradients in another order, and Adam amplifies it (see test_engine.py).
SPLIT_TOLERANCE = 1e-4


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
    changes = {"model": {"dropout": 0.0}, "run": {"micro_batch": 2}, "finetuning": {"method": "dr2net"}}
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
