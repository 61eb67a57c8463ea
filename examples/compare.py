"""Finetunes a pretrained encoder as a classifier in each way, and leaves Records: what the examples share.

    compare(Example("text", recipe, data, build), methods, seeds, runs, results)

For each seed every method sees the same samples in the same order, and the head begins with the same numbers. Peak
bytes are counted in a step of their own, with more samples than a laptop has time to train on: there the activations,
which are what the methods differ in, outweigh the optimizer's state. Seconds are the processor's, so that they mean
something beside other work. A run that this very recipe, code and data have made already is not made again.

Not here: the data and the encoders (`text/`, `audio/`), what the methods do (`engine/training/finetuning.py`), how
tables and pictures are drawn (`engine/records/tables.py`).
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

import dr2net
from dr2net import memory
from engine.config import METHODS, Finetuning, Method, Preset
from engine.records.provenance import device_name, sources_hash
from engine.records.record import Record, build_record, publish, read_record, write_record
from engine.records.tables import print_table, write_all
from engine.settings import Count, NotNegative, Positive, Settings, Share, to_json
from engine.task import Model
from engine.training.finetuning import apply_method, inverts, set_mode

# Without the paper's schedule, which was behind constant coefficients in each task.
EXAMPLE_METHODS: tuple[Method, ...] = tuple(method for method in METHODS if method != "dr2net_dynamic")
LONGEST_STEP = 1  # from 0; it takes the longest samples, so that what does not fit is known at once
MEMORY_BATCH = 128  # samples of the step whose bytes are counted, the longest there are
POOL = 8  # batches that are drawn together, and then made of samples of about equal length
CHECKED_SAMPLES = 4  # of the gradient check at the end
CURVE_EVERY = 10  # steps


class Split(Protocol):
    """Samples that are in memory."""

    labels: Tensor  # (N,) int64

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """What the classifier gets of these samples, as a new batch."""

    def in_order(self) -> Tensor:
        """(N,) all indices, such that samples of equal cost stand together."""


@dataclass(frozen=True)
class Data:
    """Training and test samples, and what is known about where they come from."""

    train: Split
    test: Split
    num_classes: int
    inputs: dict[str, str]  # fingerprints, for the Record


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """Which run of a recipe it is."""

    seed: int = 0
    max_steps: Count | None = None  # stop after so many steps (tests)


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """How a classifier is trained; the same for all methods, but for what Finetuning says."""

    row: str = ""  # <example>_<method>
    preset: Preset = "laptop"
    steps: Count = 100
    batch: Count = 16
    learning_rate: Positive = 2e-4  # of the encoder, after the warm-up, falling to 0 along half a cosine
    head_learning_rate: Positive = 1e-2
    warmup: Share = 0.1  # of the steps, linear from 0
    weight_decay: NotNegative = 0.01  # of matrices
    finetuning: Finetuning = field(default_factory=Finetuning)
    run: Run = field(default_factory=Run)


class Classifier(nn.Module):
    """An encoder, a linear layer on what `pool` makes of its output."""

    def __init__(self, backbone: nn.Module, pool: Callable[[nn.Module, dict[str, Tensor]], Tensor], width: int, k: int):
        super().__init__()
        self.backbone, self.pool, self.head = backbone, pool, nn.Linear(width, k)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, K) logits; `pool(backbone, batch)` gives (B, D)."""
        return self.head(self.pool(self.backbone, batch))


@dataclass(frozen=True)
class Example:
    """What an example brings."""

    name: str  # of its rows: <name>_<method>
    module: str  # dotted name of the program, for the hash of its code
    recipe: Recipe
    data: Data
    build: Callable[[], Classifier]  # with pretrained weights; the head's numbers come from torch's generator


def compare(
    example: Example, methods: Sequence[Method], seeds: Sequence[int], runs: Path, results: Path | None
) -> list[Record]:
    """The Records of all methods and seeds, seed by seed; with `results` they are published, and tables are drawn."""
    records = []
    for seed in seeds:
        for method in methods:
            finetuning = replace(example.recipe.finetuning, method=method, schedule=None)
            run = replace(example.recipe.run, seed=seed)
            recipe = replace(example.recipe, row=f"{example.name}_{method}", finetuning=finetuning, run=run)
            folder = runs / "examples" / recipe.row / f"seed{seed}"
            record = _finished(folder, example, recipe)
            if record is None:
                print(f"{recipe.row} seed {seed}: {recipe.steps} steps", flush=True)
                record = train(example, recipe)
                write_record(record, folder)
            print(f"{recipe.row} seed {seed}: {_metrics(record)}", flush=True)
            records.append(record)
    print_table(records)
    if results is not None:
        publish(records, results)
        write_all(results)
    return records


