"""Where the code comes from: its commit, and only where it is that repository's."""

import subprocess
from pathlib import Path

from engine.records import provenance


def repository(folder: Path) -> str:
    """A repository of somebody, with one commit; returns that."""
    folder.mkdir()
    (folder / "theirs.py").write_text("1")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "theirs.py"], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *words], check=True)
    return subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_commit_is_that_of_the_repository_that_tracks_the_code(tmp_path, monkeypatch):
    theirs = repository(tmp_path / "theirs")
    installed = tmp_path / "theirs" / ".venv" / "engine" / "records"
    installed.mkdir(parents=True)
    (installed / "provenance.py").write_text("ours, but installed inside a repository of somebody")
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert provenance.commit() == "unknown"
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "theirs" / "theirs.py"))
    assert provenance.commit() == theirs


def test_what_decides_the_pixels_is_among_the_versions():
    assert {"av", "decord", "torch", "numpy", "python"} <= provenance.versions().keys()
