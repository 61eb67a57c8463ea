"""Make the weights of the laptop preset of vos: the whole small MTTR learns to find what a sentence says by its looks.

    python -m vos.pretrain              # about 40 minutes on one core; stop and start it at will

A head that has to learn from nothing which words mean which pixels needs more sentences than a laptop's row has steps:
it falls into the hole of one query for all objects, whatever the sentence, and its methods differ in nothing. So it is
trained once, on other and smaller clips in which all things move alike, with sentences about their looks only: motion
and relations it does not learn here, nor has it seen the things and sentences of the table's test. Three parts:

    align      words and pixels in one space: the mean of a sentence's tokens has to choose among the clip's objects, of
               which each is the mean of the last map under its mask (as the alignment of MDETR, arXiv 2104.12763)
    segment    MTTR's losses with the meant object alone as target, so that its mask can only come from the words
    all        MTTR's losses as they are, with all objects of the clip as targets

Each clip comes with a sentence for each of its three things, so that only the words tell the samples apart. Every few
minutes a checkpoint is written beside the weights, and the same command goes on from it after a kill. Writes
vos/weights/small.safetensors in float16, for `--model.weights`, after measuring how often the right object is chosen
in clips of things that were never trained on.
The committed file was made piece by piece, by forerunners of this file with the same losses, rates and numbers of steps
(of the first 200 steps each clip had one sentence only, and the rate of the second part was stopped on its way down);
one run of the command makes its like, not the same bytes.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.command_line import run_command
from engine.task import Batch
from engine.training import checkpoint
from engine.training.optimization import restore_optimizer
from engine.training.state import full_tensors
from engine.weights import load_tensors, write_half
from vos import data
from vos.configs import REFERRING_WEIGHTS, SMALL_WEIGHTS, Config, referring_small
from vos.criterion import at_cells
from vos.head import Frames
from vos.model import Segmenter, build_model
from vos.synthetic import Synthetic, write_dataset

CLIPS = Synthetic(
    num_train=2000,
    num_test=60,
    height=56,
    width=56,
    num_frames=8,
    seed=7,
    kinds=("looks",),
    about=("looks",),
    shrink=0.8,
)
THINGS = 3  # in a clip, and sentences
SHARPNESS = 20.0  # of the choice by alignment
ALIGN, WARMUP = 2.0, 40  # weight of the alignment beside MTTR's losses; steps


class Part(NamedTuple):
    """A stretch of the training with a cosine of its own."""

    name: str
    steps: int
    clips: int
    rates: dict[str, float]  # by prefix of parameters' names


PARTS = (
    Part("align", 1000, 32, {"backbone.": 1e-3, "head.vid_embed_proj": 1e-3, "head.transformer.txt_proj": 1e-3}),
    Part(
        "segment",
        1100,
        16,
        {"backbone.": 5e-4, "head.transformer.": 3e-4, "head.transformer.txt_proj": 5e-4, "head.": 5e-4},
    ),
    Part("all", 300, 16, {"backbone.": 2e-4, "head.transformer.": 1e-4, "head.": 2e-4}),
)


class Clips:
    """Clips of the data set on disk with a sentence for each of their things."""

    def __init__(self, config: Config, split: Any) -> None:
        self.samples = data.build_dataset(config, split)
        of_video: dict[str, dict[str, int]] = {}
        for item, (clip, _) in enumerate(self.samples.items):
            found = self.samples.clips[clip]
            of_video.setdefault(found.video, {})[found.instance] = item
        self.videos = [items for items in of_video.values() if len(items) == THINGS]

    def batch(self, rng: np.random.Generator, count: int) -> Batch:
        """As of `data.collate`, but sentences and what they mean are THINGS for each video, in order."""
        samples: list[dict[str, Any]] = []
        texts: list[Tensor] = []
        meant: list[int] = []
        while len(samples) < count:
            items = self.videos[int(rng.integers(len(self.videos)))]
            sample = self.samples[next(iter(items.values())), int(rng.integers(2**60))]
            if len(sample["masks"]) < THINGS or not sample["masks"].flatten(1).any(1).all():
                continue  # a thing is hidden
            samples.append(sample)
            for instance, item in sorted(items.items()):
                sentence = self.samples.clips[self.samples.items[item][0]].sentence
                texts.append(self.samples.text.features(sentence))
                meant.append(int(instance) - 1)
        longest = max(len(text) for text in texts)
        return {
            **data.collate(samples),
            "text": torch.stack([F.pad(text, (0, 0, 0, longest - len(text))) for text in texts]),
            "text_padding": torch.stack([torch.arange(longest) >= len(text) for text in texts]),
            "meant": torch.tensor(meant),
        }


def config_of(root: Path) -> Config:
    """The laptop row on the clips at `root`, two frames of each, from the weights of a Video Swin alone."""
    base = referring_small("conventional")
    small = replace(base.data, root=root, window=2, image_size=56, max_size=56, cache_gib=0.5, flip=0.0)
    return replace(base, data=small, model=replace(base.model, weights=SMALL_WEIGHTS))


def alignment(model: Segmenter, maps: Tensor, batch: Batch) -> Tensor:
    """maps (N, C, h, w) of the annotated frames -> logits (sentences, THINGS)."""
    head = model.head
    cells = F.normalize(head.vid_embed_proj(maps), dim=1)
    words = head.transformer.txt_proj(batch["text"])
    kept = (~batch["text_padding"]).to(words.dtype)[..., None]
    sentences = F.normalize((words * kept).sum(1) / kept.sum(1), dim=-1)
    things, start = [], 0
    for masks in batch["masks"]:
        count = masks.shape[1]
        share = F.adaptive_avg_pool2d(masks.to(cells.dtype), (maps.shape[-2], maps.shape[-1]))
        things.append(torch.einsum("mthw,tchw->mc", share, cells[start : start + count]))
        start += count
    objects = F.normalize(torch.stack(things), dim=-1).repeat_interleave(THINGS, dim=0)
    return SHARPNESS * (objects @ sentences[..., None])[..., 0]


def run_head(
    model: Segmenter, features: list[Tensor], batch: Batch, *, all_things: bool
) -> tuple[dict[str, Tensor], Batch]:
    """The head's outputs for each sentence, and the batch that its losses want: all things as targets, or the one."""
    frames = Frames.of(batch)
    of_clip = frames.place.split(frames.counts)
    clips = [clip for clip in range(len(frames.counts)) for _ in range(THINGS)]
    counts = [frames.counts[clip] for clip in clips]
    sample = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    again = Frames(torch.cat([of_clip[clip] for clip in clips]), sample, counts)
    outputs = model.head(features, batch["padding"][clips], batch["text"], batch["text_padding"], again)
    every = [batch["masks"][clip] for clip in clips]
    meant = [masks[index, None] for masks, index in zip(every, batch["meant"].tolist(), strict=True)]
    wanted = {
        "masks": every if all_things else meant,
        "referred": batch["meant"] if all_things else torch.zeros_like(batch["meant"]),
        "visible": [masks[0].flatten(1).any(1) for masks in meant],
        "num_targets": float(sum(counts) * (THINGS if all_things else 1)),
    }
    return outputs, wanted


