"""What a block returns when it is not reversible: a tensor, or something that holds one, as in `return x, None`.

A branch registration says what a block computes, not how it hands that out, and `block(x)[0]` of a tensor would be the
first sample of the batch. So the block's own forward is run once, on fake tensors: no numbers, memory or randomness,
and what it or its hooks would leave behind is set aside.
"""

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

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
    """How the plain block hands out its output; None for the tensor alone, or if fake tensors cannot tell.

    Raises ValueError if it returns more than one tensor, or none.
    """
    if isinstance(x, FakeTensor):
        return None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            _disable_current_modes(),
            _set_aside(block, mode),
        ):
            x, args, named = tree_map(functools.partial(_stand_in, mode), (x, args, named))
            with mode, _autocast_without_cache(x):
                result = type(block).forward(block, x, *args, **named)
    except Exception:  # whatever the block does that fake tensors cannot: the real call decides
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


def _stand_in(mode: FakeTensorMode, value: Any) -> Any:
    """A fake tensor, a copy of what the block could write to (a cache of keys and values), or the value itself."""
    return mode.from_tensor(value) if isinstance(value, Tensor) else copy.deepcopy(value)


@contextmanager
def _set_aside(block: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Inside, hooks do not fire and all tensors are fake; attributes and what they hold are put back."""
    before = [(module, dict(module.__dict__)) for module in block.modules()]
    try:
        for module, attributes in before:
            module.__dict__.update({name: OrderedDict() for name in HOOKS})
            for name in ("_buffers", "_parameters"):
                fake = {key: None if t is None else mode.from_tensor(t) for key, t in attributes[name].items()}
                module.__dict__[name] = fake
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
