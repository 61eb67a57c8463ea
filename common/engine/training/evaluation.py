"""Evaluation over all processes: each collects the rows of its share, they are gathered, scored once, and told to all.

In training and by the command `evaluate` alike; what a row is, and the metric, are the task's (`engine.task`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader

from engine.config import Config
from engine.data.loader import gather, key_batches, to_device
from engine.task import Batch, EvaluateFile, Model, Row


@torch.no_grad()
def collect_rows(
    config: Config,
    model: Model,
    loader: DataLoader,
    evaluate: EvaluateFile[Any],
    accelerator: Accelerator,
    track: Callable[[DataLoader], Iterable[Batch]],
) -> list[Row]:
    """The rows of the whole loader, in the order of the dataset, on every process. track: shows progress."""
    key_batches(loader).place(rank=accelerator.process_index, world=accelerator.num_processes)
    model.eval()
    rows: list[Row] = []
    for batch in track(loader):
        rows += evaluate.collect(model, to_device(batch, accelerator.device), config)
    return gather(rows)


def score_once(config: Config, rows: Sequence[Row], truth: Any, evaluate: EvaluateFile[Any]) -> dict[str, float]:
    """The metrics, computed by the first process, on every process; an error there is an error everywhere."""
    if not (dist.is_available() and dist.is_initialized()):
        return _score(config, rows, truth, evaluate)
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [_score(config, rows, truth, evaluate)]
        except ValueError as error:
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], ValueError):
        raise told[0]
    return told[0]


def _score(config: Config, rows: Sequence[Row], truth: Any, evaluate: EvaluateFile[Any]) -> dict[str, float]:
    return {name: float(value) for name, value in evaluate.score(rows, truth, config).items()}
