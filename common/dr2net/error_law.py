"""How fast an error grows when a dual-residual sequence is inverted in floating point, and what follows from it.

Backwards, x_{i-2} = (x_i - F_i(x_{i-1}) - alpha x_{i-1}) / beta. Neglecting F', a perturbation obeys
beta e_{i-2} + alpha e_{i-1} - e_i = 0, so per branch it is multiplied by the larger root's magnitude

    g = 2 / (sqrt(alpha^2 + 4 beta) - alpha)        (real roots, beta > 0)

e.g. 10.9 at (1, .1), 2.0 at (.5, .5), 1 at (0, 1). Pure functions of numbers; the error itself is measured in
`precision.py`.
"""

import cmath
import math

import torch

TOLERANCE = 1e-3  # relative gradient error above which float inversion warns and anchors are set


def growth(alpha: float, beta: float) -> float:
    """g: the factor by which an error grows per inverted branch; infinite at beta = 0."""
    if beta == 0:
        return math.inf
    root = cmath.sqrt(alpha * alpha + 4 * beta)
    return max(abs(-alpha + root), abs(-alpha - root)) / (2 * abs(beta))


def predicted_error(alpha: float, beta: float, num_branches: int, dtype: torch.dtype) -> float:
    """Relative gradient error expected of float inversion over `num_branches` branches computed in `dtype`, at most 1.

    eps g^n: an estimate; real networks were measured from 20 times below to 2 times above it.
    """
    g = growth(alpha, beta)
    return 1.0 if g == math.inf else min(1.0, torch.finfo(dtype).eps * math.exp(min(700.0, num_branches * math.log(g))))


def anchor_spacing(alpha: float, beta: float, dtype: torch.dtype, tolerance: float = TOLERANCE) -> int | None:
    """Branches after which both streams must be kept so that the predicted error stays below `tolerance`.

    At least 1 (every branch: checkpointing); None if it never exceeds it.
    """
    g = growth(alpha, beta)
    eps = torch.finfo(dtype).eps
    if eps >= tolerance or g == math.inf:
        return 1
    if g <= 1 + 1e-9:
        return None
    return max(1, int(math.log(tolerance / eps) / math.log(g)))
