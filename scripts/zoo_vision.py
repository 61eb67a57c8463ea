"""Models of timm and torchvision with random weights, and a batch for each; for `scripts.try_models`.

One model of each timm module: the one with the fewest parameters. Not here: transformers' (`zoo_transformers.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Run = Callable[[nn.Module], Any]
SIDE = 64  # pixels, where a model takes any size


def names(library: str) -> list[str]:
    """Of timm the smallest model of each module, of torchvision all of classification, segmentation and video."""
    if library == "torchvision":
        from torchvision.models import list_models

        return [name for name in list_models() if not name.startswith("quantized")]
    import timm

    smallest: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except Exception:  # some read the values of what they have just made
                continue
        size = sum(p.numel() for p in model.parameters())
        smallest[type(model).__module__] = min(smallest.get(type(model).__module__, (size, name)), (size, name))
    return sorted(name for _, name in smallest.values())


def builder(library: str) -> Callable[[str], tuple[nn.Module, Run]]:
    """A function that makes the model of a name, and one that runs a model on a batch."""
    return _timm if library == "timm" else _torchvision


def _timm(name: str) -> tuple[nn.Module, Run]:
    import timm

    model = timm.create_model(name, num_classes=5).eval()
    channels, *size = model.default_cfg.get("input_size", (3, 224, 224))
    if not model.default_cfg.get("fixed_input_size"):
        try:
            with torch.no_grad():
                model(torch.randn(2, channels, SIDE, SIDE))
        except Exception:  # it does take only its own size
            pass
        else:
            size = [SIDE, SIDE]
    return model, functools.partial(_call, batch=_random(2, channels, *size))


def _torchvision(name: str) -> tuple[nn.Module, Run]:
    from torchvision.models import get_model, get_model_builder

    builder = get_model_builder(name)
    place, options = builder.__module__, {}
    if ".detection" in place or ".segmentation" in place:
        options = {"weights_backbone": None}
    model = get_model(name, weights=None, **options)
    if ".detection" in place:
        targets = [{"boxes": torch.tensor([[4.0, 4.0, 60.0, 60.0]]), "labels": torch.tensor([1])} for _ in range(2)]
        return model, functools.partial(_detect, images=list(_random(2, 3, 128, 128)), targets=targets)
    if ".video" in place:
        shape = (1, 3, 16, 224, 224) if "mvit" in name else (2, 3, 8, 64, 64)
        return model, functools.partial(_call, batch=_random(*shape))
    if ".optical_flow" in place:
        return model, functools.partial(_flow, images=_random(2, 3, 128, 128))
    side = 224 if "vit" in name else 299 if "inception" in name else SIDE
    return model, functools.partial(_call, batch=_random(2, 3, side, side))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _call(model: nn.Module, batch: torch.Tensor) -> Any:
    return model(batch)


def _detect(model: nn.Module, images: list[torch.Tensor], targets: list[dict]) -> Any:
    return model(images, targets) if model.training else model.backbone(torch.stack(images))


def _flow(model: nn.Module, images: torch.Tensor) -> Any:
    return model(images, images.flip(0), num_flow_updates=2)
