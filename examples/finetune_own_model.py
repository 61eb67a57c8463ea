"""Finetune a residual network of your own, on pictures of your own, in three ways, and compare memory and loss.

    python examples/finetune_own_model.py                      # draws pictures first; about two minutes on one core
    python examples/finetune_own_model.py --images FOLDER      # FOLDER/NAME OF A CLASS/*.png or *.jpg

Made to be copied. Three places are yours: the network (`MixerBlock`, `Mixer`), its weights (`pretrained`) and
the loss (`loss_of`). One is new: `branches_of_mixer_block`, which says what the residual branches of your block are.
The rest is a training loop as you have it; what Dr2Net adds to it are the two lines in `prepare`. It needs torch and
torchvision. Not here: command lines, resuming and evaluation as the tasks of this repository have them.
"""

import argparse
import copy
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import dr2net
from dr2net.memory import Memory, format_bytes, measure

SIZE, PATCH = 64, 8  # pixels
WIDTH, DEPTH = 64, 12
METHODS = ("conventional", "checkpointed", "dr2net")
Batch = tuple[Tensor, Tensor]  # (B, 3, SIZE, SIZE) in -1..1, and (B,) class numbers


# ---- your network


class MixerBlock(nn.Module):
    """x + gamma * mix(norm(x)), then x + mlp(norm(x)): two residual connections. x: (B, N, D) -> (B, N, D)."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(num_tokens, num_tokens)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))

    def mix_tokens(self, x: Tensor) -> Tensor:
        return self.gamma * self.mix(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_tokens(x)
        return x + self.mlp(self.norm_channels(x))


@dr2net.branches_of.register(MixerBlock)
def branches_of_mixer_block(block: MixerBlock) -> tuple[dr2net.Branch, ...]:
    """What each residual connection adds, without the connection; and all that it uses, a parameter of the block
    (gamma) by itself. `independent` says along what a branch may be cut, if you convert with `chunk_mib`.
    """
    return (
        dr2net.Branch("mix", block.mix_tokens, (block.norm_tokens, block.mix, block.gamma), independent="samples"),
        dr2net.Branch(
            "mlp",
            lambda x: block.mlp(block.norm_channels(x)),
            (block.norm_channels, block.mlp),
            independent="tokens",
        ),
    )


class Mixer(nn.Module):
    """Patches, blocks, mean, classifier. (B, 3, SIZE, SIZE) -> (B, K)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.blocks = nn.Sequential(*(MixerBlock((SIZE // PATCH) ** 2, WIDTH) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (B, N, D)
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def pretrained(num_classes: int, steps: int) -> Mixer:
    """Your pretrained network with a new head. Yours is loaded here (safetensors.torch.load_file, load_state_dict);
    this one learns for some seconds in which quarter of a picture something lies.
    """
    model, rng = Mixer(4), random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        quarters = torch.tensor([rng.randrange(4) for _ in range(16)])
        pictures = [draw(rng.choice(SHAPES), rng, (int(q) % 2, int(q) // 2)) for q in quarters]
        loss_of(model, (torch.stack([to_tensor(picture) for picture in pictures]), quarters)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.head = nn.Linear(WIDTH, num_classes)
    return model


# ---- your data


SHAPES = ("circle", "cross", "ring", "square")
to_tensor = transforms.Compose(
    [transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
)


def draw(shape: str, rng: random.Random, quarter: tuple[int, int] | None = None) -> Image.Image:
    """A noisy picture with one shape, in one quarter (column, row) of it or anywhere."""
    picture = Image.effect_noise((SIZE, SIZE), 60).convert("RGB")
    r = rng.randint(7, 13)
    column, row = quarter or (rng.randrange(2), rng.randrange(2))
    x, y = (half * SIZE // 2 + rng.randint(r, SIZE // 2 - r) for half in (column, row))
    color = tuple(rng.randint(120, 255) for _ in range(3))
    pen, box = ImageDraw.Draw(picture), (x - r, y - r, x + r, y + r)
    if shape == "cross":
        pen.line((x - r, y, x + r, y), fill=color, width=4)
        pen.line((x, y - r, x, y + r), fill=color, width=4)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.ellipse(box, fill=color if shape == "circle" else None, outline=color, width=4)
    return picture


def write_pictures(folder: Path, per_class: int) -> None:
    """folder/SHAPE/0000.png ..., the layout that `--images` reads."""
    rng = random.Random(0)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
        for index in range(per_class):
            draw(shape, rng).save(folder / shape / f"{index:04d}.png")


def split(folder: Path) -> tuple[list[str], Subset, Subset]:
    """Names of the classes, the pictures to train on, and every fifth, which is held out.

    ValueError for a folder with fewer than two classes; torchvision names a folder in which a class is empty.
    """
    data = ImageFolder(str(folder), to_tensor)
    if len(data.classes) < 2:
        raise ValueError(f"{folder} has only the class {data.classes[0]!r}; write FOLDER/NAME OF A CLASS/PICTURE")
    held_out = range(0, len(data), 5)
    return data.classes, Subset(data, sorted({*range(len(data))} - {*held_out})), Subset(data, held_out)


def batches(data: Subset, size: int) -> Iterator[Batch]:
    """Without end, in the same order for each method."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from DataLoader(data, size, shuffle=True, drop_last=len(data) >= size, generator=generator)


# ---- the comparison


def prepare(model: nn.Module, method: str) -> None:
    """The method's two lines, or none."""
    if method == "checkpointed":
        dr2net.checkpoint_blocks(model)
    elif method == "dr2net":
        print(dr2net.convert(model))
        dr2net.set_coefficients(model, alpha=7 / 8, beta=1 / 8)


@dataclass
class Result:
    """What one way of finetuning needed and reached."""

    memory: Memory  # of the second step
    seconds: float  # per step, the median
    loss: float  # mean of the last ten steps
    accuracy: float  # held out, in per cent


def finetune(model: nn.Module, train: Subset, held_out: Subset, steps: int, batch_size: int) -> Result:
    """AdamW at a constant rate; every step of it is ordinary."""
    torch.manual_seed(0)  # dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses, seconds, memory, source = [], [], None, batches(train, batch_size)

    def step() -> None:
        loss = loss_of(model, next(source))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    model.train()
    for index in range(max(2, steps)):
        start = time.perf_counter()
        if index == 1:  # the first step makes the optimizer's state
            memory = measure(step, model, optimizer)
        else:
            step()
        seconds.append(time.perf_counter() - start)
    assert memory is not None
    last = losses[-10:]
    return Result(memory, sorted(seconds)[len(seconds) // 2], sum(last) / len(last), accuracy(model, held_out))


@torch.no_grad()
def accuracy(model: nn.Module, data: Subset) -> float:
    """Per cent of right answers; a converted model is evaluated at the coefficients it has."""
    model.eval()
    right = [model(images).argmax(1) == labels for images, labels in DataLoader(data, 64)]
    return 100 * torch.cat(right).float().mean().item()


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="FOLDER/CLASS/*.png; without it pictures are drawn")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pretraining-steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as drawn:
        folder = options.images or Path(drawn)
        if options.images is None:
            write_pictures(folder, per_class=200)
        try:
            names, train, held_out = split(folder)
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
        print(f"{len(train)} pictures to train on, {len(held_out)} held out, classes: {', '.join(names)}")
        weights = pretrained(len(names), options.pretraining_steps)

        # once, on a small batch, before anything long is started
        model = copy.deepcopy(weights)
        dr2net.convert(model)
        dr2net.set_coefficients(model, alpha=7 / 8, beta=1 / 8)
        found = dr2net.verify(model, next(batches(train, 4)), loss_of)
        print(found)
        if not found.ok:
            raise SystemExit("the branches are not those of the block: see the problems above")

        results = {}
        for method in METHODS:
            model = copy.deepcopy(weights)
            prepare(model, method)
            results[method] = finetune(model, train, held_out, options.steps, options.batch_size)
    print(f"{'':14}{'activations':>12}{'peak':>12}{'s/step':>8}{'loss':>8}{'accuracy':>10}")
    for method, result in results.items():
        memory = f"{format_bytes(result.memory.activations):>12}{format_bytes(result.memory.peak):>12}"
        print(f"{method:14}{memory}{result.seconds:8.2f}{result.loss:8.3f}{result.accuracy:9.1f}%")
    return results


if __name__ == "__main__":
    main()
