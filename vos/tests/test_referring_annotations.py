"""Readers of the three layouts: every trap of the official files is handled as documented, every fault is named."""

import json
import os
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from engine.data.video import BrokenVideo
from vos.annotations import read_annotations, read_masks
from vos.masks import read_h5, read_h5_ids, read_mat, read_palette, read_pixels
from vos.synthetic import write_masks
from vos.tests.toy_referring import (
    HEIGHT,
    WIDTH,
    A,
    B,
    add_row,
    h5,
    quietly,
    texts,
    write_a2d,
    write_jhmdb,
    write_palette,
    write_refytvos,
)


@pytest.fixture
def a2d(tmp_path):
    return write_a2d(tmp_path / "a2d")


def test_a2d_is_read_as_it_is_packed(a2d):
    with pytest.warns(UserWarning, match="left out, as the instance is no number: one '1 \\(copy\\)'"):
        found = read_annotations(a2d, "train")
    one, cat, two = found.clips
    assert (one.video, one.instance, one.sentence) == ("one", "0", "the dog, on the left")
    assert one.frames == (2, 6, 12) and cat.frames == (2, 6) and cat.labelled == (2, 6, 12)
    assert two.path == a2d.root / "Release" / "clips320H" / "two.mp4"
    assert [path.name for path in found.files] == ["videoset.csv", "a2d_annotation.txt", "a2d_missed_videos.txt"]
    assert [(c.video, c.instance) for c in read_annotations(a2d, "test").clips] == [("three", "0"), ("three", "3")]


def test_masks_of_a2d_stand_upright_with_and_without_their_first_axis(a2d):
    cat = quietly(a2d, "train")[1]
    both, alone = read_masks(a2d, cat, 2), read_masks(a2d, cat, 12)
    assert list(both) == ["0", "3"] and list(alone) == ["0"]
    assert np.array_equal(both["0"], A) and np.array_equal(both["3"], B) and np.array_equal(alone["0"], A)
    with h5py.File(h5(a2d, "one", 2)) as file:
        assert file["reMask"].shape == (2, WIDTH, HEIGHT)
    with h5py.File(h5(a2d, "one", 12)) as file:
        assert file["reMask"].shape == (WIDTH, HEIGHT)


def test_of_an_instance_that_stands_twice_in_a_frame_the_first_mask_counts(a2d):
    write_masks(h5(a2d, "one", 2), np.stack([A, B, B]), [3, 3, 0])
    assert read_h5_ids(h5(a2d, "one", 2)) == ["3", "0"]
    found = read_h5(h5(a2d, "one", 2))
    assert np.array_equal(found["3"], A) and np.array_equal(found["0"], B)


def test_more_masks_than_instances_are_let_go_and_fewer_are_an_error(a2d, tmp_path):
    write_masks(tmp_path / "a.h5", np.stack([A, B]), [7])
    assert list(read_h5(tmp_path / "a.h5")) == ["7"]
    write_masks(tmp_path / "b.h5", np.stack([A, B]), [1, 2, 3])
    with pytest.raises(BrokenVideo, match=r"b.h5: has masks \(2, 60, 40\) of 3 instances"):
        read_h5(tmp_path / "b.h5")


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"no masks at all"])
def test_a_file_of_masks_that_is_none_is_named(content, tmp_path):
    (tmp_path / "00001.h5").write_bytes(content)
    (tmp_path / "a.mat").write_bytes(content)
    for read, name in ((read_h5, "00001.h5"), (read_h5_ids, "00001.h5"), (read_mat, "a.mat"), (read_palette, "a.mat")):
        with pytest.raises(BrokenVideo, match=name):
            read(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="none"):
            read(tmp_path / "none")


def test_a_pipe_instead_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_h5, read_h5_ids, read_mat, read_palette, read_pixels):
        with pytest.raises(BrokenVideo, match="pipe: is a named pipe, it is not a regular file"):
            read(tmp_path / "pipe")


