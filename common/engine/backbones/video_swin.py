"""Video Swin from torchvision as a backbone: clip in, feature map out, parameter names those of torchvision.

    backbone = build_video_swin("swin3d_t", weights="kinetics", drop_path=0.1)
    features = backbone(video)                     # (B, 3, T, H, W) -> (B, 768, T / 2, H / 32, W / 32), rounded up

The features are those that torchvision's network averages and classifies: after its final norm, without its head. The
stages are `features.0`, `features.2`, ..., which is what `dr2net.convert` looks for, and between them the patch
merging. Any clip size: torchvision pads to whole patches and windows. "small" is this project's network for tables in
minutes (action_detection/pretrain.py). Not here: the Swin-L of the paper, of which torchvision has no weights.
"""

from pathlib import Path
from typing import NamedTuple, cast

from torch import Tensor, nn

from engine.weights import Tensors, load_tensors, read_state_dict, torchvision_weights

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


class VideoSwin(nn.Module):
    """(B, 3, T, H, W) -> (B, C, T', H', W'), C = `width`, after the final norm."""

    def __init__(self, model: SwinTransformer3d) -> None:
        super().__init__()
        self.patch_embed, self.pos_drop = model.patch_embed, model.pos_drop
        self.features, self.norm = model.features, model.norm
        self.width = model.num_features
        for module in self.modules():
            if isinstance(module, ShiftedWindowAttention3d):  # 1.2 MB per block need not be in every checkpoint
                module.register_buffer(INDEX, module.relative_position_index, persistent=False)
        self._first_layer = _first_layers(self.features)

    def forward(self, video: Tensor) -> Tensor:
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"a clip of {tuple(video.shape)} reached a model of (B, 3, T, H, W)")
        x = self.features(self.pos_drop(self.patch_embed(video)))  # (B, T', H', W', C)
        return self.norm(x).permute(0, 4, 1, 2, 3)

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


def _download(name: str) -> Tensors:
    if name == "small":
        raise ValueError(
            "'small' has no Kinetics weights: give a file, such as action_detection/weights/small.safetensors"
        )
    return torchvision_weights(name, "KINETICS400_V1", "Kinetics")
