"""From a checkpoint and a video file to pictures; and each way in which either can be unusable."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from action_recognition import model as model_file
from action_recognition.configs import ROWS, Config
from action_recognition.data import build_dataset, collate
from action_recognition.evaluate import collect, merge
from action_recognition.model import build_model
from action_recognition.predict import annotate, classify, draw_contact_sheet, predict
from action_recognition.synthetic import Synthetic, write_dataset
from engine.commands import Prediction, load_run
from engine.data.video import BrokenVideo, probe
from engine.settings import to_json
from engine.training import checkpoint
from engine.training.finetuning import apply_method, coefficients


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Config, Path, Path]:
    """A synthetic data set and a checkpoint of an untrained tiny network: (config, checkpoint folder, a video)."""
    root = tmp_path_factory.mktemp("world")
    synthetic = Synthetic(num_classes=4, num_train=4, num_validation=4, size=32, num_frames=(8, 9))
    write_dataset(root / "data", synthetic, workers=1)
    base = ROWS["motion_tiny_dr2net"]()
    data = replace(base.data, root=root / "data", num_classes=4, num_frames=4, image_size=32)
    config = replace(base, data=data)
    save(config, root / "checkpoint")
    return config, root / "checkpoint", next((root / "data").rglob("*.mp4"))


def save(config: Config, folder: Path) -> None:
    model = build_model(config, pretrained=False)
    apply_method(model, config.finetuning)
    alpha, beta = coefficients(config.finetuning, 1.0)
    state = {"alpha": alpha, "beta": beta, "row": config.row, "config": to_json(config)}
    checkpoint.save(folder, {"model": model.state_dict()}, state)


def load(folder: Path) -> tuple[Config, torch.nn.Module]:
    return load_run(folder, Config, model_file)


def asked(folder: Path, video: Path, output: Path) -> Prediction:
    return Prediction(run=folder, input=video, output=output)


def test_prediction_writes_a_sheet_and_a_video_of_the_same_length(world, tmp_path, capsys):
    config, folder, video = world
    loaded, model = load(folder)
    assert loaded.data.num_classes == 4
    sheet, annotated = predict(config, model, asked(folder, video, tmp_path))
    assert sheet.stat().st_size > 1000
    assert probe(annotated).num_frames == probe(video).num_frames
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_probabilities_are_those_of_the_evaluation(world):
    config, folder, _ = world
    _, model = load(folder)
    samples = build_dataset(config, "test")
    with torch.no_grad():
        views = [view for i in range(len(samples)) for view in collect(model, collate([samples[i, 0]]), config)]
    prediction = merge(views)[0]
    video = next(config.data.root.rglob(f"{prediction.name}.mp4"))
    # Batches of another size may round differently in float32.
    torch.testing.assert_close(classify(config, model, video), prediction.probabilities, atol=1e-5, rtol=1e-5)


def test_the_input_is_never_overwritten(world, tmp_path):
    config, folder, video = world
    _, model = load(folder)
    copy = tmp_path / "clip.mp4"
    copy.write_bytes(video.read_bytes())
    _, annotated = predict(config, model, asked(folder, copy, tmp_path))
    assert annotated != copy
    assert copy.read_bytes() == video.read_bytes()


def test_missing_and_truncated_videos_are_named(world, tmp_path):
    config, folder, video = world
    _, model = load(folder)
    with pytest.raises(FileNotFoundError, match="absent.mp4"):
        predict(config, model, asked(folder, tmp_path / "absent.mp4", tmp_path))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(BrokenVideo, match="cut.mp4"):
        predict(config, model, asked(folder, cut, tmp_path))


def test_a_checkpoint_with_another_number_of_classes_says_both_numbers(world, tmp_path):
    config, _, _ = world
    other = replace(config, data=replace(config.data, num_classes=7))
    save(other, tmp_path)
    state = tmp_path / "state.json"
    state.write_text(state.read_text().replace('"num_classes": 7', '"num_classes": 4'))
    with pytest.raises(ValueError, match="checkpoint has 7 classes, the model 4"):
        load(tmp_path)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path)


def test_a_label_file_of_another_class_count_is_named(world, tmp_path):
    config, folder, video = world
    _, model = load(folder)
    with pytest.raises(ValueError, match="4 classes"):
        predict(replace(config, data=replace(config.data, num_classes=5)), model, asked(folder, video, tmp_path))


@pytest.mark.parametrize("num_frames", [1, 8, 17])
def test_sheets_and_captions_take_any_number_of_frames_and_long_names(num_frames):
    frames = np.zeros((num_frames, 31, 45, 3), np.uint8)
    top = [("Moving [something] out from behind [something] and then back again " * 2, 1.0), ("up", 0.0)]
    sheet = draw_contact_sheet(frames, top, title="clip.mp4")
    assert sheet.width >= 640
    annotated = annotate(frames, top)
    assert annotated.shape[0] == num_frames
    assert annotated.shape[1] % 2 == annotated.shape[2] % 2 == 0
