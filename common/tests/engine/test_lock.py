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
        with pytest.raises(ValueError, match=rf"in use by process {process.pid} on {socket.gethostname()}: wait"):
            with locked(tmp_path):
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
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
            with locked(tmp_path / "a"):
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
