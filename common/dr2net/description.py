"""What a saved model says about its conversion: coefficients and options per sequence, as JSON.

    {"format": 1, "version": "0.2.0", "recomputed": [],
     "sequences": {"vit.layers": {"alpha": 0.875, "beta": 0.125, "branches": 24, "inversion": "exact", ...}}}

beta is a number, or [numerator, denominator]. A transformers model carries this in its config (`model.config.dr2net`),
kept in step with the coefficients, so that the model's own `save_pretrained` writes what is true. Not here: files and
weights (`saving.py`).
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dr2net import exact
from dr2net.coefficients import Coefficients
from dr2net.options import Options
from dr2net.sequence import ReversibleSequence

FORMAT = 1  # newer ones raise
KEY = "dr2net"  # the attribute of a transformers config
OTHERS = ("alpha", "beta", "checkpointed", "branches")
OPTIONS = tuple(field.name for field in dataclasses.fields(Options) if field.name != "recompute_rest")


@dataclasses.dataclass(frozen=True)
class Described:
    """One sequence. `coefficients` are the sequence's own object, which moves, where it is read from a model."""

    coefficients: Coefficients
    options: Options  # `recompute_rest` is in Description.recomputed, by name
    branches: int  # at coefficients other than (1, 0) another number of them is another function

    def to_json(self) -> dict[str, Any]:
        options = {name: getattr(self.options, name) for name in OPTIONS}
        at = self.coefficients.save()
        beta = list(at["beta"]) if isinstance(at["beta"], tuple) else at["beta"]
        fixed = {"checkpointed": self.coefficients.fixed, "branches": self.branches}
        return {"alpha": at["alpha"], "beta": beta, **fixed, **options}


@dataclasses.dataclass(frozen=True)
class Description:
    """All sequences by their container's name in the model, and the modules outside them that run again in backward."""

    sequences: Mapping[str, Described]
    recomputed: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> "Description":
        """Of a converted model."""
        found = {
            name: Described(
                module.coefficients,
                Options(**{option: getattr(module, option) for option in OPTIONS}),
                module.num_branches(),
            )
            for name, module in model.named_modules()
            if isinstance(module, ReversibleSequence)
        }
        return cls(found, tuple(name for name, module in model.named_modules() if runs_again(module)))

    def to_json(self) -> dict[str, Any]:
        sequences = {name: described.to_json() for name, described in self.sequences.items()}
        return {"format": FORMAT, "version": version(), "sequences": sequences, "recomputed": list(self.recomputed)}

    @classmethod
    def from_json(cls, value: Any, place: str) -> "Description":
        """ValueError naming `place` for what is no description, or that of a newer version."""
        if not isinstance(value, Mapping) or not isinstance(value.get("format"), int):
            raise ValueError(f"{place} does not describe a converted model: {_short(value)}")
        if value["format"] > FORMAT:
            raise ValueError(
                f"{place} was written by dr2net {value.get('version')}, in a format ({value['format']}) that is newer "
                f"than this version, {version()}, can read ({FORMAT}); update dr2net"
            )
        try:
            sequences = {str(name): _described(entry) for name, entry in value["sequences"].items()}
            recomputed = tuple(map(str, value["recomputed"]))
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{place} is damaged: {type(error).__name__}: {error} in {_short(value)}") from error
        if not sequences:
            raise ValueError(f"{place} names no reversible sequence")
        return cls(sequences, recomputed)

    def refuse_unfit(self, inversion: str, place: str) -> None:
        """ValueError for a beta that this inversion cannot take, before a model is changed."""
        for name, described in self.sequences.items():
            if inversion == "exact":
                try:
                    exact.rational(described.coefficients.beta)
                except ValueError as error:
                    raise ValueError(f"{place}, {name}: {error}") from error

    def found_in(self, own: Mapping[str, Any]) -> dict[str, Described]:
        """The entries by the names that the same containers have now, where a wrapper was put on or taken off.

        own: the sequences of a model by name. Leaves out entries that fit none of them, or several, or one with another
        number of branches.
        """
        names = list(own)
        found: dict[str, Described] = {}
        for before, described in self.sequences.items():
            fitting = [name for name in names if _is_end_of(before, name) or _is_end_of(name, before)]
            fitting = [before] if before in names else fitting
            if len(fitting) == 1 and own[fitting[0]].num_branches() == described.branches:
                found[fitting[0]] = described
        return found


