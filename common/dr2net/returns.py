"""What a block returns when it is not reversible: a tensor, or something that holds one, as in `return x, None`.

A branch registration says what a block computes, not how it hands that out, and `block(x)[0]` of a tensor would be the
first sample of the batch. So the block's own forward is run once, on fake tensors (no numbers, memory or randomness)
if it can be, and what it or its hooks would leave behind is set aside. Blocks of other libraries are not asked.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from dr2net import rng

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Returned:
    """`leaves` in `structure`, of which `position` is the block's output."""

    leaves: tuple[Any, ...]
    structure: TreeSpec
    position: int

    def put(self, output: Tensor) -> Any:
        leaves = list(self.leaves)
        leaves[self.position] = output
        return tree_unflatten(leaves, self.structure)


def returned(block: nn.Module, x: Tensor, args: tuple, named: dict[str, Any]) -> Returned | None:
    """How the plain block hands out its output; None for the tensor alone.

    Raises ValueError if it returns more than one tensor, or none.
    """
    if isinstance(x, FakeTensor):
        return None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        result = _plain(block, (x, args, named), mode, mode.from_tensor)
    except Exception:  # the block looks at numbers (`if mask.any()`), or uses tensors that cannot be fake
        try:
            with rng.replay(rng.record(x), x):
                result = _plain(block, (x, args, named), nullcontext(), torch.clone)
        except Exception:  # the pass meets what is wrong, and says it by the name of the branch
            return None
    if isinstance(result, Tensor):
        return None
    leaves, structure = tree_flatten(result)
    tensors = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(tensors) != 1 or leaves[tensors[0]].shape != x.shape:
        raise ValueError(
            f"{type(block).__name__} returns a {type(result).__name__} with {len(tensors)} tensors, and a reversible "
            "block knows only its output, one tensor of its input's shape; let its forward return that alone"
        )
    leaves[tensors[0]] = None
    return Returned(tuple(leaves), structure, tensors[0])


def _plain(
    block: nn.Module, arguments: tuple, mode: AbstractContextManager[Any], stand_in: Callable[[Tensor], Tensor]
) -> Any:
    """What the block's class returns, computed inside `mode` on stand-ins for all tensors, and copies of other objects
    to which the block could write (a cache of keys and values)."""
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        _disable_current_modes(),
        _set_aside(block, stand_in),
    ):
        arguments = tree_map(lambda v: stand_in(v) if isinstance(v, Tensor) else copy.deepcopy(v), arguments)
        x, args, named = arguments
        with mode, _autocast_without_cache(x):
            return type(block).forward(block, x, *args, **named)


@contextmanager
def _set_aside(block: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, hooks do not fire and all tensors are stand-ins; attributes and what they hold are put back."""
    before = [(module, dict(module.__dict__)) for module in block.modules()]
    try:
        for module, attributes in before:
            module.__dict__.update({name: OrderedDict() for name in HOOKS})
            for name in ("_buffers", "_parameters"):
                tensors = {key: None if t is None else stand_in(t) for key, t in attributes[name].items()}
                module.__dict__[name] = tensors
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _autocast_without_cache(x: Tensor) -> AbstractContextManager[Any]:
    """The cache would hand fake weights to the real call."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, torch.get_autocast_dtype(device), enabled=enabled, cache_enabled=False)
