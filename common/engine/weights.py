"""Weights on disk, and into a model: read safely, compare, load strictly.

    read_tensors(path)       safetensors, this project's own files
    write_tensors(tensors, path)
    read_state_dict(path)    what others publish: safetensors, or what torch.save wrote, with weights_only=True
    load_tensors(model, tensors, source)     every key must fit, every value be finite as the model holds it

Numbers of a file become those of the model only within their kind: floats of 16 to 64 bits for floats, integers for
integers, truth values for truth values. Codes of 8 bits are quantized weights, which mean nothing without the scales
that belong to them; complex numbers would lose half of themselves. Nothing here executes what a file says. Not here:
checkpoints of runs (`training/checkpoint.py`), key maps of a backbone (`backbones/`).
"""

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.files import appearing, require_file

Tensors = dict[str, Tensor]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Coverage:
    """How loaded weights fit a model."""

    loaded: int
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # file's, model's


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, on the CPU. ValueError, naming the file, for anything else; never
    unpickles.
    """
    require_file(path, "give a file of weights")
    with open(path, "rb") as file:
        head = file.read(16)
    # safetensors: the length of a header, in 8 bytes of which the first may be a pickle's, then the header's brace.
    if head[8:9] != b"{" and (head[:1] == b"\x80" or head[:4] == b"PK\x03\x04"):
        raise ValueError(
            f"{path} is a pickle or torch.save archive, not safetensors; loading it could run code, so it is refused. "
            "Convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error}). Copy it again") from error


def write_tensors(tensors: Tensors, path: Path) -> None:
    """A safetensors file with the mode that the umask says; safetensors' own writes for its owner only. Not atomic."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(stat.S_IMODE(mode))


