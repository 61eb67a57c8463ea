"""Time of a training step of a row, its methods side by side in one process, as ratios.

    python -m scripts.table_row_time vos referring_small [--rounds 5]
    python -m scripts.table_row_time detection trees_small --methods conventional dr2net

The methods take turns on the same made batch, of the row's shapes and with random inputs, so that a machine whose
speed drifts slows all of them; the ratio is the median over rounds of each method's time over conventional
finetuning's in the same round. A step is forward, losses, backward and the optimizer, at the row's first coefficients;
reading data is not in it. One thread, the processor's seconds, which other programs disturb little. Writes
results/row_time_<family>.json and makes results/row_time.md of all such files.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import METHODS, Config
from engine.files import read_json, write_text
from engine.records.provenance import commit, device_name, versions
from engine.records.tables import markdown_table
from engine.rows import find_row, task_configs
from engine.training.devices import set_seed
from engine.training.finetuning import apply_method, set_coefficients, set_mode
from engine.training.optimization import build_optimizer, set_learning_rate
from engine.training.plan import training_step

WITHOUT_WARM_UP = 1  # rounds that are not counted


def made_batch(config: Config, model_file: Any) -> dict[str, Any]:
    """The example batch of a row, with random numbers where it has zeros."""
    batch = model_file.example_batch(config)
    generator = torch.Generator().manual_seed(0)
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not value.any():
            batch[key] = torch.randn(value.shape, generator=generator)
    return batch


def step_of(config: Config, model_file: Any) -> Callable[[], None]:
    """A training step of a row, ready to be run again and again."""
    set_seed(0)
    model = model_file.build_model(config)
    apply_method(model, config.finetuning)
    set_mode(model, config.finetuning)
    set_coefficients(model, config.finetuning, 0.0)
    optimizer = build_optimizer(model, config.optimization)
    set_learning_rate(optimizer, 1e-6)
    return training_step(config, model, optimizer, lambda: made_batch(config, model_file))


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each step in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + WITHOUT_WARM_UP):
        for name, step in steps.items():
            started = time.process_time()
            step()
            if turn >= WITHOUT_WARM_UP:
                seconds[name].append(time.process_time() - started)
        print(f"round {turn + 1} of {rounds + WITHOUT_WARM_UP}", flush=True)
    return seconds


def table(records: list[dict[str, Any]]) -> str:
    """results/row_time.md: a line a row, a column a method."""
    methods = [method for method in METHODS if any(method in record["ratios"] for record in records)]
    lines = []
    for record in records:
        ratios = (f"{record['ratios'][m]:.2f}" if m in record["ratios"] else "-" for m in methods)
        lines.append((record["family"], f"{statistics.median(record['seconds']['conventional']):.2f}", *ratios))
    return (
        "# Time of a training step\n\nMade by `python -m scripts.table_row_time TASK FAMILY`: processor seconds of a "
        "step of conventional finetuning with one\nthread, and the time of each method over it, the median of rounds "
        "in which all took turns in one process, beside other work.\n\n"
        + markdown_table(("rows", "conventional, s", *methods), lines)
        + "\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="the folder of a task")
    parser.add_argument("family", help="a row's name without its method, as trees_small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="conventional is always among them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, model_file = task_configs(options.task).ROWS, importlib.import_module(f"{options.task}.model")
    wanted = ["conventional", *(options.methods or METHODS)]
    names = [m for m in METHODS if m in wanted and (options.methods or f"{options.family}_{m}" in rows)]
    steps: dict[str, Callable[[], None]] = {
        m: step_of(find_row(rows, f"{options.family}_{m}"), model_file) for m in names
    }
    seconds = measure(steps, options.rounds)
    ratios = {
        m: statistics.median(a / b for a, b in zip(own, seconds["conventional"], strict=True))
        for m, own in seconds.items()
    }
    record = {
        "task": options.task,
        "family": options.family,
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "commit": commit(),
        "seconds": seconds,
        "ratios": ratios,
    }
    path = options.output / f"row_time_{options.family}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    records = [read_json(file, "make it again") for file in sorted(options.output.glob("row_time_*.json"))]
    write_text(options.output / "row_time.md", table(records))
    for m, own in seconds.items():
        print(f"{m:20} {statistics.median(own):7.3f} s   {ratios[m]:.2f} x conventional")
    print(path)


if __name__ == "__main__":
    main()
