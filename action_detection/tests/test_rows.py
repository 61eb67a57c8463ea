"""Every row of the table is a complete configuration under its own name."""

import dataclasses

import pytest

from action_detection.configs import FAMILIES, ROWS, Config, row
from engine.commands import config_of_checkpoint, parse_config
from engine.config import METHODS
from engine.records.record import run_folder
from engine.settings import to_json


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_named_after_itself_and_its_batch_divides(name):
    config = row(name)
    assert config.row == name
    assert name.endswith(f"_{config.finetuning.method}")
    assert config.optimization.global_batch % config.run.micro_batch == 0
    assert config.optimization.warmup_epochs < config.optimization.epochs
    assert config.data.num_steps % 2 ** (config.model.num_levels - 1) == 0
    assert run_folder(config).parts[-3:] == ("action_detection", name, "seed0")


def test_methods_of_a_family_differ_in_the_method_and_paper_rows_in_drop_path():
    for family in FAMILIES:
        configs = [family(method) for method in METHODS]
        base = configs[0]
        same = {
            repr(
                dataclasses.replace(
                    config,
                    row="",
                    finetuning=base.finetuning,
                    model=dataclasses.replace(config.model, drop_path=base.model.drop_path),
                )
            )
            for config in configs
        }
        assert len(same) == 1, family.__name__
        if base.preset != "paper":
            assert len({config.model.drop_path for config in configs}) == 1, family.__name__


def test_left_and_right_are_never_mirrored():
    assert not any(row(name).data.flip for name in ROWS if name.startswith("untrimmed"))


def test_an_unknown_row_names_its_neighbours():
    with pytest.raises(ValueError, match="untrimmed_tiny_dr2net"):
        row("untrimmed_tiny_drnet")


def test_the_command_line_overrides_fields_and_renames_the_row_with_its_method():
    arguments = ["untrimmed_tiny_dr2net", "--method", "frozen", "--seed", "3", "--optimization.epochs", "2"]
    config = parse_config(row, [*arguments, "--detection.tious", "0.5", "0.75"])
    assert (config.row, config.finetuning.method) == ("untrimmed_tiny_frozen", "frozen")
    assert (config.run.seed, config.optimization.epochs, config.detection.tious) == (3, 2, (0.5, 0.75))


@pytest.mark.parametrize("name", ["untrimmed_tiny_dr2net", "anet_swint_frozen"])
def test_a_config_survives_the_checkpoint(tmp_path, name, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    state = {"format": 1, "files": {}, "config": to_json(row(name))}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert config_of_checkpoint(tmp_path, Config) == row(name)
