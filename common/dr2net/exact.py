"""The dual-residual step on a fixed-point grid: inverted bit for bit, at any alpha and any rational 0 < beta <= 1.

The streams are integers n_i; the network sees x_i = n_i * grid. With beta = num / den a rational,

    q_i = round(F_i(x_{i-1}) / grid + alpha n_{i-1})        in floating point, the same in forward and recomputation
    m   = floor(beta n_{i-2})                               n_i = q_i + m
    r   = n_{i-2} - ceil(m / beta)                          what multiplying by beta destroys; stored, packed

    inverse:  m = n_i - q_i        n_{i-2} = ceil(m / beta) + r

The grid is a tensor of powers of two that broadcasts against the stream, one for each row (`grid.py`), and constant
over a run of branches.

Why it is exact. (1) q_i is a deterministic function of n_{i-1} and the grid, so it is recomputed bitwise, however it
was rounded; a checksum per channel finds a branch for which this is not so. Both are final before anything is
computed from them: a grid that the first branch outgrows is replaced, n_0 encoded anew from the floats that entered
and q_1 computed from that n_0, the one which inversion returns. (2) m = floor(beta n) means n in [m/beta,
(m+1)/beta), so 0 <= r < 1/beta: r takes ceil(1/beta) values, ceil(log2(1/beta)) bits, none at beta = 1. (3) Nothing
wraps: every q_i is measured before it is rounded, and |n_i| <= |q_i| + beta |n_{i-2}| + 1, so with |n_0|, |q_i| <=
Q all streams of N branches stay within (Q + 1) min(N/2 + 2, 1 / (1 - beta)), which `limit` keeps inside the integer's
range. All of them are counts of an element's own grid, which it shares with itself two branches ago, so it does not
matter that elements have different ones; a coarser grid only lowers |n_0|. A magnitude is a float, so it is compared
with `limit` rounded down to one. (4) Products below are of a quotient with its divisor's partner, no larger than the
stream, or of two numbers up to 2^11.

The integers have the width of the stream's floats: int32 for float32, int64 for float64. A grid is a power of two, so
scaling by it is exact, and it depends on its own sample only, so a sample's result does not depend on its batch. The
gradient treats rounding as identity. Chunks of a branch are rows of F; they are put together before they are
quantised, so neither they nor the checksum, a sum of integers, know the grid.

Nothing here needs more than a few MiB besides its arguments and results: quantising converts in place, step and inverse
work on slabs of the flattened streams.

Not here: autograd, randomness, who stores what (`reversible.py`).
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dr2net.grid import INTEGER

MANTISSA = {torch.float32: 24, torch.float64: 53}  # bits
DENOMINATOR = 1024  # a float beta is rounded to a multiple of 1/DENOMINATOR; a power of two divides by shifting
WORD = 32  # bits of the words remainders are packed into
SLAB = 2**20  # elements handled at a time: temporaries of a few MiB, which a CPU's cache holds


def rational(beta: float | Fraction) -> Fraction:
    """The beta that is computed with: a Fraction as it is, a float as the nearest multiple of 1/1024.

    Raises ValueError outside [0, 1] and for denominators over 2**11.
    """
    if not isinstance(beta, Fraction) and math.isfinite(beta):
        beta = Fraction(round(float(beta) * DENOMINATOR), DENOMINATOR)
    if not isinstance(beta, Fraction) or not 0 <= beta <= 1 or beta.denominator > 2**11:
        raise ValueError(
            f"exact inversion needs 0 <= beta <= 1 with a denominator of at most 2**11, not {beta}; "
            "use inversion='anchored' or 'float' for other values"
        )
    return beta


def remainder_bits(beta: Fraction) -> int:
    """Bits stored per element and branch: ceil(log2(1/beta)), 0 at beta = 1."""
    values = -(-beta.denominator // beta.numerator)  # ceil(1/beta)
    return (values - 1).bit_length()


def limit(beta: Fraction, num_branches: int, dtype: torch.dtype) -> int:
    """The largest |q_i| allowed, so that no stream of `num_branches` branches can leave its integer type."""
    return int(torch.iinfo(INTEGER[dtype]).max * max(1 - beta, Fraction(2, num_branches + 4))) - 2


def encode(x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Float stream -> (integers, largest magnitude in grid units; NaN where x has one)."""
    scaled = x.detach() / grid
    return scaled.round_().to(INTEGER[x.dtype]), magnitude(scaled)


