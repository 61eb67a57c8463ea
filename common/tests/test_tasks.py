"""What holds for every task folder, and would hold for a sixth: the contract of `engine.task`.

The toy task in common/tests/toy_task is a sixth task: a folder and nothing else, found by its name.
"""

import inspect
import json
import os
import runpy
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import engine
from dr2net import ReversibleSequence
from engine import commands, rows, task
from engine.config import METHODS, Config, Data
from engine.settings import from_json, to_json
from engine.training.finetuning import apply_method, inverts, set_coefficients, set_mode
from engine.training.optimization import build_optimizer, set_learning_rate

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("action_detection", "vos", "action_recognition", "pointcloud", "detection")
TASKS = [*(name for name in NAMES if (ROOT / name / "configs.py").exists()), "toy_task"]
TINY = {
    "action_detection": "untrimmed_tiny",
    "action_recognition": "motion_tiny",
    "detection": "shapes_tiny",
    "pointcloud": "rooms_tiny",
    "toy_task": "toy_vit",
    "vos": "referring_tiny",
}
PROTOCOLS = {"data": task.DataFile, "model": task.ModelFile, "evaluate": task.EvaluateFile}
# What the sums of a batch in two orders may differ by, relative to the gradient.
SPLIT_TOLERANCE = 1e-5


def part(name: str, file: str) -> ModuleType:
    return import_module(f"{name}.{file}")


def tiny(name: str, method: str = "dr2net") -> Config:
    return rows.find_row(part(name, "configs").ROWS, f"{TINY[name]}_{method}")


