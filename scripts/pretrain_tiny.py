"""Make the weights of the tiny preset: a small video ViT learns where an object is and how it moves.

    python -m scripts.pretrain_tiny

Another task than the one it is finetuned on: clips are drawn as tensors, without end and without files (a wavy blob of
random texture before a random background, shifting, growing and turning all at once), and the targets are dense: the
object's share of each token, and the clip's four rates of motion. That teaches a ViT in minutes what class labels of a
few thousand clips do not. Writes action_recognition/weights/tiny.safetensors in float16.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from action_recognition.configs import TINY_WEIGHTS, row
from action_recognition.model import build_model, without_weights

BATCH = 8  # small: updates count for more than clean gradients here
LEARNING_RATE = 5e-4


def draw_clips(batch: int, num_frames: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clips (B, 3, T, S, S), object masks (B, T, S, S), rates (B, 4) of x, y, growth and turn, each in -1..1."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    moves = (uniform(0, 1, 4) < 0.5).float()
    rates = uniform(-1, 1, 4) * moves
    time_axis = torch.linspace(-0.5, 0.5, num_frames)
    shift = rates[:, :2, None] * time_axis * 1.3  # units of half a frame
    radius = uniform(0.28, 0.5, 1) * torch.exp(rates[:, 2:3] * time_axis * 1.0)
    angle = uniform(0, 2 * math.pi, 1) + rates[:, 3:4] * time_axis * 3.5
    centre = uniform(-0.45, 0.45, 2)[:, :, None] + shift + 0.02 * torch.randn(batch, 2, num_frames, generator=generator)

    axis = torch.linspace(-1, 1, size)
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    dx = grid_x - centre[:, 0, :, None, None]
    dy = grid_y - centre[:, 1, :, None, None]
    cos, sin = torch.cos(angle)[:, :, None, None], torch.sin(angle)[:, :, None, None]
    u = (cos * dx + sin * dy) / radius[:, :, None, None]  # object coordinates, (B, T, S, S)
    v = (cos * dy - sin * dx) / radius[:, :, None, None]
    lobes = torch.randint(2, 6, (batch, 1, 1, 1), generator=generator)
    edge = 0.85 + uniform(0, 0.3, 1, 1, 1) * torch.cos(lobes * torch.atan2(v, u))
    mask = torch.sigmoid((edge - torch.hypot(u, v)) * 12)

    texture = torch.randn(batch, 3, 5, 5, generator=generator) * uniform(0.2, 1.0, 1, 1, 1) + uniform(
        -1.5, 1.5, 3, 1, 1
    )
    places = torch.stack([u, v], dim=-1).flatten(1, 2)  # (B, T S, S, 2)
    inside = F.grid_sample(texture, places, padding_mode="border", align_corners=True).unflatten(2, (num_frames, size))
    coarse = torch.randn(batch, 3, 7, 7, generator=generator) * uniform(0.1, 0.8, 1, 1, 1) + uniform(-1, 1, 3, 1, 1)
    behind = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)[:, :, None]
    clip = behind + mask[:, None] * (inside - behind)
    return clip + 0.05 * torch.randn(clip.shape, generator=generator), mask, rates


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help=f"of {BATCH} clips; about 0.1 s each on one core")
    parser.add_argument("--output", type=Path, default=Path(TINY_WEIGHTS))
    arguments = parser.parse_args()
    config = without_weights(row("motion_tiny_conventional"))
    frames, size = config.data.num_frames, config.data.image_size
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    backbone = build_model(config).backbone
    times, side = backbone.num_times, 4
    nn.init.trunc_normal_(backbone.patch_embed.weight, std=0.03)  # frames of a tubelet differ, unlike after inflation
    nn.init.trunc_normal_(backbone.time_embed, std=0.02)
    norm, to_mask = nn.LayerNorm(backbone.width), nn.Linear(backbone.width, 1)
    to_rates = nn.Linear(backbone.width, 4)
    modules = nn.ModuleList([backbone, norm, to_mask, to_rates])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=0.0, weight_decay=0.05, betas=(0.9, 0.98))
    start = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        progress = step / arguments.steps
        rate = LEARNING_RATE * min(progress / 0.03, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        clip, mask, rates = draw_clips(BATCH, frames, size, generator)
        tokens = norm(backbone(clip))
        share = F.adaptive_avg_pool3d(mask[:, None], (times, side, side)).flatten(1)
        where = F.binary_cross_entropy_with_logits(to_mask(tokens).squeeze(-1), share)
        how = F.mse_loss(to_rates(tokens.mean(dim=1)), rates)
        (where + 2 * how).backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            spread = float(rates.var())
            print(
                f"{time.perf_counter() - start:4.0f} s  step {step}  mask {where:.3f}  rates {how / spread:.2f}",
                flush=True,
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() for name, value in backbone.state_dict().items()}, arguments.output)
    print(f"{arguments.output}: {arguments.steps * BATCH} clips, {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
