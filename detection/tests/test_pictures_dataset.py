"""Samples and batches: what the network is promised, keys, crowds, empty pictures, missing and damaged files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from detection.data import Pictures, build_dataset, class_names, collate, sample_of_image
from detection.images import BrokenImage, read_image
from detection.tests.toy_pictures import PICTURES, coco_of, config_of, write_coco
from engine.data.fingerprint import inputs_of
from engine.data.loader import build_loader


@pytest.fixture
def data(tmp_path):
    return write_coco(tmp_path)


def dataset_of(data, split="train", **changes) -> Pictures:
    return build_dataset(config_of(replace(data, **changes)), split)


def pixels_of(image: torch.Tensor, data) -> torch.Tensor:
    return image * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]


def test_a_batch_has_the_promised_shapes_and_names(data):
    dataset = dataset_of(data, "test")
    batch = collate([dataset[i, 0] for i in range(3)])
    assert batch["image"].shape == (3, 3, 179, 170) and batch["image"].dtype == torch.float32
    assert batch["padding"].dtype == torch.bool and batch["padding"].shape == (3, 179, 170)
    assert (~batch["padding"]).sum((1, 2)).tolist() == [128 * 170, 179 * 128, 128 * 128]
    assert not batch["padding"][0, :128].any() and batch["padding"][0, 128:].all()
    assert (batch["image"][0, :, 128:] == 0).all() and (batch["image"][1, :, :, 128:] == 0).all()
    assert batch["num_targets"] == 3.0 and isinstance(batch["num_targets"], float)
    assert batch["name"] == ["a.jpg", "b.png", "c.jpg"] and batch["image_id"] == [7, 8, 9] and batch["skipped"] == []
    assert batch["original_size"] == [(120, 160), (140, 100), (120, 120)]
    first, second, empty = batch["targets"]
    assert first["labels"].tolist() == [0, 1] and second["labels"].tolist() == [1]
    assert first["labels"].dtype == torch.long and first["boxes"].dtype == torch.float32
    torch.testing.assert_close(first["boxes"][0], torch.tensor([45 / 160, 50 / 120, 50 / 160, 40 / 120]))
    assert empty["labels"].shape == (0,) and empty["boxes"].shape == (0, 4)
    assert class_names(config_of(data)) == ["car", "cup"]


def test_a_batch_without_any_box_is_one(data):
    dataset = dataset_of(data)
    batch = collate([dataset[2, 5], dataset[2, 6]])
    assert batch["num_targets"] == 0.0 and [len(t["labels"]) for t in batch["targets"]] == [0, 0]


def test_pixels_are_normalized(data):
    sample = dataset_of(data, "test", test_size=120)[0, 0]
    wanted = read_image(data.root / "val2017" / "a.jpg").float() / 255
    torch.testing.assert_close(pixels_of(sample["image"], data), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("crop", ["detr", "window", "none"])
def test_a_sample_is_a_function_of_its_key_alone(data, crop):
    dataset = dataset_of(data, crop=crop, color_jitter=0.3, window=64)
    first = dataset[0, 11]
    np.random.default_rng(1).random(), torch.rand(3)
    for other in (dataset, dataset_of(data, crop=crop, color_jitter=0.3, window=64)):
        other[1, 3], other[0, 12]
        again = other[0, 11]
        assert torch.equal(first["image"], again["image"]) and torch.equal(first["boxes"], again["boxes"])
    assert any(
        first["image"].shape != other["image"].shape or not torch.equal(first["image"], other["image"])
        for other in (dataset[0, 12], dataset[0, 13])
    )


def test_workers_do_not_change_a_batch(data):
    def batches(workers):
        dataset = dataset_of(data, repeats=2)
        return list(build_loader(dataset, batch_size=3, seed=1, train=True, num_workers=workers, collate=collate))

    for one, other in zip(batches(0), batches(1), strict=True):
        assert one["name"] == other["name"] and torch.equal(one["image"], other["image"])


def test_an_epoch_visits_each_picture_as_often_as_asked(data):
    assert len(dataset_of(data, repeats=5)) == 15 and len(dataset_of(data, "test", repeats=5)) == 3
    assert dataset_of(data, repeats=5)[13, 0]["name"] == "b.png"
    assert len(dataset_of(data, num_images=2)) == 2


def test_pictures_without_boxes_are_trained_on_or_left_out_and_always_tested(data):
    assert len(dataset_of(data)) == 3 and len(dataset_of(data, keep_empty=False)) == 2
    assert len(dataset_of(data, "test", keep_empty=False)) == 3


def test_crowds_are_in_no_target_and_a_picture_of_crowds_alone_counts_as_empty(tmp_path):
    content = coco_of()
    for item in content["annotations"]:
        item["iscrowd"] = int(item["image_id"] == 8 or item["category_id"] == 44)
    data = write_coco(tmp_path, content)
    for split in ("train", "test"):
        assert dataset_of(data, split, crop="none")[0, 0]["labels"].tolist() == [0]
    assert [p.path.name for p in dataset_of(data, keep_empty=False).pictures] == ["a.jpg"]
    assert dataset_of(data).annotations.pictures[8].crowd.tolist() == [True]


def test_two_thousand_boxes_in_a_picture_are_no_trouble(tmp_path):
    boxes = [([x % 50 * 3, x // 50 * 2, 3, 2], 3) for x in range(2000)]
    data = write_coco(tmp_path, pictures=[("full.jpg", 160, 120, [])])
    write_coco(tmp_path, coco_of([("full.jpg", 160, 120, boxes)]), pictures=[("full.jpg", 160, 120, [])])
    sample = dataset_of(data, "test")[0, 0]
    assert sample["boxes"].shape == (2000, 4) and (sample["boxes"][:, 2:] > 0).all()
    assert collate([dataset_of(data)[0, 1]])["num_targets"] <= 2000


def test_a_missing_picture_is_named_and_stops_or_is_left_out(data):
    (data.root / "val2017" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 pictures are missing: .*val2017/b.png; .*on-broken skip"):
        dataset_of(data, "test")
    with pytest.warns(UserWarning, match=r"b.png; left out"):
        dataset = dataset_of(data, "test", on_broken="skip")
    assert [dataset[i, 0]["image_id"] for i in range(len(dataset))] == [7, 9]


def test_a_damaged_picture_stops_or_is_replaced_in_training_and_blank_in_evaluation(data):
    for split in ("train2017", "val2017"):
        path = data.root / split / "a.jpg"
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BrokenImage, match=r"a.jpg: is damaged .*truncated.*--data.on-broken skip"):
        dataset_of(data)[0, 0]
    with pytest.warns(UserWarning, match="skipped: .*a.jpg"):
        batch = collate([dataset_of(data, on_broken="skip")[0, 0]])
    assert batch["name"] == ["b.png"] and batch["skipped"] == ["a.jpg"]
    with pytest.warns(UserWarning, match="skipped: .*a.jpg"):
        sample = dataset_of(data, "test", on_broken="skip")[0, 0]
    assert sample["image_id"] == 7 and sample["skipped"] == ["a.jpg"] and sample["labels"].tolist() == [0, 1]
    assert pixels_of(sample["image"], data).std() < 1e-6


def test_nothing_but_damaged_pictures_is_an_error(data):
    for name, *_ in PICTURES:
        (data.root / "train2017" / name).write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(BrokenImage, match="3 pictures in a row"):
        dataset_of(data, on_broken="skip")[0, 0]


def test_splits_with_other_classes_are_refused(data):
    content = coco_of()
    content["categories"][0]["name"] = "glass"
    root = data.root
    text = (root / "annotations" / "instances_train2017.json").read_text()
    (root / "annotations" / "instances_train2017.json").write_text(text.replace('"cup"', '"glass"'))
    with pytest.raises(ValueError, match=r"other classes, as .*glass.* and .*cup"):
        dataset_of(data)


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size_with_its_boxes(tmp_path):
    box = [400, 300, 800, 600]
    data = write_coco(tmp_path, pictures=[("big.jpg", 2000, 1600, [(box, 3)])])
    dataset = dataset_of(data, "test")
    assert dataset._read(0).shape == (3, 200, 250)
    sample = dataset[0, 0]
    assert sample["image"].shape == (3, 128, 160) and sample["original_size"] == (1600, 2000)
    torch.testing.assert_close(sample["boxes"][0], torch.tensor([0.4, 0.375, 0.4, 0.375]))
    seen = pixels_of(sample["image"], data)[0] > 0.5
    ys, xs = torch.nonzero(seen, as_tuple=True)
    assert [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] == pytest.approx(
        [32, 24, 96, 72], abs=1
    )


def test_small_splits_stay_decoded_and_large_ones_do_not(data, monkeypatch):
    dataset = dataset_of(data)
    first = dataset[0, 3]
    (data.root / "train2017" / "a.jpg").unlink()
    assert torch.equal(dataset[0, 3]["image"], first["image"])
    write_coco(data.root)
    monkeypatch.setattr("detection.data.CACHE_BYTES", 1000)
    assert dataset_of(data).decoded is None


def test_a_run_notices_when_a_box_or_a_picture_changes(data):
    def word():
        return inputs_of(data, {"train": dataset_of(data)})["train"]

    before = word()
    assert before.startswith("3 samples") and word() == before
    Image.new("RGB", (120, 120), "red").save(data.root / "train2017" / "c.jpg")
    pictures = word()
    write_coco(data.root, coco_of(PICTURES) | {"info": {"year": 1}})
    assert len({before, pictures, word()}) == 3


def test_a_picture_of_ones_own_becomes_a_sample_by_the_test_rule(data):
    tested = dataset_of(data, "test")[0, 0]
    own = sample_of_image(data, read_image(data.root / "val2017" / "a.jpg"), "a.jpg")
    assert torch.equal(own["image"], tested["image"]) and own["original_size"] == tested["original_size"]
    assert own.keys() == tested.keys() and collate([own])["num_targets"] == 0.0


def test_a_picture_said_to_be_larger_than_memory_is_left_out(tmp_path):
    content = coco_of()
    content["images"][0] |= {"width": 1_000_000, "height": 1_000_000}
    data = write_coco(tmp_path, content)
    with pytest.raises(ValueError, match="image 7 has the width and height"):
        build_dataset(config_of(data), "test")
    with pytest.warns(UserWarning, match="image 7 has the width and height"):
        dataset = build_dataset(config_of(replace(data, on_broken="skip")), "test")
    assert len(dataset) == 2


def test_training_without_any_box_is_refused(tmp_path):
    content = coco_of()
    for one in content["annotations"]:
        one["iscrowd"] = 1
    for annotations in (content["annotations"], []):
        data = write_coco(tmp_path, content | {"annotations": annotations})
        with pytest.raises(ValueError, match="none of the 3 pictures has a box to train on"):
            build_dataset(config_of(data), "train")
