"""Swin from torchvision as a backbone: image in, feature maps out, parameter names those of torchvision.

    backbone = build_swin("swin_t", weights="imagenet", drop_path=0.1)
    features = backbone(image)       # (B, 3, H, W) -> [(B, 192, H/8, W/8), (B, 384, H/16, ...), (B, 768, H/32, ...)]

Sizes are rounded up. Each output passes a LayerNorm of its own (`norm1`, `norm2`, `norm3`), which no classifier's file
has: they start fresh. The stages are `features.1`, `features.3`, ..., which is what `dr2net.convert` looks for.
Published detectors zero-pad the image to whole patches and windows, then roll: so do torchvision's blocks; timm's roll
first, which gives other features. Where a side of a map is not longer than the window, torchvision does not shift it,
the detectors do. Not here: Swin v2, the detector's layers.
"""

import re
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.weights import Tensors, load_tensors, read_state_dict, refuse_other_kinds, torchvision_weights

try:
    from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer
except ImportError as error:
    raise ImportError("Swin needs torchvision: pip install 'dr2net[engine]'") from error

PATCH = 4  # pixels per token and side
INDEX = "relative_position_index"  # a table of integers that the window size determines


class Size(NamedTuple):
    """The shape of a network."""

    width: int  # of the first stage, doubled from stage to stage
    depths: tuple[int, ...]  # blocks per stage
    heads: tuple[int, ...]
    window: int = 7  # tokens per side that attend to one another


SIZES = {
    "small": Size(48, (2, 2, 4), (2, 4, 8)),
    "swin_t": Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": Size(192, (2, 2, 18, 2), (6, 12, 24, 48), window=12),
}


class Swin(nn.Module):
    """(B, 3, H, W) -> the maps of all stages but the first, (B, C, h, w), normed; `widths`, `strides`: of each."""

    def __init__(self, size: Size, drop_path: float = 0.0) -> None:
        super().__init__()
        window = [size.window, size.window]
        model = SwinTransformer(
            [PATCH, PATCH], size.width, list(size.depths), list(size.heads), window, stochastic_depth_prob=drop_path
        )
        self.features = model.features
        stages = range(1, len(size.depths))
        self.widths = [size.width * 2**stage for stage in stages]
        self.strides = [PATCH * 2**stage for stage in stages]
        for stage, width in zip(stages, self.widths, strict=True):
            self.add_module(f"norm{stage}", nn.LayerNorm(width))
        for module in self.modules():
            if isinstance(module, ShiftedWindowAttention):  # it need not be in every checkpoint
                module.register_buffer(INDEX, module.relative_position_index, persistent=False)
        self._first_layer = [1]
        for part, module in enumerate(self.features):
            blocks = len(cast(nn.Sequential, module)) if part % 2 == 1 else 0
            self._first_layer.append(self._first_layer[-1] + blocks)

    def forward(self, image: Tensor) -> list[Tensor]:
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"images of {tuple(image.shape)} reached a model of (B, 3, H, W)")
        height, width = image.shape[2:]
        x = F.pad(image, (0, -width % PATCH, 0, -height % PATCH))
        outputs = []
        for part, module in enumerate(self.features):
            x = module(x)  # (B, h, w, C)
            if part % 2 == 1 and part > 1:
                norm = self.get_submodule(f"norm{part // 2}")
                outputs.append(norm(x).permute(0, 3, 1, 2))
        return outputs

    @property
    def num_layers(self) -> int:
        """The embedding and the blocks."""
        return self._first_layer[-1]

    def layer_of(self, name: str) -> int:
        """0 for the patch embedding, 1 + i for block i, counted through the stages; merging is of the block before it,
        as are the norms of the outputs of the last block of their stage."""
        if name.startswith("norm"):
            return self._first_layer[2 * int(name[4]) + 2] - 1
        _, part, rest, *_ = name.split(".")
        first = self._first_layer[int(part)]
        return first + int(rest) if int(part) % 2 == 1 else max(first - 1, 0)


