"""Make the weights of the tiny preset: a small video ViT learns where an object is and how it moves.

    python -m action_recognition.pretrain              # 1200 steps of 16 clips: 6.5 minutes on half a busy core

Another task than the one it is finetuned on: clips are drawn as tensors, without end and without files (a wavy blob of
random texture before a quiet background, shifting, swaying, growing and turning, several at once), and the targets are
dense. Each token tells the object's share of it and the mean motion of the object's points in it; all tokens together,
through a head that knows their place and time, tell the clip's rates of motion:

    loss = cross entropy(share) + FLOW_WEIGHT |flow - target|^2 + RATE_WEIGHT |rates - target|^2

Class labels of a few thousand clips do not teach a ViT that much. The patch embedding starts as a whitened cosine
transform, so that the change between the two frames of a tubelet is as loud as their color. Weight matrices of the
blocks are trained by Muon, everything else by AdamW. Writes action_recognition/weights/tiny.safetensors in float16.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from action_recognition.configs import TINY_WEIGHTS, motion_tiny
from action_recognition.head import GridHead
from engine.backbones.video_vit import VideoViT, build_tiny_vit
from engine.synthetic.clips import draw_clips, whiten_embedding
from engine.weights import write_half

BATCH = 16
LEARNING_RATE = 1e-3  # of AdamW; 3e-3 learned more slowly
MUON_LEARNING_RATE = 2e-3
FLOW_WEIGHT, RATE_WEIGHT = 13.0, 8.0  # about one over the variance of the targets
FLOW_SCALE = 12.0  # brings the motion from frame to frame, in half frames, to the order of one


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help=f"of {BATCH} clips")
    parser.add_argument("--output", type=Path, default=Path(TINY_WEIGHTS))
    arguments = parser.parse_args()
    config = motion_tiny("conventional")
    num_frames, size = config.data.num_frames, config.data.image_size
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    backbone = VideoViT(build_tiny_vit(image_size=size), num_frames=num_frames, tubelet=config.model.tubelet)
    whiten_embedding(backbone.patch_embed, draw_clips(64, num_frames, size, torch.Generator().manual_seed(3)).video)
    for positions in (backbone.time_embed, backbone.position_embed):
        nn.init.trunc_normal_(positions, std=0.3)
    norm, to_dense = nn.LayerNorm(backbone.width), nn.Linear(backbone.width, 3)
    to_rates = GridHead(backbone.width, backbone.num_tokens, 4)
    modules = nn.ModuleList([backbone, norm, to_dense, to_rates])
    matrices = [parameter for parameter in backbone.blocks.parameters() if parameter.ndim == 2]
    others = [p for p in modules.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = (
        (torch.optim.AdamW(others, lr=0.0, weight_decay=0.05, betas=(0.9, 0.98)), LEARNING_RATE),
        (torch.optim.Muon(matrices, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"), MUON_LEARNING_RATE),
    )
    side = size // backbone.patch_embed.kernel_size[-1]
    cells = (backbone.num_times, side, side)
    start, sums = time.perf_counter(), torch.zeros(3)
    for step in range(1, arguments.steps + 1):
        progress = step / arguments.steps
        share_of_rate = min(progress / 0.05, 0.5 * (1 + math.cos(math.pi * progress)))
        clips = draw_clips(BATCH, num_frames, size, generator)
        tokens = backbone(clips.video)
        dense, rates = to_dense(norm(tokens)), to_rates(tokens)
        share = F.adaptive_avg_pool3d(clips.mask[:, None], cells).flatten(1)
        flow = F.adaptive_avg_pool3d(clips.flow, cells).flatten(2).transpose(1, 2) * FLOW_SCALE
        where = F.binary_cross_entropy_with_logits(dense[..., 0], share)
        how, overall = F.mse_loss(dense[..., 1:], flow), F.mse_loss(rates, clips.rates)
        (where + FLOW_WEIGHT * how + RATE_WEIGHT * overall).backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share_of_rate
            optimizer.step()
            optimizer.zero_grad()
        floor = F.binary_cross_entropy(share.clamp(1e-6, 1 - 1e-6), share)  # what the best answer costs
        sums += torch.stack([where - floor, how / flow.var(), overall / clips.rates.var()]).detach()
        if step % 100 == 0:
            losses = "  ".join(f"{k} {v:.3f}" for k, v in zip(("share", "flow", "rates"), sums / 100, strict=True))
            print(f"{time.perf_counter() - start:4.0f} s  step {step}  {losses}", flush=True)
            sums.zero_()
    write_half(backbone.state_dict(), arguments.output)
    print(f"{arguments.output}: {arguments.steps * BATCH} clips, {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
