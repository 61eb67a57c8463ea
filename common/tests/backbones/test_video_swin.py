"""Video Swin hands out torchvision's own features, its weights load completely or not at all, and it converts."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dr2net

pytest.importorskip("torchvision")

from torchvision.models.video import swin3d_t
from torchvision.models.video.swin_transformer import SwinTransformer3d

from engine.backbones.video_swin import SIZES, VideoSwin, build_video_swin

ROUNDING = 1e-5  # float32; the streams of a converted model are rounded to a grid of about 1e-7


def little(drop_path: float = 0.0) -> VideoSwin:
    torch.manual_seed(0)
    network = SwinTransformer3d([2, 4, 4], 12, [2, 2], [2, 2], [2, 3, 3], stochastic_depth_prob=drop_path)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return VideoSwin(network)


def clip(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, video: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    features = model(video)
    (features * clip(*features.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_features_are_what_torchvision_pools_and_torchvision_s_file_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = swin3d_t().eval()
    torch.save(network.state_dict(), tmp_path / "swin3d_t.pth")
    backbone = build_video_swin("swin3d_t", weights=str(tmp_path / "swin3d_t.pth")).eval()
    seen = []
    network.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    video = clip(1, 3, 5, 34, 30)  # nothing divides: padded
    with torch.no_grad():
        network(video)
        features = backbone(video)
    assert features.shape == (1, 768, 3, 2, 1) and backbone.width == 768
    assert torch.equal(features, seen[0])
    ours, theirs = dict(backbone.named_parameters()), dict(network.named_parameters())
    assert set(ours) == {name for name in theirs if not name.startswith("head.")}


def test_weights_that_do_not_fit_are_refused_and_named(tmp_path: Path) -> None:
    state = build_video_swin("small", weights=None).state_dict()
    assert not any("index" in key for key in state)
    file = tmp_path / "small.safetensors"
    save_file({key: value.half() for key, value in state.items()}, file)
    loaded = build_video_swin("small", weights=str(file)).state_dict()
    assert all(torch.equal(loaded[key], value.half().float()) for key, value in state.items())
    save_file({key: value for key, value in state.items() if key != "norm.bias"}, file)
    with pytest.raises(ValueError, match="norm.bias"):
        build_video_swin("small", weights=str(file))
    save_file(state | {"extra.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="extra.weight"):
        build_video_swin("small", weights=str(file))
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        build_video_swin("small", weights=str(tmp_path / "absent.pth"))
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="text.pth"):
        build_video_swin("small", weights=str(tmp_path / "text.pth"))
    with pytest.raises(ValueError, match="swin3d_t, swin3d_s, swin3d_b"):
        build_video_swin("swin3d_l", weights=None)
    with pytest.raises(ValueError, match="no Kinetics weights"):
        build_video_swin("small", weights="kinetics")


def test_a_download_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match="no route to host.*--model.weights FILE"):
        build_video_swin("swin3d_t", weights="kinetics")


def test_layers_count_through_the_stages() -> None:
    backbone = build_video_swin("small", weights=None)
    blocks = sum(SIZES["small"].depths)
    assert backbone.num_layers == blocks + 1
    assert {backbone.layer_of(name) for name, _ in backbone.named_parameters()} == set(range(blocks + 1))
    assert backbone.layer_of("patch_embed.proj.weight") == 0
    assert backbone.layer_of("features.0.0.norm1.weight") == 1
    assert backbone.layer_of("features.1.reduction.weight") == backbone.layer_of("features.0.1.norm1.weight") == 2
    assert backbone.layer_of("features.2.0.norm1.weight") == 3
    assert backbone.layer_of("norm.weight") == blocks


def test_the_small_network_is_small_and_takes_stochastic_depth() -> None:
    backbone = build_video_swin("small", weights=None, drop_path=0.2)
    assert sum(parameter.numel() for parameter in backbone.parameters()) < 2.4e6
    rates = [block.stochastic_depth.p for stage in list(backbone.features)[::2] for block in stage]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2) and rates == sorted(rates)


@pytest.mark.parametrize("chunk_mib", [None, 0.01])
def test_a_converted_network_gives_the_features_and_later_exact_gradients(chunk_mib: float | None) -> None:
    plain, video = little().eval(), clip(2, 3, 7, 24, 20)
    converted, reference = copy.deepcopy(plain), copy.deepcopy(plain)
    report = dr2net.convert(converted, chunk_mib=chunk_mib)
    dr2net.convert(reference, store=True, chunk_mib=chunk_mib)
    assert [name for name, *_ in report.sequences] == ["features.0", "features.2"]
    torch.testing.assert_close(converted(video), plain(video), rtol=ROUNDING, atol=ROUNDING)
    assert set(converted.state_dict()) == set(plain.state_dict())
    for model in (converted, reference):
        dr2net.set_coefficients(model, 0.9, 0.1)
    ours, stored = gradients(converted, video), gradients(reference, video)
    scale = max(value.abs().max() for value in stored.values())
    for name in stored:  # whole branches: the very same sums; chunks sum in another order
        tolerance = 0.0 if chunk_mib is None else ROUNDING * float(scale)
        torch.testing.assert_close(ours[name], stored[name], rtol=0, atol=tolerance, msg=name)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    plain, video = little(drop_path=0.4).train(), clip(2, 3, 4, 16, 16)
    checkpointed = copy.deepcopy(plain)
    assert dr2net.checkpoint_blocks(checkpointed) == 4
    torch.manual_seed(3)
    expected = gradients(plain, video)
    torch.manual_seed(3)
    found = gradients(checkpointed, video)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_wrong_clip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 16, 16\)"):
        little()(clip(1, 4, 3, 16, 16))
