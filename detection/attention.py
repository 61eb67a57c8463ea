"""Multi-scale deformable attention in pure PyTorch: the same code on CPU and GPU, no compiled operator.

    A(q, r, v) = W_o sum_{l, p} a_{l,p}(q) (W_v v)_l [r_l + offset_{l,p}(q)]                            per head

Each query looks at `points` places of each of the maps v_l, found from its reference r, by bilinear interpolation.
Queries do not see one another: they may run in chunks under recomputation, which stores a fifth as much and computes
the same. Locations and weights are float32 whatever the precision: in bfloat16 a coordinate is off by up to 2.6 of 1333
pixels. Parameter names and initial values are those of Deformable DETR (Zhu et al., arXiv 2010.04159).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Shapes = list[tuple[int, int]]  # height, width of each level


class DeformableAttention(nn.Module):
    """query (B, Q, C) with its position, reference, value (B, N, C) -> (B, Q, C)."""

    def __init__(self, width: int, heads: int, levels: int, points: int, query_chunk: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not split into {heads} heads: make it a multiple")
        self.heads, self.levels, self.points, self.query_chunk = heads, levels, points, query_chunk
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head k looks in direction 2 pi k / heads, point p at distance p + 1; all weights are equal at first."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.points + 1, dtype=torch.float32)
        bias = direction[:, None, None, :] * distance[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        for weight in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, reference: Tensor, value: Tensor, shapes: Shapes, padding: Tensor | None = None
    ) -> Tensor:
        """reference: (B, Q, L, 2) points or (B, Q, L, 4) boxes cx, cy, w, h, in 0..1 of each padded map.
        padding: (B, N), True for values that count as 0. shapes: the maps in N, row by row. Returns (B, Q, C).
        """
        value = self.value_proj(value)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)
        batch, _, width = value.shape
        sizes = [height * width_ for height, width_ in shapes]
        maps = [
            level.transpose(1, 2).reshape(batch * self.heads, width // self.heads, *shape)
            for level, shape in zip(value.split(sizes, dim=1), shapes, strict=True)
        ]

        def attend(query: Tensor, reference: Tensor, *maps: Tensor) -> Tensor:
            return self.output_proj(self._sample(query, reference, maps))

        return in_chunks(attend, self.query_chunk, query, reference, shared=maps)

    def _sample(self, query: Tensor, reference: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
        """The weighted values of each query, (B, q, C)."""
        batch, number, _ = query.shape
        with torch.autocast(query.device.type, enabled=False):
            query, reference = query.float(), reference.float()
            offsets = self.sampling_offsets(query).view(batch, number, self.heads, self.levels, self.points, 2)
            weights = self.attention_weights(query).view(batch, number, self.heads, self.levels * self.points)
            weights = weights.softmax(dim=-1).view(batch, number, self.heads, self.levels, self.points)
            place = reference[:, :, None, :, None, :]  # (B, q, 1, L, 1, 2 or 4)
            if reference.shape[-1] == 2:
                sizes = torch.tensor([[m.shape[-1], m.shape[-2]] for m in maps], device=query.device)
                locations = place + offsets / sizes[:, None, :]
            else:
                locations = place[..., :2] + offsets / self.points * place[..., 2:] * 0.5
            grid = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B heads, q, points, 2)
            weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (L, B heads, 1, q, points)
            found = torch.zeros((), device=query.device)
            for level, one in enumerate(maps):
                sampled = F.grid_sample(one.float(), grid[level], mode="bilinear", align_corners=False)
                found = found + (sampled * weights[level]).sum(dim=-1)  # (B heads, C / heads, q)
        return found.view(batch, -1, number).transpose(1, 2)


def in_chunks(
    function: Callable[..., Tensor], size: int | None, *tensors: Tensor, shared: list[Tensor] | None = None
) -> Tensor:
    """function(*tensors, *shared), where all `tensors` are cut alike along dimension 1 into pieces of `size`, each
    recomputed in backward. `function` treats what it is cut into by itself. None, or one piece: as it is.
    """
    shared = shared or []
    number = tensors[0].shape[1]
    if size is None or number <= size:
        return function(*tensors, *shared)
    pieces = zip(*(tensor.split(size, dim=1) for tensor in tensors), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*piece, *shared) for piece in pieces], dim=1)
    return torch.cat([checkpoint(function, *piece, *shared, use_reentrant=False) for piece in pieces], dim=1)
