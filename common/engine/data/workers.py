"""Many small independent jobs, as preparing a data set has them: processes, a progress bar, files that appear whole.

    with progress_bar("writing", len(jobs)) as advance:
        results = run_jobs(write_clip, jobs, workers=2, on_done=advance)

Not a scheduler: no retries, results in the order of the jobs, the first exception ends it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engine.command_line import USER_ERRORS, one_line
from engine.data.video import BrokenVideo, probe, read_frames
from engine.files import write_text

Job = TypeVar("Job")
Result = TypeVar("Result")
Item = TypeVar("Item", covariant=True)


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
    """function(job) of each job, in order, in `workers` processes (1: in this one); on_done is called after each."""
    results = []

    def collect(found: Iterator[Result]) -> None:
        for result in found:
            results.append(result)
            if on_done is not None:
                on_done()

    if workers <= 1:
        collect(map(function, jobs))
    else:  # spawned: forking after torch has started threads can deadlock
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            try:
                collect(pool.map(partial(_told, function), jobs, chunksize=chunk))
            except BrokenProcessPool as error:
                done = f"after {len(results)} of {len(jobs)} jobs"
                raise OSError(f"a worker process died {done}; was it killed for memory? use fewer workers") from error
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
def progress_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar in the terminal, on stderr; yields the function that moves it by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def tracked(title: str, items: Counted[Job]) -> Iterator[Job]:
    """The items, with a bar in the terminal while they pass."""
    with progress_bar(title, len(items)) as advance:
        for item in items:
            yield item
            advance()


def write_json(path: Path, value: Any) -> None:
    """The file appears, or is replaced, only when it is complete."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def damaged_videos(paths: Sequence[str], *, workers: int, title: str) -> list[str]:
    """What is wrong with each unusable file, one sentence each; see `damage`."""
    with progress_bar(title, len(paths)) as advance:
        return [line for line in run_jobs(damage, paths, workers=workers, on_done=advance, chunk=32) if line]


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
    first = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    problems.append(f"{len(names)} {what}{where}: {first}")


def damage(path: str) -> str:
    """What is wrong with a video file, or nothing: all packets are walked, the last frame is decoded."""
    try:
        read_frames(path, [probe(path).num_frames - 1])
    except (BrokenVideo, OSError) as error:
        return str(error)
    return ""