class Training:
    """The model, its optimizer, and where the training stands."""

    def __init__(self, root: Path, folder: Path, parts: tuple[Part, ...]) -> None:
        self.config, self.parts, self.folder = config_of(root), parts, folder
        torch.manual_seed(0)
        self.model = build_model(self.config)
        self.clips = Clips(self.config, "train")
        self.step, self.part = 0, -1
        if checkpoint.exists(folder):
            self._resume()

    def run(self, save_minutes: float, log_every: int) -> None:
        """Train to the end, saving now and then."""
        started = saved = time.perf_counter()
        total = 0.0
        while (place := self._place()) is not None:
            number, done = place
            if number != self.part:
                self._begin(number)
            total += self._make_step(self.parts[number], done)
            self.step += 1
            now = time.perf_counter()
            if self.step % log_every == 0:
                name, mean = self.parts[number].name, total / log_every
                print(f"{now - started:5.0f} s  step {self.step}  {name}  loss {mean:.3f}", flush=True)
                total = 0.0
            if now - saved > 60 * save_minutes:
                self.save()
                saved = now

    def save(self) -> None:
        """A checkpoint from which `__init__` goes on."""
        state = {"step": self.step, "part": self.part, "steps": [part.steps for part in self.parts]}
        checkpoint.save(self.folder, full_tensors(self.model, self.optimizer), state)

    def _resume(self) -> None:
        found = checkpoint.load(self.folder)
        if found.state["steps"] != [part.steps for part in self.parts]:
            raise ValueError(f"{self.folder}: is of {found.state['steps']} steps; give the same, or delete it")
        load_tensors(self.model, found.tensors["model"], str(self.folder))
        self._begin(found.state["part"])
        restore_optimizer(self.model, self.optimizer, found.tensors["optimizer"], str(self.folder))
        self.step = found.state["step"]
        print(f"{self.folder}: going on from step {self.step}")

    def _place(self) -> tuple[int, int] | None:
        """The part that the next step belongs to, and how many of its steps are done."""
        done = self.step
        for number, part in enumerate(self.parts):
            if done < part.steps:
                return number, done
            done -= part.steps
        return None

    def _begin(self, number: int) -> None:
        self.part = number
        rates = self.parts[number].rates
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            prefix = max((prefix for prefix in rates if name.startswith(prefix)), key=len, default=None)
            parameter.requires_grad_(prefix is not None)
            if prefix is not None:
                groups.setdefault(prefix, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": own, "lr": 0.0, "peak": rates[prefix]} for prefix, own in groups.items()], weight_decay=1e-4
        )

    def _make_step(self, part: Part, done: int) -> float:
        torch.manual_seed(self.step)  # of dropout
        batch = self.clips.batch(np.random.default_rng([0, self.step]), part.clips)
        share = min(1.0, (done + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * done / part.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.model.train()
        features = self.model.backbone(batch["video"])
        maps = features[-1].transpose(1, 2).flatten(0, 1).index_select(0, Frames.of(batch).place)
        loss = F.cross_entropy(alignment(self.model, maps, batch), batch["meant"])
        if part.name != "align":
            outputs, wanted = run_head(self.model, features, batch, all_things=part.name == "all")
            loss = ALIGN * loss + torch.stack(list(self.model.head.losses(outputs, wanted).values())).sum()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}; begin anew with a lower rate")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


@torch.no_grad()
def evaluate(model: Segmenter, clips: Clips, count: int) -> dict[str, float]:
    """In percent: how often the mask of the best query lies over the right thing, and its mean IoU."""
    model.eval()
    rng = np.random.default_rng([1])
    hits: list[float] = []
    overlaps: list[float] = []
    for _ in range(count):
        batch = clips.batch(rng, 1)
        outputs, _ = run_head(model, model.backbone(batch["video"]), batch, all_things=True)
        best = outputs["logits"][-1].softmax(-1)[..., 0].argmax(1)
        found = outputs["masks"][-1][torch.arange(len(best)), best] > 0
        truth = at_cells(batch["masks"][0], (found.shape[-2], found.shape[-1])).bool()
        length = truth.shape[1]
        for sentence, meant in enumerate(batch["meant"].tolist()):
            mask = found[sentence * length : (sentence + 1) * length]
            common = (truth & mask).flatten(1).sum(1).double()
            overlap = common / (truth | mask).flatten(1).sum(1).clamp(min=1)
            hits.append(float(overlap.argmax() == meant and overlap.max() > 0))
            overlaps.append(float(overlap[meant]))
    return {"right thing": 100 * float(np.mean(hits)), "mean IoU": 100 * float(np.mean(overlaps))}


def main(words: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=3, default=[part.steps for part in PARTS], help="of the parts")
    parser.add_argument("--root", type=Path, default=Path("data/referring_pretraining"), help="where clips are written")
    parser.add_argument("--validation", type=int, default=100, help="clips on which it is measured at the end")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="between checkpoints")
    parser.add_argument("--log-every", type=int, default=20, help="steps between lines")
    parser.add_argument("--output", type=Path, default=Path(REFERRING_WEIGHTS))
    arguments = parser.parse_args(words)
    write_dataset(arguments.root, CLIPS)
    parts = tuple(part._replace(steps=steps) for part, steps in zip(PARTS, arguments.steps, strict=True))
    training = Training(arguments.root, arguments.output.with_suffix(".checkpoint"), parts)
    training.run(arguments.save_minutes, arguments.log_every)
    write_half(training.model.state_dict(), arguments.output)
    found = evaluate(training.model, Clips(training.config, "test"), arguments.validation)
    told = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB; things never seen: {told}")


if __name__ == "__main__":
    run_command(main)
