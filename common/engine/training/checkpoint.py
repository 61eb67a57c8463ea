"""Checkpoints that survive a crash and execute nothing.

A checkpoint folder holds `state.json` and the safetensors files it names with their SHA-256:

    model-<hash>.safetensors      weights, the keys of the plain pretrained model
    optimizer-<hash>.safetensors  `<parameter>/<slot>`, e.g. `head.weight/exp_avg`
    ema-<hash>.safetensors        averaged weights, if any
    state.json                    everything that is a number or a word: step, epoch, progress, coefficients, seed,
    curve, config

The random generators need no file: the engine seeds them before each step from (seed, step, process), and a batch is a
function of (seed, epoch, position), so seed and step are their whole state.

Each file is written in the folder `.saving`, synced and renamed; `state.json` comes last and its rename is the one
moment at which the new checkpoint replaces the old. Only then are the old files deleted, so a full disk or a kill at
any time leaves a complete checkpoint; what a kill leaves beside it goes when the run is taken up again. One process
saves at a time, see `lock.py`. Nothing is pickled or unpickled.
"""

import contextlib
import errno
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from engine import weights
from engine.files import make_folder, publish, read_json, write_text
from engine.weights import Coverage, Tensors, load_tensors, read_tensors, refuse_non_finite, write_tensors

FORMAT = 1
SCRATCH = ".saving"  # where files are written before they get their names
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NAMES = {"model": "weights", "ema": "averages"}  # of the kinds of tensors, in messages
MAX_NUMBER = 1e12  # steps and coefficients are far below
MAX_STATE_BYTES = 64 * 2**20  # a curve of ten thousand epochs is far below


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. `tensors` maps "model", "optimizer", "ema" to named tensors on the CPU."""

    state: dict[str, Any]
    tensors: dict[str, Tensors]
    folder: Path


def save(folder: Path, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
    """Write a checkpoint; the previous one stays until this one is complete.

    Raises OSError with a remedy when the disk is full, and ValueError when a number is not finite: both leave the
    previous checkpoint as it was.
    """
    for kind, group in tensors.items():
        refuse_non_finite(group, f"the {NAMES.get(kind, kind)} to be saved in {folder}")
    files = {}
    scratch = folder / SCRATCH
    try:
        make_folder(folder)
        delete_unnamed(folder)
        scratch.mkdir()
        for kind, group in tensors.items():
            temporary = scratch / kind
            write_tensors(_separate(group), temporary)
            digest = _digest(temporary)
            name = f"{kind}-{digest[:16]}.safetensors"
            publish(temporary, folder / name)
            files[kind] = {"name": name, "sha256": digest}
        write_text(folder / "state.json", json.dumps({**state, "format": FORMAT, "files": files}, indent=1))
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        kept = "the previous checkpoint is intact" if exists(folder) else "there is no earlier one"
        remedy = "Free disk space" if number in FULL else "Make the folder writable"
        raise OSError(
            number,
            f"could not save a checkpoint in {folder}: {error}; {kept}. {remedy}, then start the same command again",
        ) from error
    finally:
        delete_unnamed(folder)


def load(folder: Path) -> Checkpoint:
    """Read and verify a whole checkpoint. Raises FileNotFoundError, or ValueError naming the bad file."""
    state = read_state(folder)
    try:
        return _load(folder, state)
    except ValueError:
        if read_state(folder)["files"] == state["files"]:
            raise
        return load(folder)  # a run has replaced its checkpoint meanwhile


def _load(folder: Path, state: dict[str, Any]) -> Checkpoint:
    tensors = {}
    for kind, entry in state["files"].items():
        path = folder / entry["name"]
        if path.parent.resolve() != folder.resolve():
            raise ValueError(f"{folder / 'state.json'}: names a file outside its folder: {entry['name']!r}")
        if not path.exists():
            raise ValueError(f"{path} is missing; the checkpoint is incomplete. Copy the whole folder again")
        weights = read_tensors(path)
        if _digest(path) != entry["sha256"]:
            raise ValueError(
                f"{path}: its content is not what was saved (SHA-256 differs). Copy it again, or train anew"
            )
        tensors[kind] = weights
    return Checkpoint(state=state, tensors=tensors, folder=folder)


def exists(folder: Path) -> bool:
    """Whether there is a complete checkpoint in the folder."""
    return (folder / "state.json").exists()


def read_state(folder: Path) -> dict[str, Any]:
    """The scalar part of a checkpoint, without its tensors."""
    path = folder / "state.json"
    if not path.exists():
        remedy = "give the folder of a run, or its `checkpoint`"
        raise FileNotFoundError(f"no checkpoint in {folder} (no state.json); {remedy}")
    if path.stat().st_size > MAX_STATE_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes is too large to be the state of a checkpoint")
    try:
        state = read_json(path, "give another checkpoint")
        for entry in state["files"].values():
            assert isinstance(entry["name"], str) and isinstance(entry["sha256"], str)
        for name in ("step", "alpha", "beta"):  # numbers with which training and prediction go on
            value = state.get(name, 0)
            whole = name == "step"
            assert (value is None and not whole) or _is_number(value, whole), f"{name} is {value!r}"
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise ValueError(f"{path}: not the state of a checkpoint ({type(error).__name__}: {error})") from error
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: checkpoint format {state.get('format')}, this code reads {FORMAT}")
    return state


def load_weights(model: nn.Module, path: Path, *, averaged: bool = True) -> Coverage:
    """Load a checkpoint folder (averaged weights if it has them and `averaged`), or one safetensors file, into the
    model.

    Every key must fit; ValueError names those that do not. Nothing is changed in the model before all is verified.
    """
    if not path.is_dir():
        return weights.load_weights(model, path)
    tensors = load(path).tensors
    return load_tensors(model, tensors["model"] | (tensors.get("ema", {}) if averaged else {}), str(path))


def _separate(tensors: Tensors) -> Tensors:
    """On the CPU, contiguous, and no two sharing memory, as safetensors wants it (tied weights are written twice)."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in seen or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        result[key] = value
    return result


def _is_number(value: Any, whole: bool) -> bool:
    kinds = int if whole else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _errno(error: Exception) -> int:
    """The system's number of an error; safetensors has it in its words only."""
    found = re.search(r"os error (\d+)", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else errno.EIO)


def delete_unnamed(folder: Path) -> None:
    """Delete what the `state.json` on disk does not name: older tensors, and what killed processes left half written.
    Nothing where it cannot be read.
    """
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    named: set[str] = set()
    if exists(folder):
        try:
            named = {entry["name"] for entry in read_state(folder)["files"].values()}
        except (OSError, ValueError):
            return
    for path in [*folder.glob("*.safetensors"), *folder.glob(".*.tmp*"), *folder.glob(".tmp*")]:
        if path.name not in named:
            with contextlib.suppress(OSError):
                path.unlink()
