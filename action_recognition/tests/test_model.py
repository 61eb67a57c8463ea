"""The network, its loss, and the preset's claims about size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from action_recognition.configs import ROWS, Config, Model
from action_recognition.head import MeanHead, classification_loss
from action_recognition.model import build_model, example_batch
from engine.config import METHODS, Finetuning
from engine.records.record import publish
from engine.training.finetuning import apply_method
from engine.training.plan import plan_row, publish_plan


def tiny(**changes) -> Config:
    config = ROWS["motion_tiny_dr2net"]()
    data = replace(config.data, num_frames=4, image_size=32)
    return replace(config, **{"data": data, "model": replace(config.model, weights=None)} | changes)


def test_the_tiny_network_has_one_to_two_million_parameters():
    count = sum(p.numel() for p in build_model(ROWS["motion_tiny_dr2net"](), pretrained=False).parameters())
    assert 1e6 < count < 2e6


@pytest.mark.parametrize("architecture", ["video_vit", "videomae"])
def test_logits_have_the_classes_and_every_parameter_trains(architecture):
    config = tiny(label_smoothing=0.1)
    if architecture == "videomae":
        config = replace(config, model=Model(architecture=architecture, name="any-small", weights=None, depth=1))
    model = build_model(config)
    batch = {**example_batch(config), "video": torch.randn(2, 3, 4, 32, 32), "label": torch.tensor([0, 9])}
    outputs = model(batch)
    assert outputs["logits"].shape == (2, 10)
    sum(model.losses(outputs, batch).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_applies_and_keeps_parameter_names(method):
    config = tiny()
    options = replace(config.finetuning.options, chunk_mib=0.5 if method == "checkpointed_chunks" else None)
    config = replace(config, finetuning=Finetuning(method=method, options=options))
    model = build_model(config)
    names = [name for name, _ in model.named_parameters()]
    apply_method(model, config.finetuning)
    assert [name for name, _ in model.named_parameters()] == names
    model({"video": torch.randn(2, 3, 4, 32, 32)})["logits"].sum().backward()
    assert all((p.grad is None) == (method == "frozen") for p in model.backbone.blocks.parameters())


def test_layers_reach_from_zero_to_the_head():
    model = build_model(tiny())
    layers = {model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers == set(range(model.num_layers + 1))
    assert model.layer_of("head.linear.weight") == model.num_layers


def test_the_loss_of_hard_labels_is_that_of_their_one_hot_targets_and_is_smoothed_once():
    logits, label = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    hard = classification_loss(logits, {"label": label}, 0.1)
    target = torch.nn.functional.one_hot(label, 4).float()
    soft = classification_loss(logits, {"label": label, "target": target}, 0.1)
    torch.testing.assert_close(hard, soft)
    torch.testing.assert_close(hard, torch.nn.functional.cross_entropy(logits, label, label_smoothing=0.1))


def test_the_loss_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        logits = MeanHead(8, 4)(torch.randn(2, 3, 8))
        assert logits.dtype == torch.bfloat16
        assert classification_loss(logits, {"label": torch.tensor([0, 1])}, 0.0).dtype == torch.float32


def test_weights_of_another_model_and_missing_files_are_named(tmp_path):
    save_file({"blocks.0.norm1.weight": torch.ones(7)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        build_model(tiny(model=Model(weights=str(tmp_path / "other.safetensors"))))
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        build_model(tiny(model=Model(weights=str(tmp_path / "absent.safetensors"))))


def test_a_planned_row_is_not_run_and_never_replaces_a_real_one(tmp_path):
    config = tiny(model=Model(weights=None, depth=None))
    record = plan_row(config, build_model(config), lambda: example_batch(config))
    assert (record.status, record.metrics, record.memory["source"]) == ("not run", {}, "predicted")
    assert record.memory["peak"] > record.memory["parameters"] > 1e6
    path = publish_plan(record, tmp_path)
    assert publish_plan(record, tmp_path) == path
    publish([replace(record, status="tiny")], tmp_path)
    with pytest.raises(ValueError, match="real runs"):
        publish_plan(record, tmp_path)


def test_the_committed_weights_fit_the_tiny_row_and_are_small(monkeypatch):
    root = Path(__file__).resolve().parents[2]
    config = ROWS["motion_tiny_dr2net"]()
    monkeypatch.chdir(root)
    assert (root / config.model.weights).stat().st_size < 5e6
    build_model(config)
