"""Tiny networks and data for the training loops of transformers and Lightning."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toy_blocks import WIDTH, build_net
from transformers import ViTConfig, ViTForImageClassification, set_seed

import dr2net


def build_vit() -> ViTForImageClassification:
    """Two blocks, images of 8 pixels, three classes, dropout; the same weights at each call."""
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.1)
    )


def samples(count: int = 24) -> list[dict[str, Any]]:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": image, "labels": k % 3} for k, image in enumerate(images)]


def coefficients(model: nn.Module) -> tuple[float, float]:
    """Of the only sequence; (1, 0) if there is none."""
    found = [module for module in model.modules() if isinstance(module, dr2net.ReversibleSequence)]
    assert len(found) <= 1
    return (found[0].alpha, found[0].beta) if found else (1, 0)


class Task(pl.LightningModule):
    """A regression; `at` collects the coefficients of each training pass."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.net: nn.Module | None = None if late else build_net(2, dtype=torch.float32)
        self.at: list[tuple[float, float]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    def training_step(self, batch, _) -> Tensor:
        self.at.append(coefficients(self))
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, _) -> None:
        self.log("loss", self.net(batch[0]).square().mean())

    test_step = validation_step


def batches() -> DataLoader:
    """Four of four."""
    x = torch.randn(16, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=4)
