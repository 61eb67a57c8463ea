"""One dual-residual step: the paper's two streams, its inverse, its special cases."""

import pytest
import torch

from dr2net import coupling

POINTS = [(1.0, 0.0), (1.0, 0.1), (0.4, 0.7), (0.0, 1.0), (1.0, -1.0)]


def draw(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize(("alpha", "beta"), POINTS)
def test_step_is_the_paper_s_equation_on_two_streams(alpha: float, beta: float) -> None:
    f, x, previous = draw()
    y = beta * previous
    torch.testing.assert_close(coupling.step(f, x, previous, alpha, beta), f + alpha * x + y)


@pytest.mark.parametrize(("alpha", "beta"), POINTS[1:])
@pytest.mark.parametrize("in_place", [False, True])
def test_invert_undoes_step(alpha: float, beta: float, in_place: bool) -> None:
    f, x, previous = draw()
    following = coupling.step(f, x, previous, alpha, beta)
    out = following if in_place else None
    found = coupling.invert(f, x, following, alpha, beta, out)
    assert (found is following) == in_place
    torch.testing.assert_close(found, previous, rtol=1e-12, atol=1e-12)  # division by .1 costs a digit


def test_no_argument_is_changed() -> None:
    tensors = draw()
    kept = [t.clone() for t in tensors]
    following = coupling.step(*tensors, 0.5, 0.5)
    after = following.clone()
    coupling.invert(tensors[0], tensors[1], following, 0.5, 0.5)
    assert all(torch.equal(t, k) for t, k in zip((*tensors, following), (*kept, after), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_one_and_zero_it_is_bitwise_the_residual_connection(dtype: torch.dtype) -> None:
    f, x, previous = draw(torch.float32)
    f = f.to(dtype)
    assert torch.equal(coupling.step(f, x, previous, 1.0, 0.0), x + f)


def test_at_zero_and_one_a_bfloat16_branch_leaves_the_stream_in_float32() -> None:
    f, x, previous = draw(torch.float32)
    assert coupling.step(f.bfloat16(), x, previous, 0.0, 1.0).dtype == torch.float32
    assert coupling.step(f.bfloat16(), x, previous, 0.0, 0.0).dtype == torch.float32


def test_beta_zero_cannot_be_inverted() -> None:
    with pytest.raises(AssertionError, match="beta = 0"):
        coupling.invert(*draw(), 1.0, 0.0)
