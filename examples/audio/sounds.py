"""Drum sounds of fourteen kits that people recorded: one stroke each, and which of six kinds of instrument it is.

    folder = bring_drumkits()                              # Debian's hydrogen-drumkits, 143 MB, to data/drumkits
    sounds = read_drumkits(folder)                         # kit, file, class
    waves = [decode(folder / sound.kit / sound.file, 20480) for sound in sounds]

The class comes from the name that a kit gives to an instrument; names that say none of the six (a stick, a whistle, a
number) are left out. A file that two instruments share counts once. The kits of two makers, whose sounds occur in no
other kit, are for testing only: what is learned must hold for other drums, rooms and microphones. The kits are under
the GPL and CC licenses, as the package's file `copyright` says. Not here: the spectrogram (`whisper.py`).
"""

import hashlib
import re
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from engine.data.debian import Debian, unpacked
from engine.files import read_text, require_file

FOLDER = Path("data/drumkits")  # below the repository's root
PACKAGE = Debian("hydrogen-drumkits", "usr/share/hydrogen/data/drumkits", 143)
SHA256 = "d5d07dbe8593e8f07b8210e0798ba6ce69e7607fe5a59b3d18833a4c45e987b6"  # of all that is read
RATE = 16_000
# The first that is found in an instrument's name, in small letters.
PATTERNS = (
    ("percussion", r"clap|snap|cowbell|agogo|tambourine|maraca|clave|woodblock|conga|bongo|djembe|cajon"),
    ("percussion", r"sangban|dununba|kenkeni"),
    ("hi-hat", r"\bhat|hi-?hat|\bhi hat|\bhh\b|\bohh\b"),
    ("tom", r"\btom"),
    ("snare", r"snare"),
    ("kick", r"kick|bass ?drum"),
    ("cymbal", r"crash|ride|cymbal|china|splash|paiste bell"),
)
CLASSES = ("kick", "snare", "tom", "hi-hat", "cymbal", "percussion")
TEST_KITS = ("ElectricEmpireKit", "ForzeeStereo", "HardElectro1", "VariBreaks")
MAX_XML = 1 << 22
QUIET = 0.02  # of the loudest sample: a stroke begins where it is passed
LEAD = 160  # samples before that
REMEDY = "delete its folder, and it is fetched again"


class Sound(NamedTuple):
    """A file of a kit, and its class, an index of CLASSES."""

    kit: str
    file: str
    label: int


