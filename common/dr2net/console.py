"""What the commands of `cli.py` share: a line of progress, a table, an error that names the model and its input."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from dr2net.inputs import Batches

T = TypeVar("T")


def say(text: str) -> None:
    """What is being done, on one line of a terminal that the next call overwrites."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of plain text; the first is flush left, the others flush right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *cells)).rstrip())


def explained(function: Callable[[Batches], T], name: str) -> Callable[[Batches], T]:
    """Turns torch's complaint about a shape that does not suit the model into a ValueError that names both."""

    def call(batches: Batches) -> T:
        log = logging.getLogger("torch._subclasses.fake_tensor")  # it would say the same at length
        before, log.disabled = log.disabled, True
        try:
            return function(batches)
        except (RuntimeError, AssertionError, IndexError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name} does not run on an input of {batches}: {reason}") from error
        finally:
            log.disabled = before

    return call
