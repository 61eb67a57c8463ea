"""Crowns cut out of the training photograph: of that one alone, and the boxes are those of what is seen."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection import pretrain
from detection.configs import ROWS, SMALL_WEIGHTS
from detection.cutouts import compose_stand, cut_out, read_stock
from detection.model import build_model
from detection.objects import CLASSES
from detection.pretrain import Batches, Key, pretraining_config, to_batch
from detection.scenes import Scene, Stock, compose_forest, turn

BOXES = [[20, 30, 40, 40], [100, 50, 30, 36], [380, 10, 4, 40]]  # the last one touches the border
CROWD = [60, 100, 30, 30]


def write_trees(root: Path, boxes: list[list[float]] = BOXES) -> Path:
    """A training split of red crowns on green ground; val and ood have blue ones, and pictures that cannot be read."""
    (root / "annotations").mkdir(parents=True)
    picture = np.zeros((384, 384, 3), np.uint8)
    picture[..., 1] = 150
    for x, y, width, height in boxes:
        picture[y : y + height, x : x + width] = (200, 0, 0)
    for split in ("train", "val", "ood"):
        (root / split).mkdir()
        items = [{"image_id": 1, "bbox": box, "iscrowd": int(box is CROWD)} for box in [*boxes, CROWD]]
        content = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": items}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (root / split / "1.png").write_bytes(b"not to be opened")
    Image.fromarray(picture).save(root / "train" / "1.png")
    return root


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Stock:
    return read_stock(write_trees(tmp_path_factory.mktemp("trees") / "trees"))


def test_crowns_and_ground_are_of_the_training_photograph_alone(stock):
    assert stock.extents.tolist() == [36, 40]  # whole boxes, in order of size
    for thing in stock.things:
        color = np.asarray(thing.pyramid[0].convert("RGBA"))
        assert {tuple(pixel) for pixel in color[color[..., 3] == 255][:, :3]} == {(200, 0, 0)}
        assert CLASSES[thing.label] == "crown" and thing.kind == "crown"
    assert stock.grounds and all((piece[..., 0] == 0).all() for piece in stock.grounds)  # no crown in it
    assert sum(piece[..., 1].size for piece in stock.grounds) < 384 * 384  # none twice


def test_without_the_split_or_its_crowns_the_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="instances_train.json"):
        read_stock(tmp_path)
    with pytest.raises(ValueError, match="instances_train.json: no crown"):
        read_stock(write_trees(tmp_path / "empty", boxes=[]))


def test_a_crown_keeps_the_middle_of_its_box_and_not_the_corners():
    pixels = np.full((60, 80, 3), 90, np.uint8)
    picture = np.asarray(cut_out(np.random.default_rng(0), pixels, np.array([10, 5, 60, 30])).pyramid[0])
    half = len(picture) // 2
    solid = picture[..., 3] >= 128
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    assert solid[half, half] and not solid[half - 20, half - 40]
    assert 1.7 < len(columns) / len(rows) < 2.3  # as wide as the box is


def test_a_stand_is_a_function_of_its_seed_with_the_boxes_of_what_is_seen(stock):
    for seed in range(6):
        scene = compose_stand([3, seed], stock, (128, 128))
        assert scene.image.shape == (128, 128, 3) and {CLASSES[label] for label in scene.labels} <= {"crown"}
        assert np.array_equal(scene.image, compose_stand([3, seed], stock, (128, 128)).image)
        assert_seen(scene)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("quarters", range(4))
def test_boxes_turn_with_the_picture(quarters, mirror):
    scene = compose_forest(5, (64, 96))
    turned = turn(scene, quarters, mirror=mirror)
    assert turned.image.shape[:2] == turned.owner.shape == ((64, 96) if quarters % 2 == 0 else (96, 64))
    assert_seen(turned)


def test_a_batch_has_three_scenes_of_cut_crowns_and_a_drawn_forest(stock):
    config = pretraining_config(one_class=True)
    batch = Batches(config, [], one_class=True, stock=stock)[Key(2, 64, 4)]
    expected = [compose_forest([0, 2, 0], (64, 64)), *(compose_stand([0, 2, k], stock, (64, 64)) for k in (1, 2, 3))]
    assert np.array_equal(batch["image"], to_batch(expected, list("abcd"), config.data)["image"])


def test_crowns_need_one_class(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain", "--crowns", "data/trees", "--output", "unused/small.safetensors"])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "--crowns needs --one-class" in capsys.readouterr().err


def test_the_committed_weights_fit_the_laptop_rows_whole():
    row = ROWS["trees_small_conventional"]()
    file = Path(SMALL_WEIGHTS).with_name("trees.safetensors")
    assert not build_model(replace(row, model=replace(row.model, weights=str(file)))).fresh


def assert_seen(scene: Scene) -> None:
    for index, box in enumerate(scene.boxes.astype(int).tolist()):
        rows, columns = np.nonzero(scene.owner == index)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box
