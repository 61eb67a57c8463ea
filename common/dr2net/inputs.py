"""The batch that a command line describes: which tensors the model gets, of which sizes, filled with what.

    --input 16x3x224x224                         one tensor of random floats, the batch first
    --input input_ids:4x128:int                  by the name of forward's argument; numbers below the vocabulary's size
    --input input_ids:4x128:int,attention_mask:4x128:int     several, by comma or by repeating the flag
    --input token_type_ids:4x128:int:2           whole numbers below 2;  mask:4x128:bool  true everywhere
    --batch my_module:make_batch                 what your function returns: a tensor, a tuple, a dictionary of names

An integer mask is 1 everywhere and position_ids count, since random numbers would mean something else there. A tuple is
given to the model by position, a dictionary by name. Not here: the model (`model_names.py`), what is done with a batch.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Shape = tuple[int, ...]
Kind = Literal["float", "int", "bool"]
Grown = tuple[tuple[int, ...], int]  # dimensions, and the multiple by which they grow
EXAMPLE = "16x3x224x224, or input_ids:4x128:int"


class Batches(Protocol):
    """What the planner and the check need to know of a batch."""

    def make(self, device: str = "cpu") -> Any:
        """A new batch; under fake tensors, where it takes no memory, a fake one."""

    def grow(self, grown: Grown, n: int) -> "Batches":
        """The same with other sizes: the `n`-th multiple in the dimensions that grow."""

    def of_model(self, model: nn.Module) -> "Batches":
        """With what only the model knows."""

    @property
    def grows(self) -> bool:
        """Whether it can have other sizes."""


@dataclass(frozen=True)
class Input:
    """One tensor. below: of whole numbers, None: the size of the model's vocabulary; name "": by position."""

    shape: Shape
    name: str = ""
    kind: Kind = "float"
    below: int | None = None

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.name}:{size}:{self.kind}" if self.name else size + (f":{self.kind}" * (self.kind != "float"))

    def make(self, device: str) -> Tensor:
        """The tensor. Whole numbers: `below` must be known, see `Inputs.of_model`."""
        if self.kind == "float":
            return torch.randn(self.shape, device=device)
        if self.kind == "bool":
            return torch.ones(self.shape, dtype=torch.bool, device=device)
        if self._is_mask():
            return torch.ones(self.shape, dtype=torch.int64, device=device)
        if self._is_positions():
            return torch.arange(self.shape[-1], device=device).expand(self.shape)
        assert self.below is not None, "of_model has filled it in"
        return torch.randint(self.below, self.shape, device=device)

    def needs_vocabulary(self) -> bool:
        """Whether its numbers are bounded by something that only the model knows."""
        return self.kind == "int" and self.below is None and not self._is_mask() and not self._is_positions()

    def _is_mask(self) -> bool:
        return self.below is None and self.name.endswith("mask")

    def _is_positions(self) -> bool:
        return self.below is None and self.name == "position_ids"


