"""A video backbone and a head: model(batch) -> {"logits": (B, K)}.

    model = build_model(config)            # batch["video"]: (B, 3, T, H, W), normalised

`model.backbone` is what a finetuning method applies to. Not here: loss, schedules, precision.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from action_recognition.configs import Config
from action_recognition.head import GridHead, MeanHead
from engine.weights import load_weights, refuse_non_finite


class ActionRecognizer(nn.Module):
    """Backbone, then head. Layers for learning-rate decay: 0 = embeddings, ..., num_layers = head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batch: dict) -> dict[str, Tensor]:
        return {"logits": self.head(self.backbone(batch["video"]))}

    @property
    def num_layers(self) -> int:
        return self.backbone.num_layers

    def layer_of(self, name: str) -> int:
        """Layer of a parameter by its name in `named_parameters()`."""
        if name.startswith("backbone."):
            return self.backbone.layer_of(name.removeprefix("backbone."))
        return self.num_layers


def build_model(config: Config) -> ActionRecognizer:
    """The row's network with its pretrained backbone. ValueError if weights are unreachable, do not fit or hold NaN."""
    backbone = _build_backbone(config)
    refuse_non_finite(backbone.state_dict(), f"pretrained weights of {config.model.name}")
    width, num_classes, dropout = backbone.width, config.data.num_classes, config.model.dropout
    if config.model.head == "grid":
        return ActionRecognizer(backbone, GridHead(width, backbone.num_tokens, num_classes, dropout=dropout))
    return ActionRecognizer(backbone, MeanHead(width, num_classes, dropout=dropout))


def without_weights(config: Config) -> Config:
    """The same row with random weights: for planning, and where a checkpoint is about to fill every weight."""
    return replace(config, model=replace(config.model, weights=None))


def example_batch(config: Config) -> dict:
    """A batch of the shapes of one forward in training; to be called under fake tensors, where it takes no memory."""
    data = config.data
    num_clips = config.run.micro_batch * data.repeats
    return {
        "video": torch.zeros(num_clips, 3, data.num_frames, data.image_size, data.image_size),
        "label": torch.zeros(num_clips, dtype=torch.long),
    }


def _build_backbone(config: Config) -> nn.Module:
    model, data = config.model, config.data
    if model.family == "videomae":
        from engine.backbones.videomae import build_videomae

        return build_videomae(
            model.name,
            weights=model.weights,
            num_frames=data.num_frames,
            image_size=data.image_size,
            depth=model.depth,
            drop_path=model.drop_path,
        )
    from engine.backbones.video_vit import VideoViT, build_image_vit, build_tiny_vit

    if model.name == "tiny":  # this project's own; its weights are those of a whole VideoViT
        image = build_tiny_vit(image_size=data.image_size, drop_path=model.drop_path)
        backbone = VideoViT(image, num_frames=data.num_frames, tubelet=model.tubelet)
        if model.weights is not None:
            load_weights(backbone, Path(model.weights))
        return backbone
    image = build_image_vit(
        model.name,
        image_size=data.image_size,
        weights=model.weights,
        depth=model.depth,
        drop_path=model.drop_path,
    )
    return VideoViT(image, num_frames=data.num_frames, tubelet=model.tubelet)