def write_half(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file in float16, whole numbers as they are, with its folder; it is there when it is complete."""
    halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    with appearing(path) as temporary:
        write_tensors({name: value.cpu().contiguous() for name, value in halves.items()}, temporary)


def read_state_dict(path: Path, *, inside: str | None = None) -> Tensors:
    """Names and tensors as they are stored, on the CPU.

    inside: the key under which a checkpoint that holds more than weights has them; without it the file is the state
    dict itself. FileNotFoundError or ValueError, naming the file, if there are none.
    """
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}; give an existing file with --model.weights FILE")
    require_file(path, "give a file of weights")
    state: Any
    if path.suffix == ".safetensors":
        state = read_tensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling raises unrelated types
            reason = str(error).splitlines()[0] if str(error) else "no message"
            if named := re.search(r"GLOBAL (\S+)", str(error)):  # torch's own words say how to run it all the same
                reason = f"it holds objects ({named[1]}), which could run code"
            elif "weights_only" in reason:
                reason = "it is not what torch.save writes, or damaged"
            raise ValueError(
                f"{path}: not a file of tensors ({type(error).__name__}: {reason}). Download it again, or save its "
                "state dict as safetensors"
            ) from error
        if isinstance(state, dict) and inside in state:
            state = state[inside]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"keys {list(state)[:6]}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: no state dict of tensors but {found}; save the state dict alone as safetensors")
    if odd := [key for key in state if not isinstance(key, str)]:
        raise ValueError(f"{path}: has names that are no words ({str(odd[0])[:40]}); save a state dict of a model")
    if odd := [key for key, value in state.items() if not _is_plain(value)]:
        raise ValueError(f"{path}: sparse, nested or without values: {_some(odd)}; save dense tensors")
    return state


def torchvision_weights(name: str, kind: str, words: str) -> Tensors:
    """The state dict that torchvision publishes for its model `name`, such as "IMAGENET1K_V1", downloaded and checked.

    ValueError, with `words` for the kind, if it cannot be had.
    """
    from torchvision.models import get_model_weights

    try:
        return get_model_weights(name)[kind].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a damaged download
        raise ValueError(
            f"torchvision did not bring the {words} weights of {name} ({type(error).__name__}: {error}). Is there a "
            "network? Otherwise fetch the file elsewhere and give --model.weights FILE"
        ) from error


def load_weights(model: nn.Module, path: Path) -> Coverage:
    """Load one safetensors file into the model. Every key must fit; ValueError names those that do not. Nothing is
    changed in the model before all is verified.
    """
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    return load_tensors(model, read_tensors(path), str(path))


def load_tensors(model: nn.Module, weights: Tensors, source: str) -> Coverage:
    """Copy `weights` into the model after checking all that `fitted` checks; `source` is what error messages name."""
    own = model.state_dict()
    model.load_state_dict(fitted(own, weights, source), strict=True)
    return Coverage(loaded=len(own))


def fitted(own: Tensors, weights: Tensors, source: str) -> Tensors:
    """`weights` in the number types of `own`, and sharded as it is (FSDP2). ValueError, naming `source` and the
    tensors, for other keys or shapes, another kind of numbers, or a value that is not finite there (1e300 is, in
    float64; in float32 it is infinity).
    """
    coverage = compare(own, weights)
    if coverage.missing or coverage.unused or coverage.wrong_shape:
        raise ValueError(f"{source} does not fit the model: {_explain(coverage)}")
    refuse_other_kinds(own, weights, source)
    converted = {key: weights[key].to(own[key].dtype) for key in own}
    refuse_non_finite(converted, source)
    lost = [key for key, value in converted.items() if value.dtype in INTEGERS and (value != weights[key]).any()]
    if lost:
        raise ValueError(f"{source}: integers too large for the model in {_some(lost)}")
    return {key: _sharded_as(own[key], value) for key, value in converted.items()}


def whole(tensors: Tensors) -> Tensors:
    """Sharded tensors put together, the others as they are; every process has to call it."""
    return {key: cast(Any, value).full_tensor() if _is_sharded(value) else value for key, value in tensors.items()}


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")  # a DTensor


def _sharded_as(own: Any, value: Tensor) -> Tensor:
    """This process's part of `value`, which every process has whole, where `own` is sharded."""
    if not _is_sharded(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def compare(own: Tensors, weights: Tensors) -> Coverage:
    """Which keys of a model's tensors and of `weights` meet, and with which shapes."""
    wrong = {
        key: (tuple(weights[key].shape), tuple(own[key].shape))
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    }
    return Coverage(
        loaded=sum(key in weights for key in own) - len(wrong),
        missing=[key for key in own if key not in weights],
        unused=[key for key in weights if key not in own],
        wrong_shape=wrong,
    )


def refuse_other_kinds(own: Tensors, weights: Tensors, source: str) -> None:
    """ValueError where a tensor of both holds another kind of numbers in `weights` than in `own`. To be called before
    weights are resampled or joined, which would make floats of anything.
    """
    wrong = [
        f"{key} ({weights[key].dtype} for {value.dtype})".replace("torch.", "")
        for key, value in own.items()
        if key in weights and not _same_kind(weights[key], value)
    ]
    if wrong:
        raise ValueError(
            f"{source}: not weights but another kind of numbers in {_some(wrong)}. Give the weights as floats of 16 to "
            "64 bits, before quantization"
        )


def refuse_non_finite(weights: Tensors, source: str) -> None:
    """ValueError naming the tensors of `weights` that hold NaN or infinity."""
    bad = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(
            f"{source}: NaN or infinite values in {_some(bad)}. Train from, or load, an earlier checkpoint"
        )


def _same_kind(theirs: Tensor, ours: Tensor) -> bool:
    if not _is_plain(theirs):
        return False
    kind = next((kind for kind in (FLOATS, INTEGERS) if ours.dtype in kind), (ours.dtype,))
    return theirs.dtype in kind


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has a shape and a value in each place, as most operations want."""
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested


def _explain(coverage: Coverage) -> str:
    parts = []
    if coverage.missing:
        parts.append(f"{len(coverage.missing)} missing: {_some(coverage.missing)}")
    if coverage.unused:
        parts.append(f"{len(coverage.unused)} unused: {_some(coverage.unused)}")
    if coverage.wrong_shape:
        shapes = [
            f"{key} {list(theirs)} instead of {list(ours)}" for key, (theirs, ours) in coverage.wrong_shape.items()
        ]
        parts.append(f"{len(shapes)} of another shape: {_some(shapes)}")
        heads = {(theirs[:1], ours[:1]) for theirs, ours in coverage.wrong_shape.values() if theirs[1:] == ours[1:]}
        all_heads = all(theirs[1:] == ours[1:] for theirs, ours in coverage.wrong_shape.values())
        if all_heads and len(heads) == 1 and not coverage.missing and not coverage.unused:
            (theirs,), (ours,) = heads.pop()
            parts.append(
                f"if this is the class layer, the checkpoint has {theirs} classes, the model {ours}; "
                f"set the number of classes to {theirs}, or train a new head for {ours}"
            )
    if coverage.loaded == 0:
        parts.append("no key in common: this is the checkpoint of another model")
    return "; ".join(parts)


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
