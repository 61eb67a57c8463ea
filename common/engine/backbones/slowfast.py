"""SlowFast from pytorchvideo as a backbone: clip in, features of both pathways over time, batch norm frozen.

    backbone = build_slowfast("slowfast101", weights="data/slowfast_r101.pyth")
    features = backbone(video)                         # (B, 3, T, H, W) -> (B, 2304, T, 1, 1)

The fast pathway gets every frame, the slow one every fourth. Both outputs are averaged over space, the slow one is
brought to the fast one's length by linear interpolation, and they are concatenated, slow first (2048 + 256 channels):
what pytorchvideo's head pools and classifies. Batch norm always runs in evaluation mode, in training too: statistics of
one or two videos per device are no good, and a block that is run again in backward must not update them twice. Its
scales and shifts are trained; in OpenTAD's Re2TAL settings (configs/re2tal), which are alike else, they are not.

Made reversible, a block relu(x + f(x)) without down-sampling is x plus the branch relu(x + f(x)) - x = max(f(x), -x)
(dr2net/branches.py): pytorchvideo's own weights are the start. Re2TAL's has the branch relu(f(x)), another network,
which its authors pretrained on Kinetics again. Not here: the 16x8 variants.
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.weights import load_tensors, read_state_dict

try:
    from pytorchvideo.models.resnet import ResBlock
    from pytorchvideo.models.slowfast import create_slowfast
except ImportError as error:
    raise ImportError("SlowFast needs pytorchvideo: pip install 'dr2net[engine]'") from error

SPEED_RATIO = 4  # frames of the fast pathway per frame of the slow one
CHANNEL_RATIO = 8  # channels of the slow pathway per channel of the fast one
DEPTHS = {"slowfast50": (50, 7), "slowfast101": (101, 5)}  # layers, frames that a lateral convolution sees
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SlowFast(nn.Module):
    """(B, 3, T, H, W) -> (B, C, T, 1, 1), T a multiple of four; parameter names are pytorchvideo's, `blocks.0.` ..."""

    def __init__(self, blocks: nn.ModuleList, *, width: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.width = width
        counts = [_num_blocks(stage) for stage in blocks]
        self._first_layer = [0, *(1 + sum(counts[:stage]) for stage in range(1, len(blocks)))]
        self.num_layers = 1 + sum(counts)
        self.train(self.training)

    def forward(self, video: Tensor) -> Tensor:
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % SPEED_RATIO:
            raise ValueError(
                f"a clip of {tuple(video.shape)} reached SlowFast, which takes (B, 3, T, H, W), T a multiple of "
                f"{SPEED_RATIO}"
            )
        pathways = [video[:, :, ::SPEED_RATIO], video]
        for block in self.blocks:
            pathways = block(pathways)
        slow, fast = (x.mean((3, 4)) for x in pathways)
        slow = F.interpolate(slow, size=fast.shape[2], mode="linear", align_corners=False)
        return torch.cat([slow, fast], dim=1)[..., None, None]

    def train(self, mode: bool = True) -> "SlowFast":
        """As nn.Module.train, but batch norm stays in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, NORMS):
                module.training = False
        return self

    def layer_of(self, name: str) -> int:
        """0 for the stem, 1 + i for the i-th residual blocks of both pathways, counted through the stages; what joins
        the pathways after a stage belongs to its last blocks."""
        parts = name.split(".")
        stage = int(parts[1])
        if "res_blocks" in parts:
            return self._first_layer[stage] + int(parts[parts.index("res_blocks") + 1])
        return self._first_layer[stage + 1] - 1 if stage else 0


def _num_blocks(stage: nn.Module) -> int:
    return max((len(cast(nn.ModuleList, m)) for m in stage.modules() if _holds_blocks(m)), default=0)


def _holds_blocks(module: nn.Module) -> bool:
    return any(isinstance(child, ResBlock) for child in module.children())


def build_slowfast(
    name: str, *, weights: str | None, drop_path: float = 0.0, widths: tuple[int, int] = (64, 8)
) -> SlowFast:
    """Build "slowfast101" (8x8, ResNet-101) or "slowfast50".

    weights: None (random), or a file: pytorchvideo's checkpoint (SLOWFAST_8x8_R101.pyth of its model zoo), a plain
    state dict, or safetensors, with or without the classification head.
    drop_path: must be 0, ResNet blocks have none. widths: channels of the stems, slow and fast.
    ValueError if the name is unknown or the weights leave a key unfilled or unused.
    """
    if name not in DEPTHS:
        raise ValueError(f"no SlowFast {name!r}: choose one of {', '.join(DEPTHS)}")
    if drop_path:
        raise ValueError(f"drop_path {drop_path}: SlowFast has no stochastic depth, set --model.drop-path 0")
    if widths[0] != CHANNEL_RATIO * widths[1]:
        raise ValueError(f"widths {widths}: the slow pathway has {CHANNEL_RATIO} times the channels of the fast one")
    depth, fusion_frames = DEPTHS[name]
    network = create_slowfast(
        model_depth=depth,
        slowfast_fusion_conv_kernel_size=(fusion_frames, 1, 1),
        stem_dim_outs=widths,
        model_num_class=1,
    )
    stages = network.blocks[:-2]  # without pooling and classification
    backbone = SlowFast(stages, width=32 * sum(widths))
    if weights is not None:
        head = f"blocks.{len(stages) + 1}."
        state = read_state_dict(Path(weights), inside="model_state")
        state = {key: value for key, value in state.items() if not key.startswith(head)}
        load_tensors(backbone, state, f"weights {weights!r}")
    return backbone
