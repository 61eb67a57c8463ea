"""One dual-residual step in floating point, forward and inverse, as pure functions (Dr2Net, CVPR 2024, Eq. 1).

The paper writes the step on two streams,

    x_i = F_i(x_{i-1}) + alpha x_{i-1} + y_{i-1}        y_i = beta x_{i-1}        y_0 = beta x_0,

which is the second-order recurrence

    x_i = F_i(x_{i-1}) + alpha x_{i-1} + beta x_{i-2}   x_{-1} = x_0.

This code carries the pair (x_{i-1}, x_{i-2}), named `x` and `previous`, instead of (x, y): the same memory, one
multiplication and one rounding less, and y_i = beta * previous wherever somebody wants to see it.

    alpha = 1, beta = 0   the pretrained network, bit for bit
    alpha = 0, beta = 1   Re2TAL's rewired network ("hard" reversible)

Not here: fixed-point arithmetic (`exact.py`), autograd (`node.py`), how errors grow (`error_law.py`).
"""

import torch
from torch import Tensor


def step(f: Tensor, x: Tensor, previous: Tensor, alpha: float, beta: float) -> Tensor:
    """x_i from f = F_i(x_{i-1}), x = x_{i-1} and previous = x_{i-2}; all of one shape, x and previous of one dtype.

    Differentiable; no argument is changed. At (1, 0) the result is bitwise f + x.
    """
    following = torch.add(f, x, alpha=alpha) if alpha != 0 else f.to(x.dtype)
    return torch.add(following, previous, alpha=beta) if beta != 0 else following


def sketch(f: Tensor) -> Tensor:
    """What tells a recomputed branch from another: the rows of f, along its last dimension, summed with fixed weights.

    f: (..., C); returns (C,). |sketch(a) - sketch(b)| / |sketch(b)| estimates |a - b| / |b| (random projection).
    """
    rows = f.detach().reshape(-1, f.shape[-1])
    number = torch.arange(len(rows), device=f.device)
    weights = ((number * 0x9E3779B1 >> 8) & 0xFFFF).to(f.dtype) / 0x8000 - 1  # in -1..1, by multiplicative hashing
    with torch.autocast(f.device.type, enabled=False):
        return weights @ rows


def invert(f: Tensor, x: Tensor, following: Tensor, alpha: float, beta: float, out: Tensor | None = None) -> Tensor:
    """x_{i-2} from f = F_i(x_{i-1}), x = x_{i-1} and following = x_i; needs beta != 0.

    `out` may be `following` itself when the caller owns it and needs it no more.
    """
    assert beta != 0, "the step cannot be inverted at beta = 0"
    previous = torch.sub(following, f, out=out) if out is not None else torch.sub(following, f)
    if alpha != 0:
        previous.sub_(x, alpha=alpha)
    return previous.div_(beta)
