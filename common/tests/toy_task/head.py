"""What is learned besides the blocks: the mean over tokens, to class scores."""

from torch import Tensor, nn


class MeanHead(nn.Linear):
    """Tokens (B, N, D) -> logits (B, K)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.mean(1))