def test_tables_of_words_and_instances_with_fractions_are_named(tmp_path):
    for name, value in (("words", np.array([b"a"])), ("half", np.array([0.5])), ("none", None)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["reMask"] = np.zeros((4, 5), np.uint8)
            if value is not None:
                file["instance"] = value
        with pytest.raises(BrokenVideo, match=rf"{name}.h5: has (no table 'instance'|instances that are no whole)"):
            read_h5_ids(tmp_path / f"{name}.h5")


def test_tables_that_are_kept_elsewhere_are_not_followed(tmp_path):
    write_masks(tmp_path / "a.h5", np.stack([A]), [0])
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["instance"] = np.zeros(1)
        file["reMask"] = h5py.ExternalLink("a.h5", "reMask")
    with pytest.raises(BrokenVideo, match="b.h5: has no table 'reMask' of numbers"):
        read_h5(tmp_path / "b.h5")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["instance"] = np.zeros(1)
        file.create_dataset("reMask", (1 << 20, 1 << 20), np.uint8, chunks=(64, 64))
    with pytest.raises(BrokenVideo, match=r"c.h5: has 'reMask' of \(1048576, 1048576\) values"):
        read_h5(tmp_path / "c.h5")


def test_the_other_name_of_the_folder_of_clips_is_known_and_none_is_an_error(a2d):
    (a2d.root / "Release" / "clips320H").rename(a2d.root / "Release" / "CLIPS320")
    assert quietly(a2d, "train")[0].path == a2d.root / "Release" / "CLIPS320" / "one.mp4"
    (a2d.root / "Release" / "CLIPS320").rename(a2d.root / "Release" / "mp4")
    with pytest.raises(
        FileNotFoundError, match="has no folder clips320H or CLIPS320; get it with scripts/download_a2d"
    ):
        read_annotations(a2d, "train")


def test_a_missing_annotation_file_names_itself_and_the_script(a2d):
    (texts(a2d) / "a2d_annotation.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"a2d_annotation.txt: no such file; get it with scripts/download_a2d.sh"
    ):
        read_annotations(a2d, "train")


@pytest.mark.parametrize(
    "row, said",
    [
        (["one", "0", "   "], r"a2d_annotation.txt line 9 \(one 0\): the sentence is empty"),
        (["unknown", "0", "a dog"], r"line 9 \(unknown 0\): the video is not in videoset.csv"),
    ],
)
def test_entries_that_cannot_be_used_stop_or_are_left_out_by_name(a2d, row, said):
    add_row(a2d, *row)
    with pytest.raises(ValueError, match=said + r"; mend them, or leave them out with --data.on-broken skip"):
        quietly(a2d, "train")
    with pytest.warns(UserWarning, match=said):
        assert len(read_annotations(replace(a2d, on_broken="skip"), "train").clips) == 3


def test_videos_and_masks_that_are_not_there_are_named(a2d):
    (a2d.root / "Release" / "clips320H" / "one.mp4").unlink()
    h5(a2d, "two", 2).write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=r"2 entries cannot be used: .*one.mp4: no such video; .*two/00002.h5: cannot be"
    ):
        quietly(a2d, "train")
    (found,) = quietly(replace(a2d, on_broken="skip"), "train")
    assert found.video == "two" and found.frames == (6, 12)
    shutil.rmtree(h5(a2d, "two", 2).parent)
    with pytest.raises(
        ValueError, match="no sentence of the train split can be used .*one.mp4: no such video.; get it"
    ):
        quietly(replace(a2d, on_broken="skip"), "train")


def test_a_sentence_of_an_instance_without_masks_is_left_out_by_name(a2d):
    add_row(a2d, "one", "5", "the horse")
    with pytest.warns(UserWarning, match="1 sentences left out, whose instance has no mask: one 5"):
        assert len(read_annotations(a2d, "train").clips) == 3


def test_a_second_sentence_of_an_instance_has_a_name_of_its_own(a2d):
    add_row(a2d, "one", "0", "the animal that barks")
    assert [c.expression for c in quietly(a2d, "train")] == ["0", "3", "0", "0.2"]


def test_rows_of_another_form_are_named_by_line(a2d):
    add_row(a2d, "one", "0", "the dog", "the cat")
    with pytest.raises(ValueError, match="a2d_annotation.txt: line 9 has 4 columns, want 3; a comma"):
        read_annotations(a2d, "train")
    (texts(a2d) / "a2d_annotation.txt").write_text("one,0,the dog\n")
    with pytest.raises(ValueError, match="first line is not video_id,instance_id,query"):
        read_annotations(a2d, "train")
    listed = a2d.root / "Release" / "videoset.csv"
    listed.write_text(listed.read_text() + "x,1,2\n")
    with pytest.raises(ValueError, match="videoset.csv: line 5 is not of 9 columns"):
        read_annotations(a2d, "train")


def test_the_first_so_many_videos_are_taken(a2d):
    assert {clip.video for clip in quietly(replace(a2d, num_videos=1), "train")} == {"one"}


def test_jhmdb_is_read_by_the_ends_of_its_paths_and_only_evaluated(tmp_path):
    data = write_jhmdb(tmp_path)
    (clip,) = read_annotations(data, "test").clips
    assert (clip.sentence, clip.frames, clip.length) == ("a man", (1, 6, 7), 7)
    assert np.array_equal(read_masks(data, clip, 1)["1"], A) and np.array_equal(read_masks(data, clip, 7)["1"], B)
    with pytest.raises(BrokenVideo, match="puppet_mask.mat: has masks of frames 1 to 7, asked for 8"):
        read_masks(data, clip, 8)
    with pytest.raises(ValueError, match="jhmdb is for evaluation alone"):
        read_annotations(data, "train")


