"""What a branch uses beside its input and its own parameters: found in its graph, and refused, since nobody would
return its gradient.

    refuse_foreign(f, known, name)        after a branch was recomputed: does its graph reach anything else that trains?
    Reached                               and does it still reach each parameter that it reached in forward?
    caught(name, tensor)                  in place of what the first run saved: somebody differentiates through that
    refuse_arguments(values, name)        before it is recorded: objects that remember would be written to twice
    with hooks_suspended(parameters)      a user's hooks on parameters run once, on the gradient that autograd sums

Not here: buffers, which may not move twice (`module_state.py`), randomness (`rng.py`).
"""

import enum
import types
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

WRAPPERS = (
    "FullyShardedDataParallel, DataParallel and torch.func.functional_call put other tensors in the place of "
    "parameters: use DistributedDataParallel, or fully_shard on whole blocks or the whole model"
)
PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum, slice, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    *(type, types.FunctionType, types.BuiltinFunctionType),
)


def refuse_foreign(f: Tensor, known: Iterable[Tensor], name: str) -> set[int]:
    """RuntimeError if the graph of `f`, what branch `name` computed, reaches a leaf that is not among `known`.

    Tensors of `known` that are no leaves are not looked behind. Returns the ids of the leaves.
    """
    known = list(known)
    ids = {id(tensor) for tensor in known}
    leaves = _leaves(f, {(tensor.grad_fn, tensor.output_nr) for tensor in known if tensor.grad_fn is not None})
    for leaf in leaves:
        if id(leaf) not in ids:
            raise RuntimeError(
                f"branch {name} uses a tensor that trains, of shape {tuple(leaf.shape)}, which none of its modules "
                "holds, so its gradient would be lost. Name what holds it where the branch is registered, as in "
                f"Branch(..., modules=(block.mlp, model.gate)). {WRAPPERS}"
            )
    return {id(leaf) for leaf in leaves}


def _leaves(f: Tensor, edges: Container[Any] = ()) -> list[Tensor]:
    """Those that the graph of `f` reaches, not looking behind `edges`."""
    ends, seen, leaves = [f.grad_fn], set(), []
    while ends:
        node = ends.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of AccumulateGrad
        if isinstance(variable, Tensor):
            leaves.append(variable)
        ends += [following for following, number in node.next_functions if (following, number) not in edges]
    return leaves


class Reached:
    """The leaves that a branch's graph, as a whole or in parts, reaches in forward, and again in recomputation."""

    def __init__(self) -> None:
        self.before: set[int] = set()  # ids
        self.now: set[int] = set()

    def note(self, f: Tensor) -> None:
        """In forward."""
        self.before.update(id(leaf) for leaf in _leaves(f))

    def compare(self, f: Tensor, known: Iterable[Tensor], name: str) -> None:
        """In recomputation; RuntimeError as `refuse_foreign`."""
        self.now |= refuse_foreign(f, known, name)

    def refuse_lost(self, parameters: Sequence[nn.Parameter], name: str) -> None:
        """RuntimeError for a parameter that forward used and the recomputation did not: it would get no gradient."""
        lost, self.now = self.before - self.now, set()
        _refuse((p for p in parameters if id(p) in lost), name)

    def refuse_frozen(self, parameters: Sequence[nn.Parameter], name: str) -> None:
        """RuntimeError for a parameter that trained in forward and does not now, before it is recomputed."""
        _refuse((p for p in parameters if not p.requires_grad), name)


def _refuse(lost: Iterable[nn.Parameter], name: str) -> None:
    for parameter in lost:
        raise RuntimeError(
            f"a parameter of branch {name}, shape {tuple(parameter.shape)}, trained in forward and would get no "
            "gradient now: it was frozen, replaced or moved between forward and backward. Do that before forward or "
            "after backward"
        )


def caught(name: str, tensor: Tensor) -> Tensor:
    """In place of what the first run of a branch saved: that is differentiated only through a tensor caught in it."""
    raise RuntimeError(
        f"a loss depends on a tensor caught inside branch {name} of a reversible sequence (by a hook, say), whose "
        "gradient would not reach the layers before it. Use the output of a block, or convert with store=True"
    )


def remembers(arguments: Any) -> bool:
    """Whether there is an object among a block's arguments that may remember its calls, as a cache does."""
    return any(not isinstance(value, (Tensor, *PLAIN)) for value in tree_leaves(arguments))


def refuse_arguments(values: Iterable[Any], name: str) -> None:
    """ValueError for an argument of a block that is neither a tensor nor a plain value."""
    for value in values:
        if not isinstance(value, (Tensor, *PLAIN)):
            raise ValueError(
                f"branch {name} is called with a {type(value).__name__}, which it may change and would change again "
                "when it is recomputed in backward. Train without it (a key-value cache of transformers: "
                "use_cache=False), or run the model under torch.no_grad()"
            )


def refuse_changed_arguments(now: Any, structure: TreeSpec, before: Sequence[Any], name: str) -> None:
    """ValueError if a list or dictionary among a block's arguments is not what it was: it would change once more when
    the branch is recomputed, and what one branch puts there another does not see.
    """
    values, found = tree_flatten(now)
    _, structure = tree_flatten(tree_unflatten(before, structure))  # a torch.Size has become a tuple
    if found != structure or any(a is not b for a, b in zip(values, before, strict=True)):
        raise ValueError(
            f"branch {name} changes a list or dictionary among its arguments; return what it collects, or collect it "
            "with forward hooks on the blocks"
        )


@contextmanager
def hooks_suspended(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, hooks that a user registered on a parameter's gradient do not run.

    A branch's gradients are computed apart and returned to autograd, which runs the hooks, once, on the sum.
    """
    taken = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in taken:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in taken:
            parameter._backward_hooks = hooks
