"""The rows of a task's table: plain functions that return a Config, found by name, run and published as one command.

    ROWS = rows_of(motion_tiny, motion_vits)            # each function times each method: motion_tiny_dr2net, ...
    python -m engine.rows action_recognition --preset tiny [--seeds 0 1] [--dry-run]

The command is behind scripts/reproduce.sh and scripts/table_<task>.sh: it prepares the data, trains what this very code
and configuration have not trained yet (paper rows are planned instead, unless --train), publishes the Records and ends
with the tables of these rows and their figures.
"""

import difflib
import importlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import tyro

from engine import settings
from engine.command_line import parse, run_command
from engine.config import METHODS, Config, Method, Preset
from engine.data.fingerprint import inputs_of
from engine.records.record import is_finished, publish, read_records, read_runs
from engine.records.tables import print_table, write_all

C = TypeVar("C", bound=Config)
SEEDS: dict[Preset, tuple[int, ...]] = {"tiny": (0,), "laptop": (0, 1), "paper": (0,)}


def rows_of(*families: Callable[[Method], C], **variants: Callable[[], C]) -> dict[str, Callable[[], C]]:
    """Rows by name: `<family>_<method>` for each family and method, and variants under their own names.

    A family is a function of the method; its Config gets the row's name. One whose branches run whole has no row of the
    method checkpointed_chunks. ValueError, when the row is built, for a family that ignores its method; at once for two
    rows of one name.
    """
    rows: dict[str, Callable[[], C]] = {}
    for family in families:
        for method in methods_of(family):
            name = f"{family.__name__}_{method}"
            if name in rows:
                raise ValueError(f"two rows are named {name}")
            rows[name] = partial(_named, name, partial(family, method), method)
    for name, build in variants.items():
        if name in rows:
            raise ValueError(f"two rows are named {name}")
        rows[name] = partial(_named, name, build, None)
    return rows


def methods_of(family: Callable[[Method], Config]) -> list[Method]:
    """The methods that a family has rows of."""
    chunks = family("dr2net").finetuning.options.chunk_mib
    return [method for method in METHODS if method != "checkpointed_chunks" or chunks is not None]


def _named(name: str, build: Callable[[], C], method: Method | None) -> C:
    config = build()
    if method is not None and config.finetuning.method != method:
        raise ValueError(f"row {name} finetunes by {config.finetuning.method}: pass `method` on to Finetuning")
    return replace(config, row=name)


def find_row(rows: Mapping[str, Callable[[], C]], name: str) -> C:
    """The configuration of a table row. ValueError, naming the nearest rows, for an unknown name."""
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=3, cutoff=0.3)
        hint = f"did you mean {', '.join(near)}?" if near else f"the rows are {', '.join(sorted(rows))}"
        raise ValueError(f"no row {name!r}; {hint}")
    return rows[name]()


def with_method(name: str, method: str) -> str:
    """The name of the row that differs only in its finetuning method; ValueError if `name` does not end in a method."""
    own = next((known for known in sorted(METHODS, key=len, reverse=True) if name.endswith(f"_{known}")), None)
    if own is None:
        raise ValueError(f"row {name!r} has no other method: only rows whose name ends in {', '.join(METHODS)} have")
    return f"{name.removesuffix(own)}{method}"


def rows_of_preset(rows: Mapping[str, Callable[[], C]], preset: Preset) -> list[C]:
    """The rows of a preset in their order, variants aside."""
    found = [build() for build in rows.values()]
    return [config for config in found if config.preset == preset and config.row.endswith(config.finetuning.method)]


def task_configs(task: str) -> ModuleType:
    """<task>/configs.py; ValueError if there is no such task."""
    try:
        return importlib.import_module(f"{task}.configs")
    except ModuleNotFoundError as error:
        raise ValueError(f"no task {task!r} here (run from the root of the repository): {error}") from error


def run_rows(
    task: str,
    configs: Sequence[C],
    *,
    seeds: Sequence[int],
    train: bool = True,
    dry_run: bool = False,
    results: Path = Path("results"),
) -> None:
    """Train each row with each seed unless it is finished, or plan it; publish; print tables, figures and the time.

    Rows run in processes of their own, seed by seed, so that an interrupted run has whole tables of the first seeds.
    CalledProcessError if one fails.
    """
    started = time.monotonic()
    for seed in seeds:
        for config in configs:
            own = replace(config, run=replace(config.run, seed=seed))
            words = [sys.executable, "-m", f"{task}.train", config.row]
            if not train:
                if (results / task / f"{config.row}.json").exists():
                    print(
                        f"{config.row}: there already, skipped (delete results/{task}/{config.row}.json to plan anew)"
                    )
                    continue
                words += ["--plan"]
            elif _finished(task, own):
                print(f"{config.row} seed {seed}: finished, skipped")
                continue
            else:
                words += ["--seed", str(seed)]
            print("+", shlex.join(["python", *words[1:]]), flush=True)
            if not dry_run:
                subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    if dry_run:
        return
    names = {config.row for config in configs}
    if train:
        publish([record for record in read_runs(task) if record.row in names], results)
    written = write_all(results)
    print_table([record for record in read_records(task, results) if record.row in names])
    groups = {config.row.removesuffix(f"_{config.finetuning.method}") for config in configs}
    for path in written:
        if path.suffix == ".md" or path.stem in groups:
            print(path)
    print(f"{task}: {len(configs)} rows in {(time.monotonic() - started) / 60:.1f} minutes")


def _finished(task: str, config: Config) -> bool:
    """Whether there is a Record of this config by this code, from the data as they are now where they are."""
    if not is_finished(config):
        return False
    build_dataset = importlib.import_module(f"{task}.data").build_dataset
    try:
        datasets = {split: build_dataset(config, split) for split in ("train", "val")}
    except (ValueError, OSError):
        return True
    return is_finished(config, inputs_of(config, datasets))


@dataclass(frozen=True)
class Arguments(settings.Arguments):
    """Run the rows of a task's preset and show its tables."""

    task: tyro.conf.Positional[str]  # the folder, such as action_recognition
    preset: Preset = "paper"  # tiny and laptop are trained; paper is planned (its memory is predicted), unless --train
    seeds: tuple[int, ...] = ()  # default: one for tiny and paper, two for laptop
    train: bool = False  # train the paper rows, which takes the data set and GPUs
    dry_run: bool = False  # print the commands only


def main(words: list[str]) -> None:
    """The command line of this module."""
    arguments = parse(Arguments, words, prog="python -m engine.rows")
    task, preset = arguments.task, arguments.preset
    configs = rows_of_preset(task_configs(task).ROWS, preset)
    if not configs:
        raise ValueError(f"{task} has no rows at the preset {preset}")
    train = arguments.train or preset != "paper"
    if train:
        prepare = [sys.executable, "-m", f"{task}.prepare", "--preset", preset]
        print("+", shlex.join(["python", *prepare[1:]]), flush=True)
        if not arguments.dry_run:
            subprocess.run(prepare, check=True, stdin=subprocess.DEVNULL)
    run_rows(task, configs, seeds=arguments.seeds or SEEDS[preset], train=train, dry_run=arguments.dry_run)


if __name__ == "__main__":
    run_command(main)
