"""Masks of objects in the three files that the data sets keep them in, each as boolean (H, W) by the object's id.

    read_h5(folder / "00029.h5")        # A2D: {"0": mask, "1": mask}, every instance of one frame
    read_mat(folder / "puppet_mask.mat")  # JHMDB: (T, H, W), the one actor in the first T frames
    read_palette(folder / "00005.png")  # Ref-YouTube-VOS: {"1": mask, ...}, every object that is seen

Not here: which frames a sample has (annotations.py), resizing (data.py).
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from engine.data.busy import alive
from engine.data.video import BrokenVideo
from engine.files import irregular

if TYPE_CHECKING:
    import h5py

REMEDY = "download or convert the file again, or leave it out with --data.on-broken skip"
MAX_VALUES = 1 << 28  # of a file; the largest have some million
MAX_PIXELS = 1 << 26
WHITE = 255
# What h5py, scipy and Pillow raise for files that are damaged.
_DAMAGE = (
    *(OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, SyntaxError, EOFError),
    *(OverflowError, MemoryError, NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError),
)


def read_h5(path: Path) -> dict[str, np.ndarray]:
    """Instance -> mask of a frame of A2D-Sentences, bool (H, W), in the order of the file.

    The file has `instance` (n,) and `reMask` (n, W, H), transposed, without the first axis where n is 1. Of an instance
    that stands there twice the first mask counts, as in MTTR. Raises FileNotFoundError or BrokenVideo.
    """
    with _opened(path) as file:
        ids = _ids(path, file)
        stored = _table(path, file, "reMask")
        if stored.ndim == 2 and len(ids) == 1:
            stored = stored[None]
        if stored.ndim != 3 or len(stored) < len(ids) or 0 in stored.shape[1:]:
            raise BrokenVideo(
                path, f"has masks {stored.shape} of {len(ids)} instances, want (n, width, height)", REMEDY
            )
        masks: dict[str, np.ndarray] = {}
        for name, mask in zip(ids, stored, strict=False):  # there are files with more masks than instances
            masks.setdefault(name, mask.T > 0)
    return masks


def read_h5_ids(path: Path) -> list[str]:
    """The instances of a frame, each once; no mask is read. Raises as `read_h5`."""
    with _opened(path) as file:
        return list(dict.fromkeys(_ids(path, file)))


def read_mat(path: Path) -> np.ndarray:
    """JHMDB's puppet_mask.mat: bool (T, H, W) of `part_mask` (H, W, T); T may be below the number of frames.

    Raises FileNotFoundError or BrokenVideo.
    """
    from scipy.io import loadmat

    _be_file(path)
    try:
        stored = np.asarray(loadmat(path, variable_names=["part_mask"])["part_mask"])
    except Exception as error:  # scipy's own types have nothing in common
        raise BrokenVideo(path, f"cannot be read as puppet masks ({_text(error)})", REMEDY) from error
    if stored.ndim == 2:  # MATLAB drops a last axis of one
        stored = stored[:, :, None]
    if stored.ndim != 3 or stored.dtype.kind not in "biuf" or 0 in stored.shape:
        raise BrokenVideo(path, f"has part_mask {stored.dtype} {stored.shape}, want (height, width, frames)", REMEDY)
    if not np.isfinite(stored).all():
        raise BrokenVideo(path, "has part_mask with values that are not finite", REMEDY)
    return np.moveaxis(stored > 0, -1, 0)


def read_palette(path: Path) -> dict[str, np.ndarray]:
    """Object -> mask of a PNG whose values are ids, 0 the background; the colors of its palette mean nothing.

    A gray PNG of 8 bits is taken likewise. Raises FileNotFoundError, or BrokenVideo, also for colors and white, no ids.
    """
    index = read_index(path)
    return {str(value): index == value for value in np.unique(index).tolist() if value}


def read_index(path: Path) -> np.ndarray:
    """The ids of such a PNG, uint8 (H, W). Raises as `read_palette`."""
    with _picture(path, ("PNG",)) as picture:
        if picture.mode not in ("P", "L", "1"):
            problem = f"is a picture of mode {picture.mode}; want a palette whose values are the objects' ids"
            raise BrokenVideo(path, problem, "download it again: it was converted to colors")
        index = np.array(picture).astype(np.uint8)
        if picture.mode == "L" and (index == WHITE).any():
            problem = f"is a gray picture with {WHITE}, which is no object's id: it was converted to black and white"
            raise BrokenVideo(path, problem, "download it again")
        return index


def read_pixels(path: Path) -> np.ndarray:
    """A frame that is a picture file, uint8 RGB (H, W, 3). Raises FileNotFoundError or BrokenVideo."""
    with _picture(path, ("JPEG", "PNG")) as picture:
        return np.array(picture.convert("RGB"))


def _be_file(path: Path) -> None:
    """What is no regular file is not waited for."""
    alive(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file; {REMEDY}") from None
    if problem := irregular(status.st_mode):
        raise BrokenVideo(path, problem, REMEDY)


@contextmanager
def _picture(path: Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    _be_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's name no file
            with Image.open(path, formats=formats) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise BrokenVideo(path, f"has {picture.width} x {picture.height} pixels, too many", REMEDY)
                yield picture
    except BrokenVideo:
        raise
    except _DAMAGE as error:
        raise BrokenVideo(path, f"cannot be read as a picture ({_text(error)})", REMEDY) from error


@contextmanager
def _opened(path: Path) -> Iterator["h5py.File"]:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("A2D's masks need h5py; install it with: pip install 'dr2net[engine]'") from error
    _be_file(path)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except BrokenVideo:
        raise
    except _DAMAGE as error:
        raise BrokenVideo(path, f"cannot be read as masks of a frame ({_text(error)})", REMEDY) from error


def _table(path: Path, file: "h5py.File", name: str) -> np.ndarray:
    import h5py

    link = file.get(name, getlink=True)
    found = file.get(name) if isinstance(link, h5py.HardLink) else None  # others may lead to another file
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "biuf" or found.shape is None:
        raise BrokenVideo(path, f"has no table {name!r} of numbers", REMEDY)
    if found.size > MAX_VALUES or found.external or found.is_virtual:
        raise BrokenVideo(path, f"has {name!r} of {found.shape} values, or elsewhere; not as published", REMEDY)
    values = np.asarray(found[()])
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise BrokenVideo(path, f"has {name!r} with values that are not finite", REMEDY)
    return values


def _ids(path: Path, file: "h5py.File") -> list[str]:
    """As text: they are stored as floats in some files."""
    values = _table(path, file, "instance").reshape(-1)
    if (values != np.floor(values)).any():
        raise BrokenVideo(path, "has instances that are no whole numbers", REMEDY)
    return [str(int(value)) for value in values]


def _text(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__
