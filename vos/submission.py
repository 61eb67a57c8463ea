"""Masks of Ref-YouTube-VOS as its server took them, `Annotations/<video>/<expression>/<frame>.png`, and their J&F.

    write_submission(Path("submission.zip"), {("0062f687f1", "0"): masks, ...}, {("0062f687f1", "0"): frames, ...})
    with MaskFiles(Path("submission.zip")) as found, MaskFiles(Path("truth")) as truth:
        score_masks(found.read, truth.read, truth.expressions)      # {"J&F": ..., "J": ..., "F": ...} in percent

The server is gone, so the scorer is here: J and F of each frame, their mean over the frames of an expression, then over
expressions; J&F is the mean of both. A zip is checked before anything is written: the server answered NaN to a folder
of another name, a missing expression or a missing frame. Not here: J and F of a frame (`metric.py`), which annotations
there are (`annotations.py`).
"""

import io
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from engine.data.workers import first_of, tracked
from engine.files import appearing, irregular
from vos.metric import Runs, boundary_accuracy, decode_mask, region_similarity

Key = tuple[str, str]  # video, expression
Expressions = Mapping[Key, Sequence[str]]  # the names of an expression's frames, without suffix, in their order
FOLDER = "Annotations"
MAX_BYTES = 1 << 26  # of a mask's file
MAX_PIXELS = 1 << 27
DATE = (1980, 1, 1, 0, 0, 0)  # of every file in a zip: the same masks give the same bytes
REMEDY = f"want {FOLDER}/<video>/<expression>/<frame>.png"


class BrokenMask(ValueError):
    """A mask's file that cannot be used; the message names it and says what is wrong."""


def write_submission(path: Path, found: Mapping[Key, Sequence[Runs]], wanted: Expressions) -> Path:
    """The zip, with a PNG of 0 and 255 for each frame; it appears when it is complete. Raises as `check_found`."""
    check_found(found, wanted)
    with (
        appearing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,  # a PNG is compressed already
    ):
        for key in tracked(f"writing {path.name}", sorted(wanted)):
            for frame, runs in zip(wanted[key], found[key], strict=True):
                entry = zipfile.ZipInfo("/".join((FOLDER, *key, f"{frame}.png")), DATE)
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                archive.writestr(entry, as_png(decode_mask(runs)))
    return path


def check_found(found: Mapping[Key, Sequence[Runs]], wanted: Expressions) -> None:
    """ValueError naming what is missing, too much, of unequal size, or would leave its folder."""
    if not wanted:
        raise ValueError("there are no expressions to write; is it the right split?")
    for key in wanted:
        for name in (*key, *wanted[key]):
            if name in ("", ".", "..") or "/" in name or "\\" in name:
                raise ValueError(f"{_named(key)}: {name!r} cannot be the name of a file; mend the annotations")
    for what, keys in (
        ("expressions are missing", wanted.keys() - found.keys()),
        ("expressions are not in the list", found.keys() - wanted.keys()),
    ):
        if keys:
            raise ValueError(f"{len(keys)} {what}, of {len(wanted)}: {first_of(map(_named, sorted(keys)))}")
    sizes: dict[str, tuple[int, ...]] = {}
    for key, masks in found.items():
        if len(masks) != len(wanted[key]):
            raise ValueError(f"{_named(key)}: has {len(masks)} masks, its video lists {len(wanted[key])} frames")
        for runs in masks:
            own = tuple(runs["size"])
            if own != sizes.setdefault(key[0], own):
                raise ValueError(f"{_named(key)}: masks of {own} and {sizes[key[0]]} in one video; want its own size")


