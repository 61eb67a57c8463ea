"""A video backbone and a head: model(batch) -> {"logits": (B, K)}.

    model = build_model(config)            # batch["video"]: (B, 3, T, H, W), normalized

`model.backbone` is what a finetuning method applies to. Not here: loss, schedules, precision.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from action_recognition.configs import Config
from action_recognition.head import GridHead, MeanHead, classification_loss
from engine.task import Batch, Model
from engine.weights import load_weights, refuse_non_finite


class ActionRecognizer(Model):
    """Backbone, then head."""

    def __init__(self, backbone: nn.Module, head: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"logits": self.head(self.backbone(batch["video"]))}

    def losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """{"classification": scalar}, see `head.classification_loss`."""
        return {"classification": classification_loss(outputs["logits"], batch, self.label_smoothing)}


def build_model(config: Config, *, pretrained: bool = True) -> ActionRecognizer:
    """The row's network with its pretrained backbone, or a random one.

    ValueError if weights are unreachable, do not fit or hold NaN.
    """
    backbone = _build_backbone(config, pretrained)
    refuse_non_finite(backbone.state_dict(), f"pretrained weights of {config.model.name}")
    width, num_classes, dropout = backbone.width, config.data.num_classes, config.model.dropout
    head: nn.Module
    if config.model.head == "grid":
        head = GridHead(width, backbone.num_tokens, num_classes, dropout=dropout)
    else:
        head = MeanHead(width, num_classes, dropout=dropout)
    return ActionRecognizer(backbone, head, label_smoothing=config.label_smoothing)


def example_batch(config: Config) -> Batch:
    """A batch of the shapes of one forward in training; to be called under fake tensors, where it takes no memory."""
    data = config.data
    num_clips = config.run.micro_batch * data.repeats
    return {
        "video": torch.zeros(num_clips, 3, data.num_frames, data.image_size, data.image_size),
        "label": torch.zeros(num_clips, dtype=torch.long),
    }


def _build_backbone(config: Config, pretrained: bool) -> Any:
    model, data = config.model, config.data
    weights = model.weights if pretrained else None
    if model.architecture == "videomae":
        from engine.backbones.videomae import build_videomae

        return build_videomae(
            model.name,
            weights=weights,
            num_frames=data.num_frames,
            image_size=data.image_size,
            depth=model.depth,
            drop_path=model.drop_path,
        )
    from engine.backbones.video_vit import VideoViT, build_image_vit, build_tiny_vit

    if model.name == "tiny":  # this project's own; its weights are those of a whole VideoViT
        image = build_tiny_vit(image_size=data.image_size, drop_path=model.drop_path)
        backbone = VideoViT(image, num_frames=data.num_frames, tubelet=model.tubelet)
        if weights is not None:
            load_weights(backbone, Path(weights))
        return backbone
    image = build_image_vit(
        model.name,
        image_size=data.image_size,
        weights=weights,
        depth=model.depth,
        drop_path=model.drop_path,
    )
    return VideoViT(image, num_frames=data.num_frames, tubelet=model.tubelet)
