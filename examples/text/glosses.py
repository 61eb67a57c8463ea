"""WordNet's nouns: what a word means, in words, and to which of 26 kinds of things it belongs.

    path = bring_wordnet()                                # Debian's wordnet-base, 7 MB, to data/wordnet/data.noun
    glosses = read_glosses(path)                          # 82,115 of them
    train, test = split_glosses(glosses, 2000)

A line of data.noun is a set of synonyms: `00001740 03 n 01 entity 0 003 ~ ... | that which is perceived ...`: place in
the file, number of the lexicographer's file (the class), part of speech, number of words (in hexadecimal), the words,
what it is related to, and behind the bar the gloss: the definition, then examples in quotes, which are cut. The words
themselves are not shown to the classifier. Not here: tokens, the encoder (`encoder.py`).
"""

import hashlib
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.debian import Debian, unpacked
from engine.files import appearing, require_file

FOLDER = Path("data/wordnet")  # below the repository's root
PACKAGE = Debian("wordnet-base", "usr/share/wordnet", 7)
FILE, BYTES = "data.noun", 15_300_280
SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
# The files of the lexicographers 03 to 28, as WordNet's manual page lexnames(5) lists them.
CLASSES = (
    *("tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state", "substance", "time"),
)
FIRST = 3
REMEDY = "delete it, and it is fetched again"


class Gloss(NamedTuple):
    """A definition and its class, an index of CLASSES."""

    text: str
    label: int


def bring_wordnet(folder: Path = FOLDER, deb: Path | None = None) -> Path:
    """The path of data.noun, fetched where it is not there. Errors as `engine.data.debian.unpacked`, and ValueError for
    another file than the results were measured with.
    """
    path = folder / FILE
    if not path.exists():
        with unpacked(PACKAGE, deb) as source:
            require_file(source / FILE, f"it is no part of this {PACKAGE.package}")
            with appearing(path) as temporary:
                shutil.copyfile(source / FILE, temporary)
    size = require_file(path, REMEDY).st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if size == BYTES else "-"
    if digest != SHA256:
        raise ValueError(
            f"{path}: has {size} bytes and sha256 {digest}, not {BYTES} and {SHA256}: it is not the data.noun of "
            f"WordNet 3.0 that the results were measured with; {REMEDY}"
        )
    return path


def read_glosses(path: Path) -> list[Gloss]:
    """All nouns of a data.noun in its order. ValueError, naming file and line, for a line that is none of its form."""
    require_file(path, REMEDY)
    glosses = []
    with open(path, encoding="utf-8", errors="strict") as lines:
        for number, line in enumerate(lines, start=1):
            if line.startswith("  "):  # the license
                continue
            head, bar, gloss = line.partition(" | ")
            fields = head.split(" ")
            text = definition_of(gloss)
            if not bar or len(fields) < 6 or fields[2] != "n" or not re.fullmatch(r"\d\d", fields[1]) or not text:
                raise ValueError(f"{path}: line {number} is no noun of WordNet: {line[:60]!r}; {REMEDY}")
            label = int(fields[1]) - FIRST
            if not 0 <= label < len(CLASSES):
                raise ValueError(f"{path}: line {number} is in the lexicographers' file {fields[1]}, not 03 to 28")
            glosses.append(Gloss(text, label))
    if not glosses:
        raise ValueError(f"{path}: holds no nouns; {REMEDY}")
    return glosses


def definition_of(gloss: str) -> str:
    """A gloss without its examples: `a separate entity; "a thing of beauty"` -> `a separate entity`."""
    return gloss.partition('; "')[0].strip().strip(";").strip()


def split_glosses(glosses: list[Gloss], num_test: int, seed: int = 0) -> tuple[list[Gloss], list[Gloss]]:
    """Training and test glosses, drawn at random. Definitions that stand there twice are kept once, so that none is in
    both; ValueError where too few are left.
    """
    unique = list({gloss.text: gloss for gloss in glosses}.values())
    if not 0 < num_test < len(unique):
        raise ValueError(f"{num_test} test glosses of {len(unique)}")
    order = np.random.default_rng(seed).permutation(len(unique))
    chosen = [unique[k] for k in order]
    return chosen[num_test:], chosen[:num_test]
