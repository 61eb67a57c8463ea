"""Drawn clips for pretraining: a wavy blob of random texture moves before a quiet background, and what is true of it.

    clips = draw_clips(16, 8, 64, torch.Generator().manual_seed(0))

Tensors, no files, without end: the targets are dense (where the object is, how its points move), so that a small video
network learns motion in minutes. A pure function of the generator's state. Not here: synthetic videos with classes
(`motion.py`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REACH = (1.3, 1.3, 0.9, 3.6)  # over a clip at rate 1: half frames right and down, log of the growth, radians clockwise


class Clips(NamedTuple):
    """Drawn clips and what is true of them; x to the right, y down, the frame from -1 to 1."""

    video: Tensor  # (B, 3, T, S, S), normalized
    mask: Tensor  # (B, T, S, S), the object's coverage
    flow: Tensor  # (B, 2, T, S, S), motion of the object's points to the next frame, times the mask
    rates: Tensor  # (B, 4) of x, y, growth and turn, each in -1..1
    pace: Tensor  # (B, T): the rates hold for a motion 1 / pace as long as the clip; 0: the object rests


def draw_clips(batch: int, num_frames: int, size: int, generator: torch.Generator, *, pauses: bool = False) -> Clips:
    """Draw `batch` clips of `num_frames` frames of `size` x `size` pixels; a pure function of the generator's state.

    pauses: the motion takes only a part of the clip, at least a third, and before and after the object rests.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    moves = (uniform(0, 1, 4) < 0.4).float()
    rates = uniform(-1, 1, 4) * moves
    time_axis = torch.linspace(-0.5, 0.5, num_frames)
    sways = (uniform(0, 1, 2) < 0.25).float()  # a wave instead of a straight path, in x, y or both
    amplitude, cycles, phase = uniform(0.05, 0.4, 2) * sways, uniform(0.8, 4.0, 2), uniform(0, 2 * math.pi, 2)
    amplitude = amplitude / (1 + 0.5 * (cycles - 1).clamp(min=0))
    clock, pace = time_axis[None], torch.ones(batch, num_frames)
    if pauses:
        share = uniform(0.35, 1, 1)
        elapsed = (time_axis + 0.5 - uniform(0, 1, 1) * (1 - share)) / share  # from 0 to 1 while the object moves
        clock, pace = elapsed.clamp(0, 1) - 0.5, ((elapsed >= 0) & (elapsed < 1)) / share
    wave = 2 * math.pi * cycles[:, :, None] * clock[:, None] + phase[:, :, None]
    rates = torch.cat([rates[:, :2] * (1 - sways), rates[:, 2:]], dim=1)
    total = rates * torch.tensor(REACH)  # (B, 4)
    middle = uniform(-0.6, 0.6, 2) * (1 - 0.6 * rates[:, :2].abs())
    center = middle[:, :, None] + total[:, :2, None] * clock[:, None]
    center = center + amplitude[:, :, None] * torch.sin(wave)  # (B, 2, T)
    speed = amplitude[:, :, None] * torch.cos(wave) * 2 * math.pi * cycles[:, :, None]
    speed = (total[:, :2, None] + speed) / (num_frames - 1) * pace[:, None]
    growth, turn = (total[:, 2:, None] / (num_frames - 1) * pace[:, None])[..., None, None].unbind(1)  # (B, T, 1, 1)
    radius = (uniform(0.3, 0.68, 1) * torch.exp(total[:, 2:3] * clock))[:, :, None, None]  # (B, T, 1, 1)
    angle = (uniform(0, 2 * math.pi, 1) + total[:, 3:4] * clock)[:, :, None, None]

    axis = torch.linspace(-1, 1, size)
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    dx, dy = grid_x - center[:, 0, :, None, None], grid_y - center[:, 1, :, None, None]
    cos, sin = torch.cos(angle), torch.sin(angle)
    u, v = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius  # object coordinates, (B, T, S, S)
    lobes = torch.randint(2, 6, (batch, 1, 1, 1), generator=generator)
    distance = torch.hypot(u, v)
    edge = 0.78 + uniform(0, 0.22, 1, 1, 1) * torch.cos(lobes * torch.atan2(v, u))
    mask = torch.sigmoid((edge - distance) * 40 * radius)
    flow_x = speed[:, 0, :, None, None] + growth * dx - turn * dy
    flow_y = speed[:, 1, :, None, None] + growth * dy + turn * dx
    flow = torch.stack([mask * flow_x, mask * flow_y], dim=1)

    texture = torch.randn(batch, 3, 6, 6, generator=generator) * uniform(0.2, 1.2, 1, 1, 1)
    texture = texture + uniform(-1.8, 1.8, 3, 1, 1)
    places = torch.stack([u, v], dim=-1).flatten(1, 2)  # (B, T S, S, 2)
    inside = F.grid_sample(texture, places, padding_mode="border", align_corners=True).unflatten(2, (num_frames, size))
    core = torch.sigmoid((edge * 0.85 - distance) * 20)[:, None]
    inside = inside * (0.5 + 0.5 * core) - 0.9 * (1 - core)  # a darker rim
    clouds = torch.randn(batch, 1, 4, 4, generator=generator) * uniform(-0.5, 0.5, 3, 1, 1) * 0.6
    clouds = clouds + uniform(-1.4, 1.6, 3, 1, 1)
    behind = F.interpolate(clouds, size=(size, size), mode="bicubic", align_corners=True)[:, :, None]
    video = behind + mask[:, None] * (inside - behind)
    noise = uniform(0.02, 0.08, 1, 1, 1, 1) * torch.randn(video.shape, generator=generator)
    return Clips(video + noise, mask, flow, rates, pace)


@torch.no_grad()
def whiten_embedding(embedding: nn.Conv3d, video: Tensor) -> None:
    """Lowest frequencies of a cosine transform of each tubelet, whitened on `video`.

    Per spatial frequency: three axes of color, sum and difference of the two frames of a tubelet.
    """
    weight = embedding.weight  # (D, 3, tubelet, p, p)
    patch = weight.shape[-1]
    waves = torch.cos(math.pi * torch.arange(patch)[:, None] * (torch.arange(patch) + 0.5) / patch)  # (p, p)
    frequencies = sorted(((i, j) for i in range(patch) for j in range(patch)), key=lambda k: (k[0] ** 2 + k[1] ** 2, k))
    colors = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
    filters = [
        torch.einsum("c,t,h,w->cthw", color, frames, waves[i], waves[j])
        for i, j in frequencies
        for color in colors
        for frames in torch.tensor([[1.0, 1], [1, -1]])
    ]
    weight.copy_(F.normalize(torch.stack(filters[: len(weight)]).flatten(1)).view_as(weight))
    assert embedding.bias is not None
    embedding.bias.zero_()
    embedded = embedding(video)
    gain = 0.7 / embedded.std((0, 2, 3, 4))
    weight.mul_(gain[:, None, None, None, None])
    embedding.bias.copy_(-embedded.mean((0, 2, 3, 4)) * gain)
