"""Official layouts, sampling, augmentation from keys, views, mixing; and bad files and labels."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from action_recognition import data as data_file
from action_recognition.configs import Data
from action_recognition.data import Clips, build_dataset, collate, read_entries
from engine.config import Run
from engine.data import transforms
from engine.data.loader import build_loader
from engine.data.video import BrokenVideo, write_video
from engine.training.fit import build_loaders

NUM_CLASSES, SIZE, LENGTH = 3, 32, 10


def video_of(number: int, length: int = LENGTH, width: int = 48) -> np.ndarray:
    """A clip whose frames brighten with time and whose left half is darker; `number` shifts it all."""
    frames = np.zeros((length, SIZE, width, 3), np.uint8)
    frames += (20 * np.arange(length, dtype=np.uint8) + number)[:, None, None, None]
    frames[:, :, width // 2 :] += 40
    return frames


def write_ssv2(root: Path, counts: dict[str, int]) -> None:
    folder = root / "20bn-something-something-v2"
    folder.mkdir(parents=True)
    labels = {f"Class {k} of something": str(k) for k in range(NUM_CLASSES)}
    (root / "something-something-v2-labels.json").write_text(json.dumps(labels))
    number = 0
    for split, count in counts.items():
        items = []
        for _ in range(count):
            number += 1
            template = f"Class {number % NUM_CLASSES} of [something]"
            items.append({"id": str(number), "label": "x", "template": template, "placeholders": ["x"]})
            write_video(folder / f"{number}.mp4", video_of(number), 10)
        (root / f"something-something-v2-{split}.json").write_text(json.dumps(items))


@pytest.fixture
def data(tmp_path) -> Data:
    write_ssv2(tmp_path, {"train": 7, "validation": 4})
    return Data(root=tmp_path, num_classes=NUM_CLASSES, num_frames=4, image_size=SIZE)


def config(data: Data, **run) -> SimpleNamespace:
    return SimpleNamespace(data=data, run=Run(**{"micro_batch": 2, "num_workers": 0} | run))


def batches(data: Data, **run) -> list[dict]:
    return list(build_loaders(config(data, **run), data_file).train)


def class_names(data: Data) -> list[str]:
    return data_file.class_names(config(data))


RANDOM = {
    "crop_scale": (0.3, 1.0),
    "rand_augment": 2,
    "color_jitter": 0.3,
    "erase": 0.5,
    "flip": True,
    "mixup": 0.8,
    "cutmix": 1.0,
    "repeats": 2,
}


def test_batches_have_the_promised_shapes(data):
    batch = batches(data)[0]
    assert batch["video"].shape == (2, 3, 4, SIZE, SIZE) and batch["video"].dtype == torch.float32
    assert batch["label"].shape == (2,) and batch["label"].dtype == torch.long
    assert [int(name) % NUM_CLASSES for name in batch["name"]] == batch["label"].tolist()
    assert batch["skipped"] == [] and "target" not in batch and "view" not in batch
    validation = next(iter(build_loaders(config(data), data_file).val))
    assert validation["name"] == ["8", "9"] and validation["view"].tolist() == [0, 0]


def test_a_sample_is_a_function_of_its_key_alone(data):
    data = replace(data, **RANDOM)
    one, other = Clips(data, "train", train=True), Clips(data, "train", train=True)
    torch.manual_seed(1)
    first = collate([one[(2, 77)], one[(5, 78)]])
    state = torch.get_rng_state()
    torch.rand(5), np.random.rand(3)
    second = collate([other[(2, 77)], other[(5, 78)]])
    for name in ("video", "label", "target"):
        assert torch.equal(first[name], second[name])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left where it was
    assert not torch.equal(first["video"], collate([one[(2, 79)], one[(5, 78)]])["video"])


def test_workers_and_micro_batch_do_not_change_what_is_trained_on(data):
    data = replace(data, **RANDOM)
    reference = batches(data, micro_batch=2)
    for run in ({"micro_batch": 2, "num_workers": 2}, {"micro_batch": 1}, {"micro_batch": 3}):
        other = batches(data, **run)
        for name in ("video", "target", "label"):
            assert torch.equal(torch.cat([b[name] for b in reference])[:12], torch.cat([b[name] for b in other])[:12])


def test_repeated_augmentation_makes_different_samples_of_one_video(data):
    batch = batches(replace(data, repeats=2, crop_scale=(0.3, 1.0), num_frames=2))[0]
    assert len(batch["name"]) == 4 and batch["name"][0] == batch["name"][1]
    assert not torch.equal(batch["video"][0], batch["video"][1])


def test_without_augmentation_a_clip_holds_the_segment_centers_normalized(data):
    sample = Clips(data, "validation", train=False)[(0, 0)][0]
    indices = transforms.segment_indices(LENGTH, 4, None)
    assert indices.tolist() == [1, 3, 6, 8]
    expected = (video_of(8)[indices][:, :, 8:40].astype(np.float32) / 255 - np.array(data.mean)) / np.array(data.std)
    found = sample["video"].permute(1, 2, 3, 0).numpy()
    # 8-bit YUV rounds a gray level by up to 2, which is 2 / 255 / .224; the edge in the middle rings.
    np.testing.assert_allclose(found[..., :12, :], expected[..., :12, :], atol=0.06)


def test_random_segments_stay_in_their_segments_and_short_videos_repeat_frames():
    rng = np.random.default_rng(0)
    for length in (1, 3, 16, 50):
        drawn = np.array([transforms.segment_indices(length, 8, rng) for _ in range(300)])
        edges = np.arange(9) * length / 8
        assert (drawn >= np.floor(edges[:-1])).all() and (drawn < np.ceil(edges[1:])).all()
        assert set(drawn.ravel()) == set(range(length))  # every frame can be drawn
    views = [transforms.segment_indices(16, 8, None, view, 2).tolist() for view in (0, 1)]
    assert views == [list(range(0, 16, 2)), list(range(1, 16, 2))]


def test_dense_clips_keep_their_stride_and_cover_the_video():
    times = np.arange(100) / 25
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(500):
        indices = transforms.dense_indices(times, 4.0, 8, 4, rng)
        assert set(np.diff(indices)) == {4}
        starts.add(int(indices[0]))
    assert min(starts) == 0 and max(starts) == 100 - 29
    assert transforms.dense_indices(times, 4.0, 8, 4, None).tolist() == list(range(35, 67, 4))
    views = [transforms.dense_indices(times, 4.0, 8, 4, None, view, 5)[0] for view in range(5)]
    assert views == sorted(set(views)) and views[0] == 0
    assert transforms.dense_indices(times[:5], 0.2, 8, 4, None).tolist() == [0, 4, 4, 4, 4, 4, 4, 4]


def test_dense_sampling_goes_by_time_where_the_frame_rate_varies():
    times = np.concatenate([np.arange(50) / 50, 1 + np.arange(10) / 10])  # 50 frames in one second, then 10
    indices = transforms.dense_indices(times, 2.0, 16, 4, None)
    assert np.allclose(np.diff(times[indices]), 4 * 2.0 / 60, atol=0.1)  # at most one slow frame off
    assert (indices < 50).sum() == pytest.approx((indices >= 50).sum(), abs=1)


def test_views_are_segments_times_crops_and_cover_left_to_right(data):
    dataset = build_dataset(config(replace(data, test_segments=2, test_crops=3)), "test")
    loader = build_loader(dataset, batch_size=6, seed=0, train=False, num_workers=0, collate=collate)
    batch = next(iter(loader))
    assert batch["name"] == ["8"] * 6 and batch["view"].tolist() == list(range(6))
    brightness = batch["video"].mean(dim=(1, 2, 3, 4))
    assert brightness[0] < brightness[1] < brightness[2]  # the right half is brighter
    assert brightness[0] < brightness[3]  # the second segment is later, so brighter
    assert len(dataset) == 4 * 6


def test_random_crops_stay_inside_and_keep_their_share():
    rng = np.random.default_rng(0)
    y, x = torch.meshgrid(torch.arange(60), torch.arange(90), indexing="ij")
    clip = torch.stack([y * 4, x * 2, x * 0]).to(torch.uint8)[None].repeat(2, 1, 1, 1)
    for _ in range(50):
        crop = transforms.random_resized_crop(clip, 16, (0.25, 0.25), rng).float()
        assert crop.shape == (2, 3, 16, 16) and torch.equal(crop[0], crop[1])
        height, width = (crop[0, 0].amax() - crop[0, 0].amin()) / 4, (crop[0, 1].amax() - crop[0, 1].amin()) / 2
        # The resized crop spans 15/16 of what was cut, less antialiasing.
        assert 0.6 * 0.25 * 5400 < height * width * (16 / 15) ** 2 < 1.2 * 0.25 * 5400


def test_augmentation_is_the_same_in_all_frames():
    clip = torch.randint(0, 255, (1, 3, 24, 24), dtype=torch.uint8).repeat(5, 1, 1, 1)
    for seed in range(20):
        out = transforms.rand_augment(clip, 3, 15, np.random.default_rng(seed))
        out = transforms.color_jitter(out, 0.4, np.random.default_rng(seed))
        assert all(torch.equal(out[0], frame) for frame in out)
    video = torch.zeros(3, 5, 24, 24)
    erased = transforms.random_erase(video, 1.0, np.random.default_rng(0)) != 0
    assert erased.any() and all(torch.equal(erased[:, 0], erased[:, t]) for t in range(5))
    assert not video.any()  # the caller's tensor is left alone
    assert transforms.random_erase(video, 0.0, np.random.default_rng(0)) is video


def test_nothing_is_flipped_unless_asked(data):
    for flip, expected in ((False, {False}), (True, {False, True})):
        dataset = Clips(replace(data, flip=flip), "train", train=True)
        videos = [dataset[(0, seed)][0]["video"] for seed in range(20)]
        assert {bool(v[..., :4].mean() > v[..., -4:].mean()) for v in videos} == expected


@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_targets_are_the_shares_of_the_pixels(kind, data):
    data = replace(data, num_frames=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **kind)
    # Every video of a class k is a gray of 60 (k + 1): the mean of a mixture tells the shares.
    for number in range(1, 8):
        gray = np.full((4, SIZE, SIZE, 3), 60 * (number % NUM_CLASSES + 1), np.uint8)
        write_video(data.root / "20bn-something-something-v2" / f"{number}.mp4", gray, 10)
    dataset = Clips(data, "train", train=True)
    mixed = 0
    for seed in range(30):
        sample = dataset[(seed % 7, seed)][0]
        assert float(sample["target"].sum()) == pytest.approx(1)
        expected = float(sample["target"] @ (60 * torch.arange(1.0, 4.0) / 255))
        assert float(sample["video"].mean()) == pytest.approx(expected, abs=0.02)  # 8-bit YUV: 2 to 3 gray levels
        mixed += bool((sample["target"] > 0).sum() == 2)
    assert mixed > 10


def break_file(data: Data, number: int) -> None:
    path = data.root / "20bn-something-something-v2" / f"{number}.mp4"
    path.write_bytes(path.read_bytes()[:-400])


def test_a_broken_file_stops_the_run_by_name(data):
    break_file(data, 3)
    with pytest.raises(BrokenVideo, match="3.mp4: is cut short"):
        Clips(data, "train", train=True)[(2, 0)]


def test_a_broken_file_is_replaced_and_reported_if_so_configured(data):
    break_file(data, 3)
    dataset = Clips(replace(data, on_broken="skip"), "train", train=True)
    with pytest.warns(UserWarning, match="skipped: .*3.mp4"):
        batch = collate([dataset[(2, 5)]])
    assert batch["name"] == ["4"] and batch["label"].tolist() == [4 % NUM_CLASSES] and batch["skipped"] == ["3"]
    for number in range(1, 8):
        break_file(data, number)
    with pytest.warns(UserWarning), pytest.raises(BrokenVideo, match="7 videos in a row"):
        dataset[(0, 0)]


def test_missing_files_are_counted_and_named(data):
    (data.root / "20bn-something-something-v2" / "2.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 7 videos .* 2; run"):
        read_entries(data, "train")
    with pytest.warns(UserWarning, match="left out"):
        assert [e.name for e in read_entries(replace(data, on_broken="skip"), "train")] == [
            "1",
            "3",
            "4",
            "5",
            "6",
            "7",
        ]


def test_wrong_labels_and_class_counts_are_named(data):
    with pytest.raises(ValueError, match="has 3 classes, the configuration says 174; set --data.num-classes 3"):
        read_entries(replace(data, num_classes=174), "train")
    file = data.root / "something-something-v2-train.json"
    file.write_text(file.read_text().replace("Class 2 of [something]", "Class 9 of [something]", 1))
    with pytest.raises(ValueError, match="video 2 has the label 'Class 9 of something'"):
        read_entries(data, "train")
    file.write_text("[{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_entries(data, "train")
    file.write_text('[{"id": "1", "label": "a test entry has no template"}]')
    with pytest.raises(ValueError, match="train.json: entry 1 has no id or no template"):
        read_entries(data, "train")
    file.write_text("[]")
    with pytest.raises(ValueError, match="no videos"):
        read_entries(data, "train")
    (data.root / "something-something-v2-labels.json").write_text('{"a": "0", "b": "2", "c": "3"}')
    with pytest.raises(ValueError, match="class indices are not 0 to 2"):
        class_names(data)
    for odd in ('["a"]', '{"a": "first"}'):
        (data.root / "something-something-v2-labels.json").write_text(odd)
        with pytest.raises(ValueError, match="labels.json: is not a table of class names and indices"):
            class_names(data)
    with pytest.raises(FileNotFoundError, match="prepare"):
        class_names(replace(data, root=data.root / "nowhere"))


def test_kinetics_files_are_found_by_id_and_time_with_and_without_class_folders(tmp_path):
    rows = [("abseiling", "-ab", 3, 13), ("zumba", "cd_", 100, 110), ("abseiling", "ef", 0, 10)]
    for split in ("train", "val"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
            writer.writerows([*row, split] for row in rows)
    (tmp_path / "train" / "abseiling").mkdir(parents=True)
    (tmp_path / "replacement").mkdir()
    for place in ("train/abseiling/-ab_000003_000013", "train/cd__000100_000110", "replacement/ef_000000_000010"):
        write_video(tmp_path / f"{place}.mp4", video_of(0, length=40), 10)
    data = Data(
        kind="kinetics", root=tmp_path, num_classes=2, num_frames=4, image_size=SIZE, sampling="dense", stride=2
    )
    assert class_names(data) == ["abseiling", "zumba"]
    assert [entry.label for entry in read_entries(data, "train")] == [0, 1, 0]
    assert Clips(data, "train", train=True)[(0, 1)][0]["video"].shape == (3, 4, SIZE, SIZE)
    with pytest.raises(FileNotFoundError, match="2 of 3 videos"):
        read_entries(data, "validation")
    header, rows = "label,youtube_id,time_start,time_end,split\n", "abseiling,a,0,10,train\nzumba,b,soon,10,train\n"
    (tmp_path / "train.csv").write_text(header + rows)
    with pytest.raises(ValueError, match="train.csv: row 2: the times are not whole seconds"):
        read_entries(data, "train")
    (tmp_path / "train.csv").write_text("label,id\nx,y\n")
    with pytest.raises(ValueError, match="columns time_end, time_start, youtube_id are missing"):
        class_names(data)


def test_own_videos_come_from_folders_or_lists(tmp_path):
    for split in ("train", "val"):
        for label in ("jump", "run"):
            (tmp_path / split / label).mkdir(parents=True)
            write_video(tmp_path / split / label / "1.mp4", video_of(0), 10)
        lines = [f"{split}/jump/1.mp4,1", f"{split}/run/1.mp4,0"]
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    folder = Data(kind="folder", root=tmp_path, num_classes=2, num_frames=4, image_size=SIZE)
    assert class_names(folder) == ["jump", "run"]
    assert [(e.name, e.label) for e in read_entries(folder, "train")] == [("jump/1.mp4", 0), ("run/1.mp4", 1)]
    listed = replace(folder, kind="csv")
    assert [(e.name, e.label) for e in read_entries(listed, "validation")] == [
        ("val/jump/1.mp4", 1),
        ("val/run/1.mp4", 0),
    ]
    assert next(iter(build_loaders(config(listed), data_file).val))["label"].tolist() == [1, 0]


def test_the_cache_changes_no_sample_keeps_its_limit_and_sees_a_changed_file(data, monkeypatch):
    one_video = LENGTH * SIZE * 48 * 3
    plain, cached = (
        Clips(replace(data, **RANDOM, cache_gib=gib), "train", train=True) for gib in (0, 2.5 * one_video / 2**30)
    )
    for _ in range(2):
        for index in range(7):
            assert torch.equal(plain[(index, 3)][0]["video"], cached[(index, 3)][0]["video"])
    assert len(cached.cache.videos) == 2
    (path, _, _), (_, frames) = next(iter(cached.cache.videos.items()))
    before = frames.copy()
    index = [entry.path for entry in cached.entries].index(path)
    write_video(Path(path), 255 - video_of(1), 10)
    assert torch.equal(plain[(index, 3)][0]["video"], cached[(index, 3)][0]["video"])
    assert np.array_equal(before, frames)  # augmentation works on copies
