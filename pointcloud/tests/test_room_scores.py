"""Evaluation: logits averaged over crops, original points through the nearest voxel, complete rooms, one matrix."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pointcloud import data, evaluate, pix4point
from pointcloud.model import build_model
from pointcloud.s3dis import CLASSES
from pointcloud.tests.toy_rooms import WIDE, official, tiny_config, write_rooms


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("rooms"))


class ByHeight(nn.Module):
    """Says floor, wall or chair by the height, which is what the labels of the toy rooms are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.sizes: list[int] = []

    def forward(self, batch):
        height = batch["features"][..., 6]
        self.sizes.append(len(height))
        third = (height * 3 / WIDE).clamp(0, 2.99).long()
        label = torch.tensor([CLASSES.index(name) for name in ("floor", "wall", "chair")])[third]
        return {"logits": nn.functional.one_hot(label, 13).float() * self.scale}


def evaluated(config, model):
    dataset, truth = data.build_dataset(config, "val"), evaluate.read_truth(config)
    with torch.no_grad():
        rows = [
            row for k in range(len(dataset)) for row in evaluate.collect(model, data.collate([dataset[(k, 0)]]), config)
        ]
    return rows, truth


def test_a_network_that_knows_is_right_but_at_the_borders(root):
    config = tiny_config(root, voxel=0.05)
    rows, truth = evaluated(config, ByHeight())
    found = evaluate.score(rows, truth, config)
    assert list(found) == ["mIoU", "mAcc", "OA", "voxel_mIoU"]
    assert found["mIoU"] > 93 and found["voxel_mIoU"] > 93
    assert sum(row.points.sum() for row in rows) == 2 * 180, "every original point counts once"
    assert sum(row.voxels.sum() for row in rows) <= 2 * 180


@pytest.mark.parametrize("unit", ["room", "area"])
def test_neither_micro_batch_nor_order_of_rooms_changes_the_numbers(root, unit):
    config = tiny_config(root, unit=unit)
    model = ByHeight()
    one, truth = evaluated(config, model)
    other = replace(config, run=replace(config.run, micro_batch=1))
    two, _ = evaluated(other, model)
    assert set(model.sizes) >= {1, 4}
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.points, b.points) and np.array_equal(a.voxels, b.voxels)
    assert evaluate.score(one[::-1], truth, config) == evaluate.score(two, truth, config)
    assert evaluate.score([*one, one[0]], truth, config) == evaluate.score(one, truth, config), "a room counts once"


def test_logits_and_not_probabilities_are_averaged(root, monkeypatch):
    config = tiny_config(root)
    room = data.build_dataset(config, "val")[(0, 0)]["room"]
    voxel = int(room.own[0])
    crops = [(np.array([voxel]), sample) for _, sample in list(room.crops())[:3]]
    monkeypatch.setattr(type(room), "crops", lambda self: iter(crops))
    answers = iter([[[6.0, 0.0], [0.0, 2.0], [0.0, 1.0]]])

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, batch):
            told = next(answers, None)
            logits = torch.zeros(len(batch["position"]), batch["position"].shape[1], 13)
            if told is not None:
                for k, pair in enumerate(told):
                    logits[k, 0, :2] = torch.tensor(pair)
            return {"logits": logits}

    own = replace(room, own=np.array([voxel]))
    mean = evaluate.predict_voxels(Fixed(), own, config)[0, :2]
    assert mean[0] / mean[1] == pytest.approx(2.0), "logits add up to 6 and 3"


def test_original_points_take_the_class_of_the_nearest_voxel():
    voxels, points = np.array([[0.0, 0, 0], [1.0, 0, 0]]), np.array([[0.4, 0, 0], [0.6, 0, 0], [9.0, 0, 0]])
    ((piece, nearest),) = evaluate.project(points, voxels)
    assert nearest.tolist() == [0, 1, 1] and points[piece].shape == (3, 3)


def test_pieces_of_a_large_room_are_the_whole(monkeypatch):
    points, voxels = np.random.default_rng(0).random((100, 3)), np.random.default_rng(1).random((20, 3))
    whole = next(iter(evaluate.project(points, voxels)))[1]
    monkeypatch.setattr(evaluate, "PIECE", 7)
    assert np.array_equal(np.concatenate([n for _, n in evaluate.project(points, voxels)]), whole)


def test_a_missing_room_is_refused_before_and_after(root, tmp_path):
    config = tiny_config(root)
    rows, truth = evaluated(config, ByHeight())
    with pytest.raises(ValueError, match="1 rooms of the test area were not evaluated: Area_5/office_2"):
        evaluate.score(rows[:1], truth, config)
    with pytest.raises(ValueError, match="Area_5 lacks 66 rooms"):
        evaluate.read_truth(tiny_config(root, rooms="official"))


def test_a_room_that_cannot_be_read_is_known_before_the_training(tmp_path):
    write_rooms(tmp_path)
    (tmp_path / "Area_5" / "office_2" / "Annotations" / "wall_1.txt").write_text("1 2 3\n")
    with pytest.raises(ValueError, match="Area_5/office_2/Annotations/wall_1.txt: has 3 columns"):
        evaluate.read_truth(tiny_config(tmp_path))


def test_what_is_not_finite_is_named(root):
    model = ByHeight()
    nn.init.constant_(model.scale, float("nan"))
    with pytest.raises(ValueError, match="Area_5/office_1 is not finite"):
        evaluated(tiny_config(root), model)


def test_the_file_has_the_iou_of_each_class_and_names_absent_ones(root, tmp_path):
    config = tiny_config(root)
    rows, truth = evaluated(config, ByHeight())
    content = json.loads(evaluate.write(tmp_path, rows, truth, config).read_text())
    assert content["IoU"]["ceiling"] is None and content["IoU"]["chair"] > 50
    assert "sofa" in content["absent"] and content["rooms"] == ["Area_5/office_1", "Area_5/office_2"]
    assert np.array(content["confusion"]).sum() == 360


def test_the_authors_checkpoint_is_scored_by_one_command(root, tmp_path, monkeypatch, capsys):
    config = tiny_config(root)
    model = replace(config.model, weights=None, channels=(8, 128), token_scale=None, decoder_norm="batch")
    config = replace(config, model=replace(model, decoder_width=None))
    torch.manual_seed(0)
    network = build_model(config, pretrained=False)
    torch.save({"model": official(network)}, tmp_path / "pix4point.pth")
    monkeypatch.setattr(pix4point, "find_row", lambda rows, name: config)
    words = ["--weights", str(tmp_path / "pix4point.pth"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    pix4point._main(words)
    said = capsys.readouterr().out
    assert "pix4point.pth: mIoU" in said and (tmp_path / "out" / "scores.json").is_file()
    rows, truth = evaluated(config, network.eval())
    content = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert content["mIoU"] == pytest.approx(evaluate.score(rows, truth, config)["mIoU"])
