"""A Video Swin hands out torchvision's maps of its stages, for every frame, and takes the files of three projects."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dr2net

pytest.importorskip("torchvision")

from torchvision.models.video.swin_transformer import SwinTransformer3d

from engine.backbones.video_swin import SIZES, VideoStages, build_video_stages, build_video_swin, torchvision_names
from engine.weights import Tensors, write_tensors

ROUNDING = 1e-5  # float32; the streams of a converted model are rounded to a grid of about 1e-7


def clip(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def whole_network(name: str, time: int = 2) -> SwinTransformer3d:
    torch.manual_seed(0)
    width, *lists = SIZES[name]
    network = SwinTransformer3d([time, 4, 4], width, *map(list, lists), num_classes=3).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network


def saved(state: Tensors, path: Path) -> str:
    write_tensors({key: value.clone() for key, value in state.items()}, path)
    return str(path)


def official(state: Tensors, *, mttr: bool = False) -> Tensors:
    """torchvision's names -> those of the official code, or of MTTR without what it cuts off."""
    renamed = {}
    for key, value in state.items():
        if found := re.match(r"features\.(\d+)\.(.+)", key):
            part, rest = int(found[1]), found[2]
            if mttr and part > 4:
                continue
            if part % 2:
                key = f"downsamples.{part // 2}.{rest}" if mttr else f"layers.{part // 2}.downsample.{rest}"
            else:
                rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
                key = f"layers.{part // 2}.blocks.{rest}"
        elif mttr and key.startswith(("norm.", "head.")):
            continue
        key = key.replace("head.", "cls_head.fc_cls.")
        renamed[key if key.startswith("cls_head.") else f"backbone.{key}"] = value
    return renamed


@pytest.mark.parametrize("shape", [(1, 3, 8, 64, 48), (2, 3, 5, 34, 30), (1, 3, 1, 33, 32), (1, 3, 9, 96, 100)])
def test_stages_are_torchvision_s_own_forward_cut_after_each(shape: tuple[int, ...], tmp_path: Path) -> None:
    """With MTTR's surgery done by hand: the kernel summed over time."""
    network = whole_network("small")
    file = saved(network.state_dict(), tmp_path / "small.safetensors")
    backbone = build_video_stages("small", weights=file).eval()
    state = network.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].sum(dim=2, keepdim=True)
    by_frame = whole_network("small", time=1)
    by_frame.load_state_dict(state)
    seen: list[Tensor] = []
    for part in (0, 2, 4):
        by_frame.features[part].register_forward_hook(lambda _, inputs, output: seen.append(output))
    video = clip(*shape)
    with torch.no_grad():
        by_frame(video)
        maps = backbone(video)
    assert backbone.widths == [48, 96, 192]
    for found, expected in zip(maps, seen, strict=True):
        assert found.shape[2] == shape[2] and torch.equal(found, expected.permute(0, 4, 1, 2, 3))


def test_the_first_stages_of_a_network_of_four_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    backbone = build_video_stages("swin3d_t", weights=None, drop_path=0.1)
    assert backbone.widths == [96, 192, 384] and backbone.num_layers == 11
    rates = [block.stochastic_depth.p for stage in list(backbone.features)[::2] for block in stage]
    # as MTTR: rising over twelve blocks, of which ten are left
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 12)[:10])
    assert {backbone.layer_of(name) for name, _ in backbone.named_parameters()} == set(range(11))
    assert round(sum(parameter.numel() for parameter in backbone.parameters()) / 1e6, 2) == 12.36
    with torch.no_grad():
        shapes = [tuple(one.shape) for one in backbone.eval()(clip(1, 3, 2, 34, 30))]
    assert shapes == [(1, 96, 2, 9, 8), (1, 192, 2, 5, 4), (1, 384, 2, 3, 2)]


def test_overlapping_frames_are_embedded_as_pairs_and_the_last_one_twice(tmp_path: Path) -> None:
    network = whole_network("small")
    file = saved(network.state_dict(), tmp_path / "small.safetensors")
    backbone = build_video_stages("small", weights=file, patch="overlap").eval()
    video = clip(2, 3, 5, 34, 30)
    with torch.no_grad():
        tokens = backbone.embed(video)
        for time in range(5):
            pair = video[:, :, [time, min(time + 1, 4)]]
            torch.testing.assert_close(tokens[:, time], network.patch_embed(pair)[:, 0], rtol=1e-6, atol=1e-6)
        maps = backbone(video)
    assert [tuple(one.shape) for one in maps] == [(2, 48, 5, 9, 8), (2, 96, 5, 5, 4), (2, 192, 5, 3, 2)]


