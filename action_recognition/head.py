"""The learned, task-specific part: tokens to class scores, the loss, and the merging of views.

    logits = Linear(dropout(LayerNorm(mean over tokens)))          # MeanHead: the head with which VideoMAE is finetuned
    logits = Linear(dropout(LayerNorm(all tokens' Linear(LayerNorm(token)))))     # GridHead: keeps where and when
    loss   = - sum_k t_k log softmax(logits)_k                     # t: one-hot or mixed labels, smoothed

Not here: mixup and cutmix themselves, which the loader draws (`data.py`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.task import Batch


class MeanHead(nn.Module):
    """Tokens (B, N, D) -> logits (B, K). The linear layer starts small, so that first predictions are near uniform."""

    def __init__(self, width: int, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.dropout(self.norm(tokens.mean(dim=1))))


class GridHead(nn.Module):
    """Tokens (B, N, D) -> logits (B, K): `channels` numbers of each token, then one linear map of all N x channels.

    An image network's tokens say what is where; only a head that knows a token's place and time can read a motion off
    them after a few hundred steps. For clips of one fixed size.
    """

    def __init__(self, width: int, num_tokens: int, num_classes: int, *, channels: int = 8, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.reduce = nn.Linear(width, channels)
        self.grid_norm = nn.LayerNorm(num_tokens * channels)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(num_tokens * channels, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        grid = self.reduce(self.norm(tokens)).flatten(1)  # (B, N * channels)
        return self.linear(self.dropout(self.grid_norm(grid)))


def classification_loss(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Cross entropy, a scalar, in float32 outside autocast.

    logits: (B, K). batch["target"]: (B, K) mixed labels if the loader mixes, else batch["label"]: (B,) long, 0..K-1.
    Both are smoothed to (1 - s) t + s / K here and nowhere else.
    """
    num_classes = logits.shape[-1]
    with torch.autocast(logits.device.type, enabled=False):
        target = batch["target"].float() if "target" in batch else one_hot(batch["label"], num_classes)
        return F.cross_entropy(logits.float(), (1 - label_smoothing) * target + label_smoothing / num_classes)


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    """(B,) long -> (B, K) float32, by comparison: no value is read, so fake tensors pass and nothing waits."""
    return (label[:, None] == torch.arange(num_classes, device=label.device)).float()


def merge_views(probabilities: Tensor) -> Tensor:
    """Views (V, K) of one video -> (K,): the mean of probabilities, not of logits (VideoMAE's test protocol)."""
    return probabilities.mean(dim=0)