@dataclass(frozen=True)
class Inputs:
    """The tensors of one batch."""

    tensors: tuple[Input, ...]
    grows: bool = True

    def __str__(self) -> str:
        return ", ".join(map(str, self.tensors))

    def make(self, device: str = "cpu") -> Any:
        """One tensor, or a tuple by position, or a dictionary by name."""
        made = [tensor.make(device) for tensor in self.tensors]
        if self.tensors[0].name:
            return {tensor.name: value for tensor, value in zip(self.tensors, made, strict=True)}
        return made[0] if len(made) == 1 else tuple(made)

    def grow(self, grown: Grown, n: int) -> "Inputs":
        """In the first tensor, and in those that have the same size there now."""
        dimensions, multiple = grown
        first = self.tensors[0].shape
        return replace(
            self,
            tensors=tuple(
                replace(
                    tensor,
                    shape=tuple(
                        n * multiple if k in dimensions and k < len(first) and first[k] == size else size
                        for k, size in enumerate(tensor.shape)
                    ),
                )
                for tensor in self.tensors
            ),
        )

    def of_model(self, model: nn.Module) -> "Inputs":
        """With what only the model knows: the bounds of whole numbers. ValueError for a name that forward has not, and
        for numbers without a bound. A single input whose name it has not is given by position.
        """
        names = _arguments(model)
        tensors = self.tensors
        unknown = [tensor.name for tensor in tensors if names is not None and tensor.name and tensor.name not in names]
        if unknown and len(tensors) == 1:
            tensors = (replace(tensors[0], name=""),)
        elif unknown:
            raise ValueError(
                f"--input {unknown[0]}: the forward of {type(model).__name__} has no such argument; it has "
                f"{', '.join(names or ())}"
            )
        return replace(
            self,
            tensors=tuple(
                replace(tensor, below=_bound(model, tensor)) if tensor.needs_vocabulary() else tensor
                for tensor in tensors
            ),
        )


@dataclass(frozen=True)
class MadeBatch:
    """What a function of the user returns. count: the samples it is asked for; None: as many as it makes by itself."""

    function: Callable[..., Any]
    name: str
    grows: bool
    count: int | None = None

    def __str__(self) -> str:
        return self.name if self.count is None else f"{self.name}({self.count})"

    def make(self, device: str = "cpu") -> Any:
        """The function's batch on the device. ValueError for one without tensors."""
        batch = self.function() if self.count is None else self.function(self.count)
        if not isinstance(batch, (Tensor, Mapping, tuple, list)) or first_tensor(batch) is None:
            raise ValueError(
                f"{self.name} returned a {type(batch).__name__}, not tensors: one, a tuple or a dictionary"
            )
        if isinstance(batch, Mapping):
            batch = dict(batch)  # a tokenizer's is no dict, and the walk below would not look inside
        return tree_map_only(Tensor, lambda tensor: _as_made_here(tensor, device), batch)

    def of_model(self, model: nn.Module) -> "MadeBatch":
        """Nothing is missing."""
        return self

    def grow(self, grown: Grown, n: int) -> "MadeBatch":
        """Of `n` times the multiple samples."""
        return replace(self, count=n * grown[1])


def find_batches(inputs: Sequence[str] | None, function: str | None) -> Batches:
    """What --input or --batch say. ValueError unless one of them is given, and for what neither understands."""
    if bool(inputs) == bool(function):
        raise ValueError(f"give one of --input ({EXAMPLE}) and --batch (my_module:make_batch)")
    return parse_inputs(inputs) if inputs else find_batch(function or "")


def parse_inputs(texts: Sequence[str]) -> Inputs:
    """The values of --input. ValueError for what is none, a name twice, and names beside tensors without."""
    tensors = tuple(_parse_input(part.strip()) for text in texts for part in text.split(","))
    names = [tensor.name for tensor in tensors]
    if any(names) and not all(names):
        raise ValueError(f"--input {','.join(texts)!r} has tensors with and without a name; give all of them one")
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--input has {twice!r} twice")
    return Inputs(tensors)


def parse_shape(text: str) -> Shape:
    """`16x3x224x224` -> (16, 3, 224, 224)."""
    sizes = text.lower().split("x")
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes) or len(sizes) < 2:
        raise ValueError(f"--input {text!r} is not a shape; write the sizes with x between, batch first: {EXAMPLE}")
    return tuple(int(size) for size in sizes)


