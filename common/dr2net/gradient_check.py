"""Measure the error of a reversible gradient against the one from stored activations, on the model and batch at hand.

Both gradients come from the same arithmetic, the same coefficients and the same random draws; only how activations come
back differs. With exact inversion that arithmetic has a grid, which both share; what the grid costs is a second number,
against float streams with stored activations. Not here: the law that predicts the error (`error_law.py`).
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dr2net import exact, rng
from dr2net.convert import sequences
from dr2net.sequence import ReversibleSequence

# The cost of the grid that is worth a warning: more than a ReLU that falls on the other side of zero (7e-3 was seen, in
# float32 without a grid too), and more than the rounding of the branches.
TOLERANCES, EPSILONS = 10, 10


@dataclass(frozen=True)
class GradientError:
    """|g - g_stored| / |g_stored| over all trainable parameters, and per group (a block, or a part outside the
    blocks).

    grid: |g - g_float| / |g_float| with g_float from float streams, activations stored: what rounding to the grid of
    the exact inversion costs. It contains the rounding of the branches themselves, about 1e-6 where they compute in
    float32 and 1e-2 in bfloat16. None for the other inversions.
    """

    overall: float
    groups: dict[str, float]
    grid: float | None = None


def gradient_error(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> GradientError:
    """Relative error of the gradient of `loss(model, batch)`, a scalar, in a converted model.

    Two forward and backward passes, three with exact inversion, all but one with all activations stored, so choose a
    small batch. Leaves no trace: .grad, buffers, random generators and the way of inversion stay as they were. A
    gradient that is not finite gives infinity. Warns if the grid of the exact inversion costs more than ten times the
    tolerance. Raises ValueError if the model is not converted, nothing is trainable, or no reversible block ran.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient, so there is no gradient error")
    of_sequences = sequences(model)
    before = [(s, s.store, s.inversion, s.coefficients.beta) for s in of_sequences]
    on_a_grid = any(sequence.inversion == "exact" for sequence in of_sequences)
    like = next(iter(parameters.values()))
    states = rng.record(like)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = []
    try:
        for store, floats in ((True, False), (False, False), (True, True))[: 3 if on_a_grid else 2]:
            for sequence in of_sequences:
                sequence.store, sequence.ran = store, 0
                if floats and sequence.inversion == "exact":
                    sequence.inversion, sequence.coefficients.beta = "float", exact.rational(sequence.beta)
            with torch.enable_grad(), rng.replay(states, like):
                value = loss(model, batch)
                _refuse_idle(of_sequences)
                gradients.append(torch.autograd.grad(value, list(parameters.values()), allow_unused=True))
            _restore(buffers)
    finally:
        _restore(buffers)
        for sequence, store, inversion, beta in before:
            sequence.store, sequence.inversion, sequence.coefficients.beta = store, inversion, beta

    blocks = [
        f"{name}.{child}".lstrip(".")
        for name, m in model.named_modules()
        if m in of_sequences
        for child, _ in m.named_children()
    ]
    groups = {
        name: next((b for b in blocks if name.startswith(b + ".")), name.rsplit(".", 1)[0]) for name in parameters
    }
    reference, ours, *in_floats = gradients
    overall, of_groups = _errors(ours, reference, list(groups.values()))
    if not in_floats:
        return GradientError(overall, of_groups)
    grid, _ = _errors(ours, in_floats[0], list(groups.values()))
    _warn_of_the_grid(grid, of_sequences)
    return GradientError(overall, of_groups, grid)


def _errors(
    ours: Sequence[Tensor | None], reference: Sequence[Tensor | None], groups: Sequence[str]
) -> tuple[float, dict[str, float]]:
    """Relative distance of two gradients, over all and per group; `groups` has the group of each parameter."""
    differences: defaultdict[str, float] = defaultdict(float)
    norms: defaultdict[str, float] = defaultdict(float)
    for group, *pair in zip(groups, ours, reference, strict=True):
        a, b = (0.0 if g is None else g.detach().double() for g in pair)
        differences[group] += float(torch.as_tensor(a - b).square().sum())
        norms[group] += float(torch.as_tensor(b).square().sum())
    found = {group: _relative(differences[group], norms[group]) for group in norms}
    return _relative(sum(differences.values()), sum(norms.values())), found


def _warn_of_the_grid(error: float, of_sequences: Sequence[ReversibleSequence]) -> None:
    tolerance = TOLERANCES * max(sequence.tolerance for sequence in of_sequences)
    bound = max(tolerance, EPSILONS * max(torch.finfo(sequence.computed_in).eps for sequence in of_sequences))
    if not error <= bound:  # also for NaN
        warnings.warn(
            f"the grid of the exact inversion costs {error:.1e} of this gradient, more than {bound:g}: some values of "
            "a stream are far smaller than others that share their grid. The gradient is exact for the network on that "
            "grid; for the network in floats convert with inversion='anchored'",
            stacklevel=3,
        )


def _refuse_idle(of_sequences: list[ReversibleSequence]) -> None:
    """A model that calls parts of its blocks, and not the blocks, is the plain network: no error is no praise."""
    if not any(sequence.ran for sequence in of_sequences):
        raise ValueError(
            f"the loss ran no reversible block of {', '.join(sequence.place for sequence in of_sequences)}: the model "
            "does not call its blocks, but perhaps parts of them; let its forward call each block, as in x = block(x)"
        )


@torch.no_grad()
def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)


def _relative(difference: float, norm: float) -> float:
    if not (difference < float("inf") and norm < float("inf")):  # NaN compares false
        return float("inf")
    return 0.0 if difference == 0 else (difference / norm) ** 0.5 if norm > 0 else float("inf")
