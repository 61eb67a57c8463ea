"""Picture files as RGB pixels: what cameras, scanners and labelling tools write, and what is damaged.

    image = read_image("photo.jpg")                                # uint8 (3, H, W), as a viewer shows it
    image = read_image(path, size=(480, 640), as_stored=True)      # turned only if COCO's boxes of this size need it

Grey, CMYK, palette and alpha become RGB (alpha is ignored); 16 bits are scaled to 8, where Pillow would clip. Several
frames: the first. Not here: boxes, and what is done with the pixels (transforms.py).
"""

import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")  # none that starts a program
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2", ".mpo")
MAX_PIXELS = 180_000_000  # decoded half a GB; Pillow refuses from about there, too
REMEDY = "download or convert the file again, or leave it out with --data.on-broken skip"
ORIENTATION = 0x0112  # the tag of EXIF
SIDEWAYS = (5, 6, 7, 8)  # its values that swap height and width
# What Pillow's readers raise for files that are damaged.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, AttributeError),
    *(struct.error, zlib.error, Image.DecompressionBombError, NotImplementedError),
)


class BrokenImage(ValueError):
    """A picture that cannot be used; the message names the file, what is wrong, and the remedy."""

    def __init__(self, path: Path | str, problem: str, remedy: str = REMEDY):
        super().__init__(f"{path}: {problem}; {remedy}")
        self.parts = (str(path), problem, remedy)

    def __reduce__(self) -> tuple[type["BrokenImage"], tuple[str, ...]]:
        """So that it can cross from a worker process."""
        return BrokenImage, self.parts


def read_image(
    path: Path | str, *, size: tuple[int, int] | None = None, as_stored: bool = False, least: int | None = None
) -> Tensor:
    """The pixels of a file, uint8 RGB (3, H, W), turned as EXIF says.

    size: (height, width) that the boxes were drawn in; another than the file's is an error. as_stored: where `size` is
    that of the stored pixels, as in COCO, they are not turned, whatever EXIF says. least: a JPEG whose short side has
    twice this or more is decoded to a half, a quarter or an eighth, with a short side of at least `least`, at a part of
    the cost; other formats, and smaller files, are decoded whole.

    Raises FileNotFoundError, or BrokenImage for what is no picture, truncated, too large, in floating point, or of
    another size than `size`.
    """
    with _quiet(), _opened(path) as image:
        orientation, stored = _orientation(image), (image.height, image.width)
        shown = stored[::-1] if orientation in SIDEWAYS else stored
        turned = orientation != 1 and not (as_stored and size == stored)
        if size is not None and size != (shown if turned else stored):
            found, wanted = (f"{width} x {height}" for height, width in (stored, size))
            raise BrokenImage(
                path,
                f"has {found} pixels (width x height), its boxes were drawn in {wanted}",
                "annotate this file, or take it out of the annotations",
            )
        try:
            if least is not None and min(stored) >= 2 * least:
                share = least / min(stored)
                image.draft(None, (round(image.width * share), round(image.height * share)))
            pixels = _rgb(ImageOps.exif_transpose(image) if turned else image, path)
        except BrokenImage:
            raise
        except _DAMAGE as error:
            raise BrokenImage(path, f"is damaged ({_text(error)})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def shown_size(path: Path | str) -> tuple[int, int]:
    """(height, width) of a file as a viewer shows it, from its header. Raises as `read_image`."""
    with _quiet(), _opened(path) as image:
        size = (image.height, image.width)
        return size[::-1] if _orientation(image) in SIDEWAYS else size


def is_turned_unseen(path: Path | str) -> bool:
    """Whether EXIF turns or mirrors a file in a way that its size does not tell. Raises as `read_image`."""
    with _quiet(), _opened(path) as image:
        orientation = _orientation(image)
        return orientation != 1 and (orientation not in SIDEWAYS or image.width == image.height)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings, which name no file: of large pictures, for which MAX_PIXELS is the limit, and of odd
    metadata. What matters of a damaged file is an error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _opened(path: Path | str) -> Image.Image:
    """The file with its header read; what is no regular file is not waited for."""
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise BrokenImage(path, "is a folder, a pipe or a device, not a picture")
        Image.init()  # so that all of FORMATS are known; done once
        image = Image.open(path, formats=FORMATS)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path}: no such picture; put it there, or leave it out with --data.on-broken skip"
        ) from None
    except BrokenImage:
        raise
    except Image.UnidentifiedImageError:
        raise BrokenImage(path, f"is no picture in one of the formats {', '.join(FORMATS)}") from None
    except _DAMAGE as error:
        raise BrokenImage(path, f"cannot be opened ({_text(error)})") from error
    if image.width * image.height > MAX_PIXELS:
        sides = f"{image.width} x {image.height}"
        image.close()
        raise BrokenImage(path, f"has {sides} pixels, more than {MAX_PIXELS}", "cut it into tiles")
    return image


def _orientation(image: Image.Image) -> int:
    """The value of the tag, 1 where there is none or a wrong one."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except _DAMAGE:
        return 1  # the pixels may be whole all the same
    return value if value in range(1, 9) else 1


def _rgb(image: Image.Image, path: Path | str) -> np.ndarray:
    """uint8 (H, W, 3) of any mode."""
    if image.mode == "I" and image.format == "TIFF":  # of what range, nobody knows: 8 bits of 32 would be black
        raise BrokenImage(path, "has grey values of 32 bits", "convert it to 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # I;16, I;16B: a grey PNG or TIFF of 16 bits; I: 16 bits in older Pillows, and PGM
        values = np.array(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise BrokenImage(path, f"has grey values of up to {values.max()}", "convert it to 8 bits per channel")
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise BrokenImage(path, "has pixels in floating point", "convert it to 8 bits per channel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _text(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__
