"""How much a step computes and moves: FLOPs and bytes, counted on fake tensors, and from them its relative time.

    work = count(step, model, optimizer)
    work.time(rate) / plain.time(rate)        # how much longer than the plain step

Time is taken as FLOPs / speed + bytes / bandwidth: matrix products and convolutions do not overlap with what only moves
memory, and both run at a usual share of the peak. Only the ratio of the two rates matters for an order of methods;
`flops_per_byte` finds it from two steps that were measured. Good to about a tenth: kernels differ, small ones wait for
their launch. A branch in chunks computes what the whole one does, so it is counted whole. Not here: memory
(`memory.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dr2net.cuda_autocast import cuda_autocast
from dr2net.memory import Step, fake_tensors

# FLOPs per byte at which a device computes as long as it moves, at what both usually reach
RATES = {"cuda": 120.0, "cpu": 8.0}


@dataclass(frozen=True)
class Work:
    """Of one training step: multiplications and additions, and bytes that operators read and write."""

    flops: int
    bytes: int

    def time(self, flops_per_byte: float) -> float:
        """In FLOPs: those computed, and those that could have been computed while bytes moved."""
        return self.flops + flops_per_byte * self.bytes


def count(step: Step, model: nn.Module, optimizer: Optimizer | None = None) -> Work:
    """Run `step` once on fake tensors, as `memory.predict` does. Views and bookkeeping are free."""
    counter = _Counter()
    with FakeTensorMode(allow_non_fake_inputs=True), fake_tensors(model, optimizer), cuda_autocast(), counter:
        step()
    return Work(counter.flops, counter.bytes)


def flops_per_byte(plain: Work, plain_seconds: float, other: Work, other_seconds: float) -> float:
    """The rate at which both times are right, from a plain step and one that computes and moves more; 0 or more."""
    ratio = other_seconds / plain_seconds
    moved = ratio * plain.bytes - other.bytes
    computed = other.flops - ratio * plain.flops
    return max(0.0, computed / moved) if moved else 0.0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in _ATTENTION:
            self.flops += _ATTENTION[packet](*args)
        elif packet in flop_registry:
            self.flops += cast(Callable[..., int], flop_registry[packet])(*args, **(kwargs or {}), out_val=result)
        if not func.is_view and func not in _FREE:
            self.bytes += sum(_size(t) for t in _tensors((args, (kwargs or {}).values(), result)))
        return result


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_ATTENTION: dict[Any, Callable[..., int]] = {  # what torch's own table leaves out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_FREE = {torch.ops.prim.device.default, torch.ops.aten.detach.default, torch.ops.aten.empty.memory_format}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, str):
            continue
        elif hasattr(value, "__iter__"):
            yield from _tensors(value)