def run(module: str, *words: str, code: int = 0, processes: int = 1) -> str:
    """A command line in a process of its own; returns what it said."""
    paths = [str(Path(engine.__file__).parents[1]), str(ROOT), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", module, *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("file", PROTOCOLS)
def test_the_files_of_a_task_have_the_functions_of_the_template(name: str, file: str) -> None:
    wanted = {n: f for n, f in vars(PROTOCOLS[file]).items() if inspect.isfunction(f) and not n.startswith("_")}
    for function_name, template in wanted.items():
        function = getattr(part(name, file), function_name)
        own, asked = list(inspect.signature(function).parameters), list(inspect.signature(template).parameters)[1:]
        assert own == asked, f"{name}.{file}.{function_name}"


@pytest.mark.parametrize("name", TASKS)
def test_a_row_has_its_name_its_method_and_a_notebook(name: str) -> None:
    table = part(name, "configs").ROWS
    for row_name, build in table.items():
        config = build()
        assert isinstance(config, Config) and isinstance(config.data, Data)
        assert config.row == row_name and f"_{config.finetuning.method}" in row_name
    families = {row_name.removesuffix(f"_{METHODS[0]}") for row_name in table if row_name.endswith(METHODS[0])}
    for family in families:
        build = getattr(part(name, "configs"), family)
        assert build.__doc__, f"{family} has no notebook"
        assert {f"{family}_{method}" for method in rows.methods_of(build)} <= table.keys()


@pytest.mark.parametrize("name", TASKS)
def test_a_configuration_survives_json_and_an_older_one_takes_defaults(name: str) -> None:
    for build in part(name, "configs").ROWS.values():
        config = build()
        content = json.loads(json.dumps(to_json(config)))
        assert from_json(type(config), content) == config
        old = {**content, "run": {k: v for k, v in content["run"].items() if k != "evaluation_batch"}}
        assert from_json(type(config), old) == replace(config, run=replace(config.run, evaluation_batch=None))
        with pytest.raises(ValueError, match="unknown: nonsense"):
            from_json(type(config), {**content, "nonsense": 1})


@pytest.mark.parametrize("name", TASKS)
def test_every_method_trains_two_steps_and_what_must_not_train_does_not(name: str) -> None:
    for method in rows.methods_of(getattr(part(name, "configs"), TINY[name])):
        config = tiny(name, method)
        config = replace(config, run=replace(config.run, micro_batch=2))
        torch.manual_seed(0)
        model = part(name, "model").build_model(config, pretrained=False)
        assert isinstance(model, task.Model)
        apply_method(model, config.finetuning)
        optimizer = build_optimizer(model, config.optimization)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for step in range(2):
            set_mode(model, config.finetuning)
            set_coefficients(model, config.finetuning, step / 2)
            set_learning_rate(optimizer, 1e-3)
            batch = part(name, "model").example_batch(config)
            losses = model.losses(model(batch), batch)
            assert all(loss.dtype == torch.float32 and loss.shape == () for loss in losses.values())
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert any(not key.startswith("backbone.") for key in moved)
        assert any(key.startswith("backbone.") for key in moved) == (method != "frozen")
        sequences = [module for module in model.modules() if isinstance(module, ReversibleSequence)]
        assert inverts(config.finetuning) == any(not sequence.checkpointed for sequence in sequences)


@pytest.mark.parametrize("name", TASKS)
def test_how_a_batch_is_split_does_not_change_its_gradient(name: str) -> None:
    config = tiny(name, "conventional")
    config = replace(config, run=replace(config.run, micro_batch=4))
    torch.manual_seed(0)
    model = part(name, "model").build_model(config, pretrained=False).eval()  # no dropout: masks depend on the split
    batch = part(name, "model").example_batch(config)
    noise = torch.Generator().manual_seed(0)
    key = next(key for key, value in batch.items() if isinstance(value, torch.Tensor) and value.is_floating_point())
    batch[key] = torch.randn(batch[key].shape, generator=noise)

    def gradient(size: int) -> torch.Tensor:
        model.zero_grad()
        for start in range(0, 4, size):
            piece = {k: v[start : start + size] if hasattr(v, "__len__") else v for k, v in batch.items()}
            if "num_targets" in batch:
                piece["num_targets"] = batch["num_targets"] * size / 4
            (sum(model.losses(model(piece), piece).values()) * size / 4).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, halves = gradient(4), gradient(2)
    assert (whole - halves).norm() <= SPLIT_TOLERANCE * whole.norm()


@pytest.mark.parametrize("name", TASKS)
def test_what_a_user_gives_wrong_is_one_line_and_exit_code_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = f"{TINY[name]}_dr2net"
    for words, said in (
        (["train", "no_such_row"], "error: no row 'no_such_row'"),
        (["train", row, "--optimization.clip-norm", "-1"], "--optimization.clip-norm must be above 0, not -1"),
        (["train", row, "--optimization.epochs", "many"], "--optimization.epochs"),
        (["train", row, "--no-such-flag", "1"], "--no-such-flag"),
        (["train", row, "--finetuning.method", "dr2net_dynamic"], "a row's name says its method"),
        (["evaluate", str(tmp_path / "nothing")], "no checkpoint in"),
        (["predict", str(tmp_path / "nothing"), str(tmp_path / "no.mp4")], "no.mp4: no such file"),
        (["prepare"], "say what to prepare"),
    ):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
            runpy.run_module(f"{name}.{words[0]}", run_name="__main__")
        line = stop.value.code  # a text: Python prints it on the standard error and exits with 1
        assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line and said in line


def test_a_sixth_task_is_a_folder_and_nothing_else(tmp_path: Path) -> None:
    """Every command works on the toy task, whose name no code of the engine knows."""
    output = ["--run.output", str(tmp_path)]
    assert "accuracy" in run("toy_task.train", "toy_vit_dr2net", *output, "--optimization.epochs", "1")
    folder = tmp_path / "toy_task" / "toy_vit_dr2net" / "seed0"
    one, two = run("toy_task.evaluate", str(folder)), run("toy_task.evaluate", str(folder), processes=2)
    line = next(line for line in one.splitlines() if "accuracy" in line)
    assert line in two.splitlines(), "shared out over two processes and scored once, the numbers are the same"
    (tmp_path / "cloud.txt").write_text("0 1 0 0 0 0 0 0\n" * 4)
    assert "cloud_class.txt" in run(
        "toy_task.predict", str(folder), str(tmp_path / "cloud.txt"), "--output", str(tmp_path / "out")
    )
    assert "complete" in run("toy_task.prepare", "--kind", "points")
    said = run("engine.rows", "toy_task", "--preset", "tiny", "--dry-run")
    assert [line.split()[-3] for line in said.splitlines() if ".train" in line] == [
        f"toy_vit_{m}"
        for m in METHODS
        if m != "checkpointed_chunks"  # its branches run whole
    ]
    for path in Path(engine.__file__).parent.rglob("*.py"):
        assert "toy_task" not in path.read_text()


def test_rows_of_one_name_and_methods_that_are_ignored_are_refused() -> None:
    def family(method: Any) -> Config:
        """Ignores its method."""
        return Config(preset="tiny")

    table = rows.rows_of(family)
    assert table["family_dr2net"]().row == "family_dr2net"
    with pytest.raises(ValueError, match="row family_frozen finetunes by dr2net"):
        table["family_frozen"]()
    with pytest.raises(ValueError, match="two rows are named family_dr2net"):
        rows.rows_of(family, family_dr2net=lambda: Config(preset="tiny"))


def test_the_method_of_a_row_is_changed_by_its_name() -> None:
    assert rows.with_method("a_b_dr2net_dynamic", "frozen") == "a_b_frozen"
    assert rows.with_method("a_b_frozen", "dr2net_dynamic") == "a_b_dr2net_dynamic"
    with pytest.raises(ValueError, match="has no other method"):
        rows.with_method("a_b_dr2net_constant_1_4", "frozen")
    config = commands.parse_config(
        part("toy_task", "configs").ROWS, ["toy_vit_dr2net", "--method", "frozen", "--seed", "3"]
    )
    assert (config.row, config.finetuning.method, config.run.seed) == ("toy_vit_frozen", "frozen", 3)


def test_every_field_of_every_configuration_says_what_it_is() -> None:
    for name in TASKS:
        kinds = {type(getattr(tiny(name), field.name)) for field in fields(tiny(name))}
        for kind in (kind for kind in kinds if kind.__module__.startswith((name, "engine"))):
            assert kind.__doc__
