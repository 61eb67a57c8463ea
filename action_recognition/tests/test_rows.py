"""Every row of the table is a complete configuration under its own name."""

import dataclasses
import itertools

import pytest

from action_recognition.configs import ROWS, SETTINGS, Config
from engine.config import METHODS
from engine.records.record import run_folder
from engine.rows import find_row
from engine.training.finetuning import coefficients


def row(name: str) -> Config:
    return find_row(ROWS, name)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_named_after_itself_and_its_batch_divides(name):
    config = row(name)
    assert config.row == name
    setting = name.partition(f"_{config.finetuning.method}")[2]
    assert setting == "" or setting.removeprefix("_") in (*SETTINGS, "float")
    assert config.optimization.global_batch % config.run.micro_batch == 0
    assert config.optimization.warmup_epochs < config.optimization.epochs
    assert run_folder(config).parts[-3:] == ("action_recognition", name, "seed0")


def test_methods_of_a_family_differ_in_the_method_only():
    families = [name.removesuffix("_frozen") for name in ROWS if name.endswith("_frozen")]
    for family in families:
        configs = [row(f"{family}_{method}") for method in METHODS if f"{family}_{method}" in ROWS]
        same = {repr(dataclasses.replace(config, row="", finetuning=configs[0].finetuning)) for config in configs}
        assert len(same) == 1, family
        options = {config.finetuning.options for config in configs}
        assert len(options) == 1, family


def test_rows_of_the_schedule_ablation_differ_in_their_coefficients_only():
    base = row("motion_vits_dr2net")
    settings = set()
    for setting in SETTINGS:
        config = row(f"motion_vits_dr2net_{setting}")
        settings.add(config.finetuning.schedule)
        assert config.finetuning.options.inversion == "exact"
        finetuning = dataclasses.replace(config.finetuning, schedule=base.finetuning.schedule)
        assert dataclasses.replace(config, row=base.row, finetuning=finetuning) == base
    assert len(settings) == len(SETTINGS)


@pytest.mark.parametrize(
    "setting, expected",  # (alpha, beta) at progress 0, 0.3, 0.6 and 1
    [
        ("authors_together_04_07", [(1, 0.1), (0.7, 0.4), (0.4, 0.7), (0.4, 0.7)]),
        ("authors_together_0_1", [(1, 0.1), (0.5, 0.55), (0, 1), (0, 1)]),
        # alpha has moved once when beta has not, and both have made 10 of 20 moves at half of the way
        ("authors_alternating_04_07", [(1, 0.1), (0.7, 0.4), (0.4, 0.7), (0.4, 0.7)]),
        ("authors_alternating_0_1", [(1, 0.1), (0.5, 0.55), (0, 1), (0, 1)]),
        ("convex_moving", [(0.9, 0.1), (0.6, 0.4), (0.3, 0.7), (0.3, 0.7)]),
        ("constant_6_64", [(58 / 64, 6 / 64)] * 4),
        ("float", [(1, 0.1), (0.7, 0.4), (0.4, 0.7), (0.4, 0.7)]),
    ],
)
def test_coefficients_of_the_schedule_ablation(setting, expected):
    finetuning = row(f"motion_vits_dr2net_{setting}").finetuning
    for progress, pair in zip((0, 0.3, 0.6, 1), expected, strict=True):
        assert coefficients(finetuning, progress) == pytest.approx(pair), progress


def test_alternating_moves_alpha_and_beta_in_turn():
    finetuning = row("motion_vits_dr2net_authors_alternating_04_07").finetuning
    pairs = [coefficients(finetuning, k / 1000) for k in range(1001)]
    moves = [(a != b, c != d) for (a, c), (b, d) in itertools.pairwise(pairs)]
    moves = [move for move in moves if any(move)]
    assert moves == [(True, False), (False, True)] * 20


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name.startswith(("convex", "constant"))])
def test_convex_rows_keep_alpha_plus_beta_at_one(setting):
    finetuning = row(f"motion_vits_dr2net_{setting}").finetuning
    for k in range(101):
        assert sum(coefficients(finetuning, k / 100)) == pytest.approx(1)
    if setting.startswith("constant"):
        numerator, denominator = map(int, setting.split("_")[1:])
        assert coefficients(finetuning, 0.5)[1] == numerator / denominator  # the name says beta


def test_only_the_float_row_trains_without_exact_inversion():
    assert [name for name in ROWS if row(name).finetuning.options.inversion != "exact"] == ["motion_vits_dr2net_float"]


def test_left_and_right_are_never_mirrored():
    assert not any(row(name).data.flip for name in ROWS if not name.startswith("k400"))


def test_an_unknown_row_names_its_neighbors():
    with pytest.raises(ValueError, match="motion_tiny_dr2net"):
        row("motion_tiny_drnet")
