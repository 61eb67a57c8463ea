"""PointViT: a tokenizer, the pretrained blocks of an image ViT, a decoder. model(batch) -> {"logits": (B, N, K)}.

    model = build_model(config)            # batch: position (B, N, 3), features (B, N, 7), indices (`ops.py`)

`model.backbone`, on which a finetuning method acts, is the blocks only; class token, final norm and everything around
start as the authors' or from the image network. With `model.token_scale` the tokens enter as a LayerNorm times a
learnable gain of that size: pretrained blocks see tokens as large as the patches they know, and a tokenizer's own, near
1, would drown what the first blocks add. Not here: schedules, precision, official checkpoints (`pix4point.py`).
"""

from typing import cast

import torch
from torch import Tensor, nn

from engine.backbones.point_vit import PointViT, build_point_vit
from engine.task import Batch, Model
from engine.weights import load_tensors, read_tensors, refuse_non_finite
from pointcloud.configs import NUM_FEATURES, Config
from pointcloud.head import Decoder, Tokenizer, segmentation_loss

POSITION_HIDDEN = 128
POSITION_SHARE = 0.08  # standard deviation of the layer that makes positions, as a share of the tokens' scale


class TokenScale(nn.Module):
    """LayerNorm times one learnable gain: (B, N, D) of this standard deviation at first."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.gain = nn.Parameter(torch.tensor([scale]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.gain


class PointSegmenter(Model):
    """Tokenizer, blocks, decoder."""

    def __init__(self, vit: PointViT, config: Config) -> None:
        super().__init__()
        data, model = config.data, config.model
        width, channels = vit.blocks.width, model.channels
        self.tokenizer = Tokenizer(NUM_FEATURES, channels)
        self.proj: nn.Module = nn.Identity() if channels[-1] == width else nn.Linear(channels[-1], width)
        self.token_scale: nn.Module = nn.Identity()
        self.cls_token = nn.Parameter(vit.cls_token)
        self.cls_pos = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Sequential(nn.Linear(3, POSITION_HIDDEN), nn.GELU(), nn.Linear(POSITION_HIDDEN, width))
        for layer in (self.pos_embed[0], self.pos_embed[2]):
            nn.init.xavier_uniform_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)
        if model.token_scale is not None:
            self.token_scale = TokenScale(width, model.token_scale)
            nn.init.normal_(cast(nn.Linear, self.pos_embed[2]).weight, std=POSITION_SHARE * model.token_scale)
            nn.init.zeros_(self.cls_pos)
        self.backbone = vit.blocks
        self.norm = vit.norm
        self.decoder = Decoder(
            [NUM_FEATURES, *channels[:-1]],
            width,
            model.decoder_width or width,
            data.num_classes,
            norm=model.decoder_norm,
            hidden=model.hidden,
            dropout=model.dropout,
        )
        self.label_smoothing = config.label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        positions, features = self.tokenizer(batch)
        tokens = self.token_scale(self.proj(features[-1]))
        num_samples = len(tokens)
        tokens = torch.cat([self.cls_token.expand(num_samples, -1, -1).to(tokens.dtype), tokens], dim=1)
        # Not in bfloat16: every block adds to the gradient of a position, and a sum of bfloat16 numbers loses digits
        # and depends on their order, which differs where activations are rebuilt.
        with torch.autocast(positions[-1].device.type, enabled=False):
            place = self.pos_embed(positions[-1])
        place = torch.cat([self.cls_pos.expand(num_samples, -1, -1), place], dim=1)
        tokens = self.norm(self.backbone(tokens, place))  # (B, 1 + N_last, D)
        return {"logits": self.decoder([*features[:-1], tokens[:, 1:]], tokens[:, 0], batch)}

    def losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """{"segmentation": scalar}: cross entropy over all points of all samples, repeated ones included."""
        return {"segmentation": segmentation_loss(outputs["logits"], batch["label"], self.label_smoothing)}


def build_model(config: Config, *, pretrained: bool = True) -> PointSegmenter:
    """The row's network with the blocks of a pretrained image ViT, or random ones.

    ValueError if weights are unreachable, do not fit or hold NaN.
    """
    model = config.model
    weights = model.weights if pretrained else None
    vit = build_point_vit(model.name, weights=weights, depth=model.depth, drop_path=model.drop_path)
    network = PointSegmenter(vit, config)
    if pretrained and model.around is not None:
        parts = read_tensors(model.around)
        own = {key: value for key, value in network.state_dict().items() if not key.startswith("backbone.")}
        load_tensors(_Around(network), {key: value.float() for key, value in parts.items()}, str(model.around))
        assert own.keys() == parts.keys()
    refuse_non_finite(network.state_dict(), f"pretrained weights of {model.name}")
    return network


class _Around(nn.Module):
    """What a network has besides its blocks, as a module of its own to load."""

    def __init__(self, network: PointSegmenter) -> None:
        super().__init__()
        for name, child in network.named_children():
            if name != "backbone":
                self.add_module(name, child)
        self.cls_token, self.cls_pos = network.cls_token, network.cls_pos


def example_batch(config: Config) -> Batch:
    """A batch of the shapes of one forward in training; to be called under fake tensors, where it takes no memory."""
    data, count = config.data, config.run.micro_batch
    num_points = data.num_points
    batch: Batch = {
        "position": torch.zeros(count, num_points, 3),
        "features": torch.zeros(count, num_points, NUM_FEATURES),
        "label": torch.zeros(count, num_points, dtype=torch.long),
    }
    for s, ratio in enumerate(data.ratios, start=1):
        fine, coarse = num_points, num_points // ratio
        center = torch.arange(coarse, dtype=torch.int32) * ratio
        near = (center[:, None] + torch.arange(data.neighbors, dtype=torch.int32)) % fine
        up = torch.arange(fine, dtype=torch.int32)[:, None] // ratio + torch.arange(3, dtype=torch.int32)
        batch[f"center_{s}"] = center.repeat(count, 1)
        batch[f"neighbor_{s}"] = near.repeat(count, 1, 1)
        batch[f"up_{s}"] = (up % coarse).repeat(count, 1, 1)
        batch[f"weight_{s}"] = torch.full((count, fine, 3), 1 / 3)
        num_points = coarse
    return batch
