"""Every row of the table is a complete configuration under its own name."""

import dataclasses

import pytest

from action_recognition.configs import FAMILIES, ROWS, Config, row
from dr2net.training.command import config_of_checkpoint, parse_config
from dr2net.training.config import METHODS
from dr2net.training.results import as_json, run_folder


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_named_after_itself_and_its_batch_divides(name):
    config = row(name)
    assert config.row == name
    assert name.endswith("pretrain") or name.endswith(config.finetuning.method)
    assert config.optimization.global_batch % config.run.micro_batch == 0
    assert config.optimization.warmup_epochs < config.optimization.epochs
    assert run_folder(config).parts[-3:] == ("action_recognition", name, "seed0")


def test_methods_of_a_family_differ_in_the_method_only():
    for family in FAMILIES:
        configs = [family(method) for method in METHODS]
        same = {repr(dataclasses.replace(config, row="", finetuning=configs[0].finetuning)) for config in configs}
        assert len(same) == 1, family.__name__


def test_left_and_right_are_never_mirrored():
    assert not any(row(name).data.flip for name in ROWS if not name.startswith("k400"))


def test_an_unknown_row_names_its_neighbours():
    with pytest.raises(ValueError, match="motion_tiny_dr2net"):
        row("motion_tiny_drnet")


def test_the_command_line_overrides_fields_and_renames_the_row_with_its_method():
    arguments = ["motion_tiny_dr2net", "--method", "frozen", "--seed", "3", "--optimization.epochs", "2"]
    config = parse_config(row, [*arguments, "--model.weights", "None"])
    assert (config.row, config.finetuning.method) == ("motion_tiny_frozen", "frozen")
    assert (config.run.seed, config.optimization.epochs, config.model.weights) == (3, 2, None)


@pytest.mark.parametrize("arguments", [["--finetuning.method", "frozen"], ["--row", "other"]])
def test_a_method_behind_the_rows_back_is_refused(arguments):
    with pytest.raises(ValueError, match="--method METHOD"):
        parse_config(row, ["motion_tiny_dr2net", *arguments])


def test_an_unknown_flag_stops_the_command(capsys):
    with pytest.raises(SystemExit):
        parse_config(row, ["motion_tiny_dr2net", "--optimization.epoch", "2"])


@pytest.mark.parametrize("name", ["motion_tiny_dr2net", "k400_vitb_frozen"])
def test_a_config_survives_the_checkpoint(tmp_path, name, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    state = {"format": 1, "files": {}, "config": as_json(row(name))}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert config_of_checkpoint(tmp_path, Config) == row(name)
    del state["config"]["data"]["root"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="root"):
        config_of_checkpoint(tmp_path, Config)
