"""Save a converted model with all that its function depends on, and load it as that function again.

    dr2net.save(model, folder)        # weights, and coefficients and options of each sequence
    dr2net.restore(model, folder)     # of a new model, plain or converted: the outputs are bit for bit the same

Weights are safetensors; models of transformers and peft write and read theirs by their own means. The description
stands in config.json for a transformers model, else in dr2net.json. Not here: what it says (`description.py`), and
checkpoints of a training, which have the optimizer's state too.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dr2net.convert import checkpoint_blocks, convert, deconvert, recompute, sequences
from dr2net.description import KEY, OPTIONS, Description, attach, is_transformers, runs_again
from dr2net.sequence import ReversibleSequence, make_plain

FILE = "dr2net.json"
WEIGHTS = "model.safetensors"
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError)


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the weights of a converted model, the coefficients and options of its sequences, and the library's version.

    A transformers or peft model writes what its `save_pretrained` writes, the latter the adapters alone. Other models
    need safetensors (ImportError naming the extra). ValueError if the model is not converted. A model that is sharded
    by FSDP2 is saved by all processes together: the weights are gathered, and the first process writes them.
    """
    sequences(model)
    folder = Path(folder)
    if is_sharded(model):
        _save_gathered(model, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).unlink(missing_ok=True)  # of other weights
    if is_transformers(model, "PreTrainedModel"):
        attach(model)  # if a part of it was converted by itself
        cast(Any, model).save_pretrained(folder)
        return
    if is_transformers(model, "PeftModel"):
        _refuse_other_adapters(model)
        cast(Any, model).save_pretrained(folder)
    else:
        write_weights(model, folder / WEIGHTS)
    write_description(model, folder)


def restore(model: nn.Module, folder: str | os.PathLike) -> None:
    """Make `model`, a new one of the same architecture, the model that was saved in `folder`: outputs are bit-equal.

    Converts it with the options that were saved, unless it is converted already, loads the weights, all of them and no
    others, and sets the coefficients. `folder`: of `dr2net.save`, or of a transformers model's own `save_pretrained`.

    FileNotFoundError for a folder or file that is missing; ValueError naming the file for one that is damaged or of a
    newer version, for weights of other names or shapes (another number of classes) and for other sequences. The model
    is then as it was.
    """
    folder = Path(folder)
    if is_sharded(model):
        raise ValueError("the model is sharded; restore it first, then shard it: fully_shard(model)")
    description = read_description(folder, saved_file(model))
    weights = _read_weights(model, folder)
    _compare(weights, _own_weights(model), folder)
    if not any(isinstance(module, ReversibleSequence) for module in model.modules()):
        _convert_as(model, description, folder)
    own = {name: module for name, module in model.named_modules() if isinstance(module, ReversibleSequence)}
    found = _fitting(description, own, folder)
    if is_transformers(model, "PeftModel"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, weights)
    else:
        model.load_state_dict(weights)
    for name, described in found.items():
        own[name].set_coefficients(described.coefficients.alpha, described.coefficients.beta)


def write_description(model: nn.Module, folder: Path) -> None:
    """dr2net.json, of a converted model, beside weights that somebody else writes."""
    text = json.dumps(Description.of(model).to_json(), indent=2)
    part = folder / f"{FILE}.part"
    part.write_text(text + "\n")
    part.replace(folder / FILE)


def read_description(folder: Path, name: str = FILE) -> Description:
    """From dr2net.json, or of config.json the entry "dr2net". Errors as `restore` has them."""
    path = folder / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; it should be one that dr2net.save(model, folder) wrote")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, so it is not known at which coefficients these weights were trained; save with "
            "dr2net.save(model, folder), or call dr2net.convert(model) and dr2net.set_coefficients(model, alpha, beta)"
        )
    try:
        value = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if name == FILE:
        return Description.from_json(value, str(path))
    if not isinstance(value, dict) or KEY not in value:
        raise ValueError(
            f"{path} has no entry {KEY!r}: the model that was saved there was not converted. Load it with "
            "from_pretrained, then call dr2net.convert(model)"
        )
    return Description.from_json(value[KEY], f"{path}, {KEY!r},")


def names_in(path: Path) -> set[str]:
    """Of the tensors in a safetensors file. ValueError if it is damaged."""
    with _open(path) as file:
        return set(file.keys())


def apply_description(model: nn.Module, folder: Path) -> None:
    """Set the coefficients that are saved in `folder`; its weights somebody else has loaded. Errors as `restore`."""
    own = {name: module for name, module in model.named_modules() if isinstance(module, ReversibleSequence)}
    description = read_description(folder, saved_file(model))
    for name, described in _fitting(description, own, folder).items():
        own[name].set_coefficients(described.coefficients.alpha, described.coefficients.beta)


def saved_file(model: nn.Module) -> str:
    """The file of a folder that says what `model` was saved with."""
    return "config.json" if is_transformers(model, "PreTrainedModel") else FILE


def _fitting(description: Description, own: dict[str, ReversibleSequence], folder: Path) -> dict[str, Any]:
    found = description.found_in(own)
    if not len(found) == len(description.sequences) == len(own):
        raise ValueError(_other_sequences(description, own, folder))
    return found


def _other_sequences(description: Description, own: dict[str, ReversibleSequence], folder: Path) -> str:
    saved = (f"{name} of {described.branches} branches" for name, described in description.sequences.items())
    here = (f"{name} of {sequence.num_branches()}" for name, sequence in own.items())
    return (
        f"{folder} was saved with the reversible sequences {', '.join(saved)}; the model has {', '.join(here)}. "
        "Convert the same parts of the same architecture as they were, with probe=... if it was given, and restore then"
    )


