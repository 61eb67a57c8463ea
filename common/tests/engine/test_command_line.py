"""What a command line says of warnings."""

import sys
import warnings

import pytest

from engine.command_line import run_command


def test_warnings_for_users_are_one_line_and_those_of_programs_keep_their_place(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command"])
    usual = warnings.formatwarning

    def main(words: list[str]) -> None:
        for message, kind in (("a file\nis odd", UserWarning), ("old", DeprecationWarning)):
            sys.stderr.write(warnings.formatwarning(message, kind, "program.py", 7, "source()"))

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "warning: a file is odd" and others[0] == "program.py:7: DeprecationWarning: old"
    assert not stop.value.code and warnings.formatwarning is usual
