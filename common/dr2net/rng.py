"""Record and replay what a branch draws at random, without leaving a trace in the global generators.

`record` takes the state before a branch runs; `replay` runs the branch again on that state and puts the generators back
to where they were. A branch that drew nothing keeps no state. Not here: seeding (the training engine does that).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

States = dict[str, Tensor]


def record(like: Tensor) -> States:
    """States of the generators that a branch on `like`'s device may use: the CPU's and that device's."""
    if isinstance(like, FakeTensor):  # shapes only; there is nothing to draw
        return {}
    states = {"cpu": torch.get_rng_state()}
    if like.device.type not in ("cpu", "meta"):
        states[str(like.device)] = torch.get_device_module(like.device).get_rng_state(like.device)
    return states


def drawn(before: States, like: Tensor) -> States | None:
    """`before` if anything was drawn since, else None."""
    now = record(like)
    return before if any(not torch.equal(now[device], state) for device, state in before.items()) else None


@contextmanager
def replay(states: States | None, like: Tensor) -> Iterator[None]:
    """Inside, the generators of `like`'s device stand at `states`; afterwards they stand where they stood before."""
    if states is None:
        yield
        return
    now = record(like)
    restore(states)
    try:
        yield
    finally:
        restore(now)


def restore(states: States) -> None:
    """Put the generators at `states`."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
