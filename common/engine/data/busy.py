"""Who is at what: a board on which worker processes write their jobs, so that one that hangs is named and ended.

    board = Board(2)                           # shared with the workers: with board.at(worker, number): ...
    watch = Watch(board)
    watch.look()                               # the jobs that have not moved for PATIENCE seconds of looking

A file on a network share that has gone, a decoder in a loop: without this the main process waits for ever without a
word. Time counts while somebody looks, so a run that was stopped with Ctrl-Z hangs nowhere. Not here: what is done
about it (`workers.py`, `loader.py`).
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

PATIENCE = 120.0  # seconds of one job or sample without a sign of life, nor work of the processor for it
SLACK = 5  # times as long where the processor works: a big file on a busy machine, or a loop without an end
INTERVAL = 1.0  # seconds between looks
FIELDS = 3  # of a worker's line: its process, the signs of life that it gave, 1 + the number of its job (0: at none)


NAME_BYTES = 512  # of a file's name that fit on the board
_signs: list[Callable[[str], None]] = []  # how the job that this process is at says that it goes on


def alive(file: Path | str = "") -> None:
    """To be called by readers with the file that they are about to open, and now and then by a job that may rightly
    take longer than PATIENCE.
    """
    if _signs:
        _signs[-1](str(file))


class Hung(NamedTuple):
    """A job that does not end."""

    process: int
    number: int
    file: str  # that it opened last, if it said so


class Board:
    """A line per worker, in memory that all processes see."""

    def __init__(self, workers: int) -> None:
        self.lines = get_context("spawn").RawArray("q", FIELDS * workers)
        self.files = [get_context("spawn").RawArray("c", NAME_BYTES) for _ in range(workers)]
        self.workers = workers

    def begin(self, worker: int, number: int) -> None:
        """A worker says that it begins a job, or again that it goes on."""
        at = FIELDS * worker
        self.lines[at], self.lines[at + 1], self.lines[at + 2] = os.getpid(), self.lines[at + 1] + 1, number + 1

    @contextmanager
    def at(self, worker: int, number: int) -> Iterator[None]:
        """While a worker is at a job."""

        def sign(file: str) -> None:
            if file:
                self.files[worker].value = os.path.abspath(file).encode()[: NAME_BYTES - 1]
            self.begin(worker, number)

        self.files[worker].value = b""
        self.begin(worker, number)
        _signs.append(sign)
        try:
            yield
        finally:
            _signs.pop()
            self.lines[FIELDS * worker + 2] = 0


class Watch:
    """How long the main process has seen each worker at the same job."""

    def __init__(self, board: Board, patience: float | None = None) -> None:
        self.board, self.patience = board, PATIENCE if patience is None else patience
        # Per worker: its signs of life, for how long there were no more; its work, for how long there was no more.
        self.seen = [(0, 0.0, 0, 0.0)] * board.workers
        self.last = time.monotonic()

    def look(self) -> list[Hung]:
        """To be called about every INTERVAL: the jobs without a sign of life for `patience` seconds, or for SLACK times
        as long while the processor works for them.
        """
        now = time.monotonic()
        passed, self.last = min(now - self.last, 3 * INTERVAL), now  # more: this process did not run itself
        hung = []
        for worker in range(self.board.workers):
            process, signs, job = self.board.lines[FIELDS * worker : FIELDS * (worker + 1)]
            signs_before, waited, work_before, rested = self.seen[worker]
            work = ticks(process)
            waited = waited + passed if job and signs == signs_before else 0.0
            rested = min(rested + passed, waited) if work == work_before else 0.0
            self.seen[worker] = signs, waited, work, rested
            if rested >= self.patience or waited >= SLACK * self.patience:
                hung.append(Hung(process, job - 1, self.board.files[worker].value.decode(errors="replace")))
        return hung


def ticks(process: int) -> int:
    """Processor time that a process has had, in the system's units; 0 where that is not told."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return int(words[11]) + int(words[12])
    except (OSError, ValueError, IndexError):
        return 0


def kill(hung: list[Hung]) -> None:
    """End these workers, whatever they are at: one that waits for a disk hears no other signal."""
    for one in hung:
        with suppress(ProcessLookupError):
            os.kill(one.process, signal.SIGKILL)


class _Late(BaseException):
    """Passes through all that makes a damaged file of an error."""


@contextmanager
def limited(what: object, patience: float | None = None) -> Iterator[None]:
    """For a job in this very process: TimeoutError naming it, and the file that it opened last, where it waits, for the
    system, longer than `patience`. What the system itself does not interrupt, a hard mount, is waited for.

    Only in the main thread of a system that has alarms; elsewhere the job has no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    seconds = PATIENCE if patience is None else patience

    work, extensions, opened = time.process_time(), 0, ""

    def late(*_: object) -> None:
        nonlocal work, extensions
        now = time.process_time()
        if now - work < 0.01 or extensions == SLACK - 1:
            raise _Late
        work, extensions = now, extensions + 1
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def sign(file: str) -> None:
        nonlocal extensions, opened
        extensions, opened = 0, file or opened
        signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _signs.append(sign)
    try:
        yield
    except _Late:
        raise TimeoutError(told([f"{what} ({opened})" if opened else what], seconds)) from None
    finally:
        _signs.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def told(jobs: Sequence[object], seconds: float) -> str:
    """The line about jobs that do not end."""
    names = ", ".join(str(job)[:300] for job in jobs)
    return (
        f"{names}: not done after {seconds:g} s without a sign of life. Is its disk or network share there? Take the "
        "file out, or start the same command again"
    )
