"""Synthetic data sets on disk: written in processes, completed after an interruption, never over other data.

    write_files(root, {"version": 2, **asdict(settings)}, files, write_one, jobs, finish, workers=2, on_done=None)
    prepare_files(root, 150, "videos", lambda advance: write_dataset(root, settings, on_done=advance))

The stamp is the first file: it says what the others are of, so that files of other settings are never taken for these.
What tells the reader where the samples are comes last (`finish`). Not here: what a sample looks like.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from engine.data.workers import progress_bar, run_jobs, write_json
from engine.files import read_json

STAMP = "composition.json"
Job = TypeVar("Job")
Result = TypeVar("Result")


def write_files(
    root: Path,
    stamp: dict[str, Any],
    files: Sequence[Path],
    write_one: Callable[[Job], Result],
    jobs: Sequence[Job],
    finish: Callable[[list[Result]], None],
    *,
    workers: int,
    on_done: Callable[[], None] | None,
) -> bool:
    """write_one(job) of each job, then finish(results in order). False if all is there already, of the same stamp.

    files: all that the finished data set has below `root`, the stamp aside. on_done: called after each job. ValueError
    if the folder has files of another stamp, or without one: nothing is overwritten.
    """
    stamp = json.loads(json.dumps(stamp))
    if (root / STAMP).is_file():
        found = read_json(root / STAMP, "choose another --root or delete it")
        if found != stamp:
            raise ValueError(f"{root}: holds another synthetic data set ({found}); choose another --root or delete it")
        if all(path.is_file() for path in files):
            return False
    elif any((root / top).exists() for top in {path.relative_to(root).parts[0] for path in files}):
        raise ValueError(f"{root}: holds a data set that was not made here; choose another --root")
    for folder in {path.parent for path in files}:
        folder.mkdir(parents=True, exist_ok=True)
    write_json(root / STAMP, stamp)
    finish(run_jobs(write_one, jobs, workers=workers, on_done=on_done, chunk=2))
    return True


def prepare_files(root: Path, count: int, what: str, write: Callable[[Callable[..., None]], bool]) -> None:
    """write(advance) with a progress bar, then one line: how many, written now or complete already."""
    with progress_bar(f"writing {root}", count) as advance:
        written = write(advance)
        if not written:
            advance(count)  # not a bar that stands at 0 above a line that says complete
    print(f"{root}: {count} {what}, {'written' if written else 'complete already'}")
