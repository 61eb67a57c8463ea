"""The four commands of every task: train, evaluate, predict, prepare. A task's file ends in one line over each.

    python -m <task>.train ROW [--method dr2net] [--seed 1] [--plan] [--any.field value ...]
    python -m <task>.evaluate RUN [--root DATA] [--device cpu]           # torchrun shares the samples out
    python -m <task>.predict RUN INPUT [--output FOLDER]
    python -m <task>.prepare [--preset tiny] [--kind K --root DATA --probe]

`--method` picks the same row with another finetuning method, name included; `--seed` is short for `--run.seed`. Every
other field of the Config has its own flag, which tyro makes from the dataclasses: `... ROW --help` lists them. What a
user can mend is one line and exit code 1; anything else is a fault of the program and keeps its traceback.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import tyro

from engine import settings
from engine.command_line import parse, run_command
from engine.config import METHODS, Config, Preset, Split
from engine.data.check import Check
from engine.data.loader import build_loader
from engine.data.workers import tracked
from engine.records.record import task_of
from engine.rows import find_row, rows_of_preset, with_method
from engine.settings import Count, from_json
from engine.task import DataFile, EvaluateFile, Model, ModelFile
from engine.training.budget import within_budget
from engine.training.checkpoint import read_state
from engine.training.devices import build_accelerator, set_seed
from engine.training.evaluation import collect_rows, score_once
from engine.training.finetuning import autocast, load_trained
from engine.training.fit import build_loaders, fit
from engine.training.log import say
from engine.training.plan import plan_row, publish_plan

C = TypeVar("C", bound=Config)
P = TypeVar("P", bound="Prediction")
Q = TypeVar("Q", bound="Preparation")
Device = Literal["auto", "cpu", "cuda"]


def train(
    rows: Mapping[str, Callable[[], C]], model: ModelFile[C], data: DataFile[C], evaluate: EvaluateFile[C]
) -> None:
    """Train a row, or with --plan predict the memory of its step and write that to results/, status "not run"."""

    def main(words: list[str]) -> None:
        config = parse_config(rows, [word for word in words if word != "--plan"])

        def build() -> Model:
            return model.build_model(config, pretrained=False)

        def make_batch() -> Any:
            return model.example_batch(config)

        set_seed(config.run.seed)
        if "--plan" in words:
            say(f"{config.row}: predicting the memory of a step, of a paper row in a minute or more")
            planned = within_budget(config, build, make_batch)
            publish_plan(plan_row(planned, build(), make_batch), Path("results"))
            return
        loaders = build_loaders(config, data)  # what is missing there is told before weights are fetched
        config = within_budget(config, build, make_batch)
        set_seed(config.run.seed)
        record = fit(config, model.build_model(config), loaders, evaluate)
        say(f"{record.row} seed {record.seed}: {_in_words(record.metrics)}")

    run_command(main)


def evaluate(
    config_type: type[C], model: ModelFile[C], data: DataFile[C], evaluate: EvaluateFile[C], split: Split = "test"
) -> None:
    """Score a trained run on its validation samples and write its predictions into the run's folder."""

    @dataclass(frozen=True)
    class Arguments(settings.Arguments):
        run: tyro.conf.Positional[Path]  # a run's folder, or a checkpoint folder
        root: Path | None = None  # the data set's folder, if it has moved since training
        device: Device = "auto"

    def main(words: list[str]) -> None:
        arguments = parse(Arguments, words)
        config, network = load_run(arguments.run, config_type, model, root=arguments.root)
        title = f"{config.row} seed {config.run.seed}"
        score_network(config, network, data, evaluate, arguments.run, title, device=arguments.device, split=split)

    run_command(main)


def score_network(
    config: C,
    network: Model,
    data: DataFile[C],
    evaluate: EvaluateFile[C],
    folder: Path,
    title: str,
    *,
    device: Device = "auto",
    split: Split = "test",
) -> None:
    """Score a network as it is, over all processes; print its metrics behind `title`, write predictions to `folder`."""
    accelerator = build_accelerator(device, config.optimization.precision)
    network.to(accelerator.device)
    truth = evaluate.read_truth(config)
    loader = build_loader(
        data.build_dataset(config, split),
        batch_size=config.run.evaluation_batch or config.run.micro_batch,
        seed=config.run.seed,
        train=False,
        num_workers=config.run.num_workers,
        collate=data.collate,
    )
    with autocast(config.optimization.precision, accelerator.device):
        found = collect_rows(config, network, loader, evaluate, accelerator, lambda b: tracked("evaluating", b))
    metrics = score_once(config, found, truth, evaluate)
    if accelerator.is_main_process:
        print(f"{title}: {_in_words(metrics)}")
        print(evaluate.write(folder, found, truth, config))


@dataclass(frozen=True)
class Prediction(settings.Arguments):
    """What `predict` is asked for; a task may add fields."""

    run: tyro.conf.Positional[Path]  # a run's folder, or a checkpoint folder
    input: tyro.conf.Positional[Path]  # a file, or where a task says so a folder
    root: Path | None = None  # the data set's folder with the class names, if it has moved
    output: Path = Path("predictions")  # folder for what is written
    device: Device = "auto"


