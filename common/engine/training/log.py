"""What a run says while it runs: a progress line on a terminal, plain lines elsewhere, tensorboard curves always.

Only the main process speaks. Numbers go to `<run folder>/tensorboard`, which `tensorboard --logdir runs` shows, or with
`--run.tracker` to another of accelerate's. What cannot be written (a full disk, a deleted folder, a pipe whose reader
has gone) is lost; the training is not.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from engine.config import Tracker

# The disk is full; the stream is closed, or cannot spell a name; the reader has gone (rich then exits).
LOST = (OSError, ValueError, SystemExit)


def say(text: str, speak: bool = True) -> None:
    """Print a line outside of a log, for whoever hears it."""
    if speak:
        with suppress(*LOST):
            print(text, flush=True)


class Log:
    """Context manager around a run. `total` and `done` count optimizer steps, `samples` is the global batch."""

    def __init__(
        self,
        folder: Path,
        title: str,
        *,
        total: int,
        done: int,
        samples: int,
        every: int,
        speak: bool,
        tracker: Tracker = "tensorboard",
    ) -> None:
        self.every, self.samples, self.speak, self.total = max(every, 1), samples, speak, total
        self.console = Console(highlight=False, soft_wrap=True)
        self.live = speak and sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
        self.writer: Any = None  # made when the first curve is drawn, and again after it failed
        self.tracker, self.folder, self.title, self.done = tracker, folder, title, done
        self.last = (done, time.perf_counter())
        self.rate = 0.0
        if speak:
            self.progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                disable=not self.live,
            )
            self.task = self.progress.add_task(title, total=total, completed=done, numbers="")
            if not self.live:
                self.note(f"{title}: steps {done} to {total}")

    def __enter__(self) -> "Log":
        if self.speak:
            with suppress(*LOST):
                self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.speak:
            with suppress(*LOST):
                self.progress.stop()
            self.draw({}, self.done)
            if self.writer is not None:
                with suppress(Exception):  # as in `draw`
                    self.writer.finish()

    def step(self, step: int, losses: dict[str, float], rate: float, alpha: float | None, beta: float | None) -> None:
        """After optimizer step number `step` (1 is the first)."""
        if not self.speak:
            return
        loss = sum(losses.values())
        self.progress.update(self.task, completed=step)
        if step % self.every and step != self.total:
            return
        now = time.perf_counter()
        self.rate = (step - self.last[0]) * self.samples / max(now - self.last[1], 1e-9)
        seconds_left = (self.total - step) * self.samples / max(self.rate, 1e-9)
        self.last = (step, now)
        scalars = {"loss": loss, "learning_rate": rate, "samples_per_second": self.rate}
        scalars |= {f"loss/{name}": value for name, value in losses.items()}
        numbers = f"loss {loss:.4f}  lr {rate:.2e}"
        if alpha is not None and beta is not None:
            scalars |= {"alpha": alpha, "beta": beta}
            numbers += f"  alpha {alpha:.3f} beta {beta:.3f}"
        numbers += f"  {self.rate:.1f} samples/s"
        self.draw({f"train/{name}": value for name, value in scalars.items()}, step)
        self.progress.update(self.task, numbers=numbers)
        if not self.live:
            self.note(f"step {step}/{self.total}  {numbers}  {seconds_left:.0f} s left")

    def epoch(self, epoch: int, step: int, entry: dict[str, float]) -> None:
        """After an epoch or evaluation; `entry` is the line of the Record's curve."""
        values = {name: value for name, value in entry.items() if name not in ("epoch", "step", "alpha", "beta")}
        self.draw({f"epoch/{name}": value for name, value in values.items()}, step)
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.note(f"epoch {epoch}  step {step}  {words}")

    def draw(self, scalars: dict[str, float], step: int) -> None:
        """Points of curves; a warning where they cannot be written."""
        if not self.speak:
            return
        try:
            if self.writer is None or (self.tracker == "tensorboard" and not (self.folder / self.tracker).is_dir()):
                self.writer = self._build_tracker()
                self.writer.start()
            if scalars:
                self.writer.log(scalars, step)
            self.done = step
        except Exception as error:  # of its thread, its protocol buffers or the disk: none is worth the training
            self.writer = None
            self.note(f"warning: the curves of step {step} are lost ({error})")

    def _build_tracker(self) -> Any:
        """Accelerate's; ImportError if its package is not installed."""
        kind = LOGGER_TYPE_TO_CLASS[self.tracker]
        if self.tracker == "tensorboard":
            # After a crash the steps behind the checkpoint are run again: hide the orphaned points.
            return kind("tensorboard", logging_dir=self.folder, purge_step=self.done)
        if self.tracker == "wandb":
            return kind("dr2net", name=self.title, dir=str(self.folder))
        return kind("dr2net", run_name=self.title)

    def track(self, batches: DataLoader) -> Iterator[Any]:
        """The batches of an evaluation, counted on a line of their own while they pass."""
        if not self.live:
            yield from batches
            return
        task = self.progress.add_task("evaluation", total=len(batches), numbers="batches")
        try:
            for batch in batches:
                yield batch
                self.progress.advance(task)
        finally:
            self.progress.remove_task(task)

    def note(self, text: str) -> None:
        """A line that stays on the screen."""
        if self.speak:
            with suppress(*LOST):
                self.console.print(text, markup=False)
