"""Odd values on the command line of each task: one line that names the flag, and no traceback."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

import engine
from engine.command_line import one_line
from engine.commands import parse_config
from engine.config import Config
from engine.data.loader import build_loader
from engine.training.devices import set_seed
from engine.training.finetuning import apply_method
from engine.training.lock import locked

ROWS = {"action_recognition": "motion_tiny_dr2net", "action_detection": "untrimmed_tiny_dr2net"}
HUGE = "1" + "0" * 400
# Refused where the words are parsed.
ODD = {
    "--run.seed": ("-1", "1e3", "x", ""),
    "--run.micro-batch": ("0", "-1", "nan", "1.5", ""),
    "--run.evaluation-batch": ("0", "-3", "inf"),
    "--run.num-workers": ("-1", "0.5"),
    "--run.device": ("tpu", ""),
    "--run.evaluate-every-epochs": ("0", "-1", "x"),
    "--run.save-every-steps": ("0", "-1"),
    "--run.log-every-steps": ("0", "-5"),
    "--run.tracker": ("x", ""),
    "--run.max-steps": ("0", "-1", "1.5", "nan"),
    "--run.resume": ("yes", "True"),
    "--finetuning.method": ("dr2", "frozen", "conventional", ""),
    "--finetuning.check-every-epochs": ("0", "-1", "nan"),
    "--finetuning.stop-above-tolerance": ("maybe",),
    "--finetuning.options.tolerance": ("-1", "0", "nan", "inf", "x"),
    "--finetuning.options.chunk-mib": ("0", "-1", "nan", "inf", HUGE),
    "--finetuning.options.inversion": ("magic", ""),
    "--finetuning.options.anchor-every": ("0", "-1", HUGE),
    "--finetuning.options.store": ("maybe",),
    "--finetuning.schedule.start": ("nan nan", "inf 0", "1e300 1", "-1e7 0", "1", "1 1 1", "x y", HUGE + " 0"),
    "--finetuning.schedule.end": ("nan 0", "0 -inf"),
    "--finetuning.schedule.until": ("-1", "2", "nan"),
    "--finetuning.schedule.stages": ("0", "-1", "x"),
    "--finetuning.schedule.path": ("zigzag", ""),
    "--finetuning.schedule": ("None", "x"),
}


def config_of(task: str, *words: str) -> Config:
    return parse_config(import_module(f"{task}.configs").ROWS, [ROWS[task], *words])


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("flag", ODD)
def test_an_odd_value_is_one_line_that_names_the_flag_or_the_field(task, flag):
    for value in ODD[flag]:
        with pytest.raises(ValueError) as caught:
            config_of(task, flag, *value.split(" "))
        said = str(caught.value)
        # Groups of the library do not know their flags: tyro says the group, they the field.
        names = (flag, flag.rsplit(".", 1)[1].replace("-", "_"), "finetuning.options", "Unrecognized options")
        assert "\n" not in said and any(name in said for name in names), (flag, value, said)


# Refused where they are used: what is asked for depends on the model, the machine or the disk.
USED: dict[str, tuple[tuple[str, ...], Callable[[Config, Path], object]]] = {
    "--run.seed": ((str(1 << 63), str(1 << 64), HUGE), lambda config, folder: set_seed(config.run.seed)),
    "--run.num-workers": (("1025", HUGE), lambda config, folder: loader_of(config)),
    "--run.output": (
        ("{folder}/file", "/dev/null", "/proc/nope", "a" * 300, "{folder}/pipe"),
        lambda config, folder: locked(config.run.output / "row").__enter__(),
    ),
    "--finetuning.also": (("encoder", "", ".", "backbone", "head.x", "head", "backbone.blocks"), lambda c, f: apply(c)),
}


def loader_of(config: Config) -> object:
    workers = config.run.num_workers
    return build_loader([0], batch_size=1, seed=0, train=False, num_workers=workers, collate=list)  # type: ignore[arg-type,return-value]


def apply(config: Config) -> None:
    torch.manual_seed(0)
    apply_method(import_module("action_recognition.model").build_model(config, pretrained=False), config.finetuning)


@pytest.mark.parametrize("flag", USED)
def test_a_value_that_cannot_be_used_is_one_line_that_names_the_flag(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(engine.__file__).parents[2])
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    values, use = USED[flag]
    for value in values:
        config = config_of("action_recognition", flag, value.format(folder=tmp_path))
        with pytest.raises((ValueError, OSError), match=flag) as caught:
            use(config, tmp_path)
        assert len(one_line(caught.value)) < 700
