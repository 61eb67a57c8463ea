"""Branches in chunks: the results of whole branches, exact inversion, randomness, and less memory."""

import copy
import functools

import pytest
import torch
from model_zoo import FAMILIES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy_blocks import WIDTH, ToyBlock, build_input, converted, gradients, relative
from toy_tokens import CHUNK_MIB, HAVE_DROPOUT, TRANSFORMERS, TokenBlock, step, token_net

import dr2net
from dr2net import chunks, memory
from dr2net.chunks import Chunks

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_chunks_change_nothing_but_the_rounding(name: str) -> None:
    pytest.importorskip("timm"), pytest.importorskip("transformers"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = FAMILIES[name]()
    if name in HAVE_DROPOUT:
        model.eval()  # chunks draw other masks
    whole = copy.deepcopy(model)
    dr2net.convert(whole, inversion="float", store=True)
    dr2net.convert(model, inversion="float", chunk_mib=CHUNK_MIB)
    for net in (whole, model):
        dr2net.set_coefficients(net, 0, 1)
    torch.testing.assert_close(step(model, x), step(whole, x), rtol=1e-4, atol=1e-5)
    assert relative(gradients(model), gradients(whole)) < 1e-4  # float32 through the float inverse


@pytest.mark.parametrize("name", ["vit_with_layer_scale_and_drop_path", "swin3d", "huggingface_vit"])
def test_exact_inversion_in_chunks_is_that_of_stored_activations(name: str) -> None:
    pytest.importorskip("timm"), pytest.importorskip("transformers"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = FAMILIES[name]()
    twin = copy.deepcopy(model)
    for net, store in ((model, False), (twin, True)):
        dr2net.convert(net, store=store, chunk_mib=CHUNK_MIB)
        dr2net.set_coefficients(net, 0.875, 0.125)
    assert torch.equal(step(model, x), step(twin, x))  # a branch that recomputes something else raises
    assert relative(gradients(model), gradients(twin)) < 1e-5


@pytest.mark.parametrize("inversion", ["exact", "anchored"])
@pytest.mark.parametrize("chunk_mib", [1e-6, 0.005, 1e3])
def test_dropout_in_chunks_is_replayed_and_drop_path_drawn_once_per_sample(inversion: str, chunk_mib: float) -> None:
    net, x = token_net(dropout=0.4), build_input()
    ours, twin = (converted(net, 0.6, 0.4, inversion=inversion, store=s, chunk_mib=chunk_mib) for s in (False, True))
    assert torch.equal(step(ours, x), step(twin, x))
    assert relative(gradients(ours), gradients(twin)) < 1e-8  # float64
    (branch,) = dr2net.branches_of(net.blocks[0])
    net.blocks[0].dropout.p = 0.0
    cut = branch.chunks(x, (), {}, chunk_mib)
    assert (None if isinstance(cut, str) else cut.size) == {1e-6: 1, 0.005: 4, 1e3: None}[chunk_mib]  # of 15 tokens
    if isinstance(cut, str):
        return
    torch.manual_seed(7)
    found = chunks.evaluate(cut, x, x.dtype, keep_graph=False)
    torch.manual_seed(7)
    torch.testing.assert_close(found, branch(x).detach(), rtol=1e-12, atol=1e-12)


def test_frozen_parts_and_an_input_without_gradient_are_as_in_whole_branches() -> None:
    net = token_net()
    net.stem.requires_grad_(False)
    net.blocks[1].requires_grad_(False)
    net.blocks[2].up.requires_grad_(False)
    ours, whole = (converted(net, 0.5, 0.5, chunk_mib=c) for c in (1e-6, None))
    for twin in (ours, whole):
        step(twin, build_input())
    assert relative(gradients(ours), gradients(whole)) < 1e-8


def test_autocast_holds_inside_chunks() -> None:
    net, x = token_net().float(), build_input(dtype=torch.float32)
    for block in net.blocks:
        block.drop_path = None
    seen = []
    net.blocks[1].down.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    ours, twin = (converted(net, 0.5, 0.5, store=s, chunk_mib=1e-6) for s in (False, True))
    for twin_net in (ours, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = twin_net(x)
        outputs.float().square().sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert relative(gradients(ours), gradients(twin)) < 2e-2  # parameter gradients are sums in bfloat16 there


def test_what_sees_all_groups_runs_as_a_whole() -> None:
    x = build_input()
    (branch,) = dr2net.branches_of(TokenBlock(norm=nn.BatchNorm1d))
    assert "batch statistics" in branch.chunks(x, (), {}, 1e-3)
    (branch,) = dr2net.branches_of(TokenBlock())
    assert isinstance(branch.chunks(x, (), {}, 1e-3), Chunks)
    assert branch.chunks(x, (), {}, 1.0) == "it is smaller than a chunk"
    assert "the tensor 'argument 1 after x' beside x" in branch.chunks(x, (x,), {}, 1e-3)
    assert "what the tensor 'mask' beside x is" in branch.chunks(x, (), {"mask": x}, 1e-3)
    (first, _) = dr2net.branches_of(ToyBlock(2, 0.0, 0.0, False))
    assert "independent" in first.chunks(x, (), {}, 1e-3)


def test_a_block_that_is_its_own_branch_runs_in_chunks() -> None:
    model, x = FAMILIES["resnet"]()
    model.eval()
    report = dr2net.convert(model, chunk_mib=1e-4)
    model(x)
    assert "2 of them ran in the last pass, 2 in chunks" in str(report) and "as a whole" not in str(report)


def test_chunks_cost_no_more_operations() -> None:
    x = build_input(4, 64, WIDTH)

    def flops(chunk_mib: float | None) -> int:
        net = converted(token_net(), 0.5, 0.5, chunk_mib=chunk_mib)
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        return counter.get_total_flops()

    assert flops(0.05) == flops(None)


def test_the_peak_falls_with_the_chunks() -> None:
    def activations(chunk_mib: float | None) -> int:
        net = converted(token_net(2).float(), 0.5, 0.5, chunk_mib=chunk_mib)
        return memory.predict(lambda: net(torch.randn(2, 4096, WIDTH)).sum().backward(), net).activations

    stream = 2 * 4096 * WIDTH * 4
    assert activations(0.4) < 12 * stream < 20 * stream < activations(None)


def test_a_chunk_must_have_a_size() -> None:
    for chunk_mib in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="chunk_mib"):
            dr2net.convert(token_net(), chunk_mib=chunk_mib)


def test_the_rest_is_recomputed_too_and_can_be_given_back() -> None:
    torch.manual_seed(0)
    model, x = FAMILIES["swin"]()
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    dr2net.convert(plain, inversion="float")
    dr2net.convert(model, inversion="float", recompute_rest=True)
    assert list(model.state_dict()) == keys
    assert [name for name, m in model.named_modules() if isinstance(vars(m).get("forward"), functools.partial)] == [
        *("features.0", "features.2", "norm", "head")
    ]
    for net in (plain, model):
        dr2net.set_coefficients(net, 0, 1)
    assert torch.equal(step(model, x), step(plain, x))
    assert relative(gradients(model), gradients(plain)) < 1e-6
    dr2net.set_coefficients(model, 1, 0)
    dr2net.deconvert(model)
    assert not any("forward" in vars(m) for m in model.modules())
