"""One run folder, one run: whoever comes second is told who is there, and a killed run is in nobody's way."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_processes import LONG, NUM_STEPS, PATIENCE_SECONDS, finish, folder_of, start

from engine.records.record import read_record
from engine.training import checkpoint
from engine.training.lock import locked

HOLD = """
import os, sys, time
from pathlib import Path
from engine.training.lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork()  # as the workers of a loader are
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> tuple[subprocess.Popen, int]:
    """A process that has the lock of `folder`, and its child."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path):
    process, child = hold(tmp_path)
    try:
        message = rf"in use by process {process.pid} on {socket.gethostname()}: wait"
        with pytest.raises(ValueError, match=message), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # the child lives and holds nothing
        with locked(tmp_path):
            assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)


def test_one_process_does_not_train_the_same_folder_twice_at_a_time(tmp_path):
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), locked(tmp_path / "a"):
            pass
    for _ in range(2):
        with locked(tmp_path / "a"):
            time.sleep(0)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="no locks on this file system"), locked(tmp_path):
        pass


def test_two_runs_started_together_lose_nothing(tmp_path):
    runs = [start(tmp_path, LONG) for _ in range(2)]
    texts = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in runs]
    codes = [process.returncode for process in runs]
    assert sorted(codes) == [0, 1], texts
    loser = codes.index(1)
    assert f"in use by process {runs[1 - loser].pid} on {socket.gethostname()}" in texts[loser]
    record = read_record(folder_of(tmp_path, LONG).parent / "record.json")
    assert record.curve[-1]["step"] == NUM_STEPS


def test_two_runs_killed_together_leave_a_checkpoint_that_goes_on(tmp_path):
    runs = [start(tmp_path, LONG) for _ in range(2)]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not checkpoint.exists(folder_of(tmp_path, LONG)) and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in runs:
        process.kill()
        process.communicate()
    assert "continuing from step" in finish(start(tmp_path, LONG))
