"""Picture files of every mode, turned as their boxes need it, and those that cannot be used."""

import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection.images import MAX_PIXELS, SUFFIXES, BrokenImage, is_turned_unseen, read_image, shown_size

COLORS = np.array([[[250, 10, 20], [20, 240, 30]], [[30, 20, 230], [120, 130, 140]]], np.uint8)


def card(height: int = 40, width: int = 60) -> np.ndarray:
    """Four fields of one color each, uint8 (height, width, 3)."""
    return COLORS.repeat(height // 2, 0).repeat(width // 2, 1)


def fields(image: torch.Tensor) -> list[list[int]]:
    """The colors in the middle of the four fields."""
    h, w = image.shape[1:]
    return [image[:, y * h // 4, x * w // 4].tolist() for y in (1, 3) for x in (1, 3)]


def close(image: torch.Tensor, wanted: np.ndarray, tolerance: int) -> bool:
    return torch.equal(torch.tensor(fields(image)), torch.from_numpy(wanted.reshape(4, 3).astype(np.int64))) or (
        (torch.tensor(fields(image)) - torch.from_numpy(wanted.reshape(4, 3).astype(np.int64))).abs().max() <= tolerance
    )


@pytest.mark.parametrize("suffix", sorted(set(SUFFIXES) - {".pgm", ".mpo", ".gif"}))
def test_every_format_gives_the_same_pixels(tmp_path, suffix):
    path = tmp_path / f"card{suffix}"
    Image.fromarray(card()).save(path, **({"quality": 98} if suffix in (".jpg", ".jpeg", ".webp") else {}))
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 40, 60)
    assert close(image, COLORS, 0 if suffix in (".png", ".bmp", ".tif", ".tiff", ".ppm") else 12)


def test_the_files_of_telephones_with_two_pictures_give_the_first(tmp_path):
    path = tmp_path / "two.mpo"
    Image.fromarray(card()).save(
        path, format="MPO", save_all=True, append_images=[Image.new("RGB", (60, 40))], quality=98
    )
    assert close(read_image(path), COLORS, 12) and read_image(path, least=10).shape[1] <= 40


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    name = {"CMYK": "c.jpg", "YCbCr": "c.jpg"}.get(mode, "c.png")
    grey = np.array(Image.fromarray(card()).convert("L"))
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / name)
    else:
        palette = Image.Palette.ADAPTIVE  # the standard one has other colors
        Image.fromarray(card()).convert(mode, palette=palette).save(
            tmp_path / name, **({"quality": 98} if name == "c.jpg" else {})
        )
    image = read_image(tmp_path / name)
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
    if mode in ("L", "LA", "I;16"):
        assert (image == torch.from_numpy(grey)).all()
    elif mode == "1":
        assert set(image.unique().tolist()) <= {0, 255}
    else:
        assert close(image, COLORS, 30)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    image = read_image(tmp_path / "ramp.png")
    assert (image[0].flatten() == torch.arange(256)).all()
    Image.fromarray(values.astype(np.int32) * 70000).save(tmp_path / "deep.tif")
    with pytest.raises(BrokenImage, match=r"deep.tif: has grey values of 32 bits; convert it to 8 or 16 bits"):
        read_image(tmp_path / "deep.tif")
    Image.fromarray((values // 257).astype(np.int32)).save(tmp_path / "dark.tif")  # 8 bits in 32: black as 16 of them
    with pytest.raises(BrokenImage, match=r"dark.tif: has grey values of 32 bits"):
        read_image(tmp_path / "dark.tif")
    Image.fromarray(values).save(tmp_path / "ramp.pgm")
    assert (read_image(tmp_path / "ramp.pgm") == image).all()
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BrokenImage, match=r"float.tif: has pixels in floating point"):
        read_image(tmp_path / "float.tif")


def test_a_transparent_palette_is_read_without_a_warning(tmp_path, recwarn):
    Image.fromarray(card()).convert("P", palette=Image.Palette.ADAPTIVE).save(
        tmp_path / "clear.png", transparency=bytes([0, 128, 255])
    )
    assert read_image(tmp_path / "clear.png").shape == (3, 40, 60)
    assert not recwarn.list


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_where_its_boxes_are_and_nowhere_else(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(card()).save(path, exif=exif)
    sideways = orientation >= 5
    shown = (60, 40) if sideways else (40, 60)
    assert shown_size(path) == shown
    # what a viewer shows: numpy's words for the eight orientations
    moves = [
        *(lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud),
        *(lambda a: a.transpose(1, 0, 2), lambda a: np.rot90(a, 3)),
        *(lambda a: np.rot90(a, 2).transpose(1, 0, 2), np.rot90),
    ]
    wanted = moves[orientation - 1](COLORS)
    assert close(read_image(path), wanted, 0)
    assert close(read_image(path, size=shown), wanted, 0)
    assert close(read_image(path, size=(40, 60), as_stored=True), COLORS, 0)
    assert is_turned_unseen(path) == (orientation in (2, 3, 4))
    if sideways:
        assert close(read_image(path, size=(60, 40), as_stored=True), wanted, 0)
        with pytest.raises(BrokenImage, match="60 x 40 pixels"):
            read_image(path, size=(40, 60))
    with pytest.raises(BrokenImage, match=r"turned.png: has 60 x 40 pixels .* its boxes were drawn in 61 x 40"):
        read_image(path, size=(40, 61), as_stored=True)


def test_a_wrong_exif_tag_is_none(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 77
    Image.fromarray(card()).save(tmp_path / "odd.jpg", exif=exif, quality=98)
    assert close(read_image(tmp_path / "odd.jpg"), COLORS, 12)


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("404 not found")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, problem in {
        "text.jpg": "is no picture",
        "empty.jpg": "is no picture",
        "folder.jpg": "is a folder, a pipe",
        "pipe.jpg": "is a folder, a pipe",
    }.items():
        with pytest.raises(BrokenImage, match=f"{name}: {problem}") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value) and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none.jpg: no such picture; .*--data.on-broken skip"):
        read_image(tmp_path / "none.jpg")


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.tif", "cut.webp", "cut.bmp", "cut.gif"])
def test_a_file_cut_anywhere_is_an_error_that_names_it_or_whole(tmp_path, name):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for share in (0.01, 0.05, 0.2, 0.5, 0.9):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BrokenImage, match=name):
            read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "gif", "jp2"])
