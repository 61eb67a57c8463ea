"""Make the weights of the small presets of detection: the whole small detector learns composed scenes from nothing.

    python -m detection.pretrain --minutes 45      # on two cores; or --steps N, which gives the same weights each time

A row then does what users of DINO do: it loads a detector, with fresh class layers where the classes are others, and
trains it on other pictures. The scenes are drawn as they are needed (`scenes.py`), so none is seen twice; first small
pictures, then of the size of the rows. AdamW, cosine, gradient clipping; the average of the weights over the steps is
what is kept.
With --copies, each object is also to be found by so many tokens of the encoder (one-to-many matching, as in hybrid
matching, Jia et al., arXiv 2207.13080), which teaches backbone and classes faster than one token does.
With --one-class, every thing is of the same class, and three of four scenes are forests: dense stands of crowns of the
size that trees have in aerial photographs. A row with one class keeps the class layers.
Every few minutes a checkpoint is written beside the weights, and the same command goes on from it after a kill.
Writes detection/weights/small.safetensors in float16, after AP has been measured on scenes with examples of the
classes that were never trained on. No photograph of a data set is seen here, unless --photographs names its folder.
"""

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from detection.checkpoints import load_file
from detection.configs import SMALL_WEIGHTS, Config, trees_small
from detection.criterion import matched_losses
from detection.metric import evaluate_files
from detection.model import build_model
from detection.objects import CLASSES
from detection.scenes import Scene, compose, compose_forest
from detection.transformer import proposals
from engine.data.loader import to_device
from engine.data.workers import write_json
from engine.task import Batch, Model
from engine.training import checkpoint
from engine.training.ema import EMA
from engine.training.optimization import build_optimizer, restore_optimizer, set_learning_rate
from engine.training.state import full_tensors
from engine.weights import load_tensors, write_half


class Phase(NamedTuple):
    """A batch of one part of the training."""

    until: float  # of the progress
    size: int  # pixels
    scenes: int


PHASES = (Phase(0.55, 160, 10), Phase(1.0, 256, 4))  # the same number of pixels in each
LEARNING_RATE, WARMUP, EMA_DECAY = 5e-4, 0.03, 0.998
STREAM = {"train": 0, "validation": 1}  # of seeds
MAX_MB = 10
STRIDES = (8, 16, 32, 64)  # of the head's levels


class Key(NamedTuple):
    """Of a batch, which is a pure function of it."""

    number: int
    size: int
    scenes: int


class Batches(Dataset[Batch]):
    """Composed batches by their keys."""

    def __init__(self, config: Config, photographs: list[np.ndarray], *, one_class: bool) -> None:
        self.data = config.data
        self.photographs = photographs
        self.one_class = one_class

    def __getitem__(self, key: Key) -> Batch:
        seeds = [[STREAM["train"], key.number, i] for i in range(key.scenes)]
        makers = [compose_forest if self.one_class and i % 4 else compose for i in range(key.scenes)]
        scenes = [
            make(seed, (key.size, key.size), photographs=self.photographs)
            for make, seed in zip(makers, seeds, strict=True)
        ]
        return to_batch(scenes, [f"composed {key.number}.{i}" for i in range(key.scenes)], self.data)


def pretraining_config(*, one_class: bool = False) -> Config:
    """The small detector for the classes of the scenes, or one for all, with random weights, and the recipe."""
    base = trees_small("conventional")
    return replace(
        base,
        data=replace(base.data, num_classes=1 if one_class else len(CLASSES)),
        model=replace(base.model, weights=None),
        optimization=replace(base.optimization, learning_rate=LEARNING_RATE, multipliers={}, clip_norm=0.1),
    )


def to_batch(scenes: list[Scene], names: list[str], data: Any) -> Batch:
    """Scenes of one size as `data.collate` would give them; labels 0 where the data have one class."""
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    height, width = pixels.shape[-2:]
    targets = []
    for scene in scenes:
        boxes = torch.from_numpy(scene.boxes).float() / torch.tensor([width, height, width, height])
        center, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        labels = torch.from_numpy(scene.labels if data.num_classes > 1 else np.zeros_like(scene.labels))
        targets.append({"labels": labels, "boxes": torch.cat([center, extent], dim=1)})
    return {
        "image": (pixels - mean) / std,
        "padding": torch.zeros(len(scenes), height, width, dtype=torch.bool),
        "targets": targets,
        "name": names,
        "image_id": list(range(1, len(scenes) + 1)),
        "original_size": [(height, width)] * len(scenes),
        "num_targets": float(sum(len(scene.labels) for scene in scenes)),
    }