def build_swin(name: str, *, weights: str | None = None, drop_path: float = 0.0) -> Swin:
    """Build "swin_t", "swin_s", "swin_b", "swin_l" or "small".

    weights: None (random), "imagenet" (ImageNet-1k, which torchvision downloads and checks), or a file of a classifier
    or backbone in the names of torchvision, Microsoft or timm; norms of the outputs that it lacks stay fresh.
    drop_path: stochastic depth of the last block, rising linearly from 0.
    ValueError if the name is unknown, the weights are unreachable or leave a key unfilled or unused.
    """
    if name not in SIZES:
        raise ValueError(f"no Swin {name!r}: choose one of {', '.join(SIZES)}")
    backbone = Swin(SIZES[name], drop_path)
    if weights is not None:
        state = _download(name) if weights == "imagenet" else read_state_dict(Path(weights), inside="model")
        load_backbone(backbone, state, f"weights {weights!r}")
    return backbone


def load_backbone(backbone: Swin, state: Tensors, source: str) -> list[str]:
    """Fill a backbone from a state dict in any of the known names; returns what stays fresh: norms of the outputs.

    ValueError, naming `source`, if anything else is missing or unused. The classifier, its norm, and tables that
    the window determines are left out.
    """
    state = torchvision_names(state)
    own = backbone.state_dict()
    unknown = re.compile(r"^(head|norm)\.|\.relative_position_index$|\.attn_mask$")
    state = {key: value for key, value in state.items() if not unknown.search(key)}
    fresh = [key for key in own if re.match(r"norm\d\.", key) and key not in state]
    refuse_other_kinds(own, state, source)
    load_tensors(backbone, {**state, **{key: own[key] for key in fresh}}, source)
    return fresh


def torchvision_names(state: Tensors) -> Tensors:
    """A Swin's tensors under torchvision's names, from those of torchvision, Microsoft (official detectors, detrex),
    timm or mmdetection; tensors with other names keep theirs. Values are those of the file but for mmdetection's
    merging, whose channels stand in another order.
    """
    if any(key.startswith("stages.") for key in state):
        state = _microsoft_names(state)
    if not any(key.startswith("layers.") for key in state):
        return state
    # timm merges at the beginning of a stage, Microsoft at the end of the one before
    shift = 1 if any(key.startswith("layers.0.downsample.") for key in state) else 0
    renamed = {}
    for key, value in state.items():
        key = key.replace("patch_embed.proj.", "features.0.0.").replace("patch_embed.norm.", "features.0.2.")
        if found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            stage, block, rest = found.groups()
            rest = rest.replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.3.")
            key = f"features.{2 * int(stage) + 1}.{block}.{rest}"
        elif found := re.match(r"layers\.(\d+)\.downsample\.(.+)", key):
            key = f"features.{2 * (int(found[1]) + shift)}.{found[2]}"
        renamed[key] = value
    return renamed


def _microsoft_names(state: Tensors) -> Tensors:
    """mmdetection's names and its order of the four tokens that are merged."""
    names = {
        "attn.w_msa.": "attn.",
        "ffn.layers.0.0.": "mlp.fc1.",
        "ffn.layers.1.": "mlp.fc2.",
        "patch_embed.projection.": "patch_embed.proj.",
        "stages.": "layers.",
    }
    renamed = {}
    for key, value in state.items():
        if key.endswith("downsample.reduction.weight"):
            value = _merged_order(value)
        elif ".downsample.norm." in key:
            value = _merged_order(value[None])[0] if value.dim() == 1 else value
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        renamed[key] = value
    return renamed


def _merged_order(weight: Tensor) -> Tensor:
    """(o, 4 c) of unfold's channels (c, row, column) -> Swin's tokens (0, 0), (1, 0), (0, 1), (1, 1), each c long."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return weight  # of no merging: its shape will be named
    out, four = weight.shape
    return weight.reshape(out, four // 4, 4)[..., torch.tensor([0, 2, 1, 3])].transpose(1, 2).reshape(out, four)


def _download(name: str) -> Tensors:
    if name in ("small", "swin_l"):
        raise ValueError(f"torchvision has no ImageNet weights of {name}: give a file, --model.weights FILE")
    return torchvision_weights(name, "IMAGENET1K_V1", "ImageNet")
