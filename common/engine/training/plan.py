"""The memory of a row that cannot run here: one training step on fake tensors, as a Record of status "not run".

    record = plan_row(config, model, lambda: example_batch(config))
    publish_plan(record, Path("results"))

Predicted for one device, one forward of `run.micro_batch`, in the row's precision and at its first coefficients. Not
here: time, metrics, accumulation (it would keep the gradients alive through all but the first forward).
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import cast

from torch import Tensor
from torch.optim import Optimizer

from dr2net import memory
from engine.config import Config
from engine.records.record import Record, build_record, publish, read_row
from engine.task import Batch, Model
from engine.training.finetuning import apply_method, autocast, set_mode
from engine.training.optimization import build_optimizer, step_in_backward


def plan_row(config: Config, model: Model, make_batch: Callable[[], Batch]) -> Record:
    """Predict the peak memory of a training step of a freshly built model; make_batch is called under fake tensors."""
    apply_method(model, config.finetuning)
    set_mode(model, config.finetuning)
    optimizer = build_optimizer(model, config.optimization)
    step = training_step(config, model, optimizer, make_batch)
    predicted = asdict(memory.predict(step, model, optimizer))
    del predicted["live"], predicted["host"]
    return build_record(
        config,
        metrics={},
        memory={"source": "predicted", **predicted},
        seconds={},
        device="predicted",
        gradient_checks=[],
        curve=[],
        status="not run",
    )


def training_step(
    config: Config, model: Model, optimizer: Optimizer, make_batch: Callable[[], Batch], forwards: int = 1
) -> Callable[[], None]:
    """A step of a prepared model, to be run on fake tensors; its batches are of one size."""

    def step() -> None:
        for _ in range(forwards):
            batch = make_batch()
            with autocast(config.optimization.precision, "cpu"):
                outputs = model(batch)
            with step_in_backward(optimizer) if config.optimization.in_backward else nullcontext():
                cast(Tensor, sum(model.losses(outputs, batch).values())).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def publish_plan(record: Record, folder: Path) -> Path:
    """Write it to `folder`/<task>/<row>.json. ValueError if a real run is there: a prediction never replaces one."""
    path = folder / record.task / f"{record.row}.json"
    said = f"{record.row}: predicted peak {memory.format_bytes(record.memory['peak'])}"
    if path.exists() and any(run.status != "not run" for run in read_row(path)):
        raise ValueError(
            f"{said}, not written: {path} holds real runs, which a prediction must not replace; to keep the prediction "
            "in their place delete that file first"
        )
    (written,) = publish([record], folder)
    print(f"{said}, {written}", file=sys.stdout)
    return written