def find_batch(name: str) -> MadeBatch:
    """The function `package.module:function` that makes a batch; it grows if its first argument is a count, with a
    default. ValueError where it cannot be imported or called without arguments.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--batch {name!r}: cannot import {attribute!r} from {module!r}: {error}; write package.module:function"
        ) from error
    if not callable(function):
        raise ValueError(f"--batch {name!r} is a {type(function).__name__}, not a function")
    parameters = list(inspect.signature(function).parameters.values())
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise ValueError(f"--batch {name!r} needs {', '.join(needed)}; give its arguments defaults")
    counted = bool(parameters) and parameters[0].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    return MadeBatch(function, name, grows=counted)


def parse_grow(text: str, batches: Batches) -> Grown:
    """`3,4:32` -> ((3, 4), 32). ValueError for what is none, and a dimension that the first input has not."""
    listed, _, multiple = text.partition(":")
    numbers = [*listed.split(","), multiple or "1"]
    if not all(number.isascii() and number.isdigit() for number in numbers) or int(numbers[-1]) == 0:
        raise ValueError(
            f"--grow {text!r} is not a dimension; write 0 for the batch, 2:32 for the third by 32s, 3,4:32 for two"
        )
    dimensions = tuple(sorted({int(number) for number in numbers[:-1]}))
    if isinstance(batches, Inputs):
        last = len(batches.tensors[0].shape) - 1
        if dimensions[-1] > last:
            raise ValueError(f"--grow {text!r}: the input has only the dimensions 0 to {last}")
    elif dimensions != (0,):
        raise ValueError(f"--grow {text!r}: of a batch that a function makes only 0, the number of samples, can grow")
    return dimensions, int(numbers[-1])


def size_at(batches: Batches, grown: Grown) -> float:
    """The present size in the dimensions that grow, the largest of them; without end where it is not known."""
    if not isinstance(batches, Inputs):
        return math.inf
    return max(batches.tensors[0].shape[dimension] for dimension in grown[0])


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output: a mapping is given by name, a tuple or list by position, a tensor as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def first_tensor(batch: Any) -> Tensor | None:
    """A tensor of the batch, which says where it is; None if it holds none."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)


def _as_made_here(tensor: Tensor, device: str) -> Tensor:
    """On the device; inside of a prediction, where no tensor is real, a fake one of its kind."""
    from torch._subclasses.fake_tensor import FakeTensor

    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return made if isinstance(made, FakeTensor) and not isinstance(tensor, FakeTensor) else tensor.to(device)


def _parse_input(text: str) -> Input:
    fields = text.split(":")
    name = fields.pop(0) if not fields[0][:1].isdigit() else ""
    shape = parse_shape(fields[0] if fields else "")
    kind, below = (fields[1:] + [""] * 2)[:2]
    wrong = len(fields) > 3 or (name and not name.isidentifier()) or (kind and kind not in get_args(Kind))
    if wrong or (below and (kind != "int" or not (below.isascii() and below.isdigit() and int(below) > 0))):
        raise ValueError(
            f"--input {text!r} is not name:shape:kind; kinds are {', '.join(get_args(Kind))}, and int:2 is below 2: "
            f"{EXAMPLE}"
        )
    return Input(shape, name, kind or "float", int(below) if below else None)  # type: ignore[arg-type]


def _arguments(model: nn.Module) -> list[str] | None:
    """The names that forward takes; None where it takes any, as a wrapper does."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named if named or not any(p.kind is p.VAR_KEYWORD for p in parameters) else None


def _bound(model: nn.Module, tensor: Input) -> int:
    """How many words, or kinds of tokens, there are: the configuration says so, else the largest embedding."""
    setting = "type_vocab_size" if tensor.name == "token_type_ids" else "vocab_size"
    said = [getattr(config, setting, None) for config in _configurations(model)]
    found = [size for size in said if isinstance(size, int) and size > 0]
    if found:
        return found[0]
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    if not sizes:
        raise ValueError(
            f"--input {tensor}: {type(model).__name__} has no embedding that says how many words there are; write the "
            f"number behind it: {tensor}:1000"
        )
    return max(sizes)


def _configurations(model: nn.Module) -> Iterator[Any]:
    config = getattr(model, "config", None)
    if config is not None:
        yield config
        if callable(getattr(config, "get_text_config", None)):
            yield config.get_text_config()
