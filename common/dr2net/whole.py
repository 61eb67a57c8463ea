"""A block whose type nobody registered, as one branch of a model that was run once (`probe.py`).

    F(x) = block(x) - x        so that x + F(x) is what the block computes, whatever is inside it

The block is called as its class says, and of a tuple or dictionary that it returns the first tensor is block(x); others
are handed out, without a gradient. It may be run sample by sample where that was tried: in evaluation mode the first
and the last sample of a batch alone gave what they gave in it. What a probe found out stands on the block (`Found`), so
that copies and files keep it.

Not here: registered blocks, whose branches are smaller and so need less memory (`branches.py`, `adapters/`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dr2net.beside import Word, argument_names
from dr2net.branches import FOUND, Branch
from dr2net.foreign import PLAIN
from dr2net.handed_out import hand_out
from dr2net.returns import Returned, others_of


@dataclass(frozen=True)
class Found:
    """What a probe found out about a block that stands in a container."""

    reason: str = ""  # why it runs as it is; "" if it can be reversible
    registered: bool = False  # it has branches of its own, and only `begins` is new
    begins: bool = False  # its input is not the output of the block before it, so a run of blocks begins with it
    copies: bool = False  # it changes its input in place, so it gets a copy
    samples: bool = False  # it treats each sample by itself
    beside: dict[str, Word] = field(default_factory=dict)  # the tensors beside x, by the names of the block's arguments
    returns: dict[str, Returned | None] = field(default_factory=dict)  # by `kind_of` its arguments

    def branches(self, block: nn.Module) -> tuple[Branch, ...]:
        """Of a block that is not registered; none if it runs as it is."""
        if self.reason:
            return ()

        def function(x: Tensor, *args: Any, **named: Any) -> Tensor:
            result = type(block).forward(block, x.clone() if self.copies else x, *args, **named)
            y = output_of(result)
            if not isinstance(result, Tensor):
                hand_out(others_of(result, args, named))
            dtype = torch.promote_types(x.dtype, torch.float32)  # the streams': rounding F would move them
            return y.to(dtype) - x.to(dtype)

        cut: Any = {"independent": "samples", "beside": self.beside} if self.samples else {}
        return (Branch("block", function, (block,), whole=True, **cut),)


def output_of(result: Any) -> Tensor:
    """The first tensor of what a block returns."""
    return next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def mark(block: nn.Module, found: Found) -> None:
    """Note on the block what was found out about it."""
    block.__dict__[FOUND] = found


def unmark(block: nn.Module) -> None:
    """Forget it."""
    block.__dict__.pop(FOUND, None)


def samples_apart(block: nn.Module, x: Tensor, args: Sequence[Any], named: dict[str, Any]) -> dict[str, Word] | None:
    """What each tensor beside x is, if the block treats each sample of x by itself; else None.

    Runs the block in evaluation mode on x and on two of its samples, without gradients. None too for a single sample,
    with which it cannot be tried, and where a sample alone is an error.
    """
    batch = len(x)
    words: dict[str, Word] = {}
    for name, value in zip(argument_names(block, args, named), (*args, *named.values()), strict=True):
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if tensors:
            per_sample = all(t.dim() and t.shape[0] in (1, batch) for t in tensors)
            words[name] = "samples" if per_sample else "shared"

    def part(sample: int, word: str | None, value: Any) -> Any:
        cut = word == "samples" and isinstance(value, Tensor) and value.shape[0] == batch
        return value[sample : sample + 1] if cut else value

    def alone(sample: int) -> Tensor:
        names = argument_names(block, args, named)
        values = [
            tree_map(lambda leaf, name=name: part(sample, words.get(name), leaf), value)
            for name, value in zip(names, (*args, *named.values()), strict=True)
        ]
        own = dict(zip(named, values[len(args) :], strict=True))
        return output_of(type(block).forward(block, x[sample : sample + 1].clone(), *values[: len(args)], **own))

    leaves = tree_leaves((args, named))
    if batch < 2 or x.dim() < 2 or not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):  # a cache, say
        return None
    with torch.no_grad(), _in_evaluation(block):
        try:
            together = output_of(type(block).forward(block, x.clone(), *args, **named))
            for sample in (0, batch - 1):
                one, same = alone(sample).float(), together[sample : sample + 1].float()
                eps, f = torch.finfo(together.dtype).eps, same - x[sample : sample + 1].float()
                # other kernels round otherwise; samples that see each other differ by far more
                if not (one - same).norm() <= eps**0.5 / 4 * f.norm() + 16 * eps * same.norm():
                    return None
        except Exception:  # whatever a foreign block does not like about a batch of one
            return None
    return words


@contextmanager
def _in_evaluation(block: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in block.modules()]
    try:
        block.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
