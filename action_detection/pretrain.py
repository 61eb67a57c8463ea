"""Make the weights of the laptop preset of action detection: a small Video Swin learns what moves, where, how and when.

    python -m action_detection.pretrain              # 900 steps of 256 frames: 20 to 25 minutes on one core

Two phases. First short drawn clips (`engine.synthetic.clips`), whose targets are dense: each token of the last two
stages tells the object's share of it and the mean motion of the object's points in it, and the mean over space, which
is what a detection head gets, tells for each time step the clip's rates of motion. Then longer ones, with pauses (rates
of 0) and with another object that stands; and strips: clips of the classes of engine.synthetic.motion, cut together,
where the mean over space tells for each time step the class:

    loss = cross entropy(share) + |flow - target|^2 / variance + |rates - target|^2 / variance + cross entropy(class)

No video of the detection data set and no object of its validation subset is seen here. Matrices of blocks and merging
are trained by Muon, everything else by AdamW. Writes action_detection/weights/small.safetensors in float16.
At the end the class of 93.5 % of the time steps was told, for objects never seen.
"""

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from action_detection.configs import SMALL_WEIGHTS, untrimmed_small
from engine.backbones.video_swin import PATCH, VideoSwin, build_video_swin
from engine.data.transforms import normalize
from engine.synthetic.clips import Clips, draw_clips, whiten_embedding
from engine.synthetic.motion import MOTIONS, render_clip
from engine.synthetic.sprites import Group
from engine.weights import write_half


class Phase(NamedTuple):
    """A batch of one half of the training."""

    drawn: int  # drawn clips, even
    strips: int
    num_frames: int


PHASES = (Phase(32, 0, 8), Phase(4, 4, 32))  # 256 frames per step in both
LENGTHS = (12, 32)  # frames of a motion in a strip: 2 to 5 seconds at 6 per second
SLOW_FLOW, SLOW_RATE = 0.01, 0.006  # per frame; below it targets are proportional to the motion, above logarithmic
LEARNING_RATE, MUON_LEARNING_RATE = 1e-3, 2e-3  # as for the small ViT
IGNORED = -100  # label of a time step that has frames of two clips


class Targets(NamedTuple):
    """What is true of drawn clips."""

    share: list[Tensor]  # per stage (B, 1, T', H', W') in 0..1, how much of the token is object
    flow: list[Tensor]  # per stage (B, 2, T', H', W'), its motion per frame
    rates: Tensor  # (B, 4, T'), the clip's motion per frame


class Outputs(NamedTuple):
    """Of the network with the heads that are thrown away."""

    dense: list[Tensor]  # per stage (B, 3, T', H', W'): share's logit, flow
    rates: Tensor  # (B, 4, T')
    logits: Tensor  # (B, K, T')


