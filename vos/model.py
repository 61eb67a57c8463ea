"""A Video Swin and MTTR's head: model(batch) -> the head's outputs, a dict of tensors.

    model = build_model(config)     # batch["video"]: (B, 3, T, H, W), normalized; batch["text"]: (B, S, D)

`model.backbone` is what a finetuning method applies to; `model.head.segment` turns outputs into masks. Not here: the
text encoder, which is frozen and whose features are in the batch; files of others (`checkpoints.py`).
"""

from pathlib import Path

import torch
from torch import Tensor

from engine.backbones.video_swin import VideoStages, build_video_stages
from engine.task import Batch, Model
from engine.weights import refuse_non_finite
from vos.checkpoints import load_file
from vos.configs import Config
from vos.head import Frames, MTTRHead

NUM_EXAMPLE_OBJECTS = 3  # of a window
NUM_STAGES = 3  # at 1/4, 1/8 and 1/16: a fourth is left out, as in MTTR


class Segmenter(Model):
    """Backbone, then head."""

    backbone: VideoStages

    def __init__(self, backbone: VideoStages, head: MTTRHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone(batch["video"])
        return self.head(features, batch["padding"], batch["text"], batch["text_padding"], Frames.of(batch))

    def losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Those of the head."""
        return self.head.losses(outputs, batch)


def build_model(config: Config, *, pretrained: bool = True) -> Segmenter:
    """The row's network with its pretrained weights, or a random one.

    ValueError if weights are unreachable, do not fit or hold NaN.
    """
    own = config.model
    given = own.weights if pretrained else None
    backbone = build_video_stages(
        own.backbone,
        weights=given if given == "kinetics" else None,
        drop_path=own.drop_path,
        patch=own.patch,
        num_stages=NUM_STAGES,
    )
    max_words = config.data.max_words if config.data.text == "words" else None
    model = Segmenter(backbone, MTTRHead(backbone.widths, own, max_words))
    if given is not None and given != "kinetics":
        load_file(model, Path(given))
    refuse_non_finite(model.state_dict(), f"pretrained weights of {own.backbone}")
    return model


def example_batch(config: Config) -> Batch:
    """A batch of the largest shapes of one forward in training: landscape videos of the longest side. To be called
    under fake tensors, where it takes no memory.

    Ref-YouTube-VOS and composed videos have masks in every frame, of A2D's windows only the middle frame.
    """
    data, number = config.data, config.run.micro_batch
    height, width, time, words = data.image_size, data.max_size, data.window, data.max_words
    every = data.supervise == "all" and (data.kind == "refytvos" or data.samples == "sentences")
    annotated = torch.ones(number, time, dtype=torch.bool)
    if not every:
        annotated = torch.arange(time).expand(number, -1) == time // 2
    count = time if every else 1
    masks = torch.zeros(NUM_EXAMPLE_OBJECTS, count, height, width, dtype=torch.uint8)
    for index in range(NUM_EXAMPLE_OBJECTS):  # one beside the other
        masks[index, :, height // 4 : height // 2, index * width // 4 : (index + 1) * width // 4] = 1
    text = torch.zeros(number, words, config.model.text_width)
    if data.text == "words":
        text = torch.arange(1, words + 1).expand(number, -1).contiguous()
    return {
        "video": torch.zeros(number, 3, time, height, width),
        "padding": torch.zeros(number, height, width, dtype=torch.bool),
        "text": text,
        "text_padding": torch.zeros(number, words, dtype=torch.bool),
        "annotated": annotated,
        "masks": [masks.clone() for _ in range(number)],
        "referred": torch.zeros(number, dtype=torch.int64),
        "visible": [torch.ones(count, dtype=torch.bool) for _ in range(number)],
        "num_targets": float(number * NUM_EXAMPLE_OBJECTS * count),
        "name": [f"example {index}" for index in range(number)],
        "frame": [0 if not every else count // 2] * number,
        "original_size": [(height, width)] * number,
        "size": [(height, width)] * number,
        "skipped": [],
    }
