"""A row with `finetuning.budget` trains as fast as its method can within that memory: the options are chosen here.

    config = within_budget(config, lambda: build_model(config, pretrained=False), lambda: example_batch(config))

As `dr2net.plan_budget` does it, but for the row's own step: its losses, its optimizer, the parts that its method acts
on. Branches run whole or in chunks, and as many of the last ones keep their insides as the predicted peak allows, in
the schedule's worst phase. What was chosen stands in the config, so in checkpoints and Records. Counted too are
gradients that wait for further forward passes or other processes, and averaged weights; not the evaluation, nor the
gradient check, which stores the activations of two samples. A Record of a run on a CPU also counts the loader's batch.
"""

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

from dr2net import Options, planner, work
from dr2net.branches import find_branches
from dr2net.memory import format_bytes, largest, parse_bytes, predict
from engine.config import Config
from engine.task import Batch, Model
from engine.training.finetuning import apply_method, parts_of, set_coefficients, set_mode
from engine.training.log import say
from engine.training.optimization import build_optimizer
from engine.training.plan import training_step
from engine.training.step import accumulation_steps

C = TypeVar("C", bound=Config)


def within_budget(config: C, build: Callable[[], Model], make_batch: Callable[[], Batch]) -> C:
    """`config` with the options that were chosen; as it is if it names no budget. Seconds to minutes.

    build: the row's model, weights do not matter; make_batch is called under fake tensors. ValueError, with the least
    that would do, if nothing fits.
    """
    finetuning = config.finetuning
    if finetuning.budget is None:
        return config
    say(f"{config.row}: choosing what fits in {finetuning.budget}")
    model, budget = build(), parse_bytes(finetuning.budget)
    whole = replace(finetuning.options, keep=0, chunk_mib=None, recompute_rest=False)
    cut = replace(whole, chunk_mib=finetuning.options.chunk_mib or planner.CHUNKED.chunk_mib, recompute_rest=True)
    most = max(sum(len(find_branches(b)[0]) for b in part.modules()) for part in parts_of(model, finetuning))
    least, found = [], []
    for options in (whole, cut):
        trial = _worst(_Trial(config, model, make_batch), options)
        peak = functools.cache(functools.partial(_peak_of, trial, options))
        least.append(peak(0))
        keep = largest(functools.partial(_peak_after, peak), budget, limit=most + 1) - 1
        if keep >= 0:
            chosen = replace(options, keep=keep)
            found.append((round(trial.time(chosen), 3), peak(keep), chosen))
    if not found:
        raise ValueError(
            f"--finetuning.budget {finetuning.budget}: no setting trains {config.row} within it; the leanest needs "
            f"{format_bytes(min(least))}: lower --run.micro-batch or the size of the input, or name a larger budget"
        )
    _, bytes_needed, options = min(found, key=lambda one: one[:2])
    how = "as a whole" if options.chunk_mib is None else f"in chunks of {options.chunk_mib:g} MiB"
    say(f"{config.row}: branches {how}, the last {options.keep} kept, predicted peak {format_bytes(bytes_needed)}")
    return replace(config, finetuning=replace(finetuning, options=options))


@dataclass(frozen=True)
class _Trial:
    """Steps of a row with other options, at a progress of its schedule."""

    config: Config
    model: Model
    make_batch: Callable[[], Batch]
    progress: float = 0.0

    def prepare(self, options: Options) -> tuple[Callable[[], None], Model, torch.optim.Optimizer]:
        """A copy of the model that finetunes like this, and its step."""
        recipe, finetuning = self.config.optimization, replace(self.config.finetuning, options=options)
        model = copy.deepcopy(self.model)
        apply_method(model, finetuning)
        set_mode(model, finetuning)
        set_coefficients(model, finetuning, self.progress)
        optimizer = build_optimizer(model, recipe)
        forwards = accumulation_steps(recipe.global_batch, self.config.run.micro_batch, _processes())
        return training_step(self.config, model, optimizer, self.make_batch, min(2, forwards)), model, optimizer

    def peak(self, options: Options) -> int:
        """In bytes."""
        step, model, optimizer = self.prepare(options)
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        copies = (self.config.optimization.ema_decay is not None) + (_processes() > 1)  # averages; gradients of DDP
        return predict(step, model, optimizer, like=_device(self.config)).peak + copies * trained

    def time(self, options: Options) -> float:
        """Of a step, see `work.Work.time`; chunks compute what whole branches do."""
        step, model, optimizer = self.prepare(replace(options, chunk_mib=None))
        return work.count(step, model, optimizer).time(work.RATES[_device(self.config)])


def _worst(trial: _Trial, options: Options) -> _Trial:
    """At the phase of the schedule that needs the most memory, with no branch kept."""
    schedule, precision = trial.config.finetuning.schedule, trial.config.optimization.precision
    assert schedule is not None, "the method has coefficients"
    setting = planner.Setting("fp32" if precision == "fp32" else "bf16", options=options)
    trials = [replace(trial, progress=phase.progress) for phase in planner.phases(schedule, setting)]
    return trials[0] if len(trials) == 1 else max(trials, key=lambda one: one.peak(options))


def _peak_of(trial: _Trial, options: Options, keep: int) -> int:
    return trial.peak(replace(options, keep=keep))


def _peak_after(peak: Callable[[int], int], n: int) -> int:
    return peak(n - 1)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


def _device(config: Config) -> Literal["cpu", "cuda"]:
    on_gpu = config.run.device == "cuda" or (config.run.device == "auto" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu"
