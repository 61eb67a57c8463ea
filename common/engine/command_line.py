"""Command lines that fail well: what a user can mend is one line on the standard error and exit code 1.

    run_command(main)                            # main(words) -> exit code or None; warnings are one line each
    arguments = parse(Arguments, words)          # a dataclass of the words; ValueError, in one line, if they make none

Anything else is a fault of the program and keeps its traceback. Not here: what the commands do (`commands.py`).
"""

import contextlib
import io
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, OverflowError)


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run `main` on the command line's words and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name that is no text is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with short_warnings():
            code = main(sys.argv[1:])
        _flush()
        sys.exit(code)
    except subprocess.CalledProcessError as error:  # which has said itself what is wrong
        sys.exit(
            f"error: {shlex.join(['python', *error.cmd[1:]])} failed, see above; the same command goes on from there"
        )
    except USER_ERRORS as error:
        sys.exit(f"error: {one_line(error)}")


@contextlib.contextmanager
def short_warnings() -> Iterator[None]:
    """What this repository warns of is for users: one line, without the place in the program and its source there, and
    once, as where annotations are read for training, evaluation and truth.
    """
    usual, show = warnings.formatwarning, warnings.showwarning
    told: set[str] = set()

    def short(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is not UserWarning:
            return usual(message, category, filename, lineno, line)
        return f"warning: {' '.join(str(message).split())}\n"

    def once(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category is UserWarning and str(message) in told:
            return
        told.add(str(message))
        show(message, category, *place, **more)

    warnings.formatwarning, warnings.showwarning = short, once
    try:
        yield
    finally:
        warnings.formatwarning, warnings.showwarning = usual, show


def _flush() -> None:
    """What could not be said (a full disk, a reader that has gone) is no failure of what has been done."""
    if sys.stdout is None:  # closed from the start
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks; of one that came from a loader's worker, what it said there."""
    text = str(error).strip()
    if "Original Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def parse(kind: Any, words: Sequence[str], *, default: Any = None, prog: str | None = None) -> Any:
    """The dataclass (or the result of the function) `kind` of a command line; flags of a `default` have prefixes."""
    how: dict[str, Any] = {"config": (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)}
    if default is not None:
        how = {"config": (tyro.conf.AvoidSubcommands,), "default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=words, prog=prog, **how)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws a box, its title in the frame, its first paragraph above a rule; where the output is not UTF-8,
        # there is no frame, and the title stands above a rule of its own
        lines = [line.strip("│ ") for line in said.getvalue().splitlines() if line.strip()]
        rules = [k for k, line in enumerate(lines) if not line.strip("─-")]
        first, rule = (1, rules[0]) if lines[0].startswith("╭") else (rules[0] + 1, rules[1])
        raise ValueError(f"{' '.join(lines[first:rule])} (--help lists the flags)") from None
