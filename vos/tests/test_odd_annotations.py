"""Annotations and masks that other hands have made or changed: what would be lost or wrong in silence is named."""

import json
import shutil
import warnings

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from engine.data.video import BrokenVideo
from vos.annotations import read_annotations
from vos.masks import read_h5, read_mat, read_palette
from vos.tests.toy_referring import A, B, add_row, h5, quietly, texts, write_a2d, write_jhmdb, write_refytvos


@pytest.fixture
def a2d(tmp_path):
    return write_a2d(tmp_path / "a2d")


def change_valid(data, change):
    """The data set with another entry of its video `seen`."""
    file = data.root / "meta_expressions" / "valid" / "meta_expressions.json"
    content = json.loads(file.read_text())
    change(content["videos"]["seen"])
    file.write_text(json.dumps(content))
    return data


def test_a_run_that_reads_its_annotations_three_times_warns_once(a2d):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for split in ("train", "test", "test"):
            read_annotations(a2d, split)
    assert [str(one.message).partition(": ")[2] for one in told] == [
        "left out, as the instance is no number: one '1 (copy)'"
    ]


def test_a_quote_that_nobody_closed_takes_no_row_away_in_silence(a2d):
    file = texts(a2d) / "a2d_annotation.txt"
    file.write_text(file.read_text().replace("one,3,the bright cat", 'one,3,"the bright cat'))
    with pytest.raises(ValueError, match=r"a2d_annotation.txt: the quote that opens in line 3 goes on to line 8"):
        read_annotations(a2d, "train")


def test_line_ends_of_other_systems_a_mark_and_rare_separators_change_nothing(a2d):
    file = texts(a2d) / "a2d_annotation.txt"
    expected, text = quietly(a2d, "train"), file.read_text()
    for changed in (text.replace("\n", "\r\n"), "\ufeff" + text, text.replace("bright cat", "bright\u2028cat")):
        file.write_bytes(changed.encode())
        assert quietly(a2d, "train") == expected
    add_row(a2d, "one", "3", "cat " * 40_000)
    with pytest.raises(ValueError, match="a2d_annotation.txt: line 9 cannot be read as csv"):
        read_annotations(a2d, "train")


def test_a_video_of_both_splits_is_named(a2d):
    with (a2d.root / "Release" / "videoset.csv").open("a") as file:
        file.write("one,11,0,2,99,99,12,3,1\n")
    with pytest.raises(ValueError, match=r"videoset.csv: line 5: video one is in training and test"):
        read_annotations(a2d, "train")


def test_masks_that_are_not_finite_are_named(a2d, tmp_path):
    with h5py.File(h5(a2d, "one", 6), "w") as file:
        file["instance"], file["reMask"] = [0, 3], np.where(np.stack([A.T, B.T]), np.nan, 0)
    with pytest.raises(BrokenVideo, match=r"00006.h5: has 'reMask' with values that are not finite"):
        read_h5(h5(a2d, "one", 6))
    savemat(tmp_path / "m.mat", {"part_mask": np.full((4, 5, 2), np.nan)})
    with pytest.raises(BrokenVideo, match="m.mat: has part_mask with values that are not finite"):
        read_mat(tmp_path / "m.mat")


def test_odd_files_of_masks_are_named_or_read(a2d):
    pair, twice = np.stack([A.T, B.T]).astype(np.uint8), h5(a2d, "one", 6)

    def write(**tables: object) -> None:
        with h5py.File(twice, "w") as file:
            for name, table in tables.items():
                file[name] = table

    for tables, said in (
        ({"ids": [0, 3], "reMask": pair}, "has no table 'instance' of numbers"),
        ({"instance": [0, 3]}, "has no table 'reMask' of numbers"),
        ({"instance": np.zeros(2, [("a", "i4"), ("b", "f4")]), "reMask": pair}, "has no table 'instance' of numbers"),
        ({"instance": [0, 3], "reMask": pair[None]}, r"has masks \(1, 2, 60, 40\) of 2 instances"),
    ):
        write(**tables)
        with pytest.raises(BrokenVideo, match=f"one/00006.h5: {said}"):
            read_h5(twice)
    write(instance=np.zeros(0), reMask=np.zeros((0, 60, 40)))
    assert read_h5(twice) == {}
    assert [clip.frames for clip in quietly(a2d, "train")] == [(2, 12), (2,), (2, 6, 12)]


