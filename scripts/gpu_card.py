"""The card that `check_gpu.py` tries, and how one of its checks is made: within the time, and never the last one.

A check that fails is a line of the table, whatever it fails of, and the next one begins on an empty card. On a CPU
(`--device cpu`) everything runs with small networks: the counted peak stands for the allocator's, and a step that
counts more than the budget stands for one that runs out of memory. Not here: the checks (`gpu_contracts.py`,
`gpu_costs.py`, `gpu_parallel.py`).
"""

import gc
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SMALL_BUDGET = 32 << 20  # bytes of the CPU that plays a card

Row = dict[str, Any]  # of a table; what JSON can hold
Net = tuple[nn.Module, tuple[int, ...]]  # model, input


@dataclass(frozen=True)
class Card:
    """Where the checks run, and how much of it there is."""

    device: str  # "cuda" or "cpu"
    name: str
    budget: int  # bytes that a training may allocate
    small: bool  # tiny networks
    ends: float  # of time.monotonic(); nothing begins after it

    @property
    def peak_is(self) -> str:
        return "the allocator's" if self.device == "cuda" else "counted by dr2net.memory: no allocator's, on a CPU"

    def late(self) -> bool:
        """Whether nothing new may begin."""
        return time.monotonic() > self.ends


def find_card(device: str, small: bool, minutes: float) -> Card:
    """ValueError for a device that is not there, and for large networks on a CPU."""
    ends = time.monotonic() + 60 * minutes
    if device == "cpu":
        if not small:
            raise ValueError("--device cpu is for trying the checks themselves: add --small")
        return Card("cpu", f"cpu {platform.machine()}", SMALL_BUDGET, small, ends)
    if not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU; use --device cpu --small to try the checks")
    free, _ = torch.cuda.mem_get_info()  # after what the context takes, which asking makes
    return Card("cuda", torch.cuda.get_device_name(), free, small, ends)


def attempt(card: Card, names: Row, check: Callable[[], Row]) -> Row:
    """`names` and what the check found, {"ok": bool, ...}; or {"ok": False, "problem": what it died of}.

    {"ok": None, "problem": ...} for one that was not begun, as the time is up.
    """
    if card.late():
        return {**names, "ok": None, "problem": "not begun: the time was up"}
    try:
        found = {**names, **check()}
    except Exception as error:  # a card that is met for the first time may refuse anything, in any way
        found = {**names, "ok": False, "problem": reason_of(error)}
    empty()
    return found


def reason_of(error: Exception) -> str:
    """One line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"


def empty() -> None:
    """Give back what nobody refers to."""
    gc.collect()
    torch.cuda.empty_cache()


def gradients(model: nn.Module, loss: Callable[[], Tensor], seed: int = 0) -> list[Tensor | None]:
    """Of all parameters, in float32 on the CPU, with the random draws of `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss().backward()
    found = [None if p.grad is None else p.grad.float().cpu() for p in model.parameters()]
    model.zero_grad()
    return found


def relative(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """|found - expected| / |expected| over all, 0 where they are bitwise equal; infinite where one is missing."""
    if [t is None for t in found] != [t is None for t in expected]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    norm = sum(float(b.square().sum()) for _, b in pairs)
    return 0.0 if difference == 0 else math.sqrt(difference / norm) if 0 < norm < math.inf else math.inf


def number(value: float) -> float | str:
    """For strict JSON, which has no infinity."""
    return value if math.isfinite(value) else str(value)
