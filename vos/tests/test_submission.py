"""Zips of masks in the form of Ref-YouTube-VOS's server: written, refused, read and scored."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vos.metric import encode_masks
from vos.submission import (
    BrokenMask,
    Key,
    MaskFiles,
    as_png,
    check_found,
    read_indices,
    score_masks,
    warn_of_more,
    write_submission,
)

SIZE = (40, 60)  # not square: a transposed mask would show
FRAMES = {
    ("ab12", "0"): ("00000", "00005", "00010"),
    ("ab12", "1"): ("00000", "00005", "00010"),
    ("cd34", "0"): ("00000",),
}


def masks_of(key: Key) -> np.ndarray:
    """(T, H, W) of an expression, another one for each."""
    masks = np.zeros((len(FRAMES[key]), *SIZE), bool)
    for k, mask in enumerate(masks):
        mask[5 : 15 + k, 10 + 3 * int(key[1]) : 40] = True
    return masks


def found() -> dict:
    return {key: encode_masks(masks_of(key)) for key in FRAMES}


def write_folder(root: Path, masks: dict[Key, np.ndarray]) -> Path:
    for key, own in masks.items():
        for frame, mask in zip(FRAMES[key], own, strict=True):
            path = root.joinpath("Annotations", *key, f"{frame}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(as_png(mask))
    return root


def test_a_written_zip_has_every_frame_in_black_and_white_and_scores_a_hundred(tmp_path):
    path = write_submission(tmp_path / "submission.zip", found(), FRAMES)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [
            f"Annotations/{v}/{e}/{f}.png" for (v, e), frames in FRAMES.items() for f in frames
        ]
        pixels = np.asarray(Image.open(archive.open("Annotations/ab12/1/00005.png")))
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, 255 * masks_of(("ab12", "1"))[1])
    truth = write_folder(tmp_path / "truth", {key: masks_of(key) for key in FRAMES})
    with MaskFiles(path) as ours, MaskFiles(truth) as theirs:
        assert ours.expressions == theirs.expressions == {key: list(frames) for key, frames in FRAMES.items()}
        assert score_masks(ours.read, theirs.read, theirs.expressions) == {"J&F": 100, "J": 100, "F": 100}
    again = write_submission(tmp_path / "again.zip", found(), FRAMES)
    assert again.read_bytes() == path.read_bytes()


def test_frames_are_averaged_within_an_expression_first(tmp_path):
    """One of three frames wrong in one expression of three, all of one in another: (2/3 + 1 + 0) / 3."""
    masks = {key: masks_of(key) for key in FRAMES}
    masks["ab12", "0"][2] = masks["cd34", "0"][0] = False
    ours, theirs = (
        write_folder(tmp_path / "ours", masks),
        write_folder(tmp_path / "truth", {k: masks_of(k) for k in masks}),
    )
    with MaskFiles(ours) as one, MaskFiles(theirs) as other:
        scores = score_masks(one.read, other.read, other.expressions)
    assert scores == pytest.approx(dict.fromkeys(("J&F", "J", "F"), 100 * (2 / 3 + 1) / 3))


def test_what_the_server_would_answer_nan_to_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "submission.zip"
    less = {key: masks for key, masks in found().items() if key[0] != "cd34"}
    more = found() | {("zz", "3"): encode_masks(np.zeros((1, *SIZE), bool))}
    short = found() | {("ab12", "1"): found()["ab12", "1"][:2]}
    other = found() | {("ab12", "1"): encode_masks(np.zeros((3, 60, 40), bool))}
    for wrong, said in (
        (less, "1 expressions are missing, of 3: video cd34, expression 0"),
        (more, "1 expressions are not in the list, of 3: video zz, expression 3"),
        (short, "video ab12, expression 1: has 2 masks, its video lists 3 frames"),
        (other, r"video ab12, expression 1: masks of \(60, 40\) and \(40, 60\) in one video"),
    ):
        with pytest.raises(ValueError, match=said):
            write_submission(path, wrong, FRAMES)
    with pytest.raises(ValueError, match="no expressions to write"):
        check_found({}, {})
    hostile = {("../..", "0"): ("00000",)}
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        check_found({("../..", "0"): encode_masks(np.zeros((1, *SIZE), bool))}, hostile)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_name_is_told_with_what_it_has(tmp_path):
    with zipfile.ZipFile(tmp_path / "wrong.zip", "w") as archive:
        archive.writestr("valid/ab12/0/00000.png", as_png(np.ones(SIZE, bool)))
    with pytest.raises(
        ValueError, match=r"no masks below Annotations; it has valid/ab12/0/00000.png; want Annotations/<"
    ):
        MaskFiles(tmp_path / "wrong.zip")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(ValueError, match="text.zip: is neither a folder nor a zip"):
        MaskFiles(tmp_path / "text.zip")
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        MaskFiles(tmp_path / "absent")
    with pytest.raises(ValueError, match="it has none"):
        MaskFiles(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty")


def test_pictures_elsewhere_are_told_and_one_that_is_there_twice_is_refused(tmp_path):
    mask = as_png(np.ones(SIZE, bool))
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for name in (
            "Annotations/v/0/00000.png",
            "top.png",
            "back\\slash.png",
            "Annotations/../0/1.png",
            "../../x.png",
        ):
            archive.writestr(name, mask)
    with pytest.warns(UserWarning, match=r"more.zip: 4 pictures are not used: .*, top.png; want Annotations/<"):
        assert MaskFiles(tmp_path / "more.zip").expressions == {("v", "0"): ["00000"]}
    with zipfile.ZipFile(tmp_path / "top.zip", "w") as archive:
        archive.writestr("top.png", mask)
    with pytest.raises(ValueError, match=r"top.zip: no masks below Annotations; it has top.png; want"):
        MaskFiles(tmp_path / "top.zip")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("Annotations/v/0/00000.png", mask)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("Annotations/v/0/00000.png", mask)
    with pytest.raises(ValueError, match=r"twice.zip: Annotations/v/0/00000.png: is in it twice"):
        MaskFiles(tmp_path / "twice.zip")
    (tmp_path / "v" / "0").mkdir(parents=True)
    (tmp_path / "v" / "0" / "00000.png").write_bytes(mask)
    with pytest.raises(ValueError, match=r"no masks below Annotations; it has 0/00000.png; want"):
        MaskFiles(tmp_path / "v")


def test_expressions_of_another_split_are_told():
    with pytest.warns(UserWarning, match=r"1 expressions of the predictions have no truth .*: video b, expression 0"):
        warn_of_more({("a", "0"): ["1"], ("b", "0"): ["1"]}, {("a", "0"): ["1"], ("c", "0"): ["1"]})


def test_a_missing_frame_and_a_mask_of_another_size_name_the_frame(tmp_path):
    masks = {key: masks_of(key) for key in FRAMES}
    truth, ours = write_folder(tmp_path / "truth", masks), write_folder(tmp_path / "ours", masks)
    frame = ours / "Annotations" / "ab12" / "1" / "00005.png"
    with MaskFiles(ours) as one, MaskFiles(truth) as other:
        frame.write_bytes(as_png(masks["ab12", "1"][1].T))
        with pytest.raises(ValueError, match="video ab12, expression 1, frame 00005: a prediction of 60 x 40 pixels"):
            score_masks(one.read, other.read, other.expressions)
        frame.unlink()
        with pytest.raises(FileNotFoundError, match=r"Annotations/ab12/1/00005.png: is missing"):
            score_masks(one.read, other.read, other.expressions)


def test_masks_are_read_by_index_never_by_color(tmp_path):
    indices = np.arange(6, dtype=np.uint8).reshape(2, 3)
    picture = Image.fromarray(indices, "P")
    picture.putpalette([0, 0, 0] * 3 + [9, 9, 9] * 3)  # the first three look alike
    picture.save(tmp_path / "p.png")
    assert np.array_equal(read_indices((tmp_path / "p.png").read_bytes(), "p"), indices)
    Image.new("RGB", (3, 2)).save(tmp_path / "rgb.png")
    with pytest.raises(BrokenMask, match="rgb: is in RGB; a mask is gray or has a palette"):
        read_indices((tmp_path / "rgb.png").read_bytes(), "rgb")
    whole = as_png(np.ones((300, 300), bool))
    for broken in (b"", b"no picture", whole[: len(whole) // 2]):
        with pytest.raises(BrokenMask, match="file: is no picture") as caught:
            read_indices(broken, "file")
        assert "object at 0x" not in str(caught.value)
