"""A model by its name, built with random weights: what the command line of `dr2net` understands after --model.

vit_small_patch16_224            a timm name
torchvision:swin3d_t             a torchvision name
transformers:VideoMAEConfig      a configuration class of transformers, or a local model folder after the colon
package.module:function          a function of yours without arguments (or with `depth`) that returns the module
"""

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def find_model(name: str, *, pretrained: bool = False) -> Callable[[], nn.Module]:
    """A function that builds the named model; see the top of this file for names. Raises ValueError for an unknown one.

    pretrained: for timm and torchvision, load the weights of that name (from the cache or the hub).
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
    if pretrained:
        raise ValueError(f"--pretrained works for timm and torchvision, not for {name!r}: load them in your function")
    if source == "transformers":
        return _transformers_model(rest)
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
    (config,) = build.args
    if not hasattr(config, "num_hidden_layers"):
        return None

    def build_deep(depth: int) -> nn.Module:
        deep = copy.deepcopy(config)
        deep.num_hidden_layers = depth
        return build.func(deep)

    return build_deep


def _transformers_model(name: str) -> functools.partial[nn.Module]:
    transformers = _import("transformers", "the model is transformers'")
    config_class = getattr(transformers, name, None)
    try:
        config = (
            config_class() if config_class else transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        )
    except (OSError, TypeError) as error:
        raise ValueError(f"{name!r} is neither a config class of transformers nor a local model folder") from error
    return functools.partial(transformers.AutoModel.from_config, config)


def _import(package: str, why: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not installed ({why}): pip install 'dr2net[models]'") from error
