"""A model by its name, built with random weights: what the command line of `dr2net` understands after --model.

No name of these needs a network.

vit_small_patch16_224            a timm name
torchvision:swin3d_t             a torchvision name
transformers:bert                a type of model, or a class: BertForMaskedLM, VideoMAEConfig
transformers:path/to/folder      a local folder of transformers with a config.json
package.module:function          a function of yours without arguments (or with `depth`) that returns the module
"""

import copy
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def find_model(name: str, *, pretrained: bool = False) -> Callable[[], nn.Module]:
    """A function that builds the named model; see the top of this file for names. Raises ValueError for an unknown one.

    pretrained: for timm and torchvision, load the weights of that name (from the cache or the hub); for a folder of
    transformers those in it.
    """
    source, colon, rest = name.partition(":")
    if not colon:
        timm = _import("timm", "a model without a colon is a timm name")
        if name not in timm.list_models():
            close = ", ".join(timm.list_models(f"*{name[:8]}*")[:5]) or "see timm.list_models()"
            raise ValueError(f"timm has no model {name!r}; similar: {close}")
        return functools.partial(timm.create_model, name, pretrained=pretrained)
    if source == "torchvision":
        models = _import("torchvision", "the model is torchvision's").models
        if rest not in models.list_models():
            raise ValueError(f"torchvision has no model {rest!r}; see torchvision.models.list_models()")
        return functools.partial(models.get_model, rest, weights="DEFAULT" if pretrained else None)
    if source == "transformers":
        return _pretrained_folder(rest) if pretrained else _transformers_model(rest)
    if pretrained:
        raise ValueError(
            f"--pretrained works for timm and torchvision, and folders of transformers, not for {name!r}: load them in "
            "your function"
        )
    try:
        function = getattr(importlib.import_module(source), rest)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {rest!r} from {source!r}: {error}") from error

    def build() -> nn.Module:
        model = function()
        if not isinstance(model, nn.Module):
            raise ValueError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module")
        return model

    return build


def find_by_depth(name: str) -> Callable[[int], nn.Module] | None:
    """The named model as a function of its number of blocks; None if it does not take one.

    Those that do: timm models with an argument `depth`, transformers with `num_hidden_layers`, your function with an
    argument `depth`.
    """
    source, colon, rest = name.partition(":")
    if not colon:
        timm = _import("timm", "a model without a colon is a timm name")
        try:
            with torch.device("meta"):
                timm.create_model(name, depth=1)
        except (TypeError, RuntimeError):
            return None
        return lambda depth: timm.create_model(name, depth=depth)
    if source == "torchvision":
        return None
    if source != "transformers":
        function = getattr(importlib.import_module(source), rest)
        return (lambda depth: function(depth=depth)) if "depth" in inspect.signature(function).parameters else None
    build = _transformers_model(rest)
    *before, config = build.args
    if not hasattr(config, "num_hidden_layers"):
        return None

    def build_deep(depth: int) -> nn.Module:
        deep = copy.deepcopy(config)
        deep.num_hidden_layers = depth
        return build.func(*before, deep)

    return build_deep


def _transformers_model(name: str) -> functools.partial[nn.Module]:
    """Its one argument is the configuration."""
    transformers = _import("transformers", "the model is transformers'")
    found: Any = getattr(transformers, name, None) if name.isidentifier() else None
    config: Any
    build: Callable[[Any], nn.Module] = transformers.AutoModel.from_config
    try:
        if isinstance(found, type) and issubclass(found, transformers.PretrainedConfig):
            config = found()
        elif isinstance(found, type) and issubclass(found, nn.Module):
            config, build = found.config_class(), found  # type: ignore[attr-defined]  # of all its models
        elif name in transformers.CONFIG_MAPPING:
            config = transformers.CONFIG_MAPPING[name]()
        else:
            config = _config_of_folder(transformers, name)
    except (TypeError, AttributeError, ImportError) as error:  # of configurations made of others, which have no default
        raise ValueError(
            f"{name!r}: transformers makes no model of it by its name alone ({_first_line(error)})"
        ) from error
    if getattr(config, "use_cache", None):
        config.use_cache = False  # of keys and values, for generation: no training wants it
    return functools.partial(_build, build, name, config)


def _build(build: Callable[[Any], nn.Module], name: str, config: Any) -> nn.Module:
    try:
        return build(config)
    except (ValueError, ImportError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"transformers:{name} cannot be built from its configuration: {_first_line(error)}") from error


def _config_of_folder(transformers: Any, name: str) -> Any:
    """Of a local folder, or of what the hub's cache on this machine has. ValueError, with the remedy, for others."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name}: the folder has no config.json; give one that transformers' save_pretrained wrote")
    try:
        return transformers.AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else name, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if folder.is_dir():
            raise ValueError(
                f"{folder / 'config.json'}: transformers makes no model of it: {_first_line(error)}"
            ) from error
        near = difflib.get_close_matches(name.rpartition("/")[2].partition("-")[0], transformers.CONFIG_MAPPING, n=3)
        similar = f"; similar types: {', '.join(near)}" if near else ""
        raise ValueError(
            f"{name!r} is neither a config class of transformers, a type of model or a local model folder{similar}. "
            "Names of the hub need a network, which dr2net does not use: give a folder that "
            "AutoModel.from_pretrained(name).save_pretrained(folder) has filled"
        ) from error


def _pretrained_folder(name: str) -> Callable[[], nn.Module]:
    """The model of a local folder with the weights in it. ValueError where they do not fill it."""
    transformers = _import("transformers", "the model is transformers'")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"--pretrained: transformers:{name} is no local folder; give one with a config.json and weights"
        )
    config = _transformers_model(name).args[2]

    def build() -> nn.Module:
        log = transformers.utils.logging
        quiet = log.get_verbosity()
        log.set_verbosity_error()  # what it would say of missing weights is said below
        log.disable_progress_bar()
        try:
            model, report = transformers.AutoModel.from_pretrained(
                str(folder), config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}: transformers cannot load its weights: {_first_line(error)}") from error
        finally:
            log.set_verbosity(quiet)
            log.enable_progress_bar()
        lost = sorted([*report["missing_keys"], *map(str, report.get("mismatched_keys", ()))])
        if lost:
            raise ValueError(
                f"{folder}: its weights do not fill the model: {', '.join(lost[:4])}; leave out --pretrained"
            )
        return model.train()

    return build


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _import(package: str, why: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not installed ({why}): pip install 'dr2net[models]'") from error
