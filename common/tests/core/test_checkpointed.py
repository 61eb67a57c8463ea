"""Checkpointing in chunks: the plain network's numbers, less memory than checkpointing blocks, and its refusals."""

import copy
import warnings

import pytest
import torch
from model_zoo import FAMILIES, run
from torch import nn
from toy_blocks import build_input, build_net, gradients, relative
from toy_tokens import CHUNK_MIB, HAVE_DROPOUT, TRANSFORMERS, step, token_net

import dr2net
from dr2net.memory import measure, predict

WHOLE = 1000.0  # MiB, more than any branch here needs


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_are_the_plain_models(name: str) -> None:
    pytest.importorskip("timm"), pytest.importorskip("transformers"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = FAMILIES[name]()
    model.train()
    twin = copy.deepcopy(model)
    assert dr2net.checkpoint_blocks(twin, chunk_mib=WHOLE, recompute_rest=True) > 0
    assert list(twin.state_dict()) == list(model.state_dict())
    expected = step(model, x)
    torch.testing.assert_close(step(twin, x), expected, rtol=1e-5, atol=1e-6)
    assert relative(gradients(twin), gradients(model)) < 1e-5
    for (key, a), b in zip(twin.named_buffers(), model.buffers(), strict=True):  # statistics move once
        torch.testing.assert_close(a, b, msg=key)
    dr2net.deconvert(twin)
    assert not any(isinstance(m, dr2net.ReversibleSequence) for m in twin.modules())
    step(twin, x)


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name not in HAVE_DROPOUT])
def test_chunks_change_nothing_but_the_rounding(name: str) -> None:
    pytest.importorskip("timm"), pytest.importorskip("transformers"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = FAMILIES[name]()
    twin = copy.deepcopy(model)
    dr2net.checkpoint_blocks(twin, chunk_mib=CHUNK_MIB)
    expected = step(model, x)
    torch.testing.assert_close(step(twin, x), expected, rtol=1e-4, atol=1e-5)
    assert relative(gradients(twin), gradients(model)) < 1e-4


def test_dropout_and_drop_path_are_replayed_in_chunks() -> None:
    net = token_net(dropout=0.3).train()
    stored = copy.deepcopy(net)
    for one in (net, stored):
        dr2net.checkpoint_blocks(one, chunk_mib=1e-4)
    for module in stored.modules():
        if isinstance(module, dr2net.ReversibleSequence):
            module.store = True
    x = build_input()
    assert torch.equal(step(net, x), step(stored, x))
    assert relative(gradients(net), gradients(stored)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sums_are_made_in_the_plain_models_precision(dtype: torch.dtype) -> None:
    """In bfloat16 a reversible stream is float32; this one must round as the plain network rounds."""
    net = token_net().to(dtype).eval()
    x = build_input().to(dtype)
    with torch.no_grad():
        expected = run(net, x)
        dr2net.checkpoint_blocks(net, chunk_mib=WHOLE)
        assert torch.equal(run(net, x), expected)
        assert run(net, x).dtype == dtype


def test_under_autocast_the_sums_have_the_plain_models_dtype() -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = FAMILIES["swin"]()
    model.eval()
    seen: list[torch.dtype] = []
    for module in model.modules():
        if type(module).__name__ == "SwinTransformerBlock":
            module.register_forward_hook(lambda block, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = run(model, x)
        plain, seen[:] = seen[:], []
        dr2net.checkpoint_blocks(model, chunk_mib=WHOLE)
        torch.testing.assert_close(run(model, x), expected, rtol=0.02, atol=0.02)
    assert seen == plain


def test_no_more_is_kept_than_one_input_per_branch() -> None:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    def build() -> nn.Module:
        return SwinTransformer3d([2, 4, 4], 24, [2], [2], [4, 7, 7], num_classes=10)

    clip = (2, 3, 16, 56, 56)
    stream = 2 * 8 * 14 * 14 * 24 * 4
    model, blocks = build(), build()
    dr2net.checkpoint_blocks(model, chunk_mib=0.25, recompute_rest=True)
    dr2net.checkpoint_blocks(blocks)
    found, usual = (measure(lambda m=m: m(torch.randn(clip)).mean().backward(), m) for m in (model, blocks))
    assert found.peak < 0.5 * usual.peak
    # what is kept: the inputs of four branches and of the norm, and the clip
    assert found.stored < 6.5 * stream + 4 * 2 * 3 * 16 * 56 * 56
    predicted = predict(lambda: model(torch.randn(clip)).mean().backward(), model)
    assert predicted.peak == pytest.approx(found.peak, rel=0.02)


def test_no_more_than_the_reversible_network_needs_and_its_streams() -> None:
    """Converted at (1, 0), every branch keeps its input too, but F(x) is made as a whole, and compared."""
    net = token_net(num_blocks=6).float()
    twin = copy.deepcopy(net)
    dr2net.checkpoint_blocks(net, chunk_mib=0.05)
    dr2net.convert(twin, inversion="float", chunk_mib=0.05)
    x = torch.randn(64, 32, build_input().shape[-1])
    found, before = (measure(lambda m=m: run(m, x).sum().backward(), m) for m in (net, twin))
    assert found.peak < before.peak


def test_other_coefficients_are_refused() -> None:
    net = build_net(2)
    dr2net.checkpoint_blocks(net, chunk_mib=1)
    dr2net.set_coefficients(net, 1, 0)
    with pytest.raises(ValueError, match=r"blocks is checkpointed in chunks.*deconvert"):
        dr2net.set_coefficients(net, 7 / 8, 1 / 8)
    assert "checkpointed in chunks of 1 MiB" in repr(net)


def test_weights_that_were_trained_at_other_coefficients_are_told() -> None:
    net = build_net(2)
    twin = copy.deepcopy(net)
    dr2net.convert(twin)
    dr2net.set_coefficients(twin, 7 / 8, 1 / 8)
    dr2net.checkpoint_blocks(net, chunk_mib=1)
    net.load_state_dict(twin.state_dict())
    with pytest.warns(UserWarning, match=r"\(0.875, 0.125\)"):
        run(net, build_input())


def test_a_copy_stays_at_one_and_zero_whatever_it_loads() -> None:
    net = build_net(2)
    twin = copy.deepcopy(net)
    dr2net.convert(twin)
    dr2net.set_coefficients(twin, 7 / 8, 1 / 8)
    dr2net.checkpoint_blocks(net, chunk_mib=1)
    again = copy.deepcopy(net)
    expected = run(net, build_input())
    again.load_state_dict(twin.state_dict())
    with pytest.warns(UserWarning, match=r"\(0.875, 0.125\)"):
        assert torch.equal(run(again, build_input()), expected)
    with pytest.raises(ValueError, match="checkpointed in chunks"):
        dr2net.set_coefficients(again, 7 / 8, 1 / 8)


def test_a_second_derivative_and_a_second_conversion_are_refused() -> None:
    net = build_net(2)
    dr2net.checkpoint_blocks(net, chunk_mib=1)
    with pytest.raises(ValueError, match="converted already"):
        dr2net.checkpoint_blocks(net)
    x = build_input().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(run(net, x).sum(), x, create_graph=True)


def test_a_parameter_that_changes_before_backward_is_refused() -> None:
    net = build_net(2)
    dr2net.checkpoint_blocks(net, chunk_mib=1)
    loss = run(net, build_input().requires_grad_()).sum()
    with torch.no_grad():
        next(net.blocks.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_values_that_make_no_sense_are_refused_before_anything_changes() -> None:
    net = build_net(2)
    for chunk_mib in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="chunk_mib"):
            dr2net.checkpoint_blocks(net, chunk_mib=chunk_mib)
    assert dr2net.checkpoint_blocks(net, chunk_mib=1) == 2


def test_the_rest_runs_again_too() -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = FAMILIES["swin"]()
    some, all_again = copy.deepcopy(model), copy.deepcopy(model)
    dr2net.checkpoint_blocks(some, chunk_mib=CHUNK_MIB)
    dr2net.checkpoint_blocks(all_again, chunk_mib=CHUNK_MIB, recompute_rest=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = [measure(lambda m=m: step(m, x), m).stored for m in (some, all_again)]
    assert kept[1] < kept[0]
    assert relative(gradients(all_again), gradients(some)) < 1e-6
