"""From a command line, or from a checkpoint, to a row's Config. The same for every task.

    python -m <task>.train ROW [--method dr2net] [--seed 1] [--any.field value ...]

`--method` picks the same row with another finetuning method, name included; `--seed` is short for `--run.seed`. Every
other field of the Config has its own flag, which tyro makes from the dataclasses: `... ROW --help` lists them. The rows
stand in <task>/configs.py.
"""

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from engine.config import METHODS
from engine.training.checkpoint import read_state

C = TypeVar("C")


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run `main` on the command line's words. What a user gave wrong (ValueError, a missing file) is one line and exit
    code 1; anything else is a fault of the program and keeps its traceback.
    """
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def parse_config(row: Callable[[str], C], arguments: Sequence[str]) -> C:
    """The Config that `arguments` (without the program's name) ask for; row: name -> Config.

    Exits with usage on unknown flags, ValueError for an unknown row.
    """
    try:
        import tyro
    except ImportError as error:
        raise ImportError("the command line needs tyro: pip install 'dr2net[training]'") from error

    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if arguments else 2)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("row")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--seed", type=int)
    short, rest = parser.parse_known_args(arguments)
    name = short.row
    if short.method is not None:
        name = with_method(name, short.method)
    if short.seed is not None:
        rest += ["--run.seed", str(short.seed)]
    config = row(name)
    parsed = tyro.cli(type(config), default=config, args=rest, prog=f"ROW = {name}; flags")
    if (parsed.row, parsed.finetuning.method) != (config.row, config.finetuning.method):
        raise ValueError("a row's name says its method: change them with `ROW --method METHOD`, not field by field")
    return parsed


def find_row(rows: Mapping[str, Callable[[], C]], name: str) -> C:
    """The configuration of a table row. ValueError, naming the nearest rows, for an unknown name."""
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=3, cutoff=0.3)
        hint = f"did you mean {', '.join(near)}?" if near else f"the rows are {', '.join(sorted(rows))}"
        raise ValueError(f"no row {name!r}; {hint}")
    return rows[name]()


def with_method(name: str, method: str) -> str:
    """The name of the row that differs only in its finetuning method; ValueError if `name` does not end in a method."""
    base, _, own = name.rpartition("_")
    if own not in METHODS:
        raise ValueError(f"row {name!r} has no other method: only rows whose name ends in {', '.join(METHODS)} have")
    return f"{base}_{method}"


def config_of_checkpoint(folder: Path, kind: type[C]) -> C:
    """The Config with which a checkpoint was trained. FileNotFoundError if none, ValueError if of another task."""
    state = read_state(folder)
    try:
        return _from_json(kind, state["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its configuration is not one of this task in this version ({error})") from error


def _from_json(kind: Any, value: Any) -> Any:
    """Rebuild dataclasses, paths and tuples, which JSON keeps as objects, strings and lists; other keys raise."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        if set(value) != names:
            raise ValueError(f"{kind.__name__} has other fields: {sorted(set(value) ^ names)}")
        return kind(**{name: _from_json(hints[name], value[name]) for name in names})
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        return _from_json(next(option for option in inner if option is not type(None)), value)
    if kind is Path:
        return Path(value)
    if origin is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_from_json(item_kind, item) for item_kind, item in zip(kinds, value, strict=True))
    return value
