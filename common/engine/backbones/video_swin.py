"""Video Swin from torchvision as a backbone: clip in, feature map out, parameter names those of torchvision.

    backbone = build_video_swin("swin3d_t", weights="kinetics", drop_path=0.1)
    features = backbone(video)                     # (B, 3, T, H, W) -> (B, 768, T / 2, H / 32, W / 32), rounded up
    backbone = build_video_stages("swin3d_t", weights="kinetics", drop_path=0.1, patch="sum")
    features = backbone(video)                     # -> [(B, 96, T, H / 4, W / 4), (B, 192, T, H / 8, ...), ...]

The features are those that torchvision's network averages and classifies: after its final norm, without its head; or
those of each stage before its merging, without a norm, and each frame a time step of its own (`patch`). The stages are
`features.0`, `features.2`, ..., which is what `dr2net.convert` looks for, and between them the patch merging. Any clip
size: torchvision pads to whole patches and windows. "small" is this project's network for tables in minutes
(action_detection/pretrain.py). Not here: the Swin-L of the paper, of which torchvision has no weights.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.weights import Tensors, load_tensors, read_state_dict, refuse_other_kinds, torchvision_weights

try:
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d
except ImportError as error:
    raise ImportError("Video Swin needs torchvision: pip install 'dr2net[engine]'") from error

PATCH = (2, 4, 4)  # pixels per token: time, height, width


class Size(NamedTuple):
    """The shape of a network."""

    width: int  # of the first stage, doubled from stage to stage
    depths: tuple[int, ...]  # blocks per stage
    heads: tuple[int, ...]
    window: tuple[int, int, int] = (8, 7, 7)  # tokens that attend to one another: time, height, width


SIZES = {
    "small": Size(48, (2, 2, 4), (2, 4, 8), window=(4, 7, 7)),  # half the time of window 8 with 3, 6, 12 heads
    "swin3d_t": Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin3d_s": Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin3d_b": Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
}
INDEX = "relative_position_index"  # a table of integers that the window size determines
Patch = Literal["sum", "overlap"]


class _Layers(nn.Module):
    """The embedding and the stages of a network, and how its layers count."""

    def __init__(self, model: SwinTransformer3d, num_stages: int) -> None:
        super().__init__()
        self.patch_embed, self.pos_drop = model.patch_embed, model.pos_drop
        self.features = model.features[: 2 * num_stages - 1]  # between two stages stands the merging
        for module in self.modules():
            if isinstance(module, ShiftedWindowAttention3d):  # 1.2 MB per block need not be in every checkpoint
                module.register_buffer(INDEX, module.relative_position_index, persistent=False)
        self._first_layer = _first_layers(self.features)

    def embed(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, T', H', W', C)."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"a clip of {tuple(video.shape)} reached a model of (B, 3, T, H, W)")
        return self.pos_drop(self.patch_embed(video))

    @property
    def num_layers(self) -> int:
        """The embedding and the blocks."""
        return self._first_layer[-1]

    def layer_of(self, name: str) -> int:
        """0 for the patch embedding, 1 + i for block i, counted through the stages; merging is of the block before it,
        the final norm of the last block."""
        if name.startswith("features."):
            _, part, rest, *_ = name.split(".")
            first = self._first_layer[int(part)]
            return first + int(rest) if int(part) % 2 == 0 else first - 1
        return self.num_layers - 1 if name.startswith("norm.") else 0


class VideoSwin(_Layers):
    """(B, 3, T, H, W) -> (B, C, T', H', W'), C = `width`, after the final norm."""

    def __init__(self, model: SwinTransformer3d) -> None:
        super().__init__(model, (len(model.features) + 1) // 2)
        self.norm = model.norm
        self.width = model.num_features

    def forward(self, video: Tensor) -> Tensor:
        return self.norm(self.features(self.embed(video))).permute(0, 4, 1, 2, 3)


class VideoStages(_Layers):
    """(B, 3, T, H, W) -> the maps of the first stages, (B, C, T, h, w) each, before they are merged; `widths`: C."""

    def __init__(self, model: SwinTransformer3d, num_stages: int) -> None:
        super().__init__(model, num_stages)
        width = self.patch_embed.proj.out_channels
        self.widths = [width * 2**stage for stage in range(num_stages)]

    def forward(self, video: Tensor) -> list[Tensor]:
        x = self.embed(video)
        outputs = []
        for part, module in enumerate(self.features):
            x = module(x)  # (B, T, h, w, C)
            if part % 2 == 0:
                outputs.append(x.permute(0, 4, 1, 2, 3))
        return outputs


class OverlappingEmbed(nn.Module):
    """(B, 3, T, H, W) -> (B, T, H / 4, W / 4, C): each frame and its next with the kernel for two; the last one twice.

    What a kernel knows of motion it keeps, which the sum over its time forgets.
    """

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.proj, self.norm = cast(nn.Conv3d, embed.proj), cast(nn.Module, embed.norm)
        self.proj.stride = (1, *PATCH[1:])

    def forward(self, video: Tensor) -> Tensor:
        height, width = video.shape[3:]
        x = F.pad(video, (0, -width % PATCH[2], 0, -height % PATCH[1]))
        x = torch.cat([x, x[:, :, -1:]], dim=2)
        return self.norm(self.proj(x).permute(0, 2, 3, 4, 1))


def _first_layers(features: nn.Sequential) -> list[int]:
    """Layer of the first block of each stage (or, for merging, of the stage after it); last, the number of layers."""
    layers = [1]
    for part, module in enumerate(features):
        layers.append(layers[-1] + (len(cast(nn.Sequential, module)) if part % 2 == 0 else 0))
    return layers


def build_video_swin(name: str, *, weights: str | None, drop_path: float = 0.0) -> VideoSwin:
    """Build "swin3d_t", "swin3d_s", "swin3d_b" or "small".

    weights: None (random), "kinetics" (Kinetics-400, which torchvision downloads and checks), or a file: safetensors or
    a state dict of torchvision, with or without its classification head.
    drop_path: stochastic depth of the last block, rising linearly from 0.
    ValueError if the name is unknown, the weights are unreachable or leave a key unfilled or unused.
    """
    if name not in SIZES:
        raise ValueError(f"no Video Swin {name!r}: choose one of {', '.join(SIZES)}")
    width, *lists = SIZES[name]
    model = SwinTransformer3d(list(PATCH), width, *map(list, lists), stochastic_depth_prob=drop_path, num_classes=1)
    backbone = VideoSwin(model)
    if weights is not None:
        state = _download(name) if weights == "kinetics" else read_state_dict(Path(weights))
        left_out = [key for key in state if key.startswith("head.") or key.endswith(f".{INDEX}")]
        state = {key: value for key, value in state.items() if key not in left_out}
        load_tensors(backbone, state, f"weights {weights!r}")
    return backbone


def build_video_stages(
    name: str, *, weights: str | None, drop_path: float = 0.0, patch: Patch = "sum", num_stages: int = 3
) -> VideoStages:
    """The first stages of "swin3d_t", "swin3d_s", "swin3d_b" or "small", with a map of each for every frame.

    weights: as `build_video_swin`; a file may also be the official one. What belongs to later stages is left out.
    drop_path: stochastic depth of the last block of *all* stages of the network, rising linearly from 0.
    patch: how an embedding of pairs of frames becomes one of frames: kernel summed over time, or `OverlappingEmbed`.
    ValueError as `build_video_swin`.
    """
    if name not in SIZES:
        raise ValueError(f"no Video Swin {name!r}: choose one of {', '.join(SIZES)}")
    width, *lists = SIZES[name]
    if num_stages > len(SIZES[name].depths):
        raise ValueError(f"{name} has {len(SIZES[name].depths)} stages, not {num_stages}")
    pixels = [1 if patch == "sum" else PATCH[0], *PATCH[1:]]
    model = SwinTransformer3d(pixels, width, *map(list, lists), stochastic_depth_prob=drop_path, num_classes=1)
    if patch == "overlap":
        model.patch_embed = OverlappingEmbed(model.patch_embed)
    backbone = VideoStages(model, num_stages)
    if weights is not None:
        state = _download(name) if weights == "kinetics" else read_state_dict(Path(weights), inside="state_dict")
        load_stages(backbone, state, f"weights {weights!r}")
    return backbone


def load_stages(backbone: VideoStages, state: Tensors, source: str) -> None:
    """Fill the stages from a state dict of a whole network, in torchvision's names, the official ones or MTTR's.

    ValueError, naming `source`, if anything is missing or unused but later stages, the last norm and the classifier.
    """
    last = len(backbone.features) - 1
    state = {
        key: value
        for key, value in torchvision_names(state).items()
        if not re.match(r"(head|norm|cls_head)\.", key)
        and not key.endswith((f".{INDEX}", ".attn_mask"))
        and not ((found := re.match(r"features\.(\d+)\.", key)) and int(found[1]) > last)
    }
    own, name = backbone.state_dict(), "patch_embed.proj.weight"
    refuse_other_kinds(own, state, source)
    if name in state and state[name].shape[2:3] == (PATCH[0],) and own[name].shape[2] == 1:
        state[name] = state[name].to(own[name].dtype).sum(dim=2, keepdim=True)
    load_tensors(backbone, state, source)


def torchvision_names(state: Tensors) -> Tensors:
    """A Video Swin's tensors under torchvision's names, from those of torchvision, the official code (with or without
    "backbone." before them) or MTTR (whose merging stands beside the stages); others keep theirs.
    """
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("backbone.")
        if found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            stage, block, rest = found.groups()
            rest = rest.replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.3.")
            key = f"features.{2 * int(stage)}.{block}.{rest}"
        elif found := re.match(r"(?:layers\.(\d+)\.downsample|downsamples\.(\d+))\.(.+)", key):
            key = f"features.{2 * int(found[1] or found[2]) + 1}.{found[3]}"
        renamed[key] = value
    return renamed


def _download(name: str) -> Tensors:
    if name == "small":
        raise ValueError(
            "'small' has no Kinetics weights: give a file, such as action_detection/weights/small.safetensors"
        )
    return torchvision_weights(name, "KINETICS400_V1", "Kinetics")
