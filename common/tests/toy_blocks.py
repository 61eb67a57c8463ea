"""A tiny residual network of known branches, and an independent dual-residual recurrence under plain autograd.

The tests compare the library with `stored`, which shares no line with it: the paper's recurrence on the network's own
branch methods, every activation kept by autograd.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dr2net

WIDTH = 8


class ToyBlock(nn.Module):
    """x + mix(x), then x + mlp(x) if num_branches is 2. x: (B, N, WIDTH); scale, shift: optional side inputs."""

    def __init__(self, num_branches: int, dropout: float, drop_path: float, batch_norm: bool) -> None:
        super().__init__()
        self.num_branches = num_branches
        self.norm1, self.value = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.batch_norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        self.dropout, self.drop_path = dropout, drop_path
        if num_branches == 2:
            self.norm2, self.mlp1, self.mlp2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def drop(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        if not (self.training and self.drop_path):
            return x
        return x * (torch.rand(len(x), 1, 1, dtype=x.dtype) >= self.drop_path)

    def mix(self, x: Tensor, scale: Tensor | None = None, *, shift: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        h = torch.softmax(h @ h.transpose(1, 2), -1) @ self.value(h)
        h = self.batch_norm(h.flatten(0, 1)).view(h.shape)
        h = h if scale is None else h * scale
        return self.drop(h if shift is None else h + shift)

    def mlp(self, x: Tensor, *_: Tensor, **__: Tensor) -> Tensor:
        return self.drop(self.mlp2(F.gelu(self.mlp1(self.norm2(x)))))

    def functions(self) -> list[Callable[..., Tensor]]:
        return [self.mix, self.mlp][: self.num_branches]

    def forward(self, x: Tensor, *args: Tensor, **named: Tensor) -> Tensor:
        for branch in self.functions():
            x = branch(x, *args, **named) + x
        return x


@dr2net.branches_of.register
def _(block: ToyBlock):
    found = [dr2net.Branch("mix", block.mix, (block.norm1, block.value, block.batch_norm))]
    if block.num_branches == 2:
        found.append(dr2net.Branch("mlp", block.mlp, (block.norm2, block.mlp1, block.mlp2)))
    return tuple(found)


class ToyNet(nn.Module):
    """stem, blocks, head. (B, N, WIDTH) -> (B, 3)."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, *args: Tensor, **named: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, *args, **named)
        return self.head(x.mean(1))


def build_net(
    num_blocks: int,
    *,
    num_branches: int = 2,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    batch_norm: bool = False,
    dtype: torch.dtype = torch.float64,
) -> ToyNet:
    """The same weights at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ToyNet([ToyBlock(num_branches, dropout, drop_path, batch_norm) for _ in range(num_blocks)])
    return net.to(dtype)


def converted(net: nn.Module, alpha: float, beta: float, **how: object) -> nn.Module:
    """A converted copy at (alpha, beta)."""
    net = copy.deepcopy(net)
    dr2net.convert(net, **how)
    dr2net.set_coefficients(net, alpha, beta)
    return net


def build_input(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or (3, 5, WIDTH), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stored(net: ToyNet, x: Tensor, alpha: float, beta: float, *args: Tensor, **named: Tensor) -> Tensor:
    """The surrogate of the unconverted `net` with all activations stored."""
    x = previous = net.stem(x)
    for block in net.blocks:
        for branch in block.functions():
            x, previous = branch(x, *args, **named) + alpha * x + beta * previous, x
    return net.head(x.mean(1))


def gradients(net: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in net.parameters()]


def relative(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """|found - expected| / |expected| over all; what has a gradient must be the same set."""
    assert [t is None for t in found] == [t is None for t in expected]
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a is not None]
    difference = sum((a - b).square().sum().item() for a, b in pairs)
    return (difference / sum(b.square().sum().item() for _, b in pairs)) ** 0.5