def _convert_as(model: nn.Module, description: Description, folder: Path) -> None:
    """As the saved model was, with the options of each sequence."""
    first, *_ = description.sequences.values()
    if first.coefficients.fixed:
        checkpoint_blocks(model, chunk_mib=first.options.chunk_mib)
    else:
        convert(model, first.options)
    own = {name: module for name, module in model.named_modules() if isinstance(module, ReversibleSequence)}
    found = description.found_in(own)
    if len(found) < len(description.sequences):
        message = _other_sequences(description, own, folder)
        deconvert(model)
        raise ValueError(message)
    for name, sequence in own.items():
        if name not in found:  # that part was left plain
            make_plain(sequence, name)
        else:
            for option in OPTIONS:
                setattr(sequence, option, getattr(found[name].options, option))
    modules = dict(model.named_modules())
    for name in description.recomputed:
        if name not in modules:
            warnings.warn(f"{folder} names {name}, to run again in backward, which this model has not", stacklevel=3)
        elif not runs_again(modules[name]):
            recompute(modules[name])
    attach(model)


def _compare(weights: dict[str, Tensor], own: dict[str, Tensor], folder: Path) -> None:
    """ValueError for other names or shapes; a warning for dtypes that round."""
    missing = [name for name in own if name not in weights]
    unused = [name for name in weights if name not in own]
    if missing or unused:
        raise ValueError(
            f"the weights in {folder} are of another model: {len(missing)} of its {len(own)} are missing "
            f"({', '.join(missing[:4]) or '-'}), {len(unused)} have no place in it ({', '.join(unused[:4]) or '-'})"
        )
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if weights[name].shape != tensor.shape
    ]
    if shapes:
        raise ValueError(
            f"weights in {folder} have other shapes: {'; '.join(shapes[:4])}; build the model with the same sizes and "
            "the same number of classes"
        )
    other = [name for name, tensor in own.items() if weights[name].dtype != tensor.dtype]
    if other:
        name = other[0]
        warnings.warn(
            f"{len(other)} weights in {folder} have another dtype than the model's ({name}: {weights[name].dtype}, "
            f"{own[name].dtype}), so its outputs are not bit for bit those of the saved one",
            stacklevel=3,
        )


def _own_weights(model: nn.Module) -> dict[str, Tensor]:
    if is_transformers(model, "PeftModel"):
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(model)
    return model.state_dict()


def is_sharded(model: nn.Module) -> bool:
    """By FSDP2, or otherwise: some parameter is a part of itself here."""
    return any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters())


def _save_gathered(model: nn.Module, folder: Path) -> None:
    """Collective. What the plain model would write, on the first process; peft's adapters by themselves do not."""
    if is_transformers(model, "PeftModel"):
        raise ValueError("adapters that are sharded are not saved; let the Trainer save its checkpoint, or gather them")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).unlink(missing_ok=True)
        if is_transformers(model, "PreTrainedModel"):
            attach(model)
            cast(Any, model).save_pretrained(folder, state_dict=weights)
        else:
            _replace(folder / WEIGHTS, lambda part: _safetensors().torch.save_file(weights, part, {"format": "pt"}))
            write_description(model, folder)
    torch.distributed.barrier()


def _refuse_other_adapters(model: nn.Module) -> None:
    names = list(cast(Any, model).peft_config)
    if names != ["default"]:
        raise ValueError(
            f"the peft model has the adapters {', '.join(names)}; dr2net.save and dr2net.restore know a single one, "
            "named 'default': save with its own save_pretrained, and note the coefficients, model.config.dr2net"
        )


def write_weights(model: nn.Module, path: Path) -> None:
    """All of them, by the names they have in the model, as safetensors; a tensor under several names once."""
    from_torch = _safetensors().torch
    _replace(path, lambda part: from_torch.save_model(model, part, {"format": "pt"}))  # which transformers looks for


def _replace(path: Path, write: Callable[[str], None]) -> None:
    """The file is there as a whole, or as it was."""
    part = path.with_name(f"{path.name}.part")
    write(str(part))
    part.replace(path)


def _read_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """All weights in the folder by the names they have in the model."""
    for path in folder.glob("*.safetensors"):
        _open(path)  # transformers' own error for a truncated file names no file
    if is_transformers(model, "PreTrainedModel"):
        try:
            loaded, info = cast(Any, type(model)).from_pretrained(
                folder, output_loading_info=True, local_files_only=True
            )
        except LOAD_ERRORS as error:
            raise ValueError(f"{folder} cannot be loaded as a {type(model).__name__}: {error}") from error
        wrong = {kind: names for kind, names in info.items() if names}
        if wrong:
            raise ValueError(f"the weights in {folder} are not those of a {type(model).__name__}: {wrong}")
        return loaded.state_dict()
    if is_transformers(model, "PeftModel"):
        from peft.utils.save_and_load import load_peft_weights

        _refuse_other_adapters(model)
        if not (folder / "adapter_model.safetensors").is_file():
            raise FileNotFoundError(f"{folder} has no adapter_model.safetensors")
        return load_peft_weights(str(folder), device="cpu")
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; dr2net.save(model, folder) writes it")
    with _open(path) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        same = file.metadata() or {}
    own = model.state_dict()
    weights |= {name: weights[kept] for name, kept in same.items() if name in own and kept in weights}
    return weights


def _open(path: Path) -> Any:
    found = _safetensors()
    try:
        return found.safe_open(str(path), "pt")
    except (found.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install 'dr2net[saving]'") from error
    return safetensors
