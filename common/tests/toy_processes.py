"""The toy run as a process of its own, for tests that kill, stop or multiply it; each costs seconds of imports."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_training import toy_config

from engine.records import record as results
from engine.training import checkpoint

HERE = Path(__file__).parent
SCRIPT = HERE / "toy_training.py"
PATIENCE_SECONDS = 120

# Long enough to be killed in the middle; moving coefficients, averages and dropout make every kind of state matter.
LONG = {
    "finetuning": {
        "method": "dr2net",
        "schedule": {"start": [0.75, 0.25], "end": [0.25, 0.75]},
        "check_every_epochs": 5,
    },
    "optimization": {"epochs": 15},
    "run": {"save_every_steps": 3, "evaluate_every_epochs": 5},
}
NUM_STEPS = 60  # 15 epochs of 32 samples, 8 to a step


def start(output: Path, changes: dict, *launcher: str, new_group: bool = False) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(output), json.dumps(changes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=new_group, **pipes)


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
