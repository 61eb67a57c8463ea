"""From a checkpoint and a video file to JSON, a timeline and an annotated copy; and what can be wrong with either."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from action_detection import model as model_file
from action_detection import predict as module
from action_detection.configs import ROWS, Config
from action_detection.data import build_dataset, collate, read_annotations
from action_detection.evaluate import collect, detections
from action_detection.model import ActionDetector, build_model
from action_detection.predict import (
    Action,
    Arguments,
    annotate,
    annotated_actions,
    colors_of,
    detect,
    draw_captions,
    draw_overview,
    draw_timeline,
    predict,
)
from action_detection.synthetic import ANNOTATIONS, Synthetic, write_dataset
from engine import commands
from engine.data import video
from engine.data.video import BrokenVideo, probe, read_frames, write_frames, write_video
from engine.settings import to_json
from engine.training import checkpoint
from engine.training.finetuning import coefficients


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Config, ActionDetector, Path]:
    """A synthetic data set and an untrained small network: (config, model, a test video)."""
    root = tmp_path_factory.mktemp("world")
    synthetic = Synthetic(num_training=1, num_validation=1, size=32, seconds=(20.0, 20.0), fps=8.0)
    write_dataset(root, synthetic, workers=1)
    base = ROWS["untrimmed_tiny_dr2net"]()
    base = replace(base, model=replace(base.model, weights=None))
    data = replace(base.data, root=root, num_times=16, frames_per_time=2, image_size=32, fps=4.0, num_videos=None)
    # An untrained network is sure of nothing.
    config = replace(base, data=data, detection=replace(base.detection, min_score=0.0, max_detections=20))
    torch.manual_seed(0)
    name = next(name for name, video in read_annotations(data).videos.items() if video.subset == "validation")
    return config, build_model(config).eval(), root / "videos" / f"v_{name}.mp4"


def asked(video: Path, output: Path, **more: float) -> Arguments:
    return Arguments(run=Path(), input=video, output=output, **more)


def test_a_checkpoint_and_a_video_give_json_a_timeline_and_a_video_of_the_same_length(
    world, tmp_path, capsys, monkeypatch
):
    config, model, clip = world
    alpha, beta = coefficients(config.finetuning, 1.0)
    state = {"alpha": alpha, "beta": beta, "row": config.row, "config": to_json(config)}
    checkpoint.save(tmp_path / "run" / "checkpoint", {"model": model.state_dict()}, state)
    file = config.data.root / ANNOTATIONS
    words = ["--annotations", str(file), "--min-score", "0", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["predict", str(tmp_path / "run"), str(clip), *words])
    with pytest.raises(SystemExit) as stop:
        commands.predict(Config, model_file, predict, Arguments)
    assert not stop.value.code
    first, *_, table, timeline, annotated = capsys.readouterr().out.splitlines()
    assert first == "20 detections, 20 with a score of at least 0.0"
    entries = json.loads(Path(table).read_text())["results"][clip.stem.removeprefix("v_")]
    assert len(entries) == 20
    assert entries[0]["label"] in read_annotations(config.data).class_names
    assert entries == sorted(entries, key=lambda entry: -entry["score"])
    assert Path(timeline).read_bytes().startswith(b"\x89PNG")
    assert probe(annotated).num_frames == probe(clip).num_frames


def test_detections_are_those_of_the_evaluation(world):
    config, model, clip = world
    samples = build_dataset(config, "test")
    with torch.no_grad():
        windows = [w for i in range(len(samples)) for w in collect(model, collate([samples[i, 0]]), config)]
    expected = detections(windows, config.detection)
    found = detect(config, model, clip)
    wanted = expected[clip.stem.removeprefix("v_")]
    assert torch.equal(found.labels, wanted.labels)
    # Batches of another size may round differently in float32.
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.segments, wanted.segments, atol=1e-3, rtol=1e-4)


def test_no_more_than_a_window_is_decoded_at_once_even_where_training_keeps_videos(world, monkeypatch):
    config, model, path = world
    config, sizes = replace(config, data=replace(config.data, cache_gib=1.0)), []

    def counted(file: Path, indices: np.ndarray) -> np.ndarray:
        sizes.append(len(indices))
        return read_frames(file, indices)

    monkeypatch.setattr(video, "read_frames", counted)
    detect(config, model, path)
    assert sizes and max(sizes) <= config.data.num_frames


def test_a_class_agnostic_network_finds_actions(world, tmp_path):
    config, _, clip = world
    config = replace(config, model=replace(config.model, class_agnostic=True))
    table, _, _ = predict(config, build_model(config).eval(), asked(clip, tmp_path))
    assert {entry["label"] for entry in json.loads(table.read_text())["results"][clip.stem[2:]]} == {"action"}


def test_the_input_is_never_overwritten(world, tmp_path):
    config, model, clip = world
    copy = tmp_path / "clip.mp4"
    copy.write_bytes(clip.read_bytes())
    _, _, annotated = predict(config, model, asked(copy, tmp_path))
    assert annotated != copy
    assert copy.read_bytes() == clip.read_bytes()


def test_a_one_second_video_is_padded(world, tmp_path):
    config, model, clip = world
    write_video(tmp_path / "short.mp4", read_frames(clip, range(8)), 8.0)
    table, _, annotated = predict(config, model, asked(tmp_path / "short.mp4", tmp_path / "out", min_score=0.0))
    entries = json.loads(table.read_text())["results"]["short"]
    assert all(0 <= entry["segment"][0] <= entry["segment"][1] <= 1.001 for entry in entries)
    assert probe(annotated).num_frames == 8


def test_missing_and_truncated_videos_are_named(world, tmp_path):
    config, model, clip = world
    with pytest.raises(FileNotFoundError, match="absent.mp4"):
        predict(config, model, asked(tmp_path / "absent.mp4", tmp_path))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with pytest.raises(BrokenVideo, match="cut.mp4"):
        predict(config, model, asked(cut, tmp_path))


def test_annotations_without_the_video_and_scores_out_of_range_are_named(world, tmp_path):
    config, _model, clip = world
    file = config.data.root / ANNOTATIONS
    assert annotated_actions(file, clip.stem.removeprefix("v_"))
    with pytest.raises(ValueError, match="has no video 'other'"):
        annotated_actions(file, "other")
    with pytest.raises(ValueError, match="^--min-score must be at least 0 and at most 1, not 20"):
        asked(clip, tmp_path, min_score=20.0)


def test_frames_of_a_long_video_pass_in_pieces_and_each_shows_its_moment(tmp_path, monkeypatch):
    """The frames carry their index as brightness; few may be in memory at once."""
    count, sizes = 200, []
    write_frames(tmp_path / "long.mp4", (np.full((32, 32, 3), 40 + t, np.uint8) for t in range(count)), 10.0)

    def counted(path: Path, indices: np.ndarray) -> np.ndarray:
        sizes.append(len(indices))
        return read_frames(path, indices)

    monkeypatch.setattr(module, "read_frames", counted)
    monkeypatch.setattr(module, "MAX_PIECE_BYTES", 30 * 32 * 32 * 3)
    info = probe(tmp_path / "long.mp4")
    frames = annotate(tmp_path / "long.mp4", info, [Action("a", 5.0, 10.0, 0.5)], {"a": "#4e79a7"})
    seen = [(int(frame[100, 100].mean()), int(frame[-1].max()), frame[485:500, :20].max()) for frame in frames]
    assert max(sizes) <= 30 and sum(sizes) == count
    # 3: what limited range and compression cost
    assert [level for level, _, _ in seen] == pytest.approx([40 + t for t in range(count)], abs=3)
    assert [t for t, (_, _, bar) in enumerate(seen) if bar > 60] == list(range(50, 100))


def test_a_variable_frame_rate_becomes_a_constant_one(tmp_path):
    times = [0, 1, 2, 3, 13, 14, 24, 30]  # tenths of a second
    with av.open(str(tmp_path / "variable.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for t, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 + 20 * t, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    info = probe(tmp_path / "variable.mp4")
    frames = list(annotate(tmp_path / "variable.mp4", info, [], {}))
    fps = module.output_fps(info)
    assert len(frames) == round(info.seconds * fps)
    for k, frame in enumerate(frames):
        shown = sum(stamp <= k / fps + 1e-4 for stamp in info.timestamps) - 1
        assert frame[100, 100].mean() == pytest.approx(40 + 20 * shown, abs=6)


@pytest.mark.parametrize("num_classes", [0, 1, 40])
def test_pictures_take_any_number_of_classes_and_long_names(world, tmp_path, num_classes):
    _, _, clip = world
    info = probe(clip)
    names = [f"{k} Moving [something] out from behind [something] and then back again" for k in range(num_classes)]
    actions = [Action(name, 0.3 * k, 0.3 * k + 2, 1 / (k + 1)) for k, name in enumerate(names)]
    colors = colors_of(actions)
    assert list(colors) == names[: module.MAX_LANES]
    draw_timeline(tmp_path / "t.png", clip, info, actions, None, colors, title="clip $x_{1$.mp4")  # no formula
    draw_timeline(tmp_path / "t.png", clip, info, actions, actions[:1], colors, title="clip.mp4")
    shown = [action for action in actions if action.label in colors]
    for image in (draw_captions(shown, colors, 1.0, 480), draw_overview(shown, colors, info.seconds, 480)):
        assert image.width == 480 and image.height % 2 == 0


def test_a_caption_shows_the_best_action_of_each_class_while_it_lasts():
    actions = [Action("a", 1, 3, 0.9), Action("a", 0, 3, 0.5), Action("b", 2, 4, 0.4)]
    colors = {"a": "#ff0000", "b": "#00ff00"}

    def bars(moment: float) -> list[tuple]:
        pixels = np.asarray(draw_captions(actions, colors, moment, 400))
        return [tuple(pixels[24 * line + 22, 60].tolist()) for line in range(3)]

    assert bars(2.5) == [(255, 0, 0), (0, 255, 0), module.DARK]
    assert bars(3.5) == [(0, 255, 0), module.DARK, module.DARK]
    assert bars(4.0) == [module.DARK] * 3