def test_masks_of_jhmdb_of_a_single_frame_have_no_last_axis(tmp_path):
    savemat(tmp_path / "a.mat", {"part_mask": A.astype(np.uint8)})
    assert np.array_equal(read_mat(tmp_path / "a.mat"), A[None])
    savemat(tmp_path / "b.mat", {"other": A})
    with pytest.raises(BrokenVideo, match="b.mat: cannot be read as puppet masks"):
        read_mat(tmp_path / "b.mat")


def test_entries_of_jhmdb_are_checked(tmp_path):
    data = write_jhmdb(tmp_path)
    file = tmp_path / "jhmdb_sentences_samples_metadata.json"
    entries = json.loads(file.read_text())
    beyond = [*entries[0][:3], 0, "a man"]
    gone = ["v2", *(text.replace("v1", "v2") for text in entries[0][1:3]), 7, "a man"]
    file.write_text(json.dumps([*entries, beyond, gone, [*entries[0][:4], " "]]))
    said = r"3 entries .*entry 3: frame 00001 of 0 frames; .*v2/00001.png: no such file; .*entry 5 \(v1\): the sentence"
    with pytest.raises(ValueError, match=said):
        read_annotations(data, "test")
    file.write_text(json.dumps([*entries, [*entries[0][:4], "a runner"]]))
    assert [(c.expression, c.frames) for c in read_annotations(data, "test").clips] == [("1", (1, 6, 7)), ("1.2", (1,))]
    file.write_text(json.dumps([["v1", "00001.png", "puppet_mask.mat", 7, "a man"]]))
    with pytest.raises(ValueError, match="entry 0: '00001.png' or 'puppet_mask.mat' does not end in"):
        read_annotations(data, "test")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="it comes from MTTR's repository and says which frames are evaluated"):
        read_annotations(data, "test")


def test_refytvos_is_read_and_its_valid_list_loses_the_videos_of_test(tmp_path):
    data = write_refytvos(tmp_path)
    cat, dog, bird = read_annotations(data, "train").clips
    assert (cat.video, cat.expression, cat.instance, cat.frames) == ("long", "0", "1", tuple(range(7)))
    assert (dog.instance, bird.names) == ("2", ("00000", "00005"))
    cow, unknown = read_annotations(data, "test").clips
    assert (cow.video, cow.instance, cow.labelled) == ("seen", "2", (0, 1, 2, 3, 4))
    assert (unknown.instance, unknown.frames, len(unknown.names)) == ("", (), 5)
    shutil.rmtree(tmp_path / "meta_expressions" / "test")
    with pytest.raises(ValueError, match=r"hidden/00000.jpg: no such frame, of 3 of 3"), pytest.warns(UserWarning):
        read_annotations(data, "test")


def test_palette_masks_are_read_by_index_and_colors_are_refused(tmp_path):
    data = write_refytvos(tmp_path)
    dog = read_annotations(data, "train").clips[1]
    assert list(read_masks(data, dog, 0)) == ["1"]
    found = read_masks(data, dog, 6)
    assert np.array_equal(found["1"], A) and np.array_equal(found["2"], B)
    write_palette(tmp_path / "p.png", A.astype(np.uint8))
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.mode == "P"
        picture.convert("RGB").save(tmp_path / "rgb.png")
    with pytest.raises(BrokenVideo, match="rgb.png: is a picture of mode RGB; want a palette"):
        read_palette(tmp_path / "rgb.png")
    assert read_pixels(tmp_path / "p.png").shape == (HEIGHT, WIDTH, 3)


def test_training_frames_of_refytvos_without_masks_are_named(tmp_path):
    data = write_refytvos(tmp_path)
    (tmp_path / "train" / "Annotations" / "long" / "00010.png").unlink()
    with pytest.raises(ValueError, match="video long expression 0: 1 frames have no masks in"):
        read_annotations(data, "train")
    file = tmp_path / "meta_expressions" / "train" / "meta_expressions.json"
    content = json.loads(file.read_text())
    content["videos"]["long"]["frames"] = ["../../etc"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"video long: '../../etc', a frame or expression, cannot be the name"):
        read_annotations(data, "train")
    content["videos"]["long"] = {"frames": ["00000"], "expressions": {"0": "a cat"}}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="video long expression 0: is not"):
        read_annotations(data, "train")
