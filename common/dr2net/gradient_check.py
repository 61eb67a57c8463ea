"""Measure the error of a reversible gradient against the one from stored activations, on the model and batch at hand.

Both gradients come from the same arithmetic, the same coefficients and the same random draws; only how activations come
back differs. Not here: the law that predicts the error (`error_law.py`).
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dr2net import rng
from dr2net.convert import sequences
from dr2net.sequence import ReversibleSequence


@dataclass(frozen=True)
class GradientError:
    """|g - g_stored| / |g_stored| over all trainable parameters, and per group (a block, or a part outside the
    blocks)."""

    overall: float
    groups: dict[str, float]


def gradient_error(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> GradientError:
    """Relative error of the gradient of `loss(model, batch)`, a scalar, in a converted model.

    Two forward and backward passes, one of them with all activations stored, so choose a small batch. Leaves no trace:
    .grad, buffers, random generators and the way of inversion stay as they were. A gradient that is not finite gives
    infinity. Raises ValueError if the model is not converted, nothing is trainable, or no reversible block ran.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient, so there is no gradient error")
    of_sequences = sequences(model)
    stored_before = [sequence.store for sequence in of_sequences]
    like = next(iter(parameters.values()))
    states = rng.record(like)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = []
    try:
        for store in (True, False):
            for sequence in of_sequences:
                sequence.store, sequence.ran = store, 0
            with torch.enable_grad(), rng.replay(states, like):
                value = loss(model, batch)
                _refuse_idle(of_sequences)
                gradients.append(torch.autograd.grad(value, list(parameters.values()), allow_unused=True))
            _restore(buffers)
    finally:
        _restore(buffers)
        for sequence, store in zip(of_sequences, stored_before, strict=True):
            sequence.store = store

    blocks = [
        f"{name}.{child}".lstrip(".")
        for name, m in model.named_modules()
        if m in of_sequences
        for child, _ in m.named_children()
    ]
    differences, norms = defaultdict(float), defaultdict(float)
    for name, reference, ours in zip(parameters, *gradients, strict=True):
        group = next((block for block in blocks if name.startswith(block + ".")), name.rsplit(".", 1)[0])
        zero = torch.zeros_like(parameters[name])
        reference, ours = ((zero if g is None else g).detach().double() for g in (reference, ours))
        differences[group] += (ours - reference).square().sum().item()
        norms[group] += reference.square().sum().item()
    groups = {group: _relative(differences[group], norms[group]) for group in norms}
    return GradientError(_relative(sum(differences.values()), sum(norms.values())), groups)


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