class InStep(Mapping):
    """The description of a converted model as a value of its config: always of the present coefficients.

    A copy of the config alone (which is how a config is written) holds a plain dict of the moment, one that comes along
    with a copy of the model is in step with that.
    """

    def __init__(self, description: Description) -> None:
        self.description = description

    def __getitem__(self, key: str) -> Any:
        return self.description.to_json()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.description.to_json())

    def __len__(self) -> int:
        return len(self.description.to_json())

    def __repr__(self) -> str:
        return repr(self.description.to_json())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        sequences = self.description.sequences
        if not any(isinstance(copied, nn.Module) for copied in memo.values()):
            return self.description.to_json()
        copied = {
            name: dataclasses.replace(described, coefficients=copy.deepcopy(described.coefficients, memo))
            for name, described in sequences.items()
        }
        return InStep(dataclasses.replace(self.description, sequences=copied))

    def is_of(self, model: nn.Module) -> bool:
        """It describes sequences of this model, not of another one that was made of the same config."""
        own = {id(module.coefficients) for module in model.modules() if isinstance(module, ReversibleSequence)}
        return any(id(described.coefficients) in own for described in self.description.sequences.values())


def attach(model: nn.Module) -> None:
    """Keep the configs of all transformers models in or around the sequences of `model` in step with them."""
    for module, config in _configs(model):
        description = Description.of(module)
        if not description.sequences:
            continue
        present = getattr(config, KEY, None)
        if isinstance(present, InStep) and not present.is_of(model):  # two models of one config object
            own = copy.copy(config)
            for holder in module.modules():
                if holder.__dict__.get("config") is config:
                    holder.config = own
            config = own
        setattr(config, KEY, InStep(description))


def detach(model: nn.Module) -> None:
    """The configs say nothing of a conversion any more."""
    for _, config in _configs(model):
        if hasattr(config, KEY):
            delattr(config, KEY)


def recorded(model: nn.Module) -> Description | None:
    """What the configs of a model that is not converted say: that its weights were saved by a converted one.

    None if they say nothing. ValueError if it is damaged, or newer than this version.
    """
    sequences: dict[str, Described] = {}
    again: tuple[str, ...] = ()
    places = {module: name for name, module in model.named_modules()}
    for module, config in _configs(model):
        value = getattr(config, KEY, None)
        if value is not None and not isinstance(value, InStep):  # of another, converted model with the same config
            prefix = f"{places[module]}." if places[module] else ""
            description = Description.from_json(value, f"{type(module).__name__}.config.{KEY}")
            sequences = {prefix + name: described for name, described in description.sequences.items()} | sequences
            again = tuple(dict.fromkeys([*again, *(prefix + name for name in description.recomputed)]))
    return Description(sequences, again) if sequences else None


def version() -> str:
    """Of this library."""
    from dr2net import __version__  # it imports this file

    return __version__


def runs_again(module: nn.Module) -> bool:
    """Its forward was replaced by one that is checkpointed (`dr2net.recompute`)."""
    return getattr(module.__dict__.get("forward"), "func", None) is checkpoint


def is_transformers(value: Any, kind: str) -> bool:
    """An instance of that class of transformers, or of peft, which this file does without."""
    return any(
        cls.__name__.lower() == kind.lower() and cls.__module__.split(".")[0] in ("transformers", "peft")
        for cls in type(value).__mro__
    )


def _configs(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Each transformers config once, with the outermost module that holds it."""
    found: dict[int, tuple[nn.Module, Any]] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if is_transformers(config, "PreTrainedConfig"):
            found.setdefault(id(config), (module, config))
    return list(found.values())


def _described(entry: Mapping[str, Any]) -> Described:
    beta: float | Fraction = Fraction(*entry["beta"]) if isinstance(entry["beta"], list) else float(entry["beta"])
    alpha, fixed, branches = float(entry["alpha"]), entry["checkpointed"], int(entry["branches"])
    if not abs(alpha) < float("inf") or not abs(float(beta)) < float("inf") or not isinstance(fixed, bool):
        raise ValueError(f"alpha = {alpha}, beta = {beta}, checkpointed = {fixed}")
    named = {name: value for name, value in entry.items() if name not in OTHERS}
    if unknown := named.keys() - {*OPTIONS}:
        raise ValueError(f"this version does not know the options {', '.join(sorted(unknown))}: update dr2net")
    options = Options(**named)  # those that it lacks came later
    return Described(Coefficients(alpha, beta, fixed=fixed), options, branches)


def _is_end_of(end: str, name: str) -> bool:
    return end == "" or name == end or name.endswith(f".{end}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + " ..."
