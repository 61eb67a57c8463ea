"""The branches of a transformer layer, read from a line of words: the names of its parts, in the order it calls them.

    "norm1 attention* layer_scale1 drop_path"    x + drop_path(layer_scale1(attention(norm1(x), ...)))       pre-norm
    "attention* dropout + layer_norm"            layer_norm(x + dropout(attention(x, ...)))                  post-norm
    "norm | attention* | mlp"                    x + attention(norm(x), ...) + mlp(norm(x))                  parallel

| a word | what becomes of h, which is x at first |
|---|---|
| `name` | layer.name(h) of a module or function; h * layer.name of a parameter or number |
| `name*` | layer.name(h, what the layer got beside x): attention; of a tuple, the first goes on |
| `name^` | layer.name(h, what came from an encoder): cross attention; without an encoder the branch adds nothing |
| `name&` | layer.name(h, x): a part that adds x itself, which is then taken off; `name&*`, with the arguments too |
| `name!` | such a part that is `dense`, `dropout` and a sum: its two modules are called, as long as it is no other |
| `~name` | dropout with the probability layer.name |
| `+` | h + x; behind it comes the norm of a post-norm layer |
| `=` | nothing: the part before it has added x itself |
| `name?` | `name`, if the layer has it and it is not None |

Where x is in h already, F(x) = h - x, since a branch adds x. A drop path at the end is the branch's own (`Branch`).
Not here: which layer is read how (`transformers.py`).
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dr2net.beside import Word
from dr2net.branches import Branch, forward_was_replaced
from dr2net.patches import is_plain

SAMPLES = (
    *("attention_mask", "position_ids", "position_embeddings", "position_bias", "encoder_hidden_states"),
    *("encoder_attention_mask", "encoder_position_bias", "position_mask", "cache_position", "sinusoidal_pos"),
)
ENCODER = ("encoder_hidden_states", "encoder_attention_mask")


@dataclass(frozen=True)
class Words:
    """How a layer is read: a line for each of its branches.

    attention, cross, mlp, adapter: the lines; "" for a branch that the layer does not have. A branch whose first part
        is None or missing in a layer is left out.
    parts: further parts that `mlp` uses, where it names a method of the layer; held: that attention uses.
    hands_out: the layer returns a tuple: x, and what its attention returns behind its own output.
    only: the arguments that attention gets; "": all.
    without: arguments of the layer that it does not hand on to its attention.
    renamed: names that arguments of the layer have in its attention.
    of_cross: names that further arguments of the layer have in its cross attention.
    prepare: changes what attention gets, given the layer, x and the arguments by name.
    shared: arguments that hold for every sample, whatever their first dimension (rotary tables without a batch).
    packed: x is (tokens of all samples, C), so attention is not independent along the first dimension.
    tokens: `mlp` treats each token by itself, and may be given (tokens, C).
    """

    attention: str = ""
    mlp: str = ""
    cross: str = ""
    adapter: str = ""
    parts: str = ""
    held: str = ""
    hands_out: bool = False
    only: str = ""
    without: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    of_cross: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[Any, Tensor, dict[str, Any]], dict[str, Any]] | None = None
    shared: str = ""
    packed: bool = False
    tokens: bool = True


def branches(layer: nn.Module, words: Words) -> tuple[Branch, ...]:
    """The branches of `layer`, in the order in which they run."""
    beside: dict[str, Word] = dict.fromkeys((*SAMPLES, *words.renamed, *words.of_cross), "samples")
    beside |= dict.fromkeys(words.shared.split(), "shared")
    names, _, takes_more = _signature(inspect.unwrap(type(layer).forward))
    beside = {name: word for name, word in beside.items() if takes_more or name in names}
    found = []
    whole = None if words.packed else "samples"
    for name, line in (("attention", words.attention), ("cross_attention", words.cross)):
        if _exists(layer, line):
            out = words.hands_out and name == "attention"
            found.append(_branch(layer, name, line, words, independent=whole, beside=beside, hands_out=out))
    for name, line in (("mlp", words.mlp), ("adapter", words.adapter)):
        if _exists(layer, line):
            cut = "tokens" if words.tokens else whole
            found.append(_branch(layer, name, line, words, independent=cut, beside="unused"))
    return tuple(found)


def _branch(layer: nn.Module, name: str, line: str, words: Words, **how: Any) -> Branch:
    own: list[Any] = []
    further = {"mlp": words.parts, "attention": words.held}.get(name, "")
    for part in _parts(f"{line} {further}"):
        value = getattr(layer, part, None)
        if isinstance(value, (nn.Module, nn.Parameter)) and not any(value is other for other in own):
            own.append(value)
    drop_path: Any = None
    if line.endswith(" drop_path") and not isinstance(layer.drop_path, nn.Identity):
        line, drop_path = line.removesuffix(" drop_path"), layer.drop_path
        own = [part for part in own if part is not drop_path]
    run = functools.partial(_run, layer, line, words, out=how.get("hands_out", False))
    return Branch(name, run, tuple(own), drop_path=drop_path, **how)


def _run(layer: nn.Module, line: str, words: Words, x: Tensor, *args: Any, out: bool, **named: Any) -> Any:
    """F(x) of one branch; with `out`, and what its attention returns behind its output."""
    given = arguments(layer, args, named)
    crosses = given.get(ENCODER[0]) is not None
    if crosses and not _exists(layer, words.cross) and getattr(layer, "is_decoder", True):
        raise ValueError(
            f"{type(layer).__name__} gets {ENCODER[0]} and has no cross attention that is known; build the model with "
            "config.add_cross_attention=True, or leave it unconverted"
        )
    if "^" in line and not crosses:
        return torch.zeros_like(x)
    walk = _Walk(layer, words, x, given)
    common, *parallel = line.split("|")
    h = walk.run(common, x)
    if parallel:
        h = functools.reduce(torch.add, [walk.run(part, h) for part in parallel])
    f = h - x if walk.has_x else h
    return (f, *walk.rest) if out else f


class _Walk:
    """Calls the parts of one branch in turn: `has_x` says whether x was added, `rest` what attention returned too."""

    def __init__(self, layer: nn.Module, words: Words, x: Tensor, given: dict[str, Any]) -> None:
        self.layer, self.words, self.x, self.given = layer, words, x, given
        self.has_x = False
        self.rest: Sequence[Any] = ()

    def run(self, line: str, h: Tensor) -> Tensor:
        for word in line.split():
            if word in "+=":
                h, self.has_x = h + self.x if word == "+" else h, True
                continue
            (name,) = _parts(word)
            part = getattr(self.layer, name, None) if word.endswith("?") else getattr(self.layer, name)
            if part is not None:
                h = self.step(word.replace(name, "").rstrip("?"), part, h)
        return h

    def step(self, mark: str, part: Any, h: Tensor) -> Tensor:
        """h behind one part, used as its mark says."""
        if mark == "~":
            return F.dropout(h, part, self.layer.training)
        if mark in ("*", "^"):
            return self.first(part(h, **(self.own() if mark == "*" else self.of_encoder(part))))
        if mark == "!" and _is_dense(part, self.layer):
            return part.dropout(part.dense(h))
        if mark in ("&", "!", "&*"):
            self.has_x = True
            return self.first(part(h, self.x, **(self.own() if mark == "&*" else {})))
        return part(h) if callable(part) else h * part

    def first(self, returned: Any) -> Any:
        if not isinstance(returned, tuple):
            return returned
        h, *self.rest = returned
        return h

    def own(self) -> dict[str, Any]:
        """What self attention gets."""
        words, given = self.words, self.given
        if words.prepare is not None:
            given = words.prepare(self.layer, self.x, given)
        only = words.only.split() or given
        hidden = (*ENCODER, *words.without.split())
        return {words.renamed.get(name, name): given[name] for name in only if name not in hidden}

    def of_encoder(self, attention: Any) -> dict[str, Any]:
        """What cross attention gets: the names differ with its class."""
        states, mask = (self.given[name] for name in ENCODER)
        more = {name: self.given[own] for own, name in self.words.of_cross.items()}
        if "past_key_values" in self.given:
            more["past_key_values"] = self.given["past_key_values"]
        taken = inspect.signature(type(attention).forward).parameters
        if "key_value_states" in taken:
            return {"key_value_states": states, "attention_mask": mask, **more}
        return {"attention_mask": None, "encoder_hidden_states": states, "encoder_attention_mask": mask, **more}


def _is_dense(part: Any, layer: nn.Module) -> bool:
    """Nothing but the library's own dense layer, dropout and sum."""
    own = type(part).__module__ == type(layer).__module__ and not forward_was_replaced(type(part))
    return own and is_plain(part) and set(part._modules) == {"dense", "dropout"}


def arguments(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """What a layer is given beside x, by name, its defaults included. TypeError for more than it takes."""
    names, defaults, _ = _signature(inspect.unwrap(type(layer).forward))
    if len(args) > len(names):
        raise TypeError(f"{type(layer).__name__} takes {len(names)} arguments beside its input, not {len(args)}")
    return {**defaults, **dict(zip(names, args, strict=False)), **named}


@functools.cache
def _signature(forward: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any], bool]:
    """Of the arguments after self and x: the names by position, the defaults, and whether any others are taken."""
    parameters = list(inspect.signature(forward).parameters.values())[2:]
    by_position = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return by_position, defaults, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _parts(line: str) -> list[str]:
    """The names in a line, in order."""
    return re.findall(r"\w+", line)


def _exists(layer: nn.Module, line: str) -> bool:
    """The layer has the first part of the line."""
    return bool(line) and getattr(layer, _parts(line)[0], None) is not None
