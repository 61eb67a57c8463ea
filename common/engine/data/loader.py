"""From a dataset to batches whose content is a pure function of (seed, epoch, position).

The sampler hands the dataset keys `(index, sample seed)`. The sample seed is derived from (seed, epoch, position), and
the dataset draws all its randomness from generators made of it. So neither the number of workers, nor the number of
devices, nor an interruption in the middle of an epoch changes a sample. In validation it is 0 and the order is the
dataset's.

Not here: transforms, decoding, datasets. They belong to the tasks.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler, get_worker_info

from engine.command_line import USER_ERRORS, one_line
from engine.data import busy
from engine.task import KeyedDataset

Row = TypeVar("Row")
Key = tuple[int, int]
MAX_WORKERS = 1024  # processes of one loader; more is a slip of the hand


@dataclass(frozen=True)
class Loaders:
    """The two loaders of a run, both from `build_loader`."""

    train: DataLoader
    val: DataLoader


class KeyBatches(Sampler[list[Key]]):
    """Batches of keys for one device. The engine calls `place` before each epoch; nothing else has a position.

    Training: batch k of rank r holds the positions (k * world + r) * batch_size ... of the epoch's permutation, so a
    global batch is the same set of samples however it is split over devices and accumulation steps.
    Validation: rank r holds one contiguous share; shares differ by at most one sample, and none is repeated or dropped.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, train: bool) -> None:
        self.num_samples, self.batch_size, self.seed, self.train = num_samples, batch_size, seed, train
        self.place()

    def place(self, *, epoch: int = 0, rank: int = 0, world: int = 1, first: int = 0, last: int | None = None) -> None:
        """The next iteration yields the batches first ... last - 1 of this rank in this epoch (training only)."""
        self.epoch, self.rank, self.world, self.first = epoch, rank, world, first
        self.last = self.num_samples // (self.batch_size * world) if last is None else last

    def __len__(self) -> int:
        if self.train:
            return max(self.last - self.first, 0)
        return -(-len(self._share()) // self.batch_size)

    def _share(self) -> range:
        return range(self.num_samples * self.rank // self.world, self.num_samples * (self.rank + 1) // self.world)

    def __iter__(self) -> Iterator[list[Key]]:
        if not self.train:
            share = self._share()
            for start in range(0, len(share), self.batch_size):
                yield [(index, 0) for index in share[start : start + self.batch_size]]
            return
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_samples)
        for k in range(self.first, self.last):
            start = (k * self.world + self.rank) * self.batch_size
            positions = range(start, start + self.batch_size)
            yield [(int(order[position]), sample_seed(self.seed, self.epoch, position)) for position in positions]


def sample_seed(seed: int, epoch: int, position: int) -> int:
    """The seed of one sample's randomness, in [0, 2^63)."""
    return int(np.random.SeedSequence([seed, epoch, position]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def build_loader(
    dataset: KeyedDataset,
    *,
    batch_size: int,
    seed: int,
    train: bool,
    num_workers: int,
    collate: Callable[[list[Any]], dict[str, Any]],
) -> DataLoader:
    """A DataLoader over `(index, sample seed)` keys; `batch_size` is per device and forward (`run.micro_batch`).

    Raises ValueError for an empty dataset or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if len(dataset) == 0:
        raise ValueError(f"the {'training' if train else 'validation'} set is empty; check the data folder (prepare)")
    if num_workers > MAX_WORKERS:
        raise ValueError(f"--run.num-workers {num_workers}: at most {MAX_WORKERS}; a few per device are enough")
    board = busy.Board(num_workers)
    kind = partial(Watched, board=board, timeout=busy.INTERVAL) if num_workers else DataLoader
    return kind(
        Told(dataset, board),  # type: ignore[arg-type]
        batch_sampler=KeyBatches(len(dataset), batch_size, seed, train),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_main_process,
        # Workers start from this generator: making an iterator would otherwise advance the global one.
        generator=torch.Generator().manual_seed(seed),
    )


class Watched(DataLoader):
    """A loader with workers, of which none hangs without a word."""

    def __init__(self, *arguments: Any, board: busy.Board, **options: Any) -> None:
        self.board = board
        super().__init__(*arguments, **options)

    def __iter__(self) -> Any:
        return _Batches(super().__iter__(), self.board)


class _Batches:
    """The batches of a `Watched` loader; TimeoutError, naming them, where samples hang; OSError where a worker dies."""

    def __init__(self, source: Iterator[dict[str, Any]], board: busy.Board) -> None:
        self.source, self.board = source, board

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        watch = busy.Watch(self.board)
        while True:
            try:
                return next(self.source)
            except RuntimeError as error:  # the loader's own; it can be asked again
                if str(error).startswith("DataLoader worker (pid"):
                    text = f"{error}".strip()
                    raise OSError(f"{text} was it killed for memory? Lower --run.num-workers") from error
                if not str(error).startswith("DataLoader timed out"):
                    raise
            if hung := watch.look():
                with suppress(ValueError):  # not the main thread: then it is not called there either
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises wherever the process is just then
                busy.kill(hung)
                names = [f"sample {one.number}" + f" ({one.file})" * bool(one.file) for one in hung]
                raise TimeoutError(busy.told(names, watch.patience))


class Told:
    """A dataset of which no sample hangs without a word. In a worker process its errors are told in one sentence, since
    not every error can cross over.
    """

    def __init__(self, dataset: KeyedDataset, board: busy.Board) -> None:
        self.dataset, self.board = dataset, board

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while a copy is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        worker = get_worker_info()
        if worker is None:
            with busy.limited(f"sample {key[0]}"):
                return self.dataset[key]
        try:
            with self.board.at(worker.id, key[0]):
                return self.dataset[key]
        except USER_ERRORS as error:
            raise ValueError(one_line(error)) from None


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a run, but a worker that dies of them kills the step that
    the engine wants to finish. Only what the main process itself sends ends a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not say who sent a signal
        return
    main, blocked = os.getppid(), {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)

    def wait() -> None:
        while signal.sigwaitinfo(blocked).si_pid != main:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def key_batches(loader: DataLoader) -> KeyBatches:
    """The sampler of a loader made by `build_loader`; ValueError for any other loader."""
    if not isinstance(loader.batch_sampler, KeyBatches):
        raise ValueError("this loader was not made by engine.data.loader.build_loader; use it, so that runs can resume")
    return loader.batch_sampler


def to_device(batch: dict[str, Any], device: torch.device, *, copy: bool = False) -> dict[str, Any]:
    """Move the tensors of a batch, however nested in lists and dicts; leave names and numbers.

    copy: make new tensors even where they are on the device already.
    """

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True, copy=copy)
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(move(item) for item in value)
        return value

    return {key: move(value) for key, value in batch.items()}


def gather(rows: Sequence[Row]) -> list[Row]:
    """All devices' rows in dataset order, each exactly once, on every device; plain `list(rows)` without DDP.

    `evaluate` collects one or more rows per sample of its share and calls this before it scores. No sample is padded
    in, so none needs to be dropped. Rows are small: names, labels, probabilities, on the CPU.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return list(rows)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, list(rows))
    return [row for share in shares for row in share]


class StepBatches:
    """The micro-batches of one step, to be iterated once; `seconds` adds up how long they were waited for."""

    def __init__(self, source: Iterator[dict[str, Any]], count: int) -> None:
        self.source, self.count, self.seconds = source, count, 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.count):
            started = time.perf_counter()
            batch = next(self.source)
            self.seconds += time.perf_counter() - started
            yield batch


def steps_of(
    loader: DataLoader, first: int, last: int, steps_per_epoch: int, accumulation: int, rank: int, world: int
) -> Iterator[tuple[int, StepBatches]]:
    """(number, micro-batches) of the optimizer steps first ... last - 1, from epoch to epoch, for this process."""
    number = first
    while number < last:
        epoch, start = divmod(number, steps_per_epoch)
        stop = min(steps_per_epoch, last - epoch * steps_per_epoch)
        key_batches(loader).place(
            epoch=epoch, rank=rank, world=world, first=start * accumulation, last=stop * accumulation
        )
        source = iter(loader)
        for _ in range(start, stop):
            yield number, StepBatches(source, accumulation)
            number += 1
