"""The first things that somebody types: help, a wrong word, a row without its data. One line, and no waiting."""

import sys
from types import SimpleNamespace

import pytest
from toy_mirror import SCRIPTS, script
from toy_task.configs import ROWS

from engine import commands


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("download_*.sh")), ids=lambda path: path.stem)
def test_a_download_script_says_what_it_does(path, tmp_path):
    if path.stem == "download_common":  # which the others source
        return
    for word in ("--help", "-h"):
        told = script(path.name, word, PYTHON=str(tmp_path / "none"))
        assert told.returncode == 0 and f"bash scripts/{path.name} [ROOT]" in told.stdout, told.stderr
        assert "set -" not in told.stdout and "#" not in told.stdout.replace("#termsofuse", "")
    wrong = script(path.name, "--halp")
    assert wrong.returncode == 2 and "unknown option --halp; --help lists" in wrong.stderr


@pytest.mark.parametrize("words", [["--method", "frozne"], ["--seed", "one"], ["--method"]])
def test_a_wrong_word_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", next(iter(ROWS)), *words])
    with pytest.raises(SystemExit) as stop:
        commands.train(ROWS, None, None, None)
    assert str(stop.value).startswith(f"error: argument {words[0]}") and "\n" not in str(stop.value)
    assert not capsys.readouterr().err


def test_missing_data_is_told_before_weights_are_fetched(monkeypatch):
    def missing(config, split):
        raise FileNotFoundError("data/none: no such folder")

    monkeypatch.setattr(sys, "argv", ["train", next(iter(ROWS))])
    model = SimpleNamespace(build_model=lambda config: pytest.fail("weights were fetched"))
    with pytest.raises(SystemExit, match="error: data/none: no such folder"):
        commands.train(ROWS, model, SimpleNamespace(build_dataset=missing, collate=None), None)
