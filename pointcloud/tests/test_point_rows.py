"""Every row is a complete configuration, and families differ in the method only."""

import dataclasses

import pytest

from engine.config import METHODS
from engine.records.record import run_folder
from engine.rows import find_row
from pointcloud.configs import ROWS


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_named_after_itself_and_its_batch_divides(name):
    config = find_row(ROWS, name)
    assert config.row == name and name.removesuffix("_random").endswith(config.finetuning.method)
    assert config.optimization.global_batch % config.run.micro_batch == 0
    assert config.optimization.warmup_epochs < config.optimization.epochs
    assert run_folder(config).parts[-3:] == ("pointcloud", name, "seed0")
    assert config.run.evaluation_batch == 1, "a sample of the evaluation is a whole room"


def test_methods_of_a_family_differ_in_the_method_only():
    for family in (name.removesuffix("_frozen") for name in ROWS if name.endswith("_frozen")):
        names = [f"{family}_{method}" for method in METHODS]
        configs = [find_row(ROWS, name) for name in names if name in ROWS]
        assert len(configs) >= len(METHODS) - 1, "chunks are for rows that have a size for them"
        same = {repr(dataclasses.replace(c, row="", finetuning=configs[0].finetuning)) for c in configs}
        assert len(same) == 1, family
        assert len({(c.finetuning.options, c.finetuning.also) for c in configs}) == 1


def test_batch_norm_is_only_where_a_micro_batch_is_the_whole_batch():
    for name in ROWS:
        config = find_row(ROWS, name)
        if config.model.decoder_norm == "batch":
            assert config.run.micro_batch == config.optimization.global_batch, name


def test_the_paper_rows_follow_pix4point():
    config = find_row(ROWS, "s3dis_vits_conventional")
    data, recipe = config.data, config.optimization
    assert (data.num_points, data.radius, data.voxel, data.neighbors, data.ratios) == (16384, 2.0, 0.04, 32, (4, 4))
    assert data.unit == "area" and data.rooms == "official" and data.samples_per_epoch == 2000
    assert (recipe.epochs, recipe.warmup_epochs, recipe.learning_rate, recipe.weight_decay) == (600, 10, 1e-4, 1e-4)
    assert config.label_smoothing == 0.2 and config.model.drop_path == 0.1 and recipe.clip_norm == 10
