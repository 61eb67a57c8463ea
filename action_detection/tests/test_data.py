"""Windows of untrimmed videos: which frames, which targets, random ones from keys; and bad files and annotations."""

import itertools
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from action_detection import data as data_module
from action_detection.annotations import Video
from action_detection.configs import Data
from action_detection.data import (
    Windows,
    build_dataset,
    collate,
    find_files,
    random_start,
    read_annotations,
    visible_instances,
    window_starts,
    windows_of_file,
)
from action_detection.tests.toy_videos import DATABASE, FPS, SIZE, annotate, entry, frames_of, make_data
from engine.config import Run
from engine.data.loader import Loaders
from engine.data.video import BrokenVideo, write_video
from engine.training import fit


def seconds_seen(video: torch.Tensor) -> torch.Tensor:
    """Which time the frames of an unnormalized window show, (T,), for videos of `frames_of` up to 6 s."""
    return ((video[0, :, :, : SIZE // 2 - 2].mean((1, 2)) * 255 - 20) / 3) / FPS


@pytest.fixture
def data(tmp_path) -> Data:
    return make_data(tmp_path)


RANDOM = {"crop_scale": (0.3, 1.0), "flip": True, "color_jitter": 0.3}


def config(data: Data, **run) -> SimpleNamespace:
    return SimpleNamespace(data=data, run=Run(**{"micro_batch": 2, "num_workers": 0} | run))


def loaders_of(data: Data, **run) -> Loaders:
    return fit.build_loaders(config(data, **run), data_module)


def windows_of(data: Data) -> Windows:
    return build_dataset(config(data), "test")


def test_batches_have_the_promised_shapes_and_names(data):
    loaders = loaders_of(data)
    (batch,) = loaders.train  # three videos, two a batch, the rest dropped
    assert batch["video"].shape == (2, 3, 16, SIZE, SIZE) and batch["video"].dtype == torch.float32
    assert batch["mask"].shape == (2, 8) and batch["mask"].dtype == torch.bool
    assert [s.shape[1] for s in batch["segments"]] == [2, 2] and batch["segments"][0].dtype == torch.float32
    assert all(len(s) == len(k) for s, k in zip(batch["segments"], batch["labels"], strict=True))
    assert batch["labels"][0].dtype == batch["window"].dtype == torch.long
    assert batch["start"].dtype == batch["seconds_per_time"].dtype == batch["duration"].dtype == torch.float32
    torch.testing.assert_close(batch["seconds_per_time"], torch.full((2,), 0.4))
    tested = [pair for b in loaders.val for pair in zip(b["name"], b["window"].tolist(), strict=True)]
    assert tested == [("d", 0), ("d", 1), ("e", 0)]


def test_a_sample_is_a_function_of_its_key_alone(data):
    dataset = loaders_of(replace(data, **RANDOM)).train.dataset
    first = collate([dataset[0, 7]])
    np.random.default_rng(3).random()
    torch.rand(3)
    again, other = collate([dataset[0, 7]]), collate([dataset[0, 8]])
    assert torch.equal(first["video"], again["video"]) and torch.equal(first["start"], again["start"])
    assert not torch.equal(first["video"], other["video"]) and not torch.equal(first["start"], other["start"])


def test_workers_and_micro_batch_do_not_change_what_is_trained_on(data):
    data = replace(data, **RANDOM)
    one = list(loaders_of(data, micro_batch=3, num_workers=1).train)
    other = list(loaders_of(data, micro_batch=1).train)
    assert torch.equal(torch.cat([b["video"] for b in one]), torch.cat([b["video"] for b in other]))


def test_windows_overlap_reach_the_end_and_cover_everything(data):
    assert window_starts(data, 3.2) == window_starts(data, 1.0) == [0.0]
    assert window_starts(data, 5.0) == pytest.approx([0.0, 1.8])
    for duration in (3.3, 5.6, 5.7, 40.0):  # 5.6 = one window and one stride exactly
        starts = window_starts(data, duration)
        assert (
            starts[-1] == pytest.approx(duration - 3.2)
            and len(starts) == int(np.ceil((duration - 3.2) / 2.4 - 1e-9)) + 1
        )
        assert all(0 < b - a <= 2.4 + 1e-9 for a, b in itertools.pairwise(starts))
    with pytest.raises(ValueError, match="--data.overlap must be at least 0 and below 1, not 1.0"):
        window_starts(replace(data, overlap=1.0), 5.0)


@pytest.mark.parametrize("windows", ["sliding", "whole"])
def test_a_frame_is_the_one_on_screen_in_the_middle_of_its_share_of_a_step(windows, data):
    data = replace(data, windows=windows)
    for sample in (windows_of(data)[i, 0] for i in range(2)):  # video d: two windows, or itself and e
        step = sample["seconds_per_time"]
        centers = sample["start"] + (torch.arange(16) + 0.5) * step / 2
        real = centers < sample["duration"]
        shown = torch.floor(centers[real] * FPS + 1e-3) / FPS
        # The codec may be off by 1.5 of the 3 gray values that a frame makes.
        torch.testing.assert_close(seconds_seen(sample["video"][:, real]), shown.float(), atol=0.5 / FPS, rtol=0)


def test_whole_videos_have_one_window_of_their_own_length(data):
    dataset = windows_of(replace(data, windows="whole"))
    samples = [dataset[i, 0] for i in range(len(dataset))]
    assert [(s["name"], s["window"], s["start"]) for s in samples] == [("d", 0, 0.0), ("e", 0, 0.0)]
    assert [s["seconds_per_time"] for s in samples] == pytest.approx([5 / 8, 1 / 8])
    assert all(s["mask"].all() for s in samples)
    torch.testing.assert_close(samples[0]["segments"], torch.tensor([[3.2, 7.2]]))


def test_steps_and_seconds_convert_back_and_forth(data):
    dataset = loaders_of(data).train.dataset
    for seed in range(20):
        sample = dataset[0, seed]
        seconds = sample["start"] + sample["segments"].double() * sample["seconds_per_time"]
        for (start, end), label in zip(seconds.tolist(), sample["labels"].tolist(), strict=True):
            true = [(1.0, 2.5), (4.0, 5.0)][label]  # jump, run
            end_of_window = sample["start"] + 3.2
            # float32 steps
            assert start == pytest.approx(max(true[0], sample["start"]), abs=1e-5)
            assert end == pytest.approx(min(true[1], end_of_window), abs=1e-5)


def test_a_variable_frame_rate_changes_nothing(data):
    # The same film, every second frame of its first half left out and shown twice as long.
    film = frames_of(5.0)
    kept = [*range(0, 24, 2), *range(24, 50)]
    path = Path(data.root) / "videos" / "v_d.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "5", "bf": "2"})
        stream.height = stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        for i in kept:
            frame = av.VideoFrame.from_ndarray(film[i], format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for i in range(2):
        sample = windows_of(data)[i, 0]
        centers = sample["start"] + (np.arange(16) + 0.5) / 5
        shown = np.array([kept[np.searchsorted(kept, c * FPS + 1e-3, side="right") - 1] / FPS for c in centers])
        np.testing.assert_allclose(seconds_seen(sample["video"]), shown, atol=0.5 / FPS)  # see above: the codec
        torch.testing.assert_close(sample["seconds_per_time"], 0.4)


def test_a_one_second_video_is_padded_and_masked(data):
    sample = windows_of(data)[2, 0]
    assert sample["name"] == "e" and sample["mask"].tolist() == [True] * 3 + [False] * 5  # 5 frames in steps of 2
    assert (sample["video"][:, :5].amin((0, 2, 3)) > 0.05).all() and (sample["video"][:, 5:] == 0).all()
    torch.testing.assert_close(sample["segments"], torch.tensor([[0.5, 1.75]]))
    trained = Windows(data, {"e": read_annotations(data).videos["e"]}, windows_of(data).paths, train=True)[0, 5]
    assert trained["start"] == 0 and torch.equal(trained["mask"], sample["mask"])


def test_a_two_hour_video_is_read_window_by_window(data, monkeypatch):
    path, seconds = Path(data.root) / "videos" / "v_d.mp4", 7200
    write_video(path, np.broadcast_to(np.uint8(90), (seconds * 2, SIZE, SIZE, 3)), 2)  # 44 MB decoded
    annotate(data.root, DATABASE | {"d": entry(seconds, "validation", ("jump", 7000.0, 7001.0))})
    # A cache that could not hold it is not filled with it.
    dataset = windows_of(replace(data, cache_gib=0.02))
    assert len(dataset) == len(window_starts(data, seconds)) + 1 == 3001
    asked, read_frames = [], data_module.FrameCache.read_frames

    def watched(cache, path, indices):
        asked.append(len(indices))
        return read_frames(cache, path, indices)

    monkeypatch.setattr(data_module.FrameCache, "read_frames", watched)
    tracemalloc.start()
    samples = [dataset[i, 0] for i in (0, 1500, 2999)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert asked == [16] * 3 and samples[2]["start"] == pytest.approx(seconds - 3.2)
    assert peak < 20e6  # most of it the 14,400 times of the packets
    assert abs(float(samples[1]["video"].mean()) - 90 / 255) < 0.02


def test_training_windows_hold_enough_of_an_instance_and_differ(data):
    videos = read_annotations(data).videos
    starts = []
    for seed in range(60):
        start = random_start(data, videos["a"], np.random.default_rng(seed))
        assert 0 <= start <= 2.8 + 1e-9
        assert len(visible_instances(videos["a"], start, 3.2, data.min_overlap)[1]) == 1  # 3.2 s are too few for both
        starts.append(start)
    assert np.std(starts) > 0.4


def test_an_instance_mostly_outside_is_no_target_and_one_longer_than_the_window_forces_nothing(data):
    video = Video(20.0, "training", torch.tensor([[2.0, 4.0], [5.0, 19.0]], dtype=torch.float64), torch.tensor([1, 0]))
    segments, labels = visible_instances(video, 2.4, 3.2, 0.75)
    assert labels.tolist() == [1] and segments.tolist() == [[2.4, 4.0]]
    assert visible_instances(video, 2.6, 3.2, 0.75)[1].tolist() == []
    assert visible_instances(video, 2.6, 3.2, 0.0)[1].tolist() == [1, 0]
    # Only the short one can be shown enough of, so all windows are around it.
    starts = [random_start(data, video, np.random.default_rng(seed)) for seed in range(40)]
    assert max(starts) <= 2.5 and min(starts) >= 0.3
    long = Video(20.0, "training", torch.tensor([[5.0, 19.0]], dtype=torch.float64), torch.tensor([0]))
    starts = [random_start(data, long, np.random.default_rng(seed)) for seed in range(40)]
    assert min(starts) < 3 and max(starts) > 14


def test_a_repeated_annotation_stays_in_the_ground_truth_and_is_one_target(data):
    annotate(data.root, DATABASE | {"d": entry(5.0, "validation", *[("jump", 2.0, 4.5)] * 2, ("run", 2.0, 4.5))})
    assert len(read_annotations(data).videos["d"].labels) == 3
    assert windows_of(data)[1, 0]["labels"].tolist() == [0, 1]


def test_one_crop_for_the_window_however_few_frames_are_decoded_at_once(data, monkeypatch):
    dataset = loaders_of(replace(data, **RANDOM)).train.dataset
    whole = dataset[0, 3]["video"]
    monkeypatch.setattr(data_module, "MAX_CHUNK_BYTES", 5 * SIZE * SIZE * 3)
    assert torch.equal(dataset[0, 3]["video"], whole)


def test_augmentation_is_the_same_in_all_frames_and_only_in_training(data):
    still = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    write_video(Path(data.root) / "videos" / "v_a.mp4", np.broadcast_to(still, (60, SIZE, SIZE, 3)), FPS, crf=5)
    dataset = loaders_of(replace(data, **RANDOM)).train.dataset
    clips = torch.stack([dataset[0, seed]["video"] for seed in range(12)])
    assert (clips[:, :, 1:] - clips[:, :, :1]).abs().max() < 0.1  # the codec's changes; other crops differ by more
    assert min((clips[0] - clips[k]).abs().mean() for k in range(1, 12)) > 0.02
    tested = replace(data, test_subset="training", train_subset="validation")
    assert torch.equal(windows_of(tested)[0, 0]["video"], windows_of(replace(tested, **RANDOM))[0, 0]["video"])


def test_half_of_the_windows_are_mirrored_if_asked(data):
    plain = loaders_of(data).train.dataset
    flipped = loaders_of(replace(data, flip=True)).train.dataset
    same = [torch.equal(plain[1, seed]["video"], flipped[1, seed]["video"]) for seed in range(30)]
    assert 6 < sum(same) < 24
    seed = same.index(False)
    assert torch.equal(plain[1, seed]["video"].flip(-1), flipped[1, seed]["video"])


def test_the_cache_changes_no_sample(data):
    kept = replace(data, cache_gib=0.01, **RANDOM)
    plain, cached = (loaders_of(d).train.dataset for d in (replace(data, **RANDOM), kept))
    for index in range(3):
        for seed in range(3):
            assert torch.equal(plain[index, seed]["video"], cached[index, seed]["video"])
    assert len(cached.cache.videos) == 3


def test_a_file_without_annotations_gives_the_windows_of_the_test(data):
    dataset = windows_of(data)
    windows = windows_of_file(data, Path(data.root) / "videos" / "v_d.mp4")
    samples = [windows[index, 0] for index in range(len(windows))]
    assert [(s["name"], s["window"]) for s in samples] == [("v_d", 0), ("v_d", 1)]
    for i, sample in enumerate(samples):
        assert torch.equal(sample["video"], dataset[i, 0]["video"]) and sample["segments"].shape == (0, 2)
        assert sample["duration"] == pytest.approx(5.0)
    assert collate(samples)["labels"][0].dtype == torch.long
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        windows_of_file(data, "nowhere.mp4")


def test_a_segment_past_the_end_of_a_shorter_file_is_no_target_outside_it(data):
    write_video(Path(data.root) / "videos" / "v_d.mp4", frames_of(3.0), FPS)
    samples = [windows_of(data)[i, 0] for i in range(2)]  # annotated are 5 s: two windows, both lie in the file
    for sample in samples:
        assert sample["start"] == 0 and sample["mask"].all() and (sample["video"][:, 15:] == 0).all()
        assert sample["duration"] == 5.0 and len(sample["labels"]) == 0  # of 2.0 to 4.5 s only 1 s is there
    seen = windows_of(replace(data, min_overlap=0.3))[0, 0]
    torch.testing.assert_close(seen["segments"], torch.tensor([[5.0, 7.5]]))


def test_a_video_without_annotation_is_tested_and_trained_on_only_if_asked(data):
    annotate(data.root, DATABASE | {"c": entry(3.0, "training"), "e": entry(1.0, "validation")})
    assert loaders_of(data).train.dataset.names == ["a", "b"]
    with_empty = loaders_of(replace(data, train_on_empty=True)).train.dataset
    assert with_empty.names == ["a", "b", "c"] and with_empty[2, 4]["segments"].shape == (0, 2)
    assert windows_of(data)[2, 0]["name"] == "e" and len(windows_of(data)[2, 0]["labels"]) == 0


def test_blocked_videos_and_a_limit_are_kept_in_annotations_and_loaders_alike(data):
    blocked = Path(data.root) / "blocked.json"
    blocked.write_text('["a", "e"]')
    data = replace(data, blocked=blocked)
    assert list(read_annotations(data).videos) == ["b", "c", "d"]
    assert list(read_annotations(replace(data, num_videos=1)).videos) == ["b", "d"]
    assert loaders_of(replace(data, num_videos=1), micro_batch=1).train.dataset.names == ["b"]
    blocked.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="blocked.json: is not a JSON list"):
        read_annotations(data)


def test_missing_files_are_counted_and_named_or_left_out(data):
    (Path(data.root) / "videos" / "v_b.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 training videos are missing: b; run .*on-broken skip"):
        loaders_of(data)
    with pytest.warns(UserWarning, match="missing: b; left out"):
        dataset = loaders_of(replace(data, on_broken="skip")).train.dataset
    assert dataset.names == ["a", "c"]
    for name in "ac":
        (Path(data.root) / "videos" / f"v_{name}.mp4").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no training videos to use"):
        loaders_of(replace(data, on_broken="skip"))


def test_a_broken_file_stops_the_run_by_name_or_is_replaced_and_reported(data):
    path = Path(data.root) / "videos" / "v_d.mp4"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(BrokenVideo, match="v_d.mp4"):
        list(loaders_of(data).val)
    with pytest.warns(UserWarning, match="v_d.mp4"):
        batches = list(loaders_of(replace(data, on_broken="skip")).val)
    assert [name for b in batches for name in b["name"]] == ["e", "e", "e"]
    assert [name for b in batches for name in b["skipped"]] == ["d", "d"]
    (Path(data.root) / "videos" / "v_e.mp4").write_bytes(b"no video")
    with pytest.warns(UserWarning), pytest.raises(BrokenVideo, match="2 videos in a row"):
        list(loaders_of(replace(data, on_broken="skip")).val)


def test_thumos_has_its_own_names_and_ambiguous_times_are_nothing(data):
    database = {
        "video_validation_0000001": entry(4.0, "training", ("run", 0.5, 1.5), ("Ambiguous", 2.0, 3.0)),
        "video_test_0000002": entry(5.0, "validation", ("jump", 2.0, 4.5)),
    }
    annotate(data.root, database, "thumos_14_anno.json")
    folder = Path(data.root) / "videos"
    (folder / "v_b.mp4").rename(folder / "video_validation_0000001.mp4")
    (folder / "v_d.mp4").rename(folder / "video_test_0000002.mp4")
    data = replace(data, kind="thumos")
    annotations = read_annotations(data)
    assert (
        annotations.class_names == ("jump", "run") and len(annotations.videos["video_validation_0000001"].labels) == 1
    )
    assert loaders_of(data, micro_batch=1).train.dataset[0, 0]["labels"].tolist() == [1]


def test_videos_are_found_as_mp4_mkv_or_webm(data):
    folder = Path(data.root) / "videos"
    (folder / "v_a.mp4").rename(folder / "v_a.mkv")
    (folder / "v_b.mp4").rename(folder / "v_b.webm")
    (folder / "v_c.mp4").rename(folder / "v_c.txt")
    paths, missing = find_files(data, ["a", "b", "c"])
    assert [Path(path).name for path in paths.values()] == ["v_a.mkv", "v_b.webm"] and missing == ["c"]
