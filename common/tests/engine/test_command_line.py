"""What a command line says of warnings, and of names that are no text."""

import io
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


def test_a_name_that_is_no_text_does_not_end_a_command(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    with pytest.raises(SystemExit) as stop:
        run_command(lambda words: print(b"b\xff.jpg".decode("utf-8", "surrogateescape"), "and after it"))
    assert not stop.value.code
    assert raw.getvalue() == b"b\\udcff.jpg and after it\n"


def test_a_warning_is_told_once_in_a_run_whatever_resets_the_filters(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    told: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: told.append(str(message)))

    def main(words: list[str]) -> None:
        for text in ("odd", "odd", "other"):
            warnings.simplefilter("always")  # as numpy and torch do on their way, after which Python has forgotten
            warnings.warn(text, stacklevel=1)

    with warnings.catch_warnings(), pytest.raises(SystemExit):
        run_command(main)
    assert told == ["odd", "other"]
