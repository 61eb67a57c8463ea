"""A Swin backbone and DINO's head: model(batch) -> the head's outputs, a dict of tensors.

    model = build_model(config)            # batch["image"]: (B, 3, H, W), normalized; batch["padding"]: (B, H, W)

`model.backbone` is what a finetuning method applies to, and `model.head.transformer.encoder`, where the row says so
(`finetuning.also`); `model.head.detect` turns outputs into detections. Not here: files of others (`checkpoints.py`),
schedules, precision.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from detection.checkpoints import load_file
from detection.configs import Config
from detection.head import DINOHead
from detection.transformer import EncoderLayer
from engine.backbones.swin import Swin, build_swin
from engine.task import Batch, Model
from engine.weights import refuse_non_finite

NUM_EXAMPLE_BOXES = 8  # per image, about COCO's mean; denoising has the same number of queries for 1 to 50 of them


class Detector(Model):
    """Backbone, then head."""

    backbone: Swin

    def __init__(self, backbone: Swin, head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.fresh: tuple[str, ...] = ()  # parameters that a file of weights left random

    def forward(self, batch: Batch) -> dict[str, Any]:
        return self.head(self.backbone(batch["image"]), batch["padding"], batch["targets"])

    def losses(self, outputs: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        """Those of the head."""
        return self.head.losses(outputs, batch["targets"], batch["num_targets"])


def build_model(config: Config, *, pretrained: bool = True) -> Detector:
    """The row's network with its pretrained weights, or a random one.

    ValueError if weights are unreachable, do not fit or hold NaN. What a file leaves fresh is printed.
    """
    own = config.model
    given = own.weights if pretrained else None
    backbone = build_swin(own.backbone, weights=given if given == "imagenet" else None, drop_path=own.drop_path)
    model = Detector(backbone, DINOHead(backbone.widths, config.data.num_classes, own))
    for layer in model.head.transformer.encoder.layers:
        # the other methods go to coefficients where F - x is not bounded
        cast(EncoderLayer, layer).residual = config.finetuning.method == "dr2net"
    if given is not None and given != "imagenet":
        model.fresh = load_file(model, Path(given), config)
    refuse_non_finite(model.state_dict(), f"pretrained weights of {own.backbone}")
    return model


def example_batch(config: Config) -> Batch:
    """A batch of the largest shapes of one forward in training: a landscape and a portrait image pad to a square of the
    longest side. To be called under fake tensors, where it takes no memory.
    """
    data, number = config.data, config.run.micro_batch
    side = data.window if data.crop == "window" else data.max_size
    boxes = torch.full((NUM_EXAMPLE_BOXES, 4), 0.5)
    boxes[:, 2:] = torch.linspace(0.1, 0.4, NUM_EXAMPLE_BOXES)[:, None]
    labels = torch.arange(NUM_EXAMPLE_BOXES) % data.num_classes
    return {
        "image": torch.zeros(number, 3, side, side),
        "padding": torch.zeros(number, side, side, dtype=torch.bool),
        "targets": [{"labels": labels, "boxes": boxes} for _ in range(number)],
        "num_targets": float(number * NUM_EXAMPLE_BOXES),
    }