class Pretrainer(nn.Module):
    """The backbone with a linear head on each of its last two stages and two on the mean of its features."""

    def __init__(self, backbone: VideoSwin) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.LayerNorm(backbone.width // 2)
        self.dense = nn.ModuleList([nn.Linear(width, 3) for width in (backbone.width // 2, backbone.width)])
        self.rates = nn.Linear(backbone.width, 4)
        self.classes = nn.Linear(backbone.width, len(MOTIONS))
        for head in (*self.dense, self.rates, self.classes):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def forward(self, video: Tensor) -> Outputs:
        backbone = self.backbone
        middle = backbone.features[:-2](backbone.patch_embed(video))  # (B, T', H', W', C / 2), before the last merging
        last = backbone.norm(backbone.features[-2:](middle))
        pooled = last.mean((2, 3))  # (B, T', C)
        dense = [head(x) for head, x in zip(self.dense, (self.norm(middle), last), strict=True)]
        return Outputs(
            [x.permute(0, 4, 1, 2, 3) for x in dense],
            self.rates(pooled).transpose(1, 2),
            self.classes(pooled).transpose(1, 2),
        )


def draw_scenes(phase: Phase, size: int, generator: torch.Generator) -> Clips:
    """Drawn clips; in the long ones are pauses, and behind every second object stands that of the next clip."""
    long = phase.strips > 0
    clips = draw_clips(phase.drawn, phase.num_frames, size, generator, pauses=long)
    if not long:
        return clips
    mask, video = clips.mask[::2, None], clips.video.clone()
    still = clips.video[1::2, :, phase.num_frames // 2, None]
    noise = 0.05 * torch.randn(video[::2].shape, generator=generator)  # that of a still frame would stand still too
    video[::2] = still + mask * (video[::2] - still) + noise
    return clips._replace(video=video)


def targets_of(clips: Clips) -> Targets:
    """Means over the pixels of each token of the last two stages; at the border a token may be partly padding."""
    num_frames, size = clips.mask.shape[1:3]
    values = torch.cat([clips.mask[:, None], clips.flow], dim=1)
    share, flow = [], []
    for patch in (2 * PATCH[1], 4 * PATCH[1]):
        pad = -size % patch
        means = F.avg_pool3d(F.pad(values, (0, pad, 0, pad)), (PATCH[0], patch, patch))
        share.append(means[:, :1])
        flow.append(torch.asinh(means[:, 1:] / SLOW_FLOW))
    rates = F.avg_pool1d(clips.rates[:, :, None] * clips.pace[:, None] / num_frames, PATCH[0])
    return Targets(share, flow, torch.asinh(rates / SLOW_RATE))


def render_strips(numbers: list[int], num_frames: int, size: int, group: Group) -> tuple[Tensor, Tensor]:
    """Motion clips one after the other: video (B, 3, T, size, size), normalized, and class (B, T / 2) per time step.

    numbers: the keys of the strips, whose pure function they are.
    """
    data = untrimmed_small("conventional").data
    names, videos, labels = list(MOTIONS), [], []
    for number in numbers:
        rng = np.random.default_rng([5, number])
        frames: list[np.ndarray] = []
        classes: list[int] = []
        while len(classes) < num_frames:
            motion, length = int(rng.integers(len(names))), int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
            key = (5, number, len(classes))
            clip, _ = render_clip(names[motion], key=key, group=group, size=size, num_frames=(length, length))
            skip = 0 if classes else int(rng.integers(0, length // 2))  # a strip begins somewhere in its first clip
            frames.append(clip[skip:])
            classes += [motion] * (length - skip)
        video = torch.from_numpy(np.concatenate(frames)[:num_frames]).permute(0, 3, 1, 2)
        videos.append(normalize(video, data.mean, data.std))
        first, second = torch.tensor(classes[:num_frames]).view(-1, 2).unbind(1)
        labels.append(torch.where(first == second, first, IGNORED))
    return torch.stack(videos), torch.stack(labels)


def losses_of(outputs: Outputs, targets: Targets, labels: Tensor | None, spread: Targets) -> dict[str, Tensor]:
    """The parts of the loss, each near 1 per stage for a network that knows nothing (class: log K).

    Drawn clips come first in the batch, then strips with `labels`. spread: targets whose variance is the unit.
    """
    drawn = len(targets.rates)
    where, how = [], []
    for dense, share, flow, wide in zip(outputs.dense, targets.share, targets.flow, spread.flow, strict=True):
        floor = F.binary_cross_entropy(share.clamp(1e-6, 1 - 1e-6), share)  # what the best answer costs
        where.append(F.binary_cross_entropy_with_logits(dense[:drawn, :1], share) - floor)
        how.append(F.mse_loss(dense[:drawn, 1:], flow) / wide.var())
    rates = F.mse_loss(outputs.rates[:drawn], targets.rates) / spread.rates.var()
    parts = {"share": sum(where), "flow": sum(how), "rates": rates}
    if labels is not None:
        parts["class"] = F.cross_entropy(outputs.logits[drawn:], labels, ignore_index=IGNORED)
    return cast(dict[str, Tensor], parts)


def build_optimizers(model: Pretrainer) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak learning rates."""
    matrices = [module.weight for module in model.backbone.features.modules() if isinstance(module, nn.Linear)]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        (torch.optim.AdamW(others, lr=0.0, weight_decay=0.05, betas=(0.9, 0.98)), LEARNING_RATE),
        (torch.optim.Muon(matrices, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"), MUON_LEARNING_RATE),
    ]


def share_of_rate(progress: float) -> float:
    """Of the peak learning rate: up for 2 %, level until 60 %, then down as a cosine."""
    return min(progress / 0.02, 1.0, 0.5 * (1 + math.cos(math.pi * (progress - 0.6) / 0.4)) if progress > 0.6 else 1.0)


@torch.no_grad()
def accuracy(model: Pretrainer, num_strips: int, num_frames: int, size: int) -> float:
    """Share of the time steps of new strips, with objects never trained on, whose class is told."""
    right = []
    for number in range(num_strips):
        video, labels = render_strips([number], num_frames, size, "validation")
        right.append((model(video).logits.argmax(1) == labels)[labels != IGNORED])
    return torch.cat(right).float().mean().item()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900, help="half of them in each phase")
    parser.add_argument("--validation", type=int, default=100, help="strips on which the accuracy is measured")
    parser.add_argument("--output", type=Path, default=Path(SMALL_WEIGHTS))
    arguments = parser.parse_args()
    size = untrimmed_small("conventional").data.image_size
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Pretrainer(build_video_swin("small", weights=None))
    samples = [draw_scenes(phase._replace(drawn=64), size, torch.Generator().manual_seed(3)) for phase in PHASES]
    spreads = [targets_of(sample) for sample in samples]
    whiten_embedding(model.backbone.patch_embed.proj, samples[0].video)
    optimizers = build_optimizers(model)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    sums: dict[str, float] = {}
    for step in range(1, arguments.steps + 1):
        second = 2 * step > arguments.steps
        phase, spread = PHASES[second], spreads[second]
        clips = draw_scenes(phase, size, generator)
        video, labels = clips.video, None
        if phase.strips:
            numbers = list(range(step * phase.strips, (step + 1) * phase.strips))
            strips, labels = render_strips(numbers, phase.num_frames, size, "train")
            video = torch.cat([video, strips])
        parts = losses_of(model(video), targets_of(clips), labels, spread)
        cast(Tensor, sum(parts.values())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share_of_rate(step / arguments.steps)
            optimizer.step()
            optimizer.zero_grad()
        sums = {name: sums.get(name, 0.0) + part.item() for name, part in parts.items()}
        if step % 25 == 0:
            losses = "  ".join(f"{name} {total / 25:.3f}" for name, total in sums.items())
            print(f"{time.perf_counter() - start:4.0f} s  step {step}  {losses}", flush=True)
            sums = {}
        if 2 * step == arguments.steps or step == arguments.steps:
            write_half(model.backbone.state_dict(), arguments.output)
    right = accuracy(model.eval(), arguments.validation, PHASES[1].num_frames, size)
    print(f"class of a time step, objects never seen: {right:.1%} right")
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
