"""What a run was fed, as short words that change when it does: samples, annotations, the files that its settings name.

    inputs_of(config, {"train": dataset, "val": dataset})
    # {"train": "32 samples, 5d41402abc4b2a76", "val": "13 samples, ...", "model.weights": "7d793037a0760186"}

Annotations and the files of settings (weights, class scores) count by their content, the files of samples by their
names and sizes: a look, not hours of reading. Not here: what is done when one has changed (`records/origin.py`).
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from engine.files import require_file
from engine.settings import to_json

DIGITS = 16


class Files(NamedTuple):
    """The files a dataset's samples are made of, in an order that does not change by itself."""

    annotations: Sequence[Path | str] = ()  # lists, labels, class names: read whole
    samples: Sequence[Path | str] = ()  # videos, images: only their names and sizes


class Dataset(Protocol):
    """What `inputs_of` needs of a dataset."""

    def __len__(self) -> int: ...

    def files(self) -> Files: ...


def inputs_of(config: Any, datasets: Mapping[str, Dataset], backbone: nn.Module | None = None) -> dict[str, str]:
    """One word per dataset and per file that the configuration names, other than the folders of data and output.

    backbone: with its pretrained weights, as it was built. It gets a word where these come from a name, such as "hub",
    behind which another file may stand one day; see `same_inputs` for a look without it.
    """
    words = {name: f"{len(dataset)} samples, {_of_files(dataset.files())}" for name, dataset in datasets.items()}
    for name, text in _words(to_json(config)):
        if name not in ("data.root", "run.output") and ("." in text or "/" in text) and Path(text).exists():
            words[name] = _of_path(Path(text), whole=name.startswith("model."))
        elif backbone is not None and name.startswith("model.") and name.endswith("weights"):
            words[f"{name} ({text})"] = _of_tensors(backbone.state_dict())
    return words


def same_inputs(now: Mapping[str, str], then: Mapping[str, str]) -> bool:
    """Whether the words are equal, where those of named weights count only if both have looked at them."""
    both = {name for name in {**now, **then} if not name.endswith(")") or (name in now and name in then)}
    return all(now.get(name) == then.get(name) for name in both)


def _of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of the numbers in the numbered blocks. What stands around them is resampled for a row's sizes, and its last
    digits differ from machine to machine.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if any(part.isdecimal() for part in name.split(".")):
            value = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _of_files(files: Files) -> str:
    digest = hashlib.sha256()
    for path in files.annotations:
        digest.update(f"{Path(path).name} {_of_path(Path(path))}\n".encode())
    # Below their common folder, so that a moved data set is the same one.
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in files.samples] or ["/"])
    for path in files.samples:
        size = os.stat(path).st_size if os.path.exists(path) else "missing"
        digest.update(f"{os.path.relpath(path, top)} {size}\n".encode())
    return digest.hexdigest()[:DIGITS]


def _of_path(path: Path, *, whole: bool = True) -> str:
    """Of the content of a file, or of the files in a folder: their contents (weights), or names and sizes (data)."""
    if path.is_dir():
        inside = sorted(child for child in path.iterdir() if child.is_file())
        words = [f"{c.name} {_of_path(c) if whole else c.stat().st_size}" for c in inside]
        return hashlib.sha256(" ".join(words).encode()).hexdigest()[:DIGITS]
    require_file(path, "give a file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def _words(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The words in a configuration's JSON, by dotted name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _words(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, str):
        yield prefix, value
