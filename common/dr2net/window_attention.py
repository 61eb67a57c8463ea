"""Fused shifted-window attention for torchvision's Swin and Swin3d blocks, some windows at a time.

    attention(norm(x)) on windows:   softmax(q k^T / sqrt(d) + bias + mask) v        by scaled_dot_product_attention

with bias the relative position bias and mask = -100 between the regions that the cyclic shift brings together. Padding,
shift and partition are index arithmetic, so no shifted, padded or partitioned copy of x exists. It reads torchvision's
own modules (weights and state_dict keys unchanged) and equals their output to rounding. `dr2net.convert` uses it when
branches run in chunks; without chunks torchvision's own forward runs. Not here: Swin v2 (cosine attention), whose
attention is only cut by samples.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dr2net.chunks import Groups

SHIFT_MASK = -100.0  # torchvision's value


class Place(NamedTuple):
    """Where the tokens of some windows stand, (num_windows, N) each."""

    row: Tensor  # of x; padding has the number of the row after the last
    real: Tensor | None  # whether it is a row at all; None: all are
    region: Tensor | None  # between unequal ones there is no attention; None: there is between all


class Windows(Groups):
    """The windows of x, (B, *size, C), size = (H, W) or (T, H, W), as independent groups of tokens.

    norm, attention: norm1 and attn (ShiftedWindowAttention or ShiftedWindowAttention3d) of a torchvision block.
    """

    def __init__(self, norm: nn.Module, attention: nn.Module, x: Tensor) -> None:
        self.norm = norm
        self.attention = cast(Any, attention)  # its attributes are those of torchvision's two classes
        self.samples, *self.size, _ = x.shape
        window, shift = list(self.attention.window_size), list(self.attention.shift_size)
        if len(window) == 3:  # as torchvision does it: the 3-D window shrinks to a small input, the 2-D one does not
            shift = [0 if n <= w else s for n, w, s in zip(self.size, window, shift, strict=True)]
            window = [min(n, w) for n, w in zip(self.size, window, strict=True)]
        else:
            shift = [0 if n <= w else s for n, w, s in zip(self.size, window, shift, strict=True)]
        self.window, self.shift = window, shift
        self.grid = [-(-n // w) for n, w in zip(self.size, window, strict=True)]  # windows along each dimension
        self.padded = [g * w for g, w in zip(self.grid, window, strict=True)]
        self.count = self.samples * math.prod(self.grid)
        self.rows = self.positions = math.prod(window)
        self.inner = (self.rows,)

    def shared(self) -> tuple[Tensor, ...]:
        """The relative position bias, (1, heads, N, N), N tokens per window."""
        if len(self.window) == 3:
            return (self.attention.get_relative_position_bias(self.window),)
        return (self.attention.get_relative_position_bias(),)

    def where(self, start: int, stop: int, device: torch.device) -> Place:
        number = torch.arange(start, stop, device=device).unsqueeze(1)
        inside = torch.arange(self.rows, device=device).unsqueeze(0)
        places: list[Tensor] = []  # per dimension, in the shifted and padded volume
        for g, w in zip(reversed(self.grid), reversed(self.window), strict=True):
            places.insert(0, number % g * w + inside % w)
            number, inside = number // g, inside // w
        row, real, region = number, None, None  # a window's number is now that of its sample
        for n, padded, window, shift, place in zip(
            self.size, self.padded, self.window, self.shift, places, strict=True
        ):
            if shift:
                border = (place >= padded - window).int() + (place >= padded - shift).int()
                region = border if region is None else region * 3 + border
                place = (place + shift) % padded
            if padded > n:
                real = place < n if real is None else real & (place < n)
            row = row * n + place
        if real is not None:
            row = torch.where(real, row, self.samples * math.prod(self.size))
        return Place(row, real, region)

    def take(self, rows: Tensor, where: Place) -> Tensor:
        found = rows.index_select(0, where.row.flatten().clamp(max=len(rows) - 1))
        if where.real is not None:
            found = found.masked_fill(~where.real.view(-1, 1), 0)
        return found.view(-1, self.rows, rows.shape[-1])

    def put(self, rows: Tensor, values: Tensor, where: Place) -> None:
        rows.index_copy_(0, where.row.flatten(), values.reshape(-1, rows.shape[-1]).to(rows.dtype))

    def call(self, chunk: Tensor, where: Place, *shared: Tensor) -> Tensor:
        """(num_windows, N, C) -> the same."""
        attention, (bias,) = self.attention, shared
        h = self.norm(chunk)
        if where.real is not None:  # padding is put in after the norm
            h = h.masked_fill(~where.real.unsqueeze(-1), 0)
        num_windows, n, width = h.shape
        qkv = F.linear(h, attention.qkv.weight, attention.qkv.bias)
        del h
        q, k, v = qkv.view(num_windows, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = bias.to(q.dtype)
        mask = None if where.region is None else shift_mask(where.region, bias.dtype)
        dropout = attention.attention_dropout if attention.training else 0.0
        if q.device.type == "cpu" and bias.requires_grad:
            # torch 2.14 has no fused kernel for a bias with gradient there; what it runs instead is slower than this
            weights = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)).add_(bias)
            weights = F.softmax(weights if mask is None else weights.add_(mask), dim=-1)
            h = torch.matmul(F.dropout(weights, dropout), v)
            del weights
        else:
            bias = bias if mask is None else bias + mask
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        h = F.linear(h.transpose(1, 2).reshape(num_windows, n, width), attention.proj.weight, attention.proj.bias)
        return F.dropout(h, attention.dropout, attention.training)

    def floats(self, modules: Sequence[nn.Module]) -> int:
        """With three attention maps: the mask, the scores, and a gradient, where the kernel is not fused."""
        return super().floats(modules) + 3 * self.attention.num_heads * self.rows**2


def shift_mask(region: Tensor, dtype: torch.dtype) -> Tensor:
    """(num_windows, 1, N, N): SHIFT_MASK between tokens that the shift brought together from opposite borders."""
    apart = region.unsqueeze(1) != region.unsqueeze(2)
    return apart.unsqueeze(1).to(dtype) * SHIFT_MASK
