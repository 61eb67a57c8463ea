"""Weights of strangers: other kinds of numbers, values that do not survive the model's type, names that ask a hub."""

import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toy_task.configs import toy_vit
from toy_task.model import Toy

from engine.backbones.video_swin import build_video_swin
from engine.backbones.video_vit import build_image_vit
from engine.training import checkpoint
from engine.training.ema import EMA
from engine.training.optimization import build_optimizer, restore_optimizer
from engine.training.state import full_tensors
from engine.weights import load_tensors, load_weights, read_state_dict


class Counting(nn.Module):
    """One tensor of each kind that models hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int32))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))


@pytest.fixture
def no_network(monkeypatch):
    """Fail with what no code here expects as soon as a connection or a name is asked for."""

    def refuse(*arguments, **options):
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def state_of(model: nn.Module, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()} | changes


@pytest.mark.parametrize(
    "dtype",
    [torch.complex64, torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_numbers_of_another_kind_are_no_weights(tmp_path, dtype):
    bias = torch.ones(3).to(dtype)
    before = torch.full((3,), 7.0)
    for suffix in (".safetensors", ".pth"):
        model, path = Toy(), tmp_path / f"file{suffix}"
        nn.init.constant_(model.head.bias, 7.0)
        state = state_of(model, **{"head.bias": bias})
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        kind = str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=rf"file\{suffix}.*head.bias \({kind} for float32\)"):
            load_tensors(model, read_state_dict(path), str(path))
        assert torch.equal(model.head.bias, before)


def test_tensors_without_plain_storage_are_no_weights():
    dense = torch.ones(3, 8)
    for other in (dense.to_sparse(), dense.to("meta")):
        with pytest.raises(ValueError, match="another kind of numbers in head.weight"):
            load_tensors(Toy(), state_of(Toy(), **{"head.weight": other}), "state")


@pytest.mark.parametrize("value", [1e300, -1e39, float("nan")])
def test_a_value_that_is_infinite_in_the_type_of_the_model_is_named(tmp_path, value):
    state = state_of(Toy(), **{"head.bias": torch.tensor([0.0, value, 0.0], dtype=torch.float64)})
    save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="wide.safetensors: NaN or infinite values in head.bias"):
        load_weights(Toy(), tmp_path / "wide.safetensors")
    half = Toy().half()
    with pytest.raises(ValueError, match="infinite values in head.bias"):
        load_tensors(half, state_of(half, **{"head.bias": torch.full((3,), 1e5)}), "state")


def test_other_widths_of_the_same_kind_are_taken():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = Toy()
        load_tensors(model, state_of(model, **{"head.bias": torch.full((3,), 0.5, dtype=dtype)}), "state")
        assert model.head.bias.dtype == torch.float32 and model.head.bias.tolist() == [0.5] * 3
    model = Counting()
    load_tensors(model, state_of(model, count=torch.tensor(9)), "state")
    assert model.count.dtype == torch.int32 and model.count == 9


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"count": torch.tensor(2**40)}, "integers too large for the model in count"),
        ({"count": torch.tensor(1.5)}, r"count \(float32 for int32\)"),
        ({"mask": torch.ones(2)}, r"mask \(float32 for bool\)"),
    ],
)
def test_counters_and_masks_keep_their_kind(changes, message):
    with pytest.raises(ValueError, match=message):
        load_tensors(Counting(), state_of(Counting(), **changes), "state")


def test_position_embeddings_are_checked_before_they_are_resampled(tmp_path):
    state = build_image_vit("vit_tiny_patch16_224", image_size=32, weights=None).state_dict()
    state["pos_embed"] = state["pos_embed"].mul(100).to(torch.int8)
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"pos_embed \(int8 for float32\)"):
        build_image_vit("vit_tiny_patch16_224", image_size=64, weights=str(tmp_path / "vit.safetensors"))


def test_a_video_swin_file_beyond_float32_is_refused(tmp_path):
    state = dict(build_video_swin("small", weights=None).state_dict())
    state["norm.bias"] = torch.full(state["norm.bias"].shape, 1e300, dtype=torch.float64)
    torch.save(state, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match="infinite values in norm.bias"):
        build_video_swin("small", weights=str(tmp_path / "swin.pth"))


def test_a_header_of_any_length_is_not_mistaken_for_a_pickle(tmp_path):
    first_bytes = set()
    for length in range(0, 256, 8):
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"note": "x" * length})
        first_bytes.add((tmp_path / "a.safetensors").read_bytes()[0])
        assert read_state_dict(tmp_path / "a.safetensors").keys() == {"a"}
    assert 0x80 in first_bytes


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model, toy_vit("conventional").optimization)
    model.head(torch.ones(1, 4, 8)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head.bias/exp_avg": torch.full((3,), torch.nan)}, "optimizer: NaN or infinite values in head.bias/exp_avg"),
        (
            {"head.bias/exp_avg_sq": torch.full((3,), 1e300, dtype=torch.float64)},
            "infinite values in .*exp_avg_sq",
        ),
        ({"head.bias/step": torch.tensor(torch.inf)}, "infinite values in head.bias/step"),
        ({"head.bias/exp_avg": torch.ones(3, dtype=torch.int8)}, r"exp_avg \(int8 for float32\)"),
        ({"head.bias/exp_avg": torch.ones(4)}, r"exp_avg \[4\] instead of \[3\]"),
        ({"head.bias/exp_avg": None}, "1 missing: head.bias/exp_avg"),
        ({"head.bias/momentum": torch.ones(3)}, "1 unused: head.bias/momentum"),
        ({"nobody/exp_avg": torch.ones(3)}, "1 unused: nobody/exp_avg"),
        ({"nobody": torch.ones(3)}, "1 unused: nobody"),
    ],
)
def test_the_state_of_the_optimizer_is_checked(change, message):
    model = Toy()
    tensors = full_tensors(model, trained(model))["optimizer"] | change
    tensors = {key: value for key, value in tensors.items() if value is not None}
    other = Toy()
    optimizer = build_optimizer(other, toy_vit("conventional").optimization)
    with pytest.raises(ValueError, match=message):
        restore_optimizer(other, optimizer, tensors, "checkpoint")
    assert not optimizer.state


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head.bias": torch.full((3,), torch.inf)}, "averages: NaN or infinite values in head.bias"),
        ({"head.bias": torch.ones(3, dtype=torch.bool)}, r"averages: .*head.bias \(bool for float32\)"),
        ({"head.bias": torch.ones(5)}, r"averages does not fit the model: .*head.bias \[5\]"),
        ({"nobody": torch.ones(5)}, "averages does not fit the model: 1 unused: nobody"),
    ],
)
def test_averages_are_checked(change, message):
    averages = EMA(Toy(), 0.9)
    with pytest.raises(ValueError, match=message):
        averages.restore({**averages.tensors, **change}, "checkpoint")


@pytest.mark.parametrize("kind, name", [("ema", "averages"), ("optimizer", "optimizer"), ("model", "weights")])
def test_nothing_that_is_not_finite_is_saved(tmp_path, kind, name):
    checkpoint.save(tmp_path, {"model": Toy().state_dict()}, {"step": 1})
    bad = {"model": Toy().state_dict(), kind: {"head.bias": torch.full((3,), torch.nan)}}
    with pytest.raises(ValueError, match=f"the {name} to be saved .*NaN or infinite values in head.bias"):
        checkpoint.save(tmp_path, bad, {"step": 2})
    assert checkpoint.load(tmp_path).state["step"] == 1


@pytest.mark.parametrize("name", ["hf-hub:somebody/model", "hf_hub:somebody/model", "local-dir:/tmp", "no_such_vit"])
def test_a_name_that_would_be_looked_up_elsewhere_is_no_model(no_network, name):
    with pytest.raises(ValueError, match=f"timm has no image model '{name}'"):
        build_image_vit(name, image_size=32, weights=None)


def test_a_videomae_folder_that_is_not_there_is_not_looked_for_on_the_hub(no_network):
    from engine.backbones.videomae import build_videomae

    with pytest.raises(ValueError, match="no folder 'somebody/videomae'"):
        build_videomae("videomae-base", weights="somebody/videomae", num_frames=16, image_size=32)


def test_quantized_videomae_weights_are_refused(tmp_path: Path):
    from transformers import VideoMAEConfig, VideoMAEModel

    from engine.backbones.videomae import build_videomae

    small = VideoMAEConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, use_mean_pooling=True
    )
    VideoMAEModel(small).save_pretrained(tmp_path)
    build_videomae("videomae", weights=str(tmp_path), num_frames=2, image_size=32)
    state = read_state_dict(tmp_path / "model.safetensors")
    key = "embeddings.patch_embeddings.projection.weight"
    save_file({**state, key: state[key].to(torch.int8)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors.*projection.weight \(int8 for float32\)"):
        build_videomae("videomae", weights=str(tmp_path), num_frames=2, image_size=32)
