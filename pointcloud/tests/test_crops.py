"""Crops: pure functions of their keys, the recipe's augmentation, and covers that see every voxel."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.data.fingerprint import inputs_of
from engine.data.loader import build_loader
from pointcloud import augment, data
from pointcloud.s3dis import load_room
from pointcloud.tests.toy_rooms import tiny_config, write_room, write_rooms


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("rooms"))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_a_crop_is_a_function_of_its_key_and_of_nothing_else(root):
    config = tiny_config(root)
    first, second = data.build_dataset(config, "train"), data.build_dataset(config, "train")
    second[(3, 1)]
    assert same(first[(5, 7)], second[(5, 7)])
    assert not np.array_equal(first[(5, 8)]["position"], first[(5, 7)]["position"])
    assert first[(5, 7)]["features"].shape == (64, 7) and first[(5, 7)]["neighbor_1"].shape == (16, 4)


@pytest.mark.parametrize("unit", ["room", "area"])
def test_an_epoch_visits_every_cloud(root, unit):
    dataset = data.build_dataset(tiny_config(root, unit=unit, samples_per_epoch=60), "train")
    names = {dataset[(index, 0)]["name"].split("@")[0] for index in range(len(dataset))}
    assert len(names) == 5


def test_workers_change_nothing(root):
    config = tiny_config(root)
    dataset = data.build_dataset(config, "train")
    batches = []
    for workers in (0, 2):
        loader = build_loader(dataset, batch_size=4, seed=0, train=True, num_workers=workers, collate=data.collate)
        loader.timeout = 100 if workers else 0
        batches.append(list(loader))
    for one, two in zip(*batches, strict=True):
        assert one["name"] == two["name"]
        assert all(torch.equal(one[key], two[key]) for key in one if isinstance(one[key], torch.Tensor))


def test_an_area_is_not_put_together_from_aligned_rooms_or_arrays(tmp_path):
    write_rooms(tmp_path, aligned=True)
    with pytest.raises(ValueError, match="the aligned version"):
        data.build_dataset(tiny_config(tmp_path, unit="area"), "train")
    data.build_dataset(tiny_config(tmp_path, unit="room"), "train")
    with pytest.raises(ValueError, match="npy files"):
        data.build_dataset(tiny_config(tmp_path, unit="area", kind="npy"), "train")


@pytest.mark.parametrize(
    "rooms, remedy", [("official", "download_s3dis.sh"), ("composed", "--preset tiny"), ("any", "README")]
)
def test_a_folder_without_rooms_says_how_to_get_them_and_is_no_aligned_version(tmp_path, rooms, remedy):
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=f"no rooms of Area_1 in the layout 's3dis'; .*{remedy}"):
            data.build_dataset(tiny_config(root, unit="area", rooms=rooms), "train")


def test_a_crop_with_too_few_points_is_filled_by_repeating_them(tmp_path):
    write_rooms(tmp_path, count=3)
    sample = data.build_dataset(tiny_config(tmp_path), "train")[(0, 0)]
    assert len(sample["position"]) == 64 and np.isfinite(sample["features"]).all()
    assert len(np.unique(sample["label"])) <= 3
    (tmp_path / "single").mkdir()
    write_rooms(tmp_path / "single", count=1)
    for area in (1, 2, 3, 4, 6):
        for name in ("wall_1", "chair_1"):
            (tmp_path / "single" / f"Area_{area}" / "office_1" / "Annotations" / f"{name}.txt").unlink()
    sample = data.build_dataset(tiny_config(tmp_path / "single"), "train")[(0, 0)]
    assert len(np.unique(sample["label"])) == 1 and np.isfinite(sample["features"]).all()
    assert np.isfinite(sample["weight_1"]).all()


def test_a_broken_room_stops_the_run_or_is_left_out_with_its_name(tmp_path):
    write_rooms(tmp_path)
    (tmp_path / "Area_2" / "office_1" / "Annotations" / "wall_1.txt").write_text("1 2 3\n")
    with pytest.raises(ValueError, match="wall_1.txt"):
        data.build_dataset(tiny_config(tmp_path), "train")[(0, 0)]
    with pytest.warns(UserWarning, match="Area_2/office_1 is left out"):
        data.build_dataset(tiny_config(tmp_path, on_broken="skip"), "train")[(0, 0)]


@pytest.mark.parametrize("unit", ["room", "area"])
@pytest.mark.parametrize("radius", [None, 0.6])
def test_crops_of_an_evaluated_room_see_each_voxel(root, unit, radius):
    config = tiny_config(root, unit=unit, radius=radius)
    dataset = data.build_dataset(config, "val")
    assert len(dataset) == 2
    for index in range(2):
        room = dataset[(index, 0)]["room"]
        crops = [found for found, _ in room.crops()]
        seen = np.unique(np.concatenate(crops))
        assert set(room.own.tolist()) <= set(seen.tolist())
        assert all(len(found) <= 64 for found in crops)
        again = [found for found, _ in dataset[(index, 0)]["room"].crops()]
        assert all(np.array_equal(a, b) for a, b in zip(crops, again, strict=True))
        places = room.cloud.xyz[room.own] + room.offset
        original = load_room(room.room)["xyz"]
        assert np.abs(places.min(0) - original.min(0)).max() < 0.2, "the cloud's offset leads back to the files"


def test_equal_points_are_all_seen(root):
    config = tiny_config(root)
    cloud = data.Cloud("same", np.zeros((150, 3), np.float32), np.zeros((150, 3), np.uint8), np.zeros(150, np.uint8))
    room = data.build_dataset(config, "val")[(0, 0)]["room"]
    room = replace(room, cloud=cloud, own=np.arange(150))
    crops = list(room.crops())
    assert len(np.unique(np.concatenate([found for found, _ in crops]))) == 150
    assert all(np.isfinite(sample["features"]).all() for _, sample in crops)


def test_evaluation_changes_neither_colors_nor_places(root):
    config = tiny_config(root)
    room = data.build_dataset(config, "val")[(0, 0)]["room"]
    index, sample = next(room.crops())
    relative = room.cloud.xyz[index] - room.cloud.xyz[index[0]]
    assert np.allclose(sample["position"][: len(index)], relative, atol=1e-6)
    color = (room.cloud.rgb[index] / 255 - config.data.mean) / config.data.std
    assert np.allclose(sample["features"][: len(index), 3:6], color, atol=1e-5)
    assert np.allclose(sample["features"][: len(index), 6], room.cloud.xyz[index, 2])


def test_augmentation_keeps_to_the_recipe(root):
    settings = tiny_config(root, contrast=0.0, color_drop=0.0, jitter=0.0).data
    rng = np.random.default_rng(0)
    position = rng.standard_normal((50, 3)).astype(np.float32)
    color = rng.uniform(0, 255, (50, 3)).astype(np.float32)
    for seed in range(20):
        moved, kept = augment.augment_crop(position, color, settings, np.random.default_rng(seed))
        assert np.array_equal(kept, color)
        share = moved[:, 2] / position[:, 2]
        assert np.ptp(share) < 1e-4 and 0.9 <= share.mean() <= 1.1, "the vertical is scaled and not turned"
        flat = np.linalg.norm(moved[:, :2], axis=1) / np.linalg.norm(position[:, :2], axis=1)
        assert flat.min() > 0.899 and flat.max() < 1.101
    jittered, _ = augment.augment_crop(
        position, color, replace(settings, jitter=0.005, rotate=False, scale=(1.0, 1.0)), rng
    )
    assert 0 < np.abs(jittered - position).max() <= 0.02 + 1e-6
    _, dropped = augment.augment_crop(position, color, replace(settings, color_drop=1.0), rng)
    assert not dropped.any()


def test_a_rotation_is_one_about_the_vertical():
    turned = augment.rotate_about_vertical(np.array([[1.0, 0.0, 3.0]]), np.pi / 2)
    assert np.allclose(turned, [[0, 1, 3]], atol=1e-6)


def test_stretched_contrast_reaches_both_ends_and_one_color_stays():
    color = np.array([[10.0, 50, 7], [20, 100, 7]], np.float32)
    assert augment.stretch_contrast(color, 1.0).tolist() == [[0, 0, 7], [255, 255, 7]]
    assert np.allclose(augment.stretch_contrast(color, 0.0), color)


def test_a_labeled_file_that_changes_is_noticed(tmp_path):
    write_rooms(tmp_path)
    config = tiny_config(tmp_path)

    def word():
        return inputs_of(config, {"train": data.build_dataset(config, "train")})["train"]

    first = word()
    assert first.startswith("12 samples") and word() == first
    write_room(tmp_path / "Area_1" / "office_1", count=61)
    assert word() != first


def test_another_number_of_classes_is_refused(root):
    with pytest.raises(ValueError, match="--data.num-classes 20: these layouts have 13"):
        data.class_names(tiny_config(root, num_classes=20))


@pytest.mark.parametrize("ratios", [(), (4,), (2, 2, 2)])
def test_other_numbers_of_ratios_than_of_stages_are_refused(root, ratios):
    with pytest.raises(ValueError, match="--data.ratios .*--model.channels 32 64: give one of each"):
        tiny_config(root, ratios=ratios)


def test_a_long_reading_gives_signs_of_life(tmp_path, monkeypatch):
    write_rooms(tmp_path)
    files = []
    monkeypatch.setattr("engine.data.busy.alive", lambda file="": files.append(str(file)))
    data.build_dataset(tiny_config(tmp_path), "train")[(0, 0)]
    assert len(files) == 15 and files[0].endswith("chair_1.txt"), "a worker that reads 200 rooms at first is not hung"


def test_settings_that_leave_no_neighbors_are_refused(root):
    with pytest.raises(ValueError, match="fewer than --data.neighbors 32"):
        tiny_config(root, neighbors=32)


def test_no_warning_comes_from_good_rooms(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.build_dataset(tiny_config(root), "train")[(0, 1)]