def train(example: Example, recipe: Recipe) -> Record:
    """Train and test one classifier."""
    torch.manual_seed(recipe.run.seed)
    data, finetuning = example.data, recipe.finetuning
    model = example.build()
    apply_method(cast(Model, model), finetuning)
    optimizer = _optimizer(model, recipe)
    steps = min(recipe.steps, recipe.run.max_steps or recipe.steps)
    seconds: list[float] = []
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    for number, indices in zip(range(steps), _shuffled(data.train, recipe), strict=False):
        share = _rate(number, recipe)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        set_mode(cast(Model, model), finetuning)
        begun = time.process_time()
        if number == LONGEST_STEP:
            indices = data.train.in_order()[-recipe.batch :]
        losses.append(_step(model, data.train, indices, optimizer))
        seconds.append(time.process_time() - begun)
        if (number + 1) % CURVE_EVERY == 0:
            curve.append({"step": number + 1, "loss": statistics.fmean(losses[-CURVE_EVERY:])})
    begun = time.process_time()
    accuracy = evaluate(model, data.test)
    return replace(
        build_record(
            recipe,
            metrics={"accuracy": accuracy},
            memory=measure_memory(example, recipe),
            seconds={
                "step": statistics.median(seconds),
                "training": sum(seconds),
                "evaluation": time.process_time() - begun,
            },
            device=device_name(torch.device("cpu")),
            gradient_checks=_check(model, finetuning, data.train),
            curve=curve,
            inputs=data.inputs,
        ),
        sources=sources_hash(example.module),
    )


def measure_memory(example: Example, recipe: Recipe) -> dict[str, Any]:
    """The `memory` of a Record: peak bytes of a training step with the MEMORY_BATCH longest samples, or all."""
    model, split = example.build(), example.data.train
    apply_method(cast(Model, model), recipe.finetuning)
    set_mode(cast(Model, model), recipe.finetuning)
    optimizer = _optimizer(model, recipe)
    step = partial(_step, model, split, split.in_order()[-MEMORY_BATCH:], optimizer)
    found = asdict(memory.measure(step, model, optimizer))
    del found["live"], found["host"]
    return {"source": "measured", **found}


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch: int = 64) -> float:
    """Percent of the split's samples that are classified right."""
    model.eval()
    right = 0
    for indices in split.in_order().split(batch):
        right += int((model(split.take(indices)).argmax(1) == split.labels[indices]).sum())
    return 100 * right / len(split)


def loss_of(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    """Cross-entropy of (inputs, (B,) labels)."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def _step(model: nn.Module, split: Split, indices: Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss = loss_of(model, (split.take(indices), split.labels[indices]))
    if not math.isfinite(value := float(loss.detach())):
        raise FloatingPointError(f"the loss is {value}; lower the learning rates")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value


def _optimizer(model: Classifier, recipe: Recipe) -> torch.optim.Optimizer:
    groups = []
    for part, rate in ((model.backbone, recipe.learning_rate), (model.head, recipe.head_learning_rate)):
        for matrices, decay in ((True, recipe.weight_decay), (False, 0.0)):
            own = [p for p in part.parameters() if p.requires_grad and (p.dim() > 1) == matrices]
            groups += [{"params": own, "peak": rate, "weight_decay": decay}] if own else []
    return torch.optim.AdamW(groups)


def _rate(number: int, recipe: Recipe) -> float:
    """The share of the learning rates at step `number`, from 0."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if number < warmup:
        return (number + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (number - warmup) / max(1, recipe.steps - warmup))


def _shuffled(split: Split, recipe: Recipe) -> Iterator[Tensor]:
    """Batches without end, each sample once per round, in batches of about equal length."""
    generator = torch.Generator().manual_seed(recipe.run.seed)
    if len(split) < recipe.batch:
        raise ValueError(f"{len(split)} training samples are fewer than a batch of {recipe.batch}")
    place = split.in_order().argsort()
    while True:
        for pool in torch.randperm(len(split), generator=generator).split(POOL * recipe.batch):
            batches = [b for b in pool[place[pool].argsort()].split(recipe.batch) if len(b) == recipe.batch]
            for k in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[k]


def _check(model: Classifier, finetuning: Finetuning, split: Split) -> list[dict[str, float]]:
    """The error of the reversible gradient after training, for the methods that have one."""
    if not inverts(finetuning) or finetuning.schedule is None:
        return []
    set_mode(cast(Model, model), finetuning)
    indices = torch.arange(CHECKED_SAMPLES)
    error = dr2net.gradient_error(model, (split.take(indices), split.labels[indices]), loss_of).overall
    alpha, beta = finetuning.schedule.at(1.0)
    return [{"epoch": 1, "alpha": alpha, "beta": beta, "error": error}]


def _finished(folder: Path, example: Example, recipe: Recipe) -> Record | None:
    path = folder / "record.json"
    if not path.is_file():
        return None
    record = read_record(path)
    same = record.config == to_json(recipe) and record.inputs == example.data.inputs
    return record if same and record.sources == sources_hash(example.module) else None


def _metrics(record: Record) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in record.metrics.items())
