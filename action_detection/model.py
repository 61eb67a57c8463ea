"""A video backbone and a detection head: model(batch) -> the head's outputs, a dict of tensors.

    model = build_model(config)            # batch["video"]: (B, 3, T, H, W), normalized; batch["mask"]: (B, N)

`model.backbone` is what a finetuning method applies to; `model.head.detect` turns outputs into candidates. Not here:
schedules, precision, suppression of duplicates.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from action_detection.configs import Config
from action_detection.head import ActionFormerHead
from engine.task import Batch, Model
from engine.weights import refuse_non_finite


class ActionDetector(Model):
    """Backbone, mean over space, then head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batch: Batch) -> dict[str, Any]:
        features = self.backbone(batch["video"]).mean(dim=(3, 4))  # (B, C, T')
        num_times = batch["mask"].shape[1]
        if features.shape[2] != num_times:
            features = F.interpolate(features, size=num_times, mode="linear", align_corners=False)
        return self.head(features, batch["mask"])

    def losses(self, outputs: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        """Those of the head."""
        return cast(Any, self.head).losses(outputs, batch)


def build_model(config: Config, *, pretrained: bool = True) -> ActionDetector:
    """The row's network with its pretrained backbone, or a random one.

    ValueError if weights are unreachable, do not fit or hold NaN.
    """
    backbone = _build_backbone(config, pretrained)
    refuse_non_finite(backbone.state_dict(), f"pretrained weights of {config.model.backbone}")
    return ActionDetector(backbone, build_head(config, backbone.width))


def build_head(config: Config, in_width: int) -> nn.Module:
    """The row's head for features of `in_width` channels, with random weights."""
    model = config.model
    num_classes = 1 if model.class_agnostic else config.data.num_classes
    if model.head == "vsgn":
        from action_detection.vsgn import VSGNHead

        return VSGNHead(
            in_width,
            num_classes,
            width=model.width,
            num_levels=model.num_levels,
            regression_weight=model.regression_weight,
        )
    return ActionFormerHead(
        in_width,
        num_classes,
        width=model.width,
        num_levels=model.num_levels,
        window=model.attention_span or 0,
        drop_path=model.head_drop_path,
        position_embedding=model.position_embedding,
        label_smoothing=model.label_smoothing,
        regression_weight=model.regression_weight,
    )


def example_batch(config: Config) -> Batch:
    """A batch of the shapes of one forward in training; to be called under fake tensors, where it takes no memory."""
    data, num_windows = config.data, config.run.micro_batch
    length = float(data.num_times)
    return {
        "video": torch.zeros(num_windows, 3, data.num_frames, data.image_size, data.image_size),
        "mask": torch.ones(num_windows, data.num_times, dtype=torch.bool),
        "segments": [torch.tensor([[0.1, 0.3], [0.5, 0.9]]) * length for _ in range(num_windows)],
        "labels": [torch.tensor([0, data.num_classes - 1]) for _ in range(num_windows)],
        "name": [f"example_{i}" for i in range(num_windows)],
        "window": torch.zeros(num_windows, dtype=torch.long),
        "start": torch.zeros(num_windows),
        "seconds_per_time": torch.ones(num_windows),
        "duration": torch.full((num_windows,), length),
        "skipped": [],
    }


def _build_backbone(config: Config, pretrained: bool) -> Any:
    model = config.model
    weights = model.weights if pretrained else None
    if model.backbone == "slowfast101":
        from engine.backbones.slowfast import build_slowfast

        return build_slowfast(model.backbone, weights=weights, drop_path=model.drop_path)
    from engine.backbones.video_swin import build_video_swin

    return build_video_swin(model.backbone, weights=weights, drop_path=model.drop_path)