def test_entries_of_a_video_of_jhmdb_that_contradict_each_other_are_named(tmp_path):
    data = write_jhmdb(tmp_path)
    file = tmp_path / "jhmdb_sentences_samples_metadata.json"
    for folder in ("Rename_Images", "puppet_mask"):
        shutil.copytree(tmp_path / folder / "run" / "v1", tmp_path / folder / "run" / "v2")
    entries = json.loads(file.read_text())
    other = [part.replace("v1/", "v2/") if isinstance(part, str) else part for part in entries[1]]
    for odd in (other, [*entries[1][:3], 9, entries[1][4]]):
        file.write_text(json.dumps([entries[0], odd, entries[2]]))
        with pytest.raises(ValueError, match=r"entry 1 \(v1\): other files or another length than in the video's"):
            read_annotations(data, "test")
    file.write_text(json.dumps([[*entries[0][:3], "7", "a man"], entries[1]]))
    with pytest.raises(ValueError, match="entry 0: frame 00001 of '7' frames"):
        read_annotations(data, "test")


@pytest.mark.parametrize("given", [None, "0", 0, -1, "cat", [2], True, 1.5, "256x", "\u00b2"])
def test_an_object_of_refytvos_that_is_no_number_from_1_is_named(given, tmp_path):
    data = change_valid(write_refytvos(tmp_path), lambda seen: seen["expressions"]["0"].update(obj_id=given))
    with pytest.raises(ValueError, match=r"seen expression 0: obj_id is .*, want the number of an object, from 1"):
        read_annotations(data, "test")


@pytest.mark.parametrize("given", [2, "2", "02"])
def test_an_object_of_refytvos_is_a_number_or_its_text(given, tmp_path):
    data = change_valid(write_refytvos(tmp_path), lambda seen: seen["expressions"]["0"].update(obj_id=given))
    assert read_annotations(data, "test").clips[0].instance == "2"


def test_lists_of_refytvos_that_cannot_become_files_are_named_before_a_training(tmp_path):
    data = change_valid(write_refytvos(tmp_path), lambda seen: seen["frames"].append("00005"))
    with pytest.raises(ValueError, match="video seen: frame 00005 is listed twice"):
        read_annotations(data, "test")
    data = change_valid(write_refytvos(tmp_path / "b"), lambda seen: seen["expressions"].update({"a/b": {"exp": "x"}}))
    with pytest.raises(ValueError, match="video seen: 'a/b', a frame or expression, cannot be the name of a file"):
        read_annotations(data, "test")


def test_frames_of_valid_without_masks_are_told(tmp_path):
    data = write_refytvos(tmp_path)
    (tmp_path / "valid" / "Annotations" / "seen" / "00010.png").unlink()
    with pytest.warns(UserWarning, match=r"valid/Annotations: frames without masks are not scored: seen \(1 of 5\)"):
        assert read_annotations(data, "test").clips[0].frames == (0, 1, 3, 4)


def test_black_and_white_pictures_are_no_ids(tmp_path):
    Image.fromarray(A.astype(np.uint8) * 255).save(tmp_path / "white.png")
    with pytest.raises(BrokenVideo, match=r"white.png: is a gray picture with 255.*converted to black and white"):
        read_palette(tmp_path / "white.png")
    Image.fromarray(A.astype(np.uint8)).save(tmp_path / "gray.png")
    assert np.array_equal(read_palette(tmp_path / "gray.png")["1"], A)
