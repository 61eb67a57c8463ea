"""What a block returns when it is not reversible: a tensor, or something that holds one, as in `return x, None`, or
in `return x, mask` where the mask is an argument.

A branch registration says what a block computes, not how it hands that out, and `block(x)[0]` of a tensor would be the
first sample of the batch. So the block's own forward is run once, on fake tensors (no numbers, memory or randomness)
if it can be, and what it or its hooks would leave behind is set aside. Blocks of other libraries are not asked.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from dr2net import rng

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Returned:
    """`leaves` in `structure`: `position` is the block's output, `given` are arguments handed on (position here, and
    among the leaves of the block's arguments after x), `more` other tensors (`handed_out.py`)."""

    leaves: tuple[Any, ...]
    structure: TreeSpec
    position: int
    given: tuple[tuple[int, int], ...] = ()
    more: tuple[int, ...] = ()

    @property
    def has_numbers(self) -> bool:
        """It holds numbers, which may depend on those among the arguments (the size of an image)."""
        return any(isinstance(leaf, int) and not isinstance(leaf, bool) for leaf in self.leaves)

    def put(self, output: Tensor, args: tuple, named: dict[str, Any], more: Sequence[Any] = ()) -> Any:
        """What the block called with these arguments after x returns, if `output` is its output."""
        leaves = list(self.leaves)
        leaves[self.position] = output
        for position, value in zip(self.more, more, strict=True):
            leaves[position] = value
        if self.given:
            arguments = tree_leaves((args, named))
            for position, argument in self.given:
                leaves[position] = arguments[argument]
        return tree_unflatten(leaves, self.structure)


def kind_of(args: tuple, named: dict[str, Any], *, numbers: bool = False) -> str:
    """Two calls of a block with arguments of the same kind return the same form; `numbers`: and the same numbers in it,
    of which there are many kinds."""
    leaves, structure = tree_flatten((args, named))
    shown = int | str | None if numbers else bool | str | None
    plain = ["tensor" if isinstance(v, Tensor) else repr(v) if isinstance(v, shown) else type(v) for v in leaves]
    return f"{structure} {plain}"


def form_of(
    result: Any, x: Tensor, args: tuple, named: dict[str, Any], block: nn.Module, *, more: bool = False
) -> Returned | None:
    """How `result`, which the block returned for x and these arguments, holds its output; None for the tensor alone.

    Raises ValueError if its first tensor that is no argument is not of x's shape, or, without `more`, if there are
    others than that.
    """
    if isinstance(result, Tensor):
        return None
    leaves, structure = tree_flatten(result)
    arguments = {
        id(v): i for i, v in enumerate(tree_leaves((args, named))) if not isinstance(v, bool | int | str | None)
    }
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    new = [i for i in tensors if id(leaves[i]) not in arguments]
    if (len(new) != 1 and not (more and new)) or leaves[new[0]].shape != x.shape or new[0] != tensors[0]:
        raise ValueError(
            f"{type(block).__name__} returns a {type(result).__name__} with {len(new)} tensors, and a reversible "
            "block knows only its output, one tensor of its input's shape; let its forward return that alone"
        )
    given = tuple((i, arguments[id(leaf)]) for i, leaf in enumerate(leaves) if id(leaf) in arguments)
    handed_on = {i for i, _ in given}
    kept = tuple(None if i in new or i in handed_on else leaf for i, leaf in enumerate(leaves))
    return Returned(kept, structure, new[0], given, tuple(new[1:]))


def others_of(result: Any, args: tuple, named: dict[str, Any]) -> list[Tensor]:
    """The tensors that a block returns behind its output and did not get, in the order of `Returned.more`."""
    given = {id(leaf) for leaf in tree_leaves((args, named))}
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in given][1:]


def returned(block: nn.Module, x: Tensor, args: tuple, named: dict[str, Any], *, more: bool = False) -> Returned | None:
    """How the plain block hands out its output; None for the tensor alone. ValueError as `form_of`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        if isinstance(x, FakeTensor):  # no numbers and no memory as it is
            arguments, result = _plain(block, (x, args, named), nullcontext(), lambda tensor: tensor)
        else:
            arguments, result = _plain(block, (x, args, named), mode, mode.from_tensor)
    except Exception:  # the block looks at numbers (`if mask.any()`), or uses tensors that cannot be fake
        try:
            with rng.replay(rng.record(x), x):
                arguments, result = _plain(block, (x, args, named), nullcontext(), torch.clone)
        except Exception:  # the pass meets what is wrong, and says it by the name of the branch
            return None
    x, args, named = arguments
    return form_of(result, x, args, named, block, more=more)


def _plain(
    block: nn.Module, arguments: tuple, mode: AbstractContextManager[Any], stand_in: Callable[[Tensor], Tensor]
) -> Any:
    """Stand-ins for the arguments, and what the block's class returns for them, computed inside `mode`: of tensors, and
    copies of other objects to which the block could write (a cache of keys and values)."""
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        _disable_current_modes(),
        _set_aside(block, stand_in),
    ):
        arguments = tree_map(lambda v: stand_in(v) if isinstance(v, Tensor) else copy.deepcopy(v), arguments)
        x, args, named = arguments
        with mode, _autocast_without_cache(x):
            return arguments, type(block).forward(block, x, *args, **named)


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
