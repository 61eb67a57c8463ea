"""The fixed-point step: packing, number format and bitwise inversion, over random numbers (hypothesis)."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dr2net import exact
from dr2net.grid import INTEGER, Rows, grid_of

BETAS = st.builds(
    lambda numerator, denominator: Fraction(min(numerator, denominator), denominator),
    st.integers(1, 2**11),
    st.integers(1, 2**11),
)
DTYPES = st.sampled_from([torch.float32, torch.float64])
QUICK = settings(max_examples=200, deadline=None)


def integers(seed: int, shape: tuple[int, ...], bound: int, dtype: torch.dtype) -> torch.Tensor:
    """Uniform in [-bound, bound], with the bounds and the values around zero among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-bound, bound + 1, shape, generator=generator, dtype=torch.int64).flatten()
    extremes = torch.tensor([-bound, bound, 0, -1, 1])[: values.numel()]
    values[: len(extremes)] = extremes
    return values.view(shape).to(INTEGER[dtype])


@QUICK
@given(st.integers(1, 15), st.integers(0, 200), st.integers(0, 2**31))
def test_unpack_undoes_pack_in_exactly_the_bits_asked_for(bits: int, size: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    words = exact.pack(values, bits)
    assert words.numel() * 32 == bits * 32 * math.ceil(size / 32)
    assert torch.equal(exact.unpack(words, bits, values), values)


@pytest.mark.parametrize("bits", range(1, 16))
def test_pack_keeps_the_largest_value(bits: int) -> None:
    values = torch.full((3, 37), 2**bits - 1, dtype=torch.int64)
    assert torch.equal(exact.unpack(exact.pack(values, bits), bits, values), values)


@given(BETAS)
def test_remainder_bits_are_the_smallest_that_hold_it(beta: Fraction) -> None:
    # 0 <= r < 1/beta takes ceil(1/beta) values
    values = math.ceil(1 / beta)
    bits = exact.remainder_bits(beta)
    assert 2**bits >= values and (bits == 0 or 2 ** (bits - 1) < values)


@pytest.mark.parametrize(("beta", "bits"), [(1, 0), (0.7, 1), (0.5, 1), (0.4, 2), (0.1, 4), (1 / 64, 6), (1 / 100, 7)])
def test_bits_of_common_coefficients_are_those_of_the_method(beta: float, bits: int) -> None:
    assert exact.remainder_bits(exact.rational(beta)) == bits == math.ceil(math.log2(1 / beta))


@QUICK
@given(BETAS, DTYPES, st.integers(1, 48), st.integers(0, 2**31), st.floats(0, 1))
def test_invert_undoes_step_bit_for_bit_up_to_the_limit(beta, dtype, num_branches, seed, share) -> None:
    bound = int(exact.limit(beta, num_branches, dtype) * share)
    bound = min(bound, 2**62)
    previous, q = (integers(seed + i, (2, 3, 5), bound, dtype) for i in range(2))
    following, words = exact.step(q.clone(), previous, beta)
    expected = [int(a) + math.floor(beta * int(b)) for a, b in zip(q.flatten(), previous.flatten(), strict=True)]
    assert following.flatten().tolist() == expected  # against Python's unbounded integers
    assert (words is None) == (beta == 1) and (words is None or len(words) == exact.remainder_bits(beta))
    assert torch.equal(exact.invert(q.clone(), following, words, beta), previous)


@pytest.mark.parametrize("beta", [Fraction(1, 8), Fraction(51, 512), Fraction(3, 4)])
@pytest.mark.parametrize("size", [(2, 3, 5), (3, 8, 32), (1, 96)])
def test_slabs_change_nothing_in_any_memory_layout(monkeypatch, beta: Fraction, size: tuple[int, ...]) -> None:
    previous, q = (integers(i, size, 10**6, torch.float32).transpose(0, -1) for i in range(2))
    following, words = exact.step(q.clone(), previous, beta)
    monkeypatch.setattr(exact, "SLAB", 64)
    again, in_slabs = exact.step(q.clone(), previous, beta)
    assert torch.equal(again, following) and in_slabs.shape == words.shape
    assert torch.equal(exact.invert(q.clone(), following, in_slabs, beta), previous)
    assert exact.step(q.clone(), previous, beta, keep=False)[1] is None


@settings(max_examples=60, deadline=None)
@given(BETAS, DTYPES, st.integers(1, 40), st.integers(0, 2**31))
def test_no_stream_wraps_when_every_branch_is_at_the_limit(beta, dtype, num_branches, seed) -> None:
    bound = exact.limit(beta, num_branches, dtype)
    signs = torch.randint(0, 2, (num_branches, 4), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    signs[:, 0], signs[:, 1] = 1, -1  # the worst: always the same sign
    n = n_previous = (signs[0].to(INTEGER[dtype]) * bound)[None]
    unbounded = previous = [int(v) for v in n[0]]
    for i in range(num_branches):
        q = (signs[i].to(INTEGER[dtype]) * bound)[None]
        unbounded, previous = [int(a) + math.floor(beta * b) for a, b in zip(q[0], previous, strict=True)], unbounded
        following, _ = exact.step(q, n_previous, beta)
        n, n_previous = following, n
        assert n[0].tolist() == unbounded


@QUICK
@given(DTYPES, st.floats(-30, 30), st.integers(0, 2**31))
def test_a_value_is_rounded_once_by_half_a_unit_at_most(dtype, log_scale: float, seed: int) -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2.0**log_scale
    grid = grid_of(x, Rows())
    n, size = exact.encode(x, grid)
    assert float(size) == int(n.abs().max())
    assert ((exact.decode(n, grid) - x).abs() <= grid / 2).all()


@settings(max_examples=500, deadline=None)
@given(BETAS, DTYPES, st.integers(1, 200))
def test_no_magnitude_above_the_limit_passes_for_one_below(beta, dtype, num_branches: int) -> None:
    bound = exact.limit(beta, num_branches, dtype)
    size, grid = torch.tensor(float(bound), dtype=dtype), torch.ones(1, dtype=dtype)
    passing = size if int(size) <= bound else torch.nextafter(size, torch.zeros_like(size))
    above = torch.nextafter(passing, torch.full_like(size, math.inf))
    assert int(passing) <= bound < int(above)
    assert not exact.checked(grid, passing, bound).isnan()
    assert exact.checked(grid, above, bound).isnan()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_seen_in_the_size(value: float) -> None:
    x = torch.randn(2, 4)
    x[1, 2] = value
    assert not math.isfinite(float(exact.encode(x, grid_of(x, Rows()))[1]))
    grid = grid_of(torch.randn(2, 4), Rows())
    assert not math.isfinite(float(exact.quantise(x, torch.zeros(2, 4), 1.0, grid)[1]))


def test_huge_values_are_not_lost() -> None:
    x = torch.full((1, 4), 1e25)  # its square is infinite
    grid = grid_of(x, Rows())
    assert torch.allclose(exact.decode(exact.encode(x, grid)[0], grid), x)


@pytest.mark.parametrize("beta", [-0.1, 1.01, float("nan"), Fraction(1, 2**11 + 1)])
def test_a_coefficient_that_cannot_be_inverted_is_refused(beta: float | Fraction) -> None:
    with pytest.raises(ValueError):
        exact.rational(beta)


def test_the_checksum_differs_if_one_unit_of_one_value_does() -> None:
    q = integers(0, (2, 5, 8), 10**6, torch.float32)
    other = q.clone()
    other[1, 2, 3] += 1
    assert not torch.equal(exact.checksum(q), exact.checksum(other))
