"""The `forward` that a reversible block gets on conversion: however the block is called, it takes part in a pass.

    for block in model.blocks: x = block(x)        model.blocks[i](x)        model.blocks(x)

are the same, since a pass is found by the tensor that it returned last: who hands that tensor to the next block goes on
with it, who hands another to the first block of a run begins a new one. Several passes may be open at a time. The block
stays the module it was, with its class, attributes and hooks. Not here: what a pass does (`reversible.py`).
"""

import inspect
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dr2net.sequence import ReversibleSequence


class Entry:
    """Calls `block` as part of a pass of `sequence`; without a sequence (a block copied alone), as the plain block."""

    def __init__(self, block: nn.Module, sequence: "ReversibleSequence | None", held: tuple[int, int]) -> None:
        self.block = weakref.ref(block)  # both weak: a model that is deleted is freed at once, without a cycle
        self.sequence = None if sequence is None else weakref.ref(sequence)
        self.plain = inspect.unwrap(type(block).forward)  # what the branches stand for
        self.held = held  # see `parts_of`

    @torch.compiler.disable
    def __call__(self, *args: Any, **named: Any) -> Any:
        block = self.block()
        if self.sequence is None and block is not None:
            return type(block).forward(block, *args, **named)
        sequence = None if self.sequence is None else self.sequence()
        if block is None or sequence is None:
            raise ValueError(
                f"the container of this {type(block).__name__} is gone, so it is in no reversible sequence; keep the "
                "converted model, or call dr2net.deconvert(model) before taking blocks out of it"
            )
        if sequence.plain or sequence.generates((args, named)):
            return type(block).forward(block, *args, **named)
        x, args, named = _input(block, args, named)
        return sequence.call_block(block, x, args, named)

    def belongs_to(self, block: nn.Module, sequence: "ReversibleSequence") -> bool:
        """False for what came along with a copy of a block."""
        return self.block() is block and self.sequence is not None and self.sequence() is sequence

    def has_new_parts(self, block: nn.Module) -> bool:
        """Something was put beside the modules and parameters that the block had."""
        return self.held != parts_of(block)

    @property
    def __signature__(self) -> inspect.Signature:
        """For who looks up which arguments the block takes."""
        signature = inspect.signature(cast(Any, type(self.block())).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Entry":
        """Of the copied block, and of the copied sequence if that is being copied too."""
        block = memo.get(id(self.block()))
        sequence = None if self.sequence is None else memo.get(id(self.sequence()))
        return self if block is None else Entry(block, sequence, self.held)

    def __reduce__(self) -> tuple[Any, ...]:
        return Entry, (self.block(), None if self.sequence is None else self.sequence(), self.held)


def parts_of(block: nn.Module) -> tuple[int, int]:
    """How many modules and parameters it holds directly."""
    return len(block._modules), len(block._parameters)


def entry_of(block: nn.Module) -> Entry | None:
    """The Entry that is the block's forward, or that this calls as it says by `__wrapped__`."""
    forward = inspect.unwrap(block.__dict__.get("forward", _input))
    return forward if isinstance(forward, Entry) else None


def _is_exporting() -> bool:
    exporting = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return exporting is not None and exporting()


def first_argument(block: nn.Module, args: tuple, named: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
    """What is x among a block's arguments, and those after it; x may have been passed by name."""
    if not args:
        _, first, *_ = inspect.signature(type(block).forward).parameters  # after self
        if first not in named:
            raise TypeError(f"{type(block).__name__} was called without its input {first!r}")
        return named[first], (), {name: value for name, value in named.items() if name != first}
    return args[0], args[1:], named


def _input(block: nn.Module, args: tuple, named: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """x, and the arguments after it."""
    x, rest, named = first_argument(block, args, named)
    tracing = torch.jit.is_tracing() or _is_exporting() or type(x).__module__.startswith("torch.fx")
    if tracing or not isinstance(x, Tensor):
        raise ValueError(
            f"a reversible {type(block).__name__} "
            + ("cannot be traced or exported" if tracing else f"takes a tensor, not a {type(x).__name__}")
            + "; for the features of a block (create_feature_extractor), look at it: block.register_forward_hook(...); "
            "to trace or export the model, set the coefficients to (1, 0) and call dr2net.deconvert(model)"
        )
    return x, rest, named
