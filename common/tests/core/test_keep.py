"""The dial: the last branches of a model keep what they compute, the others are rebuilt; the gradients stay."""

import copy
from itertools import pairwise

import pytest
import torch
from model_zoo import swin3d, vit_with_layer_scale_and_drop_path
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toy_blocks import WIDTH, build_input, build_net

import dr2net
from dr2net.memory import predict

BRANCHES = 8
pytestmark = pytest.mark.filterwarnings("ignore:float inversion")


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(7)
    output = net(x)
    output.square().mean().backward()
    return [output.detach(), torch.rand(3), *(p.grad for p in net.parameters() if p.grad is not None)]


def built(keep: int, net: nn.Module, alpha: float = 7 / 8, beta: float = 1 / 8, **options: object) -> nn.Module:
    net = copy.deepcopy(net)
    dr2net.convert(net, keep=keep, **options)
    dr2net.set_coefficients(net, alpha, beta)
    return net


@pytest.mark.parametrize("chunk_mib", [None, 0.01])
@pytest.mark.parametrize("coefficients", [(7 / 8, 1 / 8), (0.9, 0.1), (0, 1), (1, 0)])
@pytest.mark.parametrize("keep", [1, 2, 5, BRANCHES, 100])
def test_gradients_are_those_of_stored_activations(
    keep: int, coefficients: tuple[float, float], chunk_mib: float | None
) -> None:
    net = build_net(BRANCHES // 2, dropout=0.2, drop_path=0.2, dtype=torch.float32)
    x = build_input(dtype=torch.float32)
    ours = gradients(built(keep, net, *coefficients, chunk_mib=chunk_mib), x)
    reference = gradients(built(0, net, *coefficients, store=True), x)
    assert len(ours) == len(reference) > 10
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if chunk_mib is None else 1e-6)


@pytest.mark.parametrize("inversion", ["float", "anchored"])
def test_streams_of_floats_too(inversion: str) -> None:
    net, x = build_net(BRANCHES // 2), build_input()
    options = {"inversion": inversion, "anchor_every": 2 if inversion == "anchored" else None}
    ours = gradients(built(3, net, 0.5, 0.5, **options), x)
    reference = gradients(built(0, net, 0.5, 0.5, inversion="float", store=True), x)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_memory_rises_and_work_falls_with_each_branch_that_is_kept() -> None:
    net, shape = build_net(BRANCHES // 2, dtype=torch.float32), (16, 64, WIDTH)

    def cost(model: nn.Module) -> tuple[int, int]:
        def step() -> None:
            model(torch.zeros(shape)).square().mean().backward()

        with FlopCounterMode(display=False) as counter:
            step()
        return predict(step, model).stored, counter.get_total_flops()

    found = [cost(built(keep, net)) for keep in range(BRANCHES + 1)]
    assert all(less < more for (less, _), (more, _) in pairwise(found))
    assert all(more > less for (_, more), (_, less) in pairwise(found))
    plain_stored, plain_flops = cost(net)
    assert found[-1][1] == plain_flops
    assert plain_stored <= found[-1][0] <= 1.1 * plain_stored  # the integers of the stream and the last sum


def test_the_last_branches_of_the_whole_model_are_kept_and_deconverting_forgets_it() -> None:
    model, clip = swin3d()
    plain = copy.deepcopy(model)
    dr2net.convert(model, keep=5)
    own = [module for module in model.modules() if isinstance(module, dr2net.ReversibleSequence)]
    assert [sequence.num_branches() for sequence in own] == [4, 4] and [s.keep for s in own] == [1, 4]
    assert "the last 4 branches keep their insides" in repr(own[1])
    assert dr2net.gradient_error(model, clip, lambda m, x: m(x).square().mean()).overall == 0
    dr2net.deconvert(model)
    assert not hasattr(own[0], "keep")
    torch.testing.assert_close(model.eval()(clip), plain.eval()(clip), rtol=0, atol=0)  # without stochastic depth


def test_kept_branches_save_from_the_present_error_of_float_inversion() -> None:
    net, x = build_net(BRANCHES // 2, dtype=torch.float32), build_input(dtype=torch.float32)

    def error(keep: int) -> float:
        model = built(keep, net, 0.9, 0.1, inversion="float")
        return dr2net.gradient_error(model, x, lambda m, x: m(x).square().mean()).overall

    assert error(BRANCHES) == 0 and error(BRANCHES - 2) < 0.01 * error(0)


@pytest.mark.parametrize("chunk_mib", [None, 0.01])
def test_checkpointing_has_the_same_dial(chunk_mib: float | None) -> None:
    model, image = vit_with_layer_scale_and_drop_path()
    expected = gradients(model, image)
    model.zero_grad()
    calls = []
    for block in model.blocks:
        block.attn.qkv.register_forward_pre_hook(lambda m, _: calls.append(m))
    assert dr2net.checkpoint_blocks(model, keep=3, chunk_mib=chunk_mib) >= 2
    for a, b in zip(gradients(model, image), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    runs = [sum(m is block.attn.qkv for m in calls) for block in model.blocks]
    assert runs == [2, 2, 1]  # an MLP of the second block runs once where single branches are kept


def test_what_is_no_number_of_branches_is_refused() -> None:
    for keep in (-1, 1.5):
        with pytest.raises(ValueError, match="keep="):
            dr2net.convert(build_net(2), keep=keep)
