"""DINO's head: maps of a backbone in, classes and boxes of a set of queries out; its losses, and its detections.

    outputs = head(features, padding, targets)      # targets only make the denoising queries, in training mode
    outputs["logits"]   (S, B, Q, K)                # of each decoder layer
    outputs["boxes"]    (S, B, Q, 4)                # cx, cy, w, h in 0..1 of the image without its padding
    outputs["encoder_logits"], outputs["encoder_boxes"]          (B, Q, ...)
    head.losses(outputs, targets, num_targets);  head.detect(outputs, original_size, 300)

Names of parameters are those of the official code. Not here: the layers (`transformer.py`), matching (`criterion.py`).
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from detection.configs import GROUPS
from detection.configs import Model as Settings
from detection.criterion import denoising_loss, matched_losses
from detection.denoising import Noise, Target, make_denoising
from detection.transformer import MLP, Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer, refine
from engine.detr.boxes import to_corners
from engine.detr.padding import resize_padding
from engine.detr.positions import sine_of_cells

PRIOR = 0.01  # probability of a class at the start


class Detected(NamedTuple):
    """Detections of an image, best first, on the CPU."""

    boxes: Tensor  # (k, 4) corners in pixels of the original image
    scores: Tensor  # (k,)
    labels: Tensor  # (k,) int64


class DINOHead(nn.Module):
    """See the module's docstring. widths: channels of the maps, from fine to coarse."""

    def __init__(self, widths: Sequence[int], num_classes: int, settings: Settings) -> None:
        super().__init__()
        own, width = settings, settings.width
        self.width, self.num_classes = width, num_classes
        self.temperature, self.offset = own.temperature, own.position_offset
        self.noise = Noise(own.denoising, own.max_denoising, own.box_noise, own.label_noise)
        inputs = [*widths, *[widths[-1], *[width] * own.extra_levels][: own.extra_levels]]
        self.input_proj = nn.ModuleList(
            _projection(channels, width, halve=level >= len(widths)) for level, channels in enumerate(inputs)
        )
        levels = len(inputs)
        class_embed, bbox_embed = nn.Linear(width, num_classes), MLP(width, width, width, 4)
        nn.init.constant_(class_embed.bias, -math.log((1 - PRIOR) / PRIOR))
        for parameter in bbox_embed.layers[-1].parameters():
            nn.init.zeros_(parameter)
        number = 1 if own.shared_heads else own.decoder_layers
        self.class_embed = nn.ModuleList(copy.deepcopy(class_embed) for _ in range(number))
        self.bbox_embed = nn.ModuleList(copy.deepcopy(bbox_embed) for _ in range(number))
        self.label_enc = nn.Embedding(num_classes, width)
        sizes = (width, own.heads, levels, own.points, own.feedforward)
        encoder = Encoder([EncoderLayer(*sizes, own.query_chunk) for _ in range(own.encoder_layers)])
        decoder = Decoder([DecoderLayer(*sizes, own.query_chunk is not None) for _ in range(own.decoder_layers)], width)
        self.transformer = Transformer(encoder, decoder, width, levels, own.queries, class_embed, bbox_embed)

    def forward(self, features: list[Tensor], padding: Tensor, targets: list[Target] | None) -> dict[str, Any]:
        """features: (B, C, h, w) each; padding: (B, H, W) of the images, True where padded."""
        maps, paddings, positions = self._levels(features, padding)
        encoded = self.transformer.encode(maps, paddings, positions)
        selected = self.transformer.select(*encoded)
        noised = make_denoising(targets, self.num_classes, self.noise) if self.training and targets else None
        extra, blocked = None, None
        if noised is not None:
            contents = self.label_enc(noised.labels) * noised.real[..., None]
            extra, blocked = (contents, noised.boxes), noised.blocked(selected.boxes.shape[1])
        heads = [self.bbox_embed[index % len(self.bbox_embed)] for index in range(len(self.transformer.decoder.layers))]
        contents, references = self.transformer.decode(selected, extra, blocked, encoded, heads)
        with torch.autocast(padding.device.type, enabled=False):
            logits = torch.stack(
                [self.class_embed[index % len(self.class_embed)](x.float()) for index, x in enumerate(contents)]
            )
            found = [refine(*three) for three in zip(heads, contents, references, strict=True)]
            # without a box in the batch the label embedding has no other use, which DDP would not forgive
            boxes = torch.stack(found) + 0 * self.label_enc.weight[0, 0]
        split = 0 if noised is None else noised.labels.shape[1]
        outputs: dict[str, Any] = {
            "logits": logits[:, :, split:],
            "boxes": boxes[:, :, split:],
            "encoder_logits": selected.logits,
            "encoder_boxes": selected.boxes,
        }
        if noised is not None:
            outputs["denoising"] = {"logits": logits[:, :, :split], "boxes": boxes[:, :, :split], "plan": noised}
        return outputs

    def losses(self, outputs: dict[str, Any], targets: list[Target], num_targets: float) -> dict[str, Tensor]:
        """Weighted sums over layers, divided by the targets of the whole global batch; float32."""
        logits = torch.cat([outputs["logits"], outputs["encoder_logits"][None]]).float()
        boxes = torch.cat([outputs["boxes"], outputs["encoder_boxes"][None]]).float()
        found = matched_losses(logits, boxes, targets, num_targets)  # (S + 1, 3)
        losses = dict(zip(("class", "box", "giou"), found[-2], strict=True))
        losses |= {"auxiliary": found[:-2].sum(), "encoder": found[-1].sum()}
        if "denoising" in outputs:
            own = outputs["denoising"]
            losses["denoising"] = denoising_loss(own["logits"].float(), own["boxes"].float(), own["plan"], num_targets)
        return losses

    @torch.no_grad()
    def detect(
        self,
        outputs: dict[str, Any],
        original_size: Sequence[tuple[int, int]],
        max_detections: int,
        max_overlap: float | None = None,
    ) -> list[Detected]:
        """The best `max_detections` of all queries and classes (a query may be there twice), for images of
        (height, width) pixels, less those whose IoU with a better one of their class is above `max_overlap`. No
        threshold.
        """
        scores = outputs["logits"][-1].float().sigmoid().flatten(1)  # (B, Q K)
        corners = to_corners(outputs["boxes"][-1].float())
        best, place = scores.topk(min(max_detections, scores.shape[1]), dim=1)
        detections = []
        for index, (height, width) in enumerate(original_size):
            query, labels = place[index] // self.num_classes, place[index] % self.num_classes
            pixels = corners[index, query] * corners.new_tensor([width, height, width, height])
            found = Detected(pixels.cpu(), best[index].cpu(), labels.cpu())
            if max_overlap is not None:
                kept = batched_nms(found.boxes, found.scores, found.labels, max_overlap)
                found = Detected(*(values[kept] for values in found))
            detections.append(found)
        return detections

    def _levels(self, features: list[Tensor], padding: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Projected maps, what is padding in each, and positions."""
        maps: list[Tensor] = []
        for level, projection in enumerate(self.input_proj):
            # beyond the backbone's levels: of its last map, then of the level before
            source = features[level] if level < len(features) else features[-1] if level == len(features) else maps[-1]
            maps.append(projection(source))
        paddings = [resize_padding(padding, (int(one.shape[2]), int(one.shape[3]))) for one in maps]
        with torch.autocast(padding.device.type, enabled=False):
            positions = [sine_of_cells(one, self.width, self.temperature, self.offset) for one in paddings]
        return maps, paddings, positions


def _projection(channels: int, width: int, *, halve: bool) -> nn.Sequential:
    """A map of the backbone, or half of the size of the level before, to the head's width."""
    convolution = nn.Conv2d(channels, width, 3, 2, 1) if halve else nn.Conv2d(channels, width, 1)
    nn.init.xavier_uniform_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, width))
