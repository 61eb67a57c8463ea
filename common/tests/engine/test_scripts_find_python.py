"""The scripts that are started by hand take the interpreter of VENV, and say what to do where there is none."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"
NAMES = sorted(path.name for pattern in ("download_*.sh", "make_*.sh") for path in SCRIPTS.glob(pattern))
NAMES.remove("download_common.sh")


def start(name: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "VENV")} | variables
    words = [str(tmp_path / "data"), "--dry-run"] if name.startswith("download") else []
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *words], capture_output=True, text=True, env=environment, cwd=tmp_path
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_python_is_named_with_the_remedy(name, tmp_path):
    for variables in ({"VENV": str(tmp_path / "none")}, {"PYTHON": str(tmp_path / "none/bin/python")}):
        done = start(name, tmp_path, **variables)
        assert done.returncode == 1 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert f"there is no {tmp_path}/none/bin/python: run bash scripts/setup.sh" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_python_of_venv_is_taken(name, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "stub $*"\n')
    python.chmod(0o755)
    done = start(name, tmp_path, VENV=str(tmp_path / "venv"))
    assert done.returncode == 0, done.stderr
    assert "stub -m" in done.stdout or f"would run: {python}" in done.stdout