def bring_drumkits(folder: Path = FOLDER, deb: Path | None = None) -> Path:
    """The folder of the kits, fetched where it is not there. Errors as `engine.data.debian.unpacked`, and ValueError
    for other kits than the results were measured with.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        with unpacked(PACKAGE, deb) as source:
            shutil.copytree(source, temporary)
        temporary.rename(folder)
    if (digest := fingerprint(folder, read_drumkits(folder))) != SHA256:
        raise ValueError(
            f"{folder}: its sounds have the fingerprint {digest}, not {SHA256}: they are not those that the results "
            f"were measured with; {REMEDY}"
        )
    return folder


def read_drumkits(folder: Path) -> list[Sound]:
    """The sounds of all kits in a folder, in the order of their names. ValueError naming the file that cannot be read.

    A sound that a kit lists and that is not there (the package lacks one) is left out, with a warning that names it.
    """
    found: dict[tuple[str, str], Sound] = {}
    for path in sorted(folder.glob("*/drumkit.xml")):
        for name, file in instruments_of(path):
            label = class_of(name)
            if label is not None and (path.parent.name, file) not in found:
                if not (path.parent / file).is_file():
                    warnings.warn(f"{path.parent / file}: is listed by its kit and not there; left out", stacklevel=2)
                    continue
                found[path.parent.name, file] = Sound(path.parent.name, file, label)
    if not found:
        raise ValueError(f"{folder}: holds no drum kit; {REMEDY}")
    return [found[key] for key in sorted(found)]


def instruments_of(path: Path) -> list[tuple[str, str]]:
    """(name of the instrument, name of a sound's file) of a drumkit.xml, one for each of its layers.

    ValueError, naming the file: no XML, a document type (entities could grow without bound), a file outside the kit.
    """
    if require_file(path, REMEDY).st_size > MAX_XML:
        raise ValueError(f"{path}: is larger than {MAX_XML} bytes; {REMEDY}")
    text = read_text(path, REMEDY)
    if "<!DOCTYPE" in text.upper() or "<!ENTITY" in text.upper():
        raise ValueError(f"{path}: has a document type or entities, which no drum kit has; it is not read")
    try:
        tree = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as XML ({error}); {REMEDY}") from error
    pairs = []
    for instrument in tree.iter():
        if _tag(instrument) == "instrument":
            name = next((part.text or "" for part in instrument if _tag(part) == "name"), "")
            files = [part.text or "" for part in instrument.iter() if _tag(part) == "filename"]
            if outside := [file for file in files if "/" in file or file in ("", ".", "..")]:
                raise ValueError(f"{path}: {outside[0]!r} is no file of this kit; {REMEDY}")
            pairs += [(name, file) for file in files]
    return pairs


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]  # some kits write a namespace before it


def class_of(name: str) -> int | None:
    """The class of an instrument by its name; None for what is none of them."""
    named = next((kind for kind, pattern in PATTERNS if re.search(pattern, name.lower())), None)
    return None if named is None else CLASSES.index(named)


def fingerprint(folder: Path, sounds: list[Sound]) -> str:
    """sha256 over the names, classes and contents of the sounds."""
    digest = hashlib.sha256()
    for sound in sounds:
        content = hashlib.sha256((folder / sound.kit / sound.file).read_bytes()).hexdigest()
        digest.update(f"{sound.kit}/{sound.file} {sound.label} {content}\n".encode())
    return digest.hexdigest()


def decode(path: Path, num_samples: int) -> np.ndarray:
    """(num_samples,) float32 in [-1, 1] at 16 kHz: one channel, from the stroke on, as loud as can be, zeros behind it.

    ValueError naming the file for one that holds no sound, only zeros, or is damaged.
    """
    wave = read_mono(path)
    loudest = float(np.abs(wave).max())
    if not 0 < loudest < np.inf:
        raise ValueError(f"{path}: is silent or not finite; {REMEDY}")
    begin = max(0, int(np.argmax(np.abs(wave) >= QUIET * loudest)) - LEAD)
    wave = wave[begin : begin + num_samples] / loudest
    return np.pad(wave, (0, num_samples - len(wave))).astype(np.float32)


def read_mono(path: Path) -> np.ndarray:
    """(T,) float32 at 16 kHz, channels mixed into one, of whatever FFmpeg reads: wav, flac, aiff, ogg."""
    import av

    require_file(path, REMEDY)
    parts = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise ValueError(f"{path}: holds no sound; {REMEDY}")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
            for frame in container.decode(audio=0):
                parts += [made.to_ndarray().reshape(-1) for made in resampler.resample(frame)]
            parts += [made.to_ndarray().reshape(-1) for made in resampler.resample(None)]
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be decoded ({error}); {REMEDY}") from error
    if not parts or not sum(map(len, parts)):
        raise ValueError(f"{path}: holds no sound; {REMEDY}")
    return np.concatenate(parts)


def split_kits(sounds: list[Sound], test: tuple[str, ...] = TEST_KITS) -> tuple[list[Sound], list[Sound]]:
    """Sounds for training, and those of the test kits. ValueError for a class that one of them lacks."""
    parts = [s for s in sounds if s.kit not in test], [s for s in sounds if s.kit in test]
    for title, part in zip(("training", "test"), parts, strict=True):
        if lacking := [name for k, name in enumerate(CLASSES) if not any(sound.label == k for sound in part)]:
            raise ValueError(f"the {title} kits have no {', '.join(lacking)}")
    return parts
