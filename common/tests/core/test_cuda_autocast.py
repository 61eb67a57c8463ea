"""A card's autocast lists on a CPU: they are those of torch's own header, they act, and they leave no trace."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dr2net import cuda_autocast as lists
from dr2net.cuda_autocast import cuda_autocast
from dr2net.memory import measure, predict

LOW = torch.bfloat16


def in_header(macro: str) -> set[str]:
    """The operators that a list in torch's autocast_mode.h names."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    body = re.search(rf"#define {macro}\(_\)((?:.*\\\n)+.*)", header.read_text())
    assert body is not None
    names = {".".join(re.split(r",\s*", name)) for name in re.findall(r"_\(([\w, ]+)\)", body[1])}
    return {name for name in names if "name" not in name.lower()}  # named tensors, of older versions


@pytest.mark.parametrize(
    ("macro", "ours"),
    [
        ("AT_FORALL_FP32", lists.FLOAT32),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", lists.FLOAT32_RESULT),
        ("AT_FORALL_PROMOTE", lists.WIDEST),
    ],
)
def test_the_lists_are_those_of_torch(macro: str, ours: tuple[str, ...]) -> None:
    theirs = in_header(macro)
    assert len(theirs) > 5
    # the two norms have a macro of their own, and torch 2.6 does not know of the third
    assert theirs <= set(ours) <= theirs | {"norm.Scalar", "norm.ScalarOpt_dim", "rms_norm"}
    assert len(set(ours)) == len(ours)


def dtypes() -> dict[str, torch.dtype]:
    x, weight = torch.randn(2, 4, 8, dtype=LOW), torch.ones(8)
    grid = torch.zeros(1, 2, 2, 2)
    with torch.autocast("cpu", LOW):
        results = {
            "layer_norm": F.layer_norm(x, (8,), weight, weight),
            "softmax": x.softmax(-1),
            "softmax, asked for": x.softmax(-1, dtype=LOW),
            "sum": x.sum(),
            "square": x**2,
            "norm": x.norm(),
            "upsample": F.interpolate(x[None], scale_factor=2),
            "cross entropy": F.cross_entropy(x[0], torch.tensor([1, 2, 3, 0])),
            "grid sample": F.grid_sample(x[None], grid.to(LOW), align_corners=False),
            "grid sample, mixed": F.grid_sample(x[None], grid, align_corners=False),
            "gelu": F.gelu(x),
            "mean": x.mean(),
            "linear": F.linear(x.float(), torch.ones(3, 8)),
        }
    return {name: result.dtype for name, result in results.items()}


def test_operators_have_the_dtypes_that_they_have_on_a_card_and_afterwards_their_own_again() -> None:
    before = dtypes()
    with cuda_autocast():
        found = dtypes()
        with cuda_autocast():
            assert dtypes() == found
        assert dtypes() == found
    low = {"softmax, asked for", "grid sample", "gelu", "mean", "linear"}
    assert found == {name: LOW if name in low else torch.float32 for name in before}
    assert dtypes() == before and before["layer_norm"] == before["softmax"] == LOW
    with pytest.raises(ZeroDivisionError), cuda_autocast():
        raise ZeroDivisionError
    assert dtypes() == before


def test_gradients_pass_through_the_operators_in_float32() -> None:
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(8), torch.randn(4, 8, dtype=LOW)

    def gradient() -> Tensor:
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", LOW):
            loss = norm(own).square().sum()
        return torch.autograd.grad(loss, own)[0]

    with cuda_autocast():
        found = gradient()
    expected = torch.autograd.grad(norm(wide := x.float().requires_grad_()).square().sum(), wide)[0]
    assert found.dtype == LOW and torch.equal(found, expected.to(LOW))


def test_a_prediction_follows_the_card_unless_it_is_for_this_cpu() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64))

    def step() -> None:
        with torch.autocast("cpu", LOW):
            output = model(torch.randn(1000, 64))
        output.float().mean().backward()

    here, on_a_card = predict(step, model, like="cpu"), predict(step, model)
    assert here.peak == pytest.approx(measure(step, model).peak, rel=0.01)
    assert on_a_card.stored > 1.2 * here.stored  # what the norm returns, and GELU keeps, is float32
    with cuda_autocast():
        assert measure(step, model).peak == pytest.approx(on_a_card.peak, rel=0.03)
