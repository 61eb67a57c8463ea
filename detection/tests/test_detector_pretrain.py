"""Pretraining of the small detector: a few steps, a kill and what goes on from it, the file that the rows load."""

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from detection import pretrain
from detection.configs import ROWS
from detection.model import build_model
from detection.objects import CLASSES
from detection.pretrain import Key, Phase, pretraining_config, share_of_rate, to_batch
from detection.scenes import compose, compose_forest

# A picture of 64 px has fewer tokens than queries: so few steps are quick.
PHASES = (Phase(0.5, 64, 2), Phase(1.0, 96, 1))


def start(monkeypatch: pytest.MonkeyPatch, output: Path, *words: str) -> None:
    monkeypatch.setattr(pretrain, "PHASES", PHASES)
    shared = ["--validation", "2", "--workers", "0", "--precision", "fp32", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["pretrain", *shared, *words])
    pretrain.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "small.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        start(patch, output, "--steps", "4")
    return output


def test_a_batch_is_what_the_data_gives():
    scenes = [compose(k, (64, 96)) for k in range(2)]
    config = pretraining_config()
    batch = to_batch(scenes, ["a", "b"], config.data)
    assert batch["image"].shape == (2, 3, 64, 96) and not batch["padding"].any()
    assert batch["num_targets"] == sum(len(scene.labels) for scene in scenes)
    for scene, target, image in zip(scenes, batch["targets"], batch["image"], strict=True):
        boxes = target["boxes"].numpy() * np.tile([96, 64], 2)
        corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
        np.testing.assert_allclose(corners, scene.boxes, atol=1e-4)  # float32 of up to 96 pixels
        pixels = image * torch.tensor(config.data.std)[:, None, None] + torch.tensor(config.data.mean)[:, None, None]
        np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy() * 255, scene.image, atol=1e-3)
    empty = to_batch([compose(0, (64, 64), count=(0, 0))], ["c"], config.data)
    assert empty["targets"][0]["boxes"].shape == (0, 4) and empty["num_targets"] == 0


def test_batches_are_functions_of_their_keys():
    batches = pretrain.Batches(pretraining_config(), [], one_class=False)
    first, again = batches[Key(5, 64, 2)], batches[Key(5, 64, 2)]
    assert torch.equal(first["image"], again["image"])
    assert not torch.equal(first["image"], batches[Key(6, 64, 2)]["image"])


def test_the_file_holds_every_weight_of_the_whole_detector_trained(trained, capsys):
    weights = load_file(trained)
    assert trained.stat().st_size < pretrain.MAX_MB * 1e6
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
    torch.manual_seed(0)
    model = build_model(pretraining_config(), pretrained=False)
    assert weights.keys() == model.state_dict().keys()
    still = [name for name, value in model.named_parameters() if torch.equal(weights[name], value.detach().half())]
    assert not [name for name in still if "bias" not in name], still
    assert weights["head.class_embed.0.weight"].shape[0] == len(CLASSES)
    assert not trained.with_suffix(".checkpoint").exists()


def test_with_one_class_most_scenes_are_forests_and_a_row_keeps_the_class_layers(trained, tmp_path, monkeypatch):
    output = tmp_path / "small.safetensors"
    start(monkeypatch, output, "--steps", "1", "--one-class", "--start", str(trained))
    config = pretraining_config(one_class=True)
    batches = pretrain.Batches(config, [], one_class=True)
    batch = batches[Key(0, 64, 2)]
    forest = compose_forest([0, 0, 1], (64, 64))
    assert np.array_equal(batch["image"][1], to_batch([forest], ["a"], config.data)["image"][0])
    assert not torch.cat([target["labels"] for target in batch["targets"]]).any()
    row = ROWS["trees_small_conventional"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build_model(replace(row, model=replace(row.model, weights=str(output))))
    weights = load_file(output)
    assert torch.equal(model.head.class_embed[0].weight, weights["head.class_embed.0.weight"].float())


def test_a_killed_pretraining_goes_on_to_the_same_weights(trained, tmp_path, monkeypatch, capsys):
    output = tmp_path / "small.safetensors"
    make_step = pretrain.Training._make_step

    def killed(self: pretrain.Training, batch: dict) -> float:
        if self.step == 3:
            raise KeyboardInterrupt
        return make_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Training, "_make_step", killed)
        with pytest.raises(KeyboardInterrupt):
            start(patch, output, "--steps", "4", "--save-minutes", "0")
    assert not output.exists()
    with pytest.raises(ValueError, match="is of --steps 4, not 5; give the same, or delete it"):
        start(monkeypatch, output, "--steps", "5")
    capsys.readouterr()
    start(monkeypatch, output, "--steps", "4", "--log-every", "1")
    out = capsys.readouterr().out
    assert "going on from step 3" in out and "step 4  96 px  loss" in out and "2 scenes never seen: AP " in out
    whole, resumed = load_file(trained), load_file(output)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_with_minutes_the_time_of_all_starts_counts(tmp_path, monkeypatch, capsys):
    output = tmp_path / "small.safetensors"
    start(monkeypatch, output, "--minutes", "0.0001")
    assert f"{output}: 1 steps" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_it(tmp_path, monkeypatch):
    from detection.model import Detector

    monkeypatch.setattr(Detector, "losses", lambda self, outputs, batch: {"class": torch.tensor(float("nan"))})
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        start(monkeypatch, tmp_path / "small.safetensors", "--steps", "2")


def test_the_rate_rises_and_falls_to_zero():
    rates = [share_of_rate(k / 200) for k in range(201)]
    assert rates[0] == 0 and max(rates) == pytest.approx(1, abs=0.01) and rates[200] == pytest.approx(0, abs=1e-9)
    peak = int(np.argmax(rates))
    assert all(np.diff(rates[: peak + 1]) > 0) and all(np.diff(rates[peak:]) < 0)


def test_photographs_are_read_from_a_folder_and_a_folder_without_any_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .jpg or .png"):
        pretrain.read_photographs(tmp_path)
    Image.new("L", (30, 20), 7).save(tmp_path / "a.png")
    (photograph,) = pretrain.read_photographs(tmp_path)
    assert photograph.shape == (20, 30, 3) and photograph.max() == 7
