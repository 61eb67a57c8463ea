"""Every row of the table is a complete configuration under its own name."""

import dataclasses

import pytest

from action_detection.configs import ROWS, Config
from engine.commands import parse_config
from engine.config import METHODS
from engine.records.record import run_folder
from engine.rows import find_row


def row(name: str) -> Config:
    return find_row(ROWS, name)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_named_after_itself_and_its_batch_divides(name):
    config = row(name)
    assert config.row == name
    assert name.endswith(f"_{config.finetuning.method}")
    assert config.optimization.global_batch % config.run.micro_batch == 0
    assert config.optimization.warmup_epochs < config.optimization.epochs
    assert config.data.num_times % 2 ** (config.model.num_levels - 1) == 0
    assert run_folder(config).parts[-3:] == ("action_detection", name, "seed0")


def test_methods_of_a_family_differ_in_the_method_and_paper_rows_in_drop_path():
    families = [name.removesuffix("_frozen") for name in ROWS if name.endswith("_frozen")]
    for family in families:
        configs = [row(f"{family}_{method}") for method in METHODS if f"{family}_{method}" in ROWS]
        base = configs[0]
        assert len({config.finetuning.options for config in configs}) == 1, family
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
        assert len(same) == 1, family
        if base.preset != "paper":
            assert len({config.model.drop_path for config in configs}) == 1, family


def test_left_and_right_are_never_mirrored():
    assert not any(row(name).data.flip for name in ROWS if name.startswith("untrimmed"))


def test_an_unknown_row_names_its_neighbors():
    with pytest.raises(ValueError, match="untrimmed_tiny_dr2net"):
        row("untrimmed_tiny_drnet")


def test_thresholds_of_the_metric_are_given_on_the_command_line():
    config = parse_config(ROWS, ["untrimmed_tiny_dr2net", "--detection.tious", "0.5", "0.75"])
    assert config.detection.tious == (0.5, 0.75)