@pytest.mark.parametrize("names", ["torchvision", "official", "mttr"])
def test_files_of_three_projects_hold_the_same_network(names: str, tmp_path: Path) -> None:
    state = whole_network("swin3d_t").state_dict()
    wanted = build_video_stages("swin3d_t", weights=saved(state, tmp_path / "torchvision.safetensors")).state_dict()
    theirs = state
    if names != "torchvision":
        theirs = official(state, mttr=names == "mttr")
    if names == "mttr":
        key = "backbone.patch_embed.proj.weight"
        theirs[key] = theirs[key].sum(dim=2, keepdim=True)
    torch.save(theirs if names == "torchvision" else {"state_dict": theirs}, tmp_path / "file.pth")
    found = build_video_stages("swin3d_t", weights=str(tmp_path / "file.pth")).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert not any("index" in key or key.startswith("norm") for key in found)


def test_half_precision_kernels_are_summed_as_the_model_s(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in whole_network("small").state_dict().items() if "index" not in key}
    found = build_video_stages("small", weights=saved(state, tmp_path / "half.safetensors")).state_dict()
    name = "patch_embed.proj.weight"
    assert torch.equal(found[name], state[name].float().sum(dim=2, keepdim=True))


def test_files_that_do_not_fit_are_refused_and_named(tmp_path: Path) -> None:
    state = dict(build_video_swin("small", weights=None).state_dict())
    file = tmp_path / "other.safetensors"
    for change, said in (
        ({"features.2.1.mlp.0.bias": None}, "features.2.1.mlp.0.bias"),
        ({"features.2.2.mlp.0.bias": torch.zeros(2)}, "unused: features.2.2.mlp.0.bias"),
        ({"extra.weight": torch.zeros(1)}, "unused: extra.weight"),
        ({"patch_embed.proj.weight": torch.ones(48, 3, 2, 4, 4, dtype=torch.int8)}, "another kind of numbers"),
        ({"patch_embed.proj.weight": torch.zeros(48, 3, 4, 4)}, "of another shape: patch_embed.proj.weight"),
        ({"patch_embed.proj.weight": torch.full((48, 3, 2, 4, 4), 3e38)}, "NaN or infinite values"),
    ):
        merged = {**state, **change}
        saved({key: value for key, value in merged.items() if value is not None}, file)
        with pytest.raises(ValueError, match=re.escape(said)):
            build_video_stages("small", weights=str(file))
    saved(state, file)
    with pytest.raises(ValueError, match="does not fit"):
        build_video_stages("swin3d_t", weights=str(file))
    with pytest.raises(ValueError, match="small has 3 stages, not 4"):
        build_video_stages("small", weights=None, num_stages=4)
    with pytest.raises(ValueError, match="choose one of"):
        build_video_stages("swin3d_l", weights=None)
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 16, 16\)"):
        build_video_stages("small", weights=None)(clip(1, 4, 3, 16, 16))


def test_names_that_are_torchvision_s_stay() -> None:
    state = whole_network("small").state_dict()
    assert torchvision_names(state).keys() == state.keys()
    assert torchvision_names(official(state)).keys() - {"cls_head.fc_cls.weight", "cls_head.fc_cls.bias"} == {
        key for key in state if not key.startswith("head.")
    }


def little(patch_time: int = 1) -> VideoStages:
    torch.manual_seed(0)
    network = SwinTransformer3d([patch_time, 4, 4], 12, [2, 2, 2], [2, 2, 2], [2, 3, 3], stochastic_depth_prob=0.0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return VideoStages(network, 3)


def gradients(model: nn.Module, video: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    maps = model(video)
    sum((one * clip(*one.shape)).sum() for one in maps).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("chunk_mib", [None, 0.01])
def test_converted_stages_give_the_maps_and_later_exact_gradients(chunk_mib: float | None) -> None:
    """Each stage is a run of its own, and what it hands out is part of the graph."""
    plain, video = little().eval(), clip(2, 3, 5, 24, 20)
    converted, reference = copy.deepcopy(plain), copy.deepcopy(plain)
    report = dr2net.convert(converted, chunk_mib=chunk_mib, recompute_rest=True)
    dr2net.convert(reference, store=True, chunk_mib=chunk_mib)
    assert [name for name, *_ in report.sequences] == ["features.0", "features.2", "features.4"]
    for ours, theirs in zip(converted(video), plain(video), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=ROUNDING)
    for model in (converted, reference):
        dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    ours, stored = gradients(converted, video), gradients(reference, video)
    assert set(ours) == {name for name, _ in plain.named_parameters()}
    scale = max(value.abs().max() for value in stored.values())
    for name in stored:  # whole branches: the very same sums; chunks sum in another order
        tolerance = 0.0 if chunk_mib is None else ROUNDING * float(scale)
        torch.testing.assert_close(ours[name], stored[name], rtol=0, atol=tolerance, msg=name)