def checked(grid: Tensor, size: Tensor, largest: int) -> Tensor:
    """The grid, or NaN if a magnitude passed its limit: nothing decoded with it can be mistaken for a result."""
    unit = 2 ** max(0, largest.bit_length() - MANTISSA[size.dtype])  # compared as floats, the limit may not round up
    return torch.where(size <= largest // unit * unit, grid, torch.nan)


def decode(n: Tensor, grid: Tensor) -> Tensor:
    """Integers -> float stream of the grid's dtype."""
    return n.to(grid.dtype).mul_(grid)


def quantise(f: Tensor, x: Tensor, alpha: float, grid: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q_i and its largest magnitude, measured before rounding; f = F_i(x), x = x_{i-1} on the grid. (B, ...) each.

    `out`, of x's dtype and layout, is overwritten and becomes q_i; it may be f.
    """
    # into x's memory layout, so that a rebuilt stream has the layout of the first one and kernels add in the same order
    out = torch.empty_like(x) if out is None or out.stride() != x.stride() else out
    scaled = torch.add(f, x, alpha=alpha, out=out).div_(grid)
    size = magnitude(scaled)
    return scaled.view(INTEGER[x.dtype]).copy_(scaled.round_()), size  # integers in place of floats of the same width


def magnitude(x: Tensor) -> Tensor:
    """max |x| as a scalar tensor; NaN if any element is; 0 if there is none."""
    if x.numel() == 0:
        return x.new_zeros(())
    low, high = torch.aminmax(x)
    return torch.maximum(low.neg(), high)


def step(q: Tensor, previous: Tensor, beta: Fraction, *, keep: bool = True) -> tuple[Tensor, Tensor | None]:
    """n_i from q_i and n_{i-2}, and what `invert` needs: the remainders r, packed; None at beta = 1 or unless `keep`.

    `q`, which lies in memory as `previous` does, is overwritten with n_i.
    """
    if beta == 0:
        return q, None
    if beta == 1:
        return q.add_(previous), None
    bits = remainder_bits(beta)
    words = _words(q, bits) if keep else None
    for columns, n, n_previous in _slabs(q, previous):
        remainder = _step(n, n_previous, beta)
        if words is not None:
            pack(remainder, bits, words[:, columns])
    return q, words


def _step(q: Tensor, previous: Tensor, beta: Fraction) -> Tensor:
    whole, part = _divide(previous, beta.denominator)  # n = den * whole + part
    if beta.numerator == 1:
        q.add_(whole)
        return part
    part.mul_(beta.numerator)
    carry, part = _divide(part, beta.denominator)  # num n = den m + part
    q.add_(whole.mul_(beta.numerator)).add_(carry)
    return _divide_small(part, beta.numerator)


def invert(q: Tensor, following: Tensor, words: Tensor | None, beta: Fraction) -> Tensor:
    """n_{i-2} from q_i, n_i and the packed remainders. `q` is overwritten with it."""
    if beta == 1:
        return torch.sub(following, q, out=q)
    assert words is not None and beta > 0
    for columns, part, n in _slabs(q, following):
        m = torch.sub(n, part, out=part)
        if beta.numerator > 1:
            whole, rest = _divide(m, beta.numerator)
            rest.mul_(beta.denominator).add_(beta.numerator - 1)
            torch.add(whole.mul_(beta.denominator), _divide_small(rest, beta.numerator), out=m)
        else:
            m.mul_(beta.denominator)
        m.add_(unpack(words[:, columns], remainder_bits(beta), m))
    return q


def faintest(n: Tensor) -> Tensor:
    """The least of the samples' largest magnitudes, of n (B, ...); samples that are zero do not count."""
    none = torch.iinfo(n.dtype).max
    if not n.numel():
        return n.new_full((), none)
    inside = tuple(range(1, n.dim()))
    sizes = torch.maximum(n.amin(inside).neg(), n.amax(inside))
    return torch.where(sizes > 0, sizes, none).amin()


def checksum(q: Tensor) -> Tensor:
    """Sum over all but the last dimension, wrapping: differs if a recomputed branch does."""
    return q.reshape(-1, q.shape[-1]).sum(0, dtype=q.dtype)


def pack(values: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Integers 0 <= v < 2**bits of any shape -> int32 words holding exactly `bits` bits each (padded to 32 values).

    Value k of a row of 32 occupies bits [k * bits, (k + 1) * bits) of that row's `bits` words, (bits, rows); `out` are
    such words, zero.
    """
    columns = _columns(values.reshape(-1).to(torch.int32))
    words = _words(values, bits) if out is None else out
    for k, column in enumerate(columns):
        word, offset = divmod(k * bits, WORD)
        if offset + bits < WORD:  # the bits are free and the sign's is not reached: a sum is their union, in one kernel
            words[word].add_(column, alpha=1 << offset)
        else:
            words[word].bitwise_or_(column << offset)
        if offset + bits > WORD:
            words[word + 1].bitwise_or_(column >> (WORD - offset))
    return words


def unpack(words: Tensor, bits: int, like: Tensor) -> Tensor:
    """The inverse of `pack`: values in the shape and dtype of `like`."""
    columns = words.new_empty(WORD, words.shape[1])
    for k, column in enumerate(columns):
        word, offset = divmod(k * bits, WORD)
        torch.bitwise_right_shift(words[word], offset, out=column)
        if offset + bits > WORD:
            low = WORD - offset
            column.bitwise_and_((1 << low) - 1).bitwise_or_(words[word + 1] << low)
    columns.bitwise_and_((1 << bits) - 1)
    return columns.reshape(-1)[: like.numel()].reshape(like.shape).to(like.dtype)


def _words(values: Tensor, bits: int) -> Tensor:
    return torch.zeros(bits, -(-values.numel() // WORD), dtype=torch.int32, device=values.device)


def _slabs(*streams: Tensor) -> Iterator[tuple[Any, ...]]:
    """Slabs of tensors that lie in memory alike, without gaps: the columns of their words, then a flat view of each."""
    assert len({_layout(stream) for stream in streams}) == 1
    size = streams[0].numel()
    flat = [stream.as_strided((size,), (1,)) for stream in streams]
    starts: Sequence[int] = range(0, size, SLAB)
    if isinstance(streams[0], FakeTensor):  # nothing to compute, and all slabs but the last are alike
        starts = sorted({0, *starts[-1:]})
    for start in starts:
        stop = min(start + SLAB, size)
        yield slice(start // WORD, -(-stop // WORD)), *(view[start:stop] for view in flat)


def _layout(stream: Tensor) -> tuple[tuple[int, int], ...]:
    """Sizes and strides; those of dimensions of one element, which mean nothing and differ freely, left out."""
    return tuple((size, stride) for size, stride in zip(stream.shape, stream.stride(), strict=True) if size != 1)


def _columns(flat: Tensor) -> Tensor:
    """(n,) -> (32, ceil(n / 32)), padded with zeros."""
    padding = -len(flat) % WORD
    return (torch.nn.functional.pad(flat, (0, padding)) if padding else flat).view(WORD, -1)


def _divide(n: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Floor division with remainder, both new tensors; by shifting where the divisor is a power of two."""
    if divisor & (divisor - 1) == 0:
        return n >> (divisor.bit_length() - 1), n & (divisor - 1)
    quotient = torch.div(n, divisor, rounding_mode="trunc")  # three times as fast as "floor"
    part = torch.sub(n, quotient, alpha=divisor)
    negative = part >> torch.iinfo(part.dtype).bits - 1  # -1 where truncation went up, else 0
    return quotient.add_(negative), part.sub_(negative, alpha=divisor)


def _divide_small(n: Tensor, divisor: int) -> Tensor:
    """Floor division of integers 0 <= n < 2^23, exact in float32, whose quotient errs by less than 1 / divisor."""
    return n.to(torch.float32).div_(divisor).floor_().to(n.dtype)