def predict(
    config_type: type[C],
    model: ModelFile[C],
    predict: Callable[[C, Model, P], Iterable[Path]],
    arguments_type: type[P] = Prediction,  # type: ignore[assignment]
) -> None:
    """Apply a trained run to a user's file; prints the paths of what it wrote.

    predict(config, model, arguments) is called without gradients, with the model in eval mode on its device.
    """

    def main(words: list[str]) -> None:
        arguments = parse(arguments_type, words)
        if not arguments.input.exists():
            raise FileNotFoundError(f"{arguments.input}: no such file")
        config, network = load_run(arguments.run, config_type, model, root=arguments.root)
        network.to(build_accelerator(arguments.device, config.optimization.precision).device)
        with torch.no_grad():
            for path in predict(config, network, arguments):
                print(path)

    run_command(main)


@dataclass(frozen=True)
class Preparation(settings.Arguments):
    """What `prepare` is asked for; a task names its kinds and may add fields."""

    preset: Preset | None = None  # make the data of this preset's rows; of paper: check what their rows need
    kind: str | None = None  # the layout to check or download
    root: Path | None = None  # the data set's folder; default: that of the rows
    probe: bool = False  # decode every file: slow, finds damaged ones
    download: bool = False  # fetch what can be fetched, say what to request
    dry_run: bool = False  # with download: say what would be fetched
    sheet: Path | None = None  # with a preset: also write a contact sheet of the data (PNG) here
    on_broken: Literal["raise", "skip"] = "raise"  # what missing and damaged files mean for the exit status
    lists: Path | None = None  # folder for the full lists of what is missing or damaged
    workers: Count = 2  # processes


def prepare(
    arguments_type: type[Q],
    rows: Mapping[str, Callable[[], Any]],
    *,
    synthetic: Callable[[Q], None],
    check: Callable[[Q], Check],
    download: Callable[[Q], None],
) -> None:
    """Make, download or check data. The exit status is 0 only if everything is there (`Check.failed`)."""

    def main(words: list[str]) -> int:
        arguments = parse(arguments_type, words)
        if arguments.preset in ("tiny", "laptop"):
            synthetic(arguments)
            return 0
        wanted = [arguments]
        if arguments.preset == "paper":
            sources = {(c.data.kind, c.data.root): None for c in rows_of_preset(rows, "paper")}
            wanted = [replace(arguments, kind=kind, root=root) for kind, root in sources]
        elif arguments.kind is None:
            raise ValueError("say what to prepare: --preset tiny, or --kind and --root of a data set (--help)")
        failed = False
        for one in wanted:
            if arguments.download:
                download(one)
                if arguments.dry_run:
                    continue
            found = check(one)
            found.report()
            failed |= found.failed(arguments.on_broken)
        return int(failed)

    run_command(main)


def load_run(run: Path, config_type: type[C], model: ModelFile[C], *, root: Path | None = None) -> tuple[C, Model]:
    """The Config and the trained network, in eval mode on the CPU, of a run's or a checkpoint's folder.

    root: where the data set is now. FileNotFoundError or ValueError, with the remedy, if it cannot be used.
    """
    folder = run / "checkpoint" if (run / "checkpoint").is_dir() else run
    config = config_of_checkpoint(folder, config_type)
    network = model.build_model(config, pretrained=False)
    load_trained(network, config.finetuning, folder)
    if root is not None:
        config = replace(config, data=replace(config.data, root=root))  # type: ignore[attr-defined,call-arg]  # each task's Config has it
    return config, network


def config_of_checkpoint(folder: Path, kind: type[C]) -> C:
    """The Config with which a checkpoint was trained. FileNotFoundError if none, ValueError if of another task."""
    state = read_state(folder)
    try:
        return from_json(kind, state["config"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder}: its configuration is not one of this task in this version ({error})") from error


def parse_config(rows: Mapping[str, Callable[[], C]], arguments: Sequence[str]) -> C:
    """The Config that `arguments` (without the program's name) ask for.

    Exits with usage on unknown flags, ValueError for an unknown row or a value out of range.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        print("Rows:", ", ".join(rows))
        raise SystemExit(0 if arguments else 2)
    parser = _Words(add_help=False, allow_abbrev=False)
    parser.add_argument("row")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--seed", type=int)
    short, rest = parser.parse_known_args(arguments)
    name = short.row
    if short.method is not None:
        name = with_method(name, short.method)
    if short.seed is not None:
        rest += ["--run.seed", str(short.seed)]
    config = find_row(rows, name)
    parsed = parse(type(config), rest, default=config, prog=f"python -m {task_of(config)}.train {name}")
    if (parsed.row, parsed.finetuning.method) != (config.row, config.finetuning.method):
        raise ValueError("a row's name says its method: change them with `ROW --method METHOD`, not field by field")
    return parsed


class _Words(argparse.ArgumentParser):
    """Whose errors are a user's, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the flags)")


def _in_words(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())
