"""Values on the command line that make no sense, alone or together: one line before anything is read or built."""

from dataclasses import replace

import pytest

from detection.configs import COCO, ROWS, SHAPES, SMALL
from detection.data import _least_side
from engine.commands import parse_config

WRONG = [
    ("--model.width 100", "--model.width 100"),
    ("--model.width 32", "--model.width must be at least 64"),
    ("--model.heads 7", "--model.heads 7"),
    ("--model.queries 0", "--model.queries must be at least 1"),
    ("--model.queries 1000000000", "--model.queries must be at least 1 and at most 100000"),
    ("--model.extra-levels 0", "--model.extra-levels must be at least 1"),
    ("--model.extra-levels 9", "--model.extra-levels must be at least 1 and at most 3"),
    ("--model.drop-path 1", "--model.drop-path must be at least 0 and below 1"),
    ("--model.temperature 1e-300", "--model.temperature must be at least 1"),
    ("--data.window 8 --data.crop window", "--data.window must be at least 32"),
    ("--data.test-size 1", "--data.test-size must be at least 32"),
    ("--data.test-size 1000000 --data.max-size 1000000", "--data.max-size must be at least 32 and at most"),
    ("--data.sizes 4", "--data.sizes must be at least 32"),
    ("--data.sizes", "--data.sizes is empty"),
    ("--data.crop-sizes", "--data.crop-sizes is empty"),
    ("--data.crop-range 600 384", "--data.crop-range 600 384"),
    ("--data.crop-range 1 1", "--data.crop-range must be at least 32"),
    ("--data.scale 2 1", "--data.scale 2 1"),
    ("--data.scale 1e9 1e9", "--data.scale must be at least 0.01 and at most 100"),
    ("--data.max-size 100 --data.sizes 64", "--data.max-size 100 is below --data.test-size 128"),
    ("--data.max-size 100 --data.test-size 64", "--data.max-size 100 is below --data.sizes 128"),
    ("--data.mean 123.675 116.28 103.53", "--data.mean must be at least 0 and at most 1"),
    ("--data.std 58.395 57.12 57.375", "--data.std must be"),
    ("--detection.max-detections 0", "--detection.max-detections must be at least 1"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[words for words, _ in WRONG])
def test_a_value_without_sense_is_one_line_that_names_the_flag(words, said):
    with pytest.raises(ValueError) as error:
        parse_config(ROWS, ["shapes_tiny_dr2net", *words.split()])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_every_row_and_what_its_documentation_suggests_is_allowed():
    for row in ROWS.values():
        row()
    replace(COCO, test_size=1200, max_size=2000, sizes=(800, 1200))
    single = replace(SHAPES, crop="none", sizes=(32,), crop_sizes=(), max_size=128)
    assert _least_side(single, True) == 32
    replace(SMALL, width=256, heads=8, extra_levels=1, temperature=10000.0, position_offset=-0.5, queries=1500)
