"""The tensors that a block gets beside x: what a branch does with each, so that it can run in chunks all the same.

    Branch("attention", ..., independent="samples", beside={"mask": "samples", "rotary": "shared"})
    Branch("mlp", ..., independent="tokens", beside="unused")

One word for all tensors, or one for each of the block's arguments, by its name in the block's `forward`; it holds for
all tensors in that argument (a tuple of sines and cosines). An argument that is None, a number or a text needs none.

    word        the tensor                                                  a chunk of x gets
    "rows"      has a row for each row of x: x's shape but for the last     the rows of the chunk
                dimension, or that without the batch (positions)
    "samples"   numbers the samples in its first dimension, or has 1 there  those of the chunk
                (attention masks, conditions)
    "shared"    has nothing to do with samples (rotary tables)              all of it
    "unused"    is not looked at by F                                       None in its place

A branch that is independent by tokens runs by samples where a tensor is cut by samples, or has no batch. Gradients of
what is shared are summed over the chunks. Not here: the chunks (`chunks.py`), what nobody declared (it runs as a whole,
and the report of `convert` says so).
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

Word = Literal["rows", "samples", "shared", "unused"]
Beside = Word | Mapping[str, Word | Callable[[Tensor], Word]]  # a function of the tensor: it depends on its shape


class RunsWhole(Exception):
    """A branch cannot be cut; the text says why."""


def check_words(beside: Beside | None, name: str) -> None:
    """ValueError for what is no word of the table above."""
    words = {} if beside is None else {"": beside} if isinstance(beside, str) else beside
    for argument, word in words.items():
        if not callable(word) and word not in get_args(Word):
            of = f" of {argument!r}" if argument else ""
            raise ValueError(f"beside{of} of branch {name!r} must be one of {', '.join(get_args(Word))}, not {word!r}")


def refuse_unknown_arguments(block: nn.Module, name: str, beside: Beside | None) -> None:
    """ValueError if `beside` names an argument that the block's forward does not take."""
    if beside is None or isinstance(beside, str):
        return
    parameters = inspect.signature(type(block).forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    taken = [parameter.name for parameter in parameters]
    for argument in beside:
        if argument not in taken:
            raise ValueError(
                f"{name}: Branch(beside=) names {argument!r}, which the forward of {type(block).__name__} does not "
                f"take; it takes {', '.join(taken[1:])}"
            )


def positional_names(block: nn.Module) -> tuple[str, ...]:
    """The names of the block's arguments after x, in order; the last one holds for all that follow if it has a star."""
    return _positional_names(inspect.unwrap(type(block).forward))


def argument_names(block: nn.Module, args: Sequence[Any], named: dict[str, Any]) -> list[str]:
    """The name of each argument after x: those of `args`, then those of `named`."""
    return [*(_name(index, positional_names(block)) for index in range(len(args))), *named]


@functools.cache
def _positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(forward).parameters.values())[2:]  # after self and x
    starred = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
    return (*(p.name for p in parameters if p.kind in kinds), *starred)


def words_of(
    beside: Beside | None, x: Tensor, args: Sequence[Any], named: dict[str, Any], positional: Sequence[str]
) -> list[Word]:
    """The word for each tensor among the arguments, in the order of tree_flatten((args, named)): "rows" only where its
    rows are x's, "samples" only where it has x's batch; what holds for every sample is "shared".

    RunsWhole for a tensor that nobody declared, or that does not have the shape it was declared to have.
    """
    found: list[Word] = []
    path: Any
    for path, value in tree_flatten_with_path((tuple(args), named))[0]:
        if not isinstance(value, Tensor):
            continue
        name = path[1].key if path[0].idx == 1 else _name(path[1].idx, positional)
        word = beside if beside is None or isinstance(beside, str) else beside.get(name)
        if word is None:
            raise RunsWhole(f"it does not say what the tensor {name!r} beside x is (Branch.beside)")
        found.append(_as_cut(word(value) if callable(word) else word, value, x, name))
    return found


def _name(index: int, positional: Sequence[str]) -> str:
    return positional[min(index, len(positional) - 1)] if positional else f"argument {index + 1} after x"


def _as_cut(word: Word, value: Tensor, x: Tensor, name: str) -> Word:
    if word == "rows":
        rows, without_batch = x.shape[:-1], x.shape[1:-1]
        if value.shape[:-1] == rows:
            return "rows"
        if value.shape[:-1] in (without_batch, (1, *without_batch)):
            return "shared"  # among the samples
    elif word == "samples":
        if value.dim() and value.shape[0] in (1, len(x)):
            return "samples" if value.shape[0] == len(x) else "shared"
    else:
        return word
    raise RunsWhole(f"the tensor {name!r} of shape {tuple(value.shape)} has no {word} of x, {tuple(x.shape)}")