def as_png(mask: np.ndarray) -> bytes:
    """A mask (H, W) as a gray PNG of 0 and 255."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class MaskFiles:
    """The masks in a zip or folder of the server's form. Raises FileNotFoundError or ValueError for anything else."""

    def __init__(self, path: Path) -> None:
        self.path, self.archive = path, None
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; {REMEDY}")
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*.png"))]
        elif problem := irregular(path.stat().st_mode):
            raise ValueError(f"{path}: {problem}; give a zip or a folder")
        else:
            try:
                self.archive = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
                raise ValueError(f"{path}: is neither a folder nor a zip ({error}); {REMEDY}") from None
            names = sorted(name for name in self.archive.namelist() if name.endswith(".png"))
            if twice := [name for name, next_one in pairwise(names) if name == next_one]:
                self.close()
                raise ValueError(f"{path}: {first_of(twice)}: is in it twice; which one is meant? Write the zip again")
        expressions: dict[Key, list[str]] = {}
        others = []
        for name in names:
            parts = name.split("/")
            if len(parts) == 4 and parts[0] == FOLDER and not {"", ".", ".."} & {*parts}:
                expressions.setdefault((parts[1], parts[2]), []).append(parts[3].removesuffix(".png"))
            else:
                others.append(name)
        if not expressions:
            self.close()
            have = f"it has {first_of(others)}" if others else "it has none"
            raise ValueError(f"{path}: no masks below {FOLDER}; {have}; {REMEDY}")
        if others:
            warnings.warn(f"{path}: {len(others)} pictures are not used: {first_of(others)}; {REMEDY}", stacklevel=2)
        self.expressions: Expressions = expressions

    def read(self, key: Key, frame: str) -> np.ndarray:
        """A mask (H, W), boolean. FileNotFoundError, or BrokenMask for what is no gray or palette picture."""
        name = "/".join((FOLDER, *key, f"{frame}.png"))
        where = f"{self.path}: {name}"
        try:
            with self._open(name) as file:
                content = file.read(MAX_BYTES + 1)
        except (KeyError, FileNotFoundError):
            raise FileNotFoundError(f"{where}: is missing; every frame of every expression needs a mask") from None
        except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BrokenMask(f"{where}: cannot be read ({error})") from None
        if len(content) > MAX_BYTES:
            raise BrokenMask(f"{where}: is larger than {MAX_BYTES >> 20} MiB, too large for a mask")
        return read_indices(content, where) > 0

    def _open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb") if self.archive is None else self.archive.open(name)

    def close(self) -> None:
        """No reading after it."""
        if self.archive is not None:
            self.archive.close()

    def __enter__(self) -> "MaskFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_indices(content: bytes, where: str) -> np.ndarray:
    """The values (H, W) of a gray picture, or the indices of one with a palette, never its colors; BrokenMask."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.mode not in ("1", "L", "P", "I;16"):
                raise BrokenMask(f"{where}: is in {image.mode}; a mask is gray or has a palette")
            if image.width * image.height > MAX_PIXELS:
                raise BrokenMask(f"{where}: has {image.width} x {image.height} pixels, too many for a mask")
            return np.asarray(image)
    except BrokenMask:
        raise
    except UnidentifiedImageError:  # whose message is about an object in memory
        raise BrokenMask(f"{where}: is no picture, it does not begin as a PNG does") from None
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise BrokenMask(f"{where}: is no picture ({error})") from None


Reader = Callable[[Key, str], np.ndarray]


def score_masks(found: Reader, truth: Reader, wanted: Expressions) -> dict[str, float]:
    """J&F, J and F in percent; both readers give the mask (H, W) of an expression in a frame.

    Raises ValueError naming the frame for a mask of another size, and whatever the readers raise.
    """
    if not wanted:
        raise ValueError("there are no expressions to score; is it the right split?")
    regions, accuracies = zip(
        *(_of_expression(found, truth, key, wanted[key]) for key in tracked("scoring", sorted(wanted))), strict=True
    )
    region, accuracy = 100 * float(np.mean(regions)), 100 * float(np.mean(accuracies))
    return {"J&F": (region + accuracy) / 2, "J": region, "F": accuracy}


def warn_of_more(found: Expressions, wanted: Expressions) -> None:
    """A warning that names expressions which nobody asked for: they may be of another split."""
    if more := sorted(found.keys() - wanted.keys()):
        some = first_of([_named(key) for key in more])
        warnings.warn(
            f"{len(more)} expressions of the predictions have no truth and are not scored: {some}", stacklevel=2
        )


def _of_expression(found: Reader, truth: Reader, key: Key, frames: Sequence[str]) -> tuple[float, float]:
    """Mean J and F over the frames."""
    pairs: Iterator[tuple[str, np.ndarray, np.ndarray]] = ((f, found(key, f), truth(key, f)) for f in frames)
    regions, accuracies = [], []
    for frame, ours, theirs in pairs:
        try:
            regions.append(region_similarity(ours, theirs))
            accuracies.append(boundary_accuracy(ours, theirs))
        except ValueError as error:
            raise ValueError(f"{_named(key)}, frame {frame}: {error}") from None
    if not regions:
        raise ValueError(f"{_named(key)}: lists no frames")
    return float(np.mean(regions)), float(np.mean(accuracies))


def _named(key: Key) -> str:
    return f"video {key[0]}, expression {key[1]}"
