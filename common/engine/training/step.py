"""One optimizer step: its forwards and backwards, the global number of targets, clipping, the update, its memory."""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dr2net import memory
from engine.config import Config
from engine.data.loader import to_device
from engine.task import Batch, Model
from engine.training import checkpoint
from engine.training.optimization import step_in_backward


def accumulation_steps(global_batch: int, micro_batch: int, world: int) -> int:
    """Forward passes per optimizer step and device; ValueError when the batches do not divide."""
    if micro_batch < 1 or global_batch < 1:
        raise ValueError(f"global_batch {global_batch} and micro_batch {micro_batch} must be at least 1")
    if global_batch % (micro_batch * world):
        raise ValueError(
            f"optimization.global_batch {global_batch} is not a multiple of "
            f"run.micro_batch {micro_batch} x {world} devices; choose run.micro_batch to divide"
        )
    return global_batch // (micro_batch * world)


@dataclass(frozen=True)
class Step:
    """What a step needs; call it with the micro-batches of one."""

    config: Config
    model: Model
    parallel: nn.Module  # the model, or DDP around it
    optimizer: torch.optim.Optimizer
    prepared: Any  # accelerate's view of it
    accelerator: Accelerator
    accumulation: int
    saved: Path  # where the last good checkpoint is, for messages

    def __call__(self, batches: Iterable[Batch], number: int, *, copy: bool = False) -> dict[str, float]:
        """Make step `number`, from 0; returns this device's mean losses. copy: also copy what is on the device.

        FloatingPointError or OverflowError, naming step, samples and checkpoint, when a loss or a stream is not finite.
        """
        recipe, accelerator = self.config.optimization, self.accelerator
        means: dict[str, float] = {}
        for index, batch in enumerate(self._with_global_targets(batches)):
            batch = to_device(batch, accelerator.device, copy=copy)
            with nullcontext() if index + 1 == self.accumulation else accelerator.no_sync(self.parallel):
                losses = self._losses(batch, number)
                numbers = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
                values = dict(zip(losses, numbers, strict=True))
                self._refuse_non_finite(values, batch, number)
                with step_in_backward(self.optimizer) if recipe.in_backward else nullcontext():
                    accelerator.backward(sum(losses.values()) / self.accumulation)
            for name, value in values.items():
                means[name] = means.get(name, 0.0) + value / self.accumulation
        if recipe.clip_norm is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.prepared.step()  # finds no gradient where backward has made the steps
        self.prepared.zero_grad(set_to_none=True)
        return means

    def measure(self, batches: Iterable[Batch], number: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Make the step and count its peak memory in bytes, split by what it is for."""
        losses: dict[str, float] = {}
        ready = list(batches)
        # What is measured is what the step makes: let it make its input too, as `memory.predict` asks for.
        found = asdict(
            memory.measure(lambda: losses.update(self(ready, number, copy=True)), self.model, self.optimizer)
        )
        del found["live"], found["host"]
        return losses, found

    def _with_global_targets(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; where they count targets, each with the mean number over all batches of the step and devices.

        Losses divided by it add up to those of the whole global batch, however that is split.
        """
        source = iter(batches)
        first = next(source)
        if "num_targets" not in first:
            yield from itertools.chain([first], source)
            return
        every = [first, *source]
        count = torch.tensor(float(sum(batch["num_targets"] for batch in every)), device=self.accelerator.device)
        total = float(self.accelerator.reduce(count, "sum"))
        mean = max(total, 1.0) / (self.accumulation * self.accelerator.num_processes)
        for batch in every:
            yield {**batch, "num_targets": mean}

    def _losses(self, batch: Batch, number: int) -> dict[str, Tensor]:
        try:
            return self.model.losses(self.parallel(batch), batch)
        except (FloatingPointError, OverflowError) as error:  # of a reversible sequence, which knows no samples
            raise type(error)(f"{error}, {self._circumstances(batch, number)}") from error

    def _refuse_non_finite(self, losses: dict[str, float], batch: Batch, number: int) -> None:
        if not all(math.isfinite(value) for value in losses.values()):
            terms = ", ".join(f"{name} = {value:g}" for name, value in losses.items())
            raise FloatingPointError(f"the loss is not finite ({terms}), {self._circumstances(batch, number)}")

    def _circumstances(self, batch: Batch, number: int) -> str:
        names = ", ".join(str(name) for name in batch["name"]) if "name" in batch else "not named by the batch"
        exists = checkpoint.exists(self.saved)
        kept = f"the last good checkpoint is in {self.saved}" if exists else "no checkpoint was saved yet"
        return f"at step {number + 1}; samples: {names}; {kept}"
