"""SlowFast hands out pytorchvideo's own features over time, its batch norm never moves, and it converts."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import relative

import dr2net
from dr2net import memory

pytest.importorskip("pytorchvideo")

from pytorchvideo.models.slowfast import create_slowfast

from engine.backbones.slowfast import SlowFast, build_slowfast

WIDTHS = (16, 2)
ROUNDING = 1e-5  # float32; the streams of a converted model are rounded to a grid of about 1e-7


def randomise(model: nn.Module) -> None:
    """Batch norm that matters: at first it is the identity, and the last of a block is zero."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.2, 0.4, generator=generator)


def little() -> SlowFast:
    torch.manual_seed(0)
    backbone = build_slowfast("slowfast50", weights=None, widths=WIDTHS)
    randomise(backbone)
    return backbone


def clip(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, video: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    features = model(video)
    (features * clip(*features.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_features_are_what_pytorchvideo_pools_and_its_checkpoint_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create_slowfast(model_depth=50, stem_dim_outs=WIDTHS, head_pool_kernel_sizes=((2, 1, 1), (8, 1, 1)))
    randomise(network)
    file = tmp_path / "SLOWFAST.pyth"
    torch.save({"model_state": network.state_dict(), "cfg": "text"}, file)
    backbone = build_slowfast("slowfast50", weights=str(file), widths=WIDTHS).eval()
    seen = []
    network.eval().blocks[5].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    video = clip(2, 3, 8, 32, 32)
    with torch.no_grad():
        network([video[:, :, ::4], video])
        features = backbone(video)
    slow, fast = (x.mean((3, 4)) for x in seen)
    assert features.shape == (2, backbone.width, 8, 1, 1) and backbone.width == 576
    assert torch.equal(features[:, 512:, :, 0, 0], fast)
    torch.testing.assert_close(features[:, :512, 0, 0, 0], slow[:, :, 0])  # before the middle of the first slow frame
    torch.testing.assert_close(features[:, :512, -1, 0, 0], slow[:, :, 1])


def test_training_leaves_batch_norm_s_statistics_and_reaches_its_scale() -> None:
    backbone = little()
    for converted in (False, True):
        if converted:
            dr2net.convert(backbone)
            dr2net.set_coefficients(backbone, 0.9, 0.1)
        nn.ModuleList([backbone]).train()  # as the engine does it, from the outside
        before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
        backbone.zero_grad()
        backbone(clip(1, 3, 8, 32, 32)).square().mean().backward()
        assert before and all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())
        scale = backbone.blocks[1].multipathway_blocks[0].res_blocks[1].branch2.norm_b.weight
        assert scale.grad.abs().max() > 0
        assert backbone.training and not backbone.blocks[0].multipathway_fusion.norm.training


@pytest.mark.parametrize("chunk_mib", [None, 1e-3])  # whole; sample by sample
def test_a_converted_network_gives_the_features_and_later_exact_gradients(chunk_mib: float | None) -> None:
    plain, video = little().train(), clip(2, 3, 8, 32, 32)
    converted, reference = copy.deepcopy(plain), copy.deepcopy(plain)
    report = dr2net.convert(converted, chunk_mib=chunk_mib, recompute_rest=chunk_mib is not None)
    dr2net.convert(reference, store=True, chunk_mib=chunk_mib)
    assert len(report.sequences) == 8 and sum(blocks for _, blocks, _ in report.sequences) == 2 * (2 + 3 + 5 + 2)
    assert len(report.ordinary) == 8  # the first block of each stage changes the shape
    torch.testing.assert_close(converted(video), plain(video), rtol=ROUNDING, atol=ROUNDING)
    assert set(converted.state_dict()) == set(plain.state_dict())
    for model in (converted, reference):
        dr2net.set_coefficients(model, 0.9, 0.1)
    ours, stored = gradients(converted, video), gradients(reference, video)
    if chunk_mib is None:
        assert all(torch.equal(ours[name], stored[name]) for name in stored)
    else:  # sums over samples in another order
        assert relative(list(ours.values()), list(stored.values())) < ROUNDING


def test_it_needs_less_memory_than_checkpointing_which_needs_less_than_nothing_done() -> None:
    def activations(prepare: Callable[[nn.Module], object]) -> int:
        with torch.device("meta"):
            backbone = build_slowfast("slowfast50", weights=None)
        prepare(backbone)
        return memory.predict(lambda: backbone(torch.zeros(2, 3, 32, 112, 112)).mean().backward(), backbone).activations

    def ours(backbone: nn.Module) -> None:
        dr2net.convert(backbone, chunk_mib=64, recompute_rest=True)
        dr2net.set_coefficients(backbone, 7 / 8, 1 / 8)

    assert activations(ours) < 0.9 * activations(dr2net.checkpoint_blocks) < 0.5 * activations(lambda backbone: None)


def test_a_converted_block_adds_to_the_streams_what_it_added_to_its_input() -> None:
    stage = little().eval().blocks[1].multipathway_blocks[0]
    blocks = copy.deepcopy(stage.res_blocks)
    dr2net.convert(stage)
    dr2net.set_coefficients(stage, 0.5, 0.5)
    video = clip(1, blocks[0].branch1_conv.in_channels, 2, 4, 4)
    with torch.no_grad():
        before = x = blocks[0](video)
        for block in blocks[1:]:
            before, x = x, block(x) - x + 0.5 * x + 0.5 * before
        torch.testing.assert_close(stage(video), x, rtol=ROUNDING, atol=ROUNDING)


def test_layers_count_through_the_stages_alike_in_both_pathways() -> None:
    backbone = little()
    assert backbone.num_layers == 17
    assert {backbone.layer_of(name) for name, _ in backbone.named_parameters()} == set(range(17))
    assert backbone.layer_of("blocks.0.multipathway_fusion.norm.weight") == 0
    for pathway in (0, 1):
        assert backbone.layer_of(f"blocks.2.multipathway_blocks.{pathway}.res_blocks.1.branch2.conv_a.weight") == 5
    assert backbone.layer_of("blocks.1.multipathway_fusion.norm.weight") == 3


def test_bad_input_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        little()(clip(1, 3, 6, 32, 32))
    with pytest.raises(ValueError, match="slowfast101"):
        build_slowfast("slowfast18", weights=None)
    with pytest.raises(ValueError, match="drop-path 0"):
        build_slowfast("slowfast50", weights=None, drop_path=0.1)
    with pytest.raises(FileNotFoundError, match=r"absent.pyth"):
        build_slowfast("slowfast50", weights=str(tmp_path / "absent.pyth"))
    state = little().state_dict()
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "other.pyth")
    with pytest.raises(ValueError, match=r"other.pyth.*\['epoch', 'state_dict'\]"):
        build_slowfast("slowfast50", weights=str(tmp_path / "other.pyth"), widths=WIDTHS)
    torch.save([1, 2], tmp_path / "list.pyth")
    with pytest.raises(ValueError, match=r"list.pyth: no state dict of tensors but list"):
        build_slowfast("slowfast50", weights=str(tmp_path / "list.pyth"), widths=WIDTHS)
    torch.save(
        {"model_state": {k: v for k, v in state.items() if not k.startswith("blocks.4")}}, tmp_path / "part.pyth"
    )
    with pytest.raises(ValueError, match=r"part.pyth.*missing: blocks.4"):
        build_slowfast("slowfast50", weights=str(tmp_path / "part.pyth"), widths=WIDTHS)
