"""A short cut of scripts/kill_campaign.py, and that the campaign finds what it looks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def campaign(fault: str, output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The campaign's command line, after `fault` has been planted in the code that trains."""
    code = f"import sys\n{fault}\nfrom scripts.kill_campaign import main\nsys.exit(main(sys.argv[1:]))"
    paths = os.pathsep.join([str(ROOT / "common"), str(ROOT / "common" / "tests"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "--output", str(output), *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_runs_that_are_killed_end_as_if_nothing_had_happened(tmp_path):
    done = campaign("", tmp_path / "table.md", "--kills", "4", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows] == ["kind", "moment", "call", "signals", "pair", "all"]
    assert int(rows[-1][1]) >= 4 and [cell.strip("| ") for cell in rows[-1][-3:]] == ["0", "0", "0"]


@pytest.mark.slow
def test_the_campaign_finds_a_planted_fault(tmp_path):
    fault = "from engine.training import state; state.restore_optimizer = lambda *everything: None"
    done = campaign(fault, tmp_path / "table.md", "--kills", "3", "--kinds", "call")
    assert done.returncode == 1 and "optimizer" in done.stderr and "differ" in done.stderr, done.stdout + done.stderr
