"""A few blocks of a timm ViT on tokens, and a linear head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import task
from engine.task import Batch
from toy_task.configs import Config
from toy_task.data import WIDTH
from toy_task.head import MeanHead


class Backbone(nn.Module):
    """Tokens (B, N, WIDTH) -> the same."""

    def __init__(self, depth: int, dropout: float) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.blocks = nn.Sequential(*[Block(WIDTH, 2, qkv_bias=True, proj_drop=dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH)
        self.num_layers = depth + 1

    def layer_of(self, name: str) -> int:
        """Layer of a parameter: blocks count from 1."""
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.num_layers

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))


class Toy(task.Model):
    """Backbone and head."""

    def __init__(self, num_classes: int = 3, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = Backbone(depth, dropout)
        self.head = MeanHead(WIDTH, num_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.backbone(batch["x"]))

    def losses(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Two, so that sums and names matter."""
        return {"cross_entropy": F.cross_entropy(outputs, batch["label"]), "size": 1e-3 * outputs.square().mean()}


def build_model(config: Config, *, pretrained: bool = True) -> Toy:
    """There are no pretrained weights to load."""
    return Toy(config.data.num_classes, config.model.depth, config.model.dropout)


def example_batch(config: Config) -> Batch:
    """Shapes of a training batch."""
    num_samples = config.run.micro_batch
    return {
        "x": torch.randn(num_samples, 4, WIDTH),
        "label": torch.zeros(num_samples, dtype=torch.long),
        "name": ["example"] * num_samples,
    }
