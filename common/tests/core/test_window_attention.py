"""Fused window attention, in chunks of windows, against torchvision's own attention."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from dr2net.chunks import Chunks, differentiate, evaluate

pytest.importorskip("torchvision")

from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from dr2net.window_attention import Windows

WIDTH = 8
TOLERANCE = 1e-5  # float32 in another order of operations
CASES = {
    "2-D": ((2, 8, 8), (4, 4), (0, 0)),
    "2-D shifted": ((2, 8, 12), (4, 4), (2, 2)),
    "2-D shifted and padded": ((2, 9, 6), (4, 4), (2, 2)),
    "2-D shifted along one dimension only": ((2, 8, 4), (4, 4), (2, 2)),
    "2-D smaller than the window": ((2, 3, 3), (4, 4), (2, 2)),
    "3-D": ((2, 4, 4, 4), (2, 2, 2), (0, 0, 0)),
    "3-D shifted": ((1, 8, 4, 4), (4, 2, 2), (2, 1, 1)),
    "3-D shifted and padded": ((2, 5, 7, 6), (4, 3, 3), (2, 1, 1)),
    "3-D shorter than the window": ((2, 3, 6, 6), (8, 3, 3), (4, 1, 1)),
}


def build(case: str, **dropout: float) -> tuple[nn.Module, nn.Module, Tensor]:
    (batch, *size), window, shift = CASES[case]
    torch.manual_seed(0)
    cls = ShiftedWindowAttention if len(window) == 2 else ShiftedWindowAttention3d
    norm, attention = nn.LayerNorm(WIDTH), cls(WIDTH, list(window), list(shift), 2, **dropout)
    for parameter in (*norm.parameters(), *attention.parameters()):
        nn.init.normal_(parameter, std=0.5)  # a bias and a norm that matter
    return norm, attention, torch.randn(batch, *size, WIDTH)


def chunks(norm: nn.Module, attention: nn.Module, x: Tensor, size: int) -> Chunks:
    found = Chunks(Windows(norm, attention, x), (norm, attention), None, 1e12)
    assert found.size == found.groups.count  # the budget is ample; now by hand
    found.size = min(size, found.size)
    return found


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_torchvision_s(case: str, size: int) -> None:
    norm, attention, x = build(case)
    parameters = [*norm.parameters(), *attention.parameters()]
    x.requires_grad_()
    expected, grad = attention(norm(x)), torch.randn_like(x)
    gradients = torch.autograd.grad(expected, [x, *parameters], grad)
    windows = chunks(norm, attention, x, size)
    found = evaluate(windows, x, x.dtype, keep_graph=False)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    with torch.no_grad():  # the fused kernel, which has no gradient for the bias on a CPU
        fused = evaluate(windows, x, x.dtype, keep_graph=False)
    torch.testing.assert_close(fused, expected, rtol=TOLERANCE, atol=TOLERANCE)
    again, of_x, of_parameters = differentiate(
        windows, x, grad, x.dtype, 0.0, parameters, nullcontext, lambda f, known: None
    )
    assert torch.equal(again, found)
    for ours, theirs in zip([of_x, *of_parameters], gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # sums over all tokens


@pytest.mark.parametrize("case", ["2-D shifted and padded", "3-D shifted"])
def test_attention_dropout_draws_torchvision_s_masks_when_all_windows_are_one_chunk(case: str) -> None:
    norm, attention, x = build(case, attention_dropout=0.3, dropout=0.2)
    torch.manual_seed(5)
    expected = attention(norm(x))
    torch.manual_seed(5)
    found = evaluate(chunks(norm, attention, x, 1000), x.requires_grad_(), x.dtype, keep_graph=False)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    attention.eval()
    expected = attention(norm(x))
    found = evaluate(chunks(norm, attention, x, 2), x, x.dtype, keep_graph=False)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_every_token_is_in_one_window_and_padding_in_none() -> None:
    norm, attention, x = build("3-D shifted and padded")
    index, real, _ = Windows(norm, attention, x).where(0, 2 * 2 * 3 * 2, x.device)
    assert sorted(index[real].tolist()) == list(range(x[..., 0].numel()))
    assert set(index[~real].tolist()) == {x[..., 0].numel()}
