"""Many small independent jobs, as preparing a data set has them: processes, a progress bar, files that appear whole.

    with progress_bar("writing", len(jobs)) as advance:
        results = run_jobs(write_clip, jobs, workers=2, on_done=advance)

Not a scheduler: no retries, results in the order of the jobs; the first exception ends it, and so does a job that hangs
(`busy.py`).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engine.command_line import USER_ERRORS, one_line
from engine.data import busy
from engine.data.packets import BrokenVideo
from engine.files import write_text

Job = TypeVar("Job")
Result = TypeVar("Result")
Item = TypeVar("Item", covariant=True)
_line: tuple[busy.Board, int] | None = None  # of this process, if it is a worker


class Counted(Protocol[Item]):
    """What has a length and can be iterated over: lists, loaders."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    workers: int,
    on_done: Callable[[], None] | None = None,
    chunk: int = 8,
) -> list[Result]:
    """function(job) of each job, in order, in `workers` processes (1: in this one); on_done is called after each.

    Raises what `function` raises, OSError where a worker dies, and TimeoutError naming a job that takes longer than
    `busy.PATIENCE` without a sign of life.
    """
    results: list[Result] = []

    def collect(found: Iterable[Result]) -> None:
        for result in found:
            results.append(result)
            if on_done is not None:
                on_done()

    workers = min(workers, max(-(-len(jobs) // chunk), 2))  # more would be idle
    if workers <= 1:
        for job in jobs:
            with busy.limited(job):
                result = function(job)
            collect([result])
        return results
    board, context = busy.Board(workers), get_context("spawn")  # forking after torch has started threads can deadlock
    lines = context.Value("i", 0)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_take_line, initargs=(board, lines)) as pool:
        starts = range(0, len(jobs), chunk)
        parts = [pool.submit(_work, function, start, jobs[start : start + chunk]) for start in starts]
        try:
            watch = busy.Watch(board)
            for part in parts:
                while not wait([part], timeout=busy.INTERVAL).done:
                    if hung := watch.look():
                        busy.kill(hung)
                        raise TimeoutError(busy.told([jobs[one.number] for one in hung], watch.patience))
                collect(part.result())
        except BrokenProcessPool as error:
            done = f"after {len(results)} of {len(jobs)} jobs"
            raise OSError(f"a worker process died {done}; was it killed for memory? use fewer workers") from error
        finally:
            for part in parts:
                part.cancel()
    return results


def _take_line(board: busy.Board, lines: Any) -> None:
    """In a worker that begins: the next free line of the board is its own."""
    global _line
    with lines.get_lock():
        _line = board, lines.value % board.workers
        lines.value += 1


def _work(function: Callable[[Job], Result], start: int, jobs: Sequence[Job]) -> list[Result]:
    """function(job) of each job in a worker; `start`: the number of the first."""
    assert _line is not None, "workers begin with _take_line"
    results = []
    for number, job in enumerate(jobs, start):
        with _line[0].at(_line[1], number):
            results.append(_told(function, job))
    return results


def _told(function: Callable[[Job], Result], job: Job) -> Result:
    """function(job) in a worker; a user's error of a kind that may not cross to the main process goes as its text."""
    try:
        return function(job)
    except USER_ERRORS as error:
        if type(error).__module__ == "builtins" or isinstance(error, BrokenVideo):
            raise
        raise ValueError(one_line(error)) from None


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar in the terminal, on stderr; yields the function that moves it by one, or by as much as it is given."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count=1: progress.advance(task, count)


def tracked(title: str, items: Counted[Job]) -> Iterator[Job]:
    """The items, with a bar in the terminal while they pass."""
    with progress_bar(title, len(items)) as advance:
        for item in items:
            yield item
            advance()


def write_json(path: Path, value: Any) -> None:
    """The file appears, or is replaced, only when it is complete."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def name_some(problems: list[str], names: Sequence[str], file: Path | None, what: str) -> None:
    """Add one sentence with the first 20 names; all of them go to `file`, which is removed when there are none."""
    if not names:
        if file is not None:
            file.unlink(missing_ok=True)
        return
    where = ""
    if file is not None:
        write_text(file, "\n".join(names) + "\n")
        where = f" (full list: {file})"
    problems.append(f"{len(names)} {what}{where}: {first_of(names, 20)}")


def first_of(names: Iterable[str], limit: int = 5) -> str:
    """The first so many of the names, and dots if there are more."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")
