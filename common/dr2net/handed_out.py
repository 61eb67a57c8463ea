"""What a block hands out beside its output, as in `return x, weights`: caught while its branches run.

    with caught(stored=False) as more:      around one step of a block
        hand_out(weights)                   by a branch that says `hands_out=True`
    return output, *more.values()

A branch in chunks hands out a piece a chunk, which are put together along the samples. What is handed out is detached:
a loss that depends on it ends in an error, except with stored activations. Not here: the form in which a block of one's
own hands out its output alone (`returns.py`).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Caught:
    """What the branches of one block have handed out so far."""

    def __init__(self, *, stored: bool) -> None:
        self.stored = stored
        self.pieces: list[tuple[Any, ...]] = []

    def values(self, output: Tensor) -> tuple[Any, ...]:
        """Each value that was handed out beside `output`, the pieces of a tensor put together."""
        return tuple(self._joined(pieces, output) for pieces in zip(*self.pieces, strict=True))

    def _joined(self, pieces: tuple[Any, ...], output: Tensor) -> Any:
        if not isinstance(pieces[0], Tensor):
            return pieces[0]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self.stored or not whole.requires_grad:
            return whole
        # On the way to what trains, so that torch.autograd.grad, too, passes the hook; a leaf's it would not look at.
        handed = whole.detach() + output[:0].sum().to(whole.dtype)
        if handed.requires_grad:
            handed.register_hook(_refuse)
        return handed


class _Open(threading.local):
    """The block that runs in this thread."""

    def __init__(self) -> None:
        self.caught: Caught | None = None


_OPEN = _Open()


@contextmanager
def caught(*, stored: bool) -> Iterator[Caught]:
    """Inside, what branches hand out is collected; outside, as in a recomputation, it is dropped.

    stored: the branches run under plain autograd, so it may be differentiated.
    """
    before, _OPEN.caught = _OPEN.caught, Caught(stored=stored)
    try:
        yield _OPEN.caught
    finally:
        _OPEN.caught = before


def hand_out(values: Sequence[Any]) -> None:
    """By a branch, once each time it runs."""
    if _OPEN.caught is not None:
        _OPEN.caught.pieces.append(tuple(values))


def forget() -> None:
    """What was handed out so far: the branch runs once more."""
    if _OPEN.caught is not None:
        _OPEN.caught.pieces.clear()


def _refuse(_: Tensor) -> None:
    """The gradient of what was handed out."""
    raise RuntimeError(
        "a loss depends on what a reversible block handed out beside its output (attention weights), whose gradient "
        "would not reach the block. Use the output of a block, or convert with store=True"
    )