def share_of_rate(progress: float) -> float:
    """Of the peak learning rate: up over WARMUP, then down as a cosine."""
    return min(progress / WARMUP, 0.5 * (1 + math.cos(math.pi * min(max(progress - WARMUP, 0) / (1 - WARMUP), 1))))


class Training:
    """The model, its optimizer and averages, and where the training stands; progress is of steps or of minutes."""

    def __init__(self, arguments: argparse.Namespace, photographs: list[np.ndarray]) -> None:
        self.arguments = arguments
        self.config = pretraining_config(one_class=arguments.one_class)
        self.phases = PHASES[-1:] if arguments.one_class else PHASES  # trees keep their size in pixels
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(self.config, pretrained=False).to(self.device)
        if arguments.start is not None:
            load_file(self.model, arguments.start, self.config)
        self.encoded: Tensor | None = None
        self.model.head.transformer.encoder.register_forward_hook(self._keep)
        self.optimizer = build_optimizer(self.model, self.config.optimization)
        self.ema = EMA(self.model, EMA_DECAY)
        self.batches = Batches(self.config, photographs, one_class=arguments.one_class)
        self.step, self.seconds = 0, 0.0
        self.folder: Path = arguments.output.with_suffix(".checkpoint")
        if checkpoint.exists(self.folder):
            self._resume()

    def progress(self, step: int) -> float:
        """In [0, 1]: of steps where they are given, else of the time."""
        if self.arguments.steps is not None:
            return min(step / self.arguments.steps, 1.0)
        return min(self.seconds / (60 * self.arguments.minutes), 1.0)

    def run(self) -> None:
        """Train to the end, saving now and then."""
        start, before = time.perf_counter(), self.seconds
        last_save = start
        total, count = 0.0, 0
        workers = self.arguments.workers
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=cast(Any, self._keys()),
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=_one_thread if workers else None,
        )
        for batch in loader:
            total += self._make_step(batch)
            count += 1
            now = time.perf_counter()
            self.seconds = before + now - start
            if self.step % self.arguments.log_every == 0:
                size, found = batch["image"].shape[-1], total / count
                print(f"{self.seconds:5.0f} s  step {self.step}  {size} px  loss {found:.3f}", flush=True)
                total, count = 0.0, 0
            if now - last_save > 60 * self.arguments.save_minutes:
                self.save()
                last_save = now

    def save(self) -> None:
        """A checkpoint from which `__init__` goes on."""
        tensors = {**full_tensors(self.model, self.optimizer), "ema": self.ema.tensors}
        state = {"step": self.step, "seconds": self.seconds, "steps": self.arguments.steps}
        checkpoint.save(self.folder, tensors, state)

    def _resume(self) -> None:
        found = checkpoint.load(self.folder)
        if found.state.get("steps") != self.arguments.steps:
            raise ValueError(
                f"{self.folder}: is of --steps {found.state.get('steps')}, not {self.arguments.steps}; give the same, "
                "or delete it to begin anew"
            )
        load_tensors(self.model, found.tensors["model"], str(self.folder))
        restore_optimizer(self.model, self.optimizer, found.tensors["optimizer"], str(self.folder))
        self.ema.restore(found.tensors["ema"], str(self.folder))
        self.step, self.seconds = found.state["step"], found.state["seconds"]
        print(f"{self.folder}: going on from step {self.step}")

    def _keys(self) -> Iterator[Key]:
        """Of the batches that are still to come, in order; asked for a little ahead by the loader."""
        number = self.step
        while self.progress(number) < 1:
            phase = next(phase for phase in self.phases if self.progress(number) < phase.until)
            yield Key(number, phase.size, phase.scenes)
            number += 1

    def _make_step(self, batch: Batch) -> float:
        torch.manual_seed(self.step)  # of the noise in the queries
        batch = to_device(batch, self.device)
        with self._precision():
            outputs = self.model(batch)
        loss = cast(Tensor, sum(self.model.losses(outputs, batch).values()))
        if self.arguments.copies:
            loss = loss + self._one_to_many(batch)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}; begin anew with another precision"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), cast(float, self.config.optimization.clip_norm))
        set_learning_rate(self.optimizer, LEARNING_RATE * share_of_rate(self.progress(self.step + 1)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.ema.update(self.step)
        return loss.item()

    def _keep(self, encoder: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.encoded = output

    def _one_to_many(self, batch: Batch) -> Tensor:
        """Losses of all tokens of the encoder, matched to `copies` of each target; no picture is padded here."""
        transformer, tokens = self.model.head.transformer, cast(Tensor, self.encoded).float()
        shapes = [(-(-side // stride),) * 2 for side in batch["image"].shape[-1:] for stride in STRIDES]
        boxes, usable = proposals(shapes, torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device))
        found = transformer.enc_output_norm(transformer.enc_output(tokens.masked_fill(~usable[..., None], 0)))
        moved = (transformer.enc_out_bbox_embed(found) + boxes).sigmoid()
        copies = self.arguments.copies
        targets = [{name: torch.cat([value] * copies) for name, value in one.items()} for one in batch["targets"]]
        logits = transformer.enc_out_class_embed(found)
        return matched_losses(logits[None], moved[None], targets, max(batch["num_targets"], 1.0) * copies).sum()

    def _precision(self) -> AbstractContextManager:
        if self.arguments.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


@torch.no_grad()
def evaluate(model: Model, config: Config, num_scenes: int, size: int) -> dict[str, float | None]:
    """Metrics in percent on new scenes with other examples of the classes; the model is in eval mode."""
    device = next(model.parameters()).device
    images, detections = [], []
    annotations: list[dict[str, Any]] = []
    for number in range(1, num_scenes + 1):
        make = compose_forest if config.data.num_classes == 1 and number % 2 else compose
        scene = make([STREAM["validation"], number], (size, size), group="validation")
        batch = to_device(to_batch([scene], [f"held out {number}"], config.data), device)
        outputs = model(batch)
        (found,) = cast(Any, model).head.detect(outputs, batch["original_size"], config.detection.max_detections)
        images.append({"id": number, "width": size, "height": size, "file_name": f"{number}.png"})
        for box, label in zip(_xywh(scene.boxes), batch["targets"][0]["labels"].tolist(), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "iscrowd": 0}
            annotations.append({**entry, "bbox": box, "area": box[2] * box[3]})
        boxes = _xywh(found.boxes.double().numpy())
        for box, label, score in zip(boxes, found.labels.tolist(), found.scores.tolist(), strict=True):
            detections.append({"image_id": number, "category_id": label + 1, "bbox": box, "score": score})
    names = CLASSES if config.data.num_classes > 1 else ("thing",)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(names)]
    with tempfile.TemporaryDirectory() as scratch:
        truth, results = Path(scratch) / "truth.json", Path(scratch) / "detections.json"
        write_json(truth, {"images": images, "annotations": annotations, "categories": categories})
        write_json(results, detections)
        return dict(evaluate_files(truth, results))


def read_photographs(folder: Path) -> list[np.ndarray]:
    """All JPEG and PNG files below a folder, uint8 (H, W, 3). FileNotFoundError if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise FileNotFoundError(f"{folder}: no .jpg or .png files; name a folder of photographs")
    found = []
    for path in files:
        with Image.open(path) as picture:
            found.append(np.asarray(picture.convert("RGB")))
    return found


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=45.0, help="of training, over all starts")
    length.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--start", type=Path, help="weights to go on from, instead of random ones")
    parser.add_argument("--copies", type=int, default=6, help="tokens of the encoder per object; 0: one-to-one only")
    parser.add_argument(
        "--one-class", action="store_true", help="all things are one class, three of four scenes forests"
    )
    parser.add_argument("--validation", type=int, default=100, help="scenes on which AP is measured at the end")
    parser.add_argument(
        "--photographs", type=Path, help="a folder of photographs, for the ground of half of the scenes"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--workers", type=int, default=1, help="processes that compose; 0: between the steps")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="between checkpoints")
    parser.add_argument("--log-every", type=int, default=25, help="steps between lines")
    parser.add_argument("--output", type=Path, default=Path(SMALL_WEIGHTS))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    photographs = [] if arguments.photographs is None else read_photographs(arguments.photographs)
    training = Training(arguments, photographs)
    training.run()
    training.save()
    training.ema.swap()
    model = training.model.eval()
    write_half(model.state_dict(), arguments.output)
    megabytes = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: {training.step} steps, {megabytes:.1f} MB")
    metrics = evaluate(model, training.config, arguments.validation, PHASES[-1].size)
    words = ", ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in metrics.items())
    print(f"{arguments.validation} scenes never seen: {words}")
    if megabytes > MAX_MB:
        raise ValueError(f"{arguments.output}: {megabytes:.1f} MB is more than {MAX_MB}; make the network smaller")
    shutil.rmtree(training.folder)


if __name__ == "__main__":
    main()
