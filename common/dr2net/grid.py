"""How fine the grid of a stream of integers is (`exact.py`): one power of two for each row, a token or a position.

    scale of a row = max( 1.48 mean(sqrt |value|)^2, the root mean square of normal values,
                          the median of that over the rows of its sample that are not zero, so that weak rows may grow,
                          largest |value| / room, so that a large value may grow )
    grid           = 2^-17 (float64: 2^-40) scale, rounded down to a power of two

A row has its own grid because one grid for a sample is as coarse as its largest token needs: a token of 1e5 among 196
cost nine tenths of the gradient. The mean of roots and the median hardly see few large values in a row and few large
rows in a sample, as pretrained transformers have them. A row may grow to 4096 scales at least (beta <= 1/2), its
largest value GROWTH-fold; beyond that an overflow is reported.

What shares a grid (`rows_of`): the last dimension, a token's channels, in (B, N, C), (B, H, W, C), (B, T, H, W, C); the
channels of a position in convolutional streams, (B, C, H, W) or (B, C, T, H, W). Where nothing normalises the rows
before they are mixed, as between convolutions, a large row makes its neighbours large, so there a scale is at least
SPREAD times the root mean square of the sample. Where a norm does, tokens weaker than the square root of its epsilon
are noise to it beside stronger ones, and that is the least scale; but if all of a sample is that weak it is no noise,
since nothing else is there, and its grid follows it: what then grows too far is an overflow, not a zero that nobody
asked for. A sample that is zero has no scale and gets OF_ZEROS.

The first branch may add far more than what entered (queries that start near zero). Then the grid is made coarser before
anything depends on it (`coarser`), and the branch runs again.

Nothing here looks at another sample. Not here: the arithmetic on the grid (`exact.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dr2net.branches import Branch

INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
PRECISION_BITS = {torch.float32: 17, torch.float64: 40}  # of a row's scale
EXPONENT = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}  # a float's exponent bits
NORMAL = 1.479  # root mean square of normal values, in squares of the mean root of their magnitudes
GROWTH = 32  # what the largest value that enters, or that the first branch adds, may grow by
OF_ZEROS = 1 / 8  # fine for first branches of .02, and with room for streams of 1000
FAINT = 16  # least scale of a sample that is faint everywhere, in scales of its strongest row; leaves it 13 bits
LEAST = 1e-32  # its grid is still a normal float32
SPREAD = 1 / 128  # with an outlier of 1e4, twelve bottlenecks of gain 1.5 fit in 1/256 and overflow in 1/1024


@dataclass(frozen=True)
class Rows:
    """What shares a grid, and the least scale it has."""

    dim: int = -1  # values along it share a grid
    spread: float = SPREAD  # least scale, in root mean squares of the sample
    faint: float = 0.0  # least scale, in units of the stream, unless all of a sample is weaker
    room: float = 256.0  # the largest value of a row, in scales, is at most this


def rows_of(branches: Sequence[Branch], x: Tensor, largest: int) -> Rows:
    """For a run of branches that x, (B, ...), enters and whose integers are bounded by `largest` (`exact.limit`)."""
    room = largest / 2 ** PRECISION_BITS[x.dtype] / GROWTH
    modules = [m for branch in branches for part in branch.modules for m in part.modules()]
    norms = [m for m in modules if getattr(m, "normalized_shape", None) == (x.shape[-1],)]
    tokens = any(branch.independent == "tokens" for branch in branches)
    if not tokens and any(isinstance(m, nn.modules.conv._ConvNd) and m.in_channels == x.shape[1] for m in modules):
        return Rows(dim=1, room=room)
    if tokens or norms:
        return Rows(
            spread=0.0, faint=math.sqrt(min((getattr(m, "eps", None) or 0.0 for m in norms), default=0.0)), room=room
        )
    return Rows(room=room)


def grid_of(x: Tensor, rows: Rows) -> Tensor:
    """The grid of the entering stream x, (B, ...): its shape but 1 along the dimension of a row; a value per row."""
    if not x.numel():
        return x.detach().sum(rows.dim, keepdim=True)
    magnitudes = x.detach().abs()
    of_largest = magnitudes.amax(rows.dim, keepdim=True).div_(rows.room)
    scale = magnitudes.sqrt_().mean(rows.dim, keepdim=True).square_().mul_(NORMAL)
    of_sample = scale.flatten(1)
    zeros = (of_sample == 0).sum(1, keepdim=True)
    middle = (zeros + (of_sample.shape[1] - zeros - 1) // 2).clamp_(max=of_sample.shape[1] - 1)
    least = of_sample.sort(1).values.gather(1, middle)  # torch.median is not deterministic on CUDA
    least = least.masked_fill_(least == 0, OF_ZEROS)
    if rows.spread:
        mean_square = of_sample.square().mean(1, keepdim=True).clamp_(max=torch.finfo(x.dtype).max)
        least = torch.maximum(least, mean_square.sqrt_().mul_(rows.spread))
    faint = of_sample.amax(1, keepdim=True).mul_(FAINT).clamp_(max=rows.faint)
    least = torch.maximum(least, faint).view(-1, *[1] * (x.dim() - 1))
    return _grid(torch.maximum(torch.maximum(scale, least), of_largest))


def coarser(grid: Tensor, f: Tensor, rows: Rows) -> Tensor | None:
    """A grid that has room for f = F_1(x), (B, ...), too; None if `grid` has it already."""
    if isinstance(f, FakeTensor) or not f.numel():
        return None
    # asked of the batch first, which spares the exact question in ordinary streams; waits for the device
    low, high = torch.aminmax(f)
    if not bool(torch.maximum(low.neg(), high) / rows.room >= grid.amin() * 2 ** PRECISION_BITS[grid.dtype]):
        return None
    new = torch.maximum(grid, _grid(f.to(grid.dtype).abs().amax(rows.dim, keepdim=True).div_(rows.room)))
    return None if torch.equal(new, grid) else new


def _grid(scale: Tensor) -> Tensor:
    # finite, so that huge values are found to overflow instead of rounding to zero
    scale = scale.clamp(min=LEAST, max=torch.finfo(scale.dtype).max)
    power_of_two = (scale.view(INTEGER[scale.dtype]) & EXPONENT[scale.dtype]).view(scale.dtype)  # mantissa cleared
    return power_of_two * 2.0 ** -PRECISION_BITS[scale.dtype]