def test_flipped_bytes_never_raise_anything_else(tmp_path, suffix, recwarn):
    path, rng = tmp_path / f"bits.{suffix}", np.random.default_rng(1)
    Image.fromarray(card()).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        data = whole.copy()
        data[rng.integers(0, min(len(data), 400), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(data.tobytes())
        try:
            assert read_image(path).dtype == torch.uint8
        except BrokenImage as error:
            assert str(path) in str(error) and "\n" not in str(error)
    assert not recwarn.list


def png_that_claims(path: Path, width: int, height: int) -> None:
    """A PNG of a few bytes with this size in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def test_a_bomb_is_refused_from_its_header(tmp_path, recwarn):
    for width, height in ((100_000, 100_000), (14_000, 13_000)):
        assert width * height > MAX_PIXELS
        png_that_claims(tmp_path / "bomb.png", width, height)
        with pytest.raises(BrokenImage, match=r"bomb.png: "):
            read_image(tmp_path / "bomb.png")
        with pytest.raises(BrokenImage, match=r"bomb.png: "):
            shown_size(tmp_path / "bomb.png")
    assert not recwarn.list


def test_a_picture_of_ten_thousand_pixels_is_read_and_a_jpeg_at_a_part_of_its_size(tmp_path, recwarn):
    Image.new("L", (10_000, 10_000), 77).save(tmp_path / "large.jpg")
    assert shown_size(tmp_path / "large.jpg") == (10_000, 10_000)
    image = read_image(tmp_path / "large.jpg", size=(10_000, 10_000), as_stored=True, least=800)
    assert image.shape == (3, 1250, 1250) and (image == 77).all()
    assert not recwarn.list


def test_a_part_of_the_size_is_never_below_what_is_asked(tmp_path):
    for width, height in ((1601, 1203), (900, 2000), (640, 480)):
        Image.new("RGB", (width, height)).save(tmp_path / "some.jpg")
        for least in (100, 300, 599, 601, 2000):
            shape = read_image(tmp_path / "some.jpg", least=least).shape[1:]
            assert min(shape) >= min(least, width, height)
            assert shape[1] / shape[0] == pytest.approx(width / height, rel=0.01)
