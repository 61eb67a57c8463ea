"""The base of every configuration: frozen dataclasses whose values are checked once, when one is made.

    @dataclass(frozen=True, kw_only=True)
    class Optimization(Settings):
        epochs: Annotated[float, Range(above=0)] = 40

A wrong value, from a command line, a checkpoint or code, is a ValueError that names the flag: types, choices and ranges
stand in the annotations and nowhere else. `to_json` and `from_json` keep a configuration as plain JSON.
"""

import math
import os
import types
import typing
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

C = TypeVar("C")


@dataclass(frozen=True)
class Range:
    """The numbers a field takes: low <= x, above < x, x <= high, x < below; always finite."""

    low: float = -math.inf
    above: float = -math.inf
    high: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether `value` is inside."""
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        bounds = [("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below)]
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound)) or "finite"


Count = Annotated[int, Range(low=1)]
Share = Annotated[float, Range(low=0, high=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(low=0)]


@dataclass(frozen=True)
class Settings:
    """A group of settings. Its flags begin with the class's name in small letters, as `--optimization.epochs`; those of
    a `Config` and of `Arguments` have no prefix.
    """

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        prefix = "--" if name == "config" or isinstance(self, Arguments) else f"--{name}."
        for field, hint in _hints(type(self)).items():  # type: ignore[arg-type]  # mypy: __hash__ of its instances
            problem = _problem(getattr(self, field), hint)
            if problem:
                raise ValueError(f"{prefix}{field.replace('_', '-')} {problem}")


@dataclass(frozen=True)
class Arguments(Settings):
    """The words of a command line that is not a `Config`."""


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _problem(value: Any, hint: Any) -> str:
    """What is wrong with a value of a field, or nothing."""
    if hint is Any:
        return ""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [extra for extra in inner[1:] if isinstance(extra, Range)]
        outside = next((r for r in ranges if _is_number(value) and not r.holds(value)), None)
        return _problem(value, inner[0]) or (f"must be {outside}, not {value!r}" if outside else "")
    if origin in (types.UnionType, typing.Union):
        problems = [_problem(value, option) for option in inner]
        given = [p for p, option in zip(problems, inner, strict=True) if option is not type(None)]
        return given[0] if all(problems) else ""
    if origin is Literal:
        return "" if value in inner else f"must be one of {', '.join(map(str, inner))}, not {value!r}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return f"must be a tuple, not {value!r}"
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) != len(value):
            return f"must have {len(kinds)} values, not {len(value)}: {value!r}"
        return next((p for item, kind in zip(value, kinds, strict=True) if (p := _problem(item, kind))), "")
    if origin is dict:
        if not isinstance(value, dict):
            return f"must be a dictionary, not {value!r}"
        found = [_problem(part, kind) for item in value.items() for part, kind in zip(item, inner, strict=True)]
        return next(filter(None, found), "")
    if hint is float:
        return "" if _is_number(value) and math.isfinite(value) else f"must be a finite number, not {value!r}"
    if hint is int:
        return "" if _is_number(value) and isinstance(value, int) else f"must be a whole number, not {value!r}"
    if isinstance(hint, type) and (hint in (bool, str, Path, type(None)) or is_dataclass(hint)):
        return "" if isinstance(value, hint) else f"must be of type {hint.__name__}, not {value!r}"
    raise TypeError(f"settings cannot hold fields of type {hint}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_json(value: Any) -> Any:
    """A configuration as JSON values: paths below the working folder become relative, tuples lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Path):
        return os.path.relpath(value) if value.is_absolute() and value.is_relative_to(Path.cwd()) else str(value)
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"a config may not hold {value!r} of type {type(value).__name__}; use numbers, words, paths, tuples"
    )


def from_json(kind: type[C], value: Any) -> C:
    """The inverse of `to_json`: a dataclass of its JSON. A field that is missing takes its default.

    ValueError, naming the field, for a field that does not exist, one without default that is missing, and for a value
    of the wrong type or range.
    """
    return _from_json(kind, value, kind.__name__)


def _from_json(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, not {value!r}")
        hints, own = typing.get_type_hints(kind, include_extras=True), {field.name: field for field in fields(kind)}
        unknown = sorted(value.keys() - own.keys())
        needed = [n for n, f in own.items() if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in needed if name not in value]
        if unknown or missing:
            said = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(
                missing
            )
            raise ValueError(f"{where} has other fields ({'; '.join(said)})")
        return kind(**{name: _from_json(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _from_json(inner[0], value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        return _from_json(next(option for option in inner if option is not type(None)), value, where)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else [*inner, *[Any] * (len(value) - len(inner))]
        return tuple(_from_json(k, item, where) for k, item in zip(kinds, value, strict=False))
    return value
