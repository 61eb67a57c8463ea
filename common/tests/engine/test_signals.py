"""Requests to stop: what schedulers and people send, to one process or to all of a run."""

import os
import signal
import subprocess
import time

import pytest
from toy_processes import LONG, NUM_STEPS, finish, folder_of, start, wait_for_checkpoint

from engine.training import checkpoint
from engine.training.signals import stop_signals


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # the handler runs between two instructions


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
    ids=str,
)
def test_only_a_second_ctrl_c_interrupts(capfd, numbers):
    with stop_signals() as received:
        send(*numbers)
        assert received == list(numbers)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT, signal.SIGINT)
    assert capfd.readouterr().out.count("finishing this step, then saving") >= len(numbers)


def test_a_request_is_heard_where_nobody_can_be_told(monkeypatch):
    def gone(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    with stop_signals() as received:
        send(signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_a_scheduler_that_sends_two_signals_to_every_process_of_a_run_finds_it_saved(tmp_path):
    changes = {**LONG, "run": {**LONG["run"], "num_workers": 1}}
    process = start(tmp_path, changes, new_group=True)
    wait_for_checkpoint(folder_of(tmp_path, changes), process, beyond=0)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.02)
    text = finish(process, code=128 + signal.SIGTERM)
    assert "exited unexpectedly" not in text and "Traceback" not in text
    step = checkpoint.load(folder_of(tmp_path, changes)).state["step"]
    assert f"stopped after step {step} of {NUM_STEPS}, saved in" in text
    assert subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout == b""  # no worker is left
