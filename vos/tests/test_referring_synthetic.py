"""Composed scenes: sentences name one thing, masks are what is seen; the files are A2D's, with their oddities."""

import csv
import json
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from engine.synthetic.write import STAMP
from vos import scenes
from vos.annotations import read_annotations, read_masks
from vos.configs import ROWS
from vos.masks import read_h5
from vos.scenes import KINDS, RELATIONS, STILL, build_scene, fits, group_of, render
from vos.sentences import mirror_sentence
from vos.synthetic import ALONE, LAPTOP, MISSED, TWICE, Synthetic, film, video_name, write_contact_sheet, write_dataset

SMALL = Synthetic(num_train=4, num_test=3, height=48, width=64)
SCENES = [
    build_scene([number], (96, 96), 16, kind=KINDS[number % 3], group=group, annotated=annotated)
    for group, annotated in (("train", range(16)), ("validation", (4, 8, 12)))
    for number in range(12)
]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("referring") / "set"
    assert write_dataset(root, SMALL, workers=1)
    return root


def data_of(root: Path):
    return replace(ROWS["referring_tiny_dr2net"]().data, root=root)


def clips(root: Path, split: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_annotations(data_of(root), split).clips


def test_each_sentence_names_one_thing_and_is_true_of_it():
    for number, scene in enumerate(SCENES):
        annotated = range(16) if number < 12 else (4, 8, 12)
        assert len(scene.sentences) == len(set(scene.sentences)) == len(scene.things) == 3
        for i, text in enumerate(scene.sentences):
            (meant,) = [c for c in scenes._candidates(scene.things, i) if c.text == text][:1]
            assert fits(scene.things, meant, annotated) == [i]
            if meant.relation is not None:
                one = scene.things[i].track
                (other,) = [t.track for t in scene.things if meant.other <= t.traits()]
                axis, sign = ("x", meant.relation[0]) if meant.relation[0] else ("y", meant.relation[1])
                assert all(sign * (getattr(one, axis)[t] - getattr(other, axis)[t]) > 0 for t in annotated)


def test_only_their_motion_tells_twins_apart():
    for scene in SCENES[::3]:
        pictures = [id(thing.pyramid) for thing in scene.things]
        (twin,) = {picture for picture in pictures if pictures.count(picture) == 2}
        pair = [i for i in range(3) if pictures[i] == twin]
        assert len({scene.things[i].motion for i in pair}) == 2
        for i in pair:
            assert scene.things[i].motion in scene.sentences[i]


def test_looks_and_relations_are_spoken_of_too():
    texts = " | ".join(text for scene in SCENES for text in scene.sentences)
    assert any(relation in texts for relation in RELATIONS) and "there is the" in texts
    motions = [{thing.motion for thing in scene.things} for scene in SCENES[1::3]]
    assert all(len(found) == 1 for found in motions)
    shapes = [[thing.shape for thing in scene.things] for scene in SCENES[1::3]]
    assert {len(set(found)) for found in shapes} == {2, 3}  # in some, the shape alone does not tell


def test_training_and_test_share_words_but_no_sentence_and_no_object():
    train, test = SCENES[:12], SCENES[12:]
    said = [{text for scene in part for text in scene.sentences} for part in (train, test)]
    assert not said[0] & said[1]
    assert all(group_of(text) == "train" for text in said[0]) and all(group_of(t) == "validation" for t in said[1])
    things = [{(thing.shape, thing.texture) for scene in part for thing in scene.things} for part in (train, test)]
    assert not things[0] & things[1]
    words = [set(" ".join(texts).replace(",", "").split()) for texts in said]
    assert len(words[0] & words[1]) > 15


def test_a_mirrored_sentence_is_true_of_the_mirrored_scene():
    mirrored = {"moving left": "moving right", "turning clockwise": "turning counter-clockwise", STILL: STILL}
    for motion, other in mirrored.items():
        assert mirror_sentence(f"the disc {motion}") == f"the disc {other}"
        assert mirror_sentence(f"the disc {other}") == f"the disc {motion}"


def test_things_are_as_large_as_in_the_pretraining_and_one_at_rest_stays():
    for scene in SCENES:
        for thing in scene.things:
            assert thing.track.radius.min() > 0.09 and thing.track.radius.max() < 0.21
            if thing.motion == STILL:
                assert np.ptp(thing.track.x) < 0.04 and np.ptp(thing.track.angle) < 0.11


def test_masks_are_where_a_thing_changes_the_picture_and_never_overlap():
    for number, size in enumerate(((96, 96), (48, 64))):
        scene = build_scene([number], size, 8, kind="free", group="train", annotated=range(8))
        scene = replace(scene, noise=0.0, light=np.ones(8), background=np.full((*size, 3), 255, np.uint8))
        frames, masks = render(scene, np.random.default_rng(0))
        assert frames.shape == (8, *size, 3) and masks.shape == (8, 3, *size) and masks.sum(1).max() == 1
        untouched = (frames == 255).all(-1)
        assert not (untouched & masks.any(1)).any()  # rims are dark, so there is no white at the mask's edge
        assert (~untouched & ~masks.any(1)).mean() < 0.05  # what is half covered counts for nobody


def test_render_is_the_same_when_whole_frames_are_drawn():
    scene = build_scene([3], (48, 64), 8, kind="free", group="train", annotated=range(8))
    _, masks = render(scene, np.random.default_rng(0))
    for t in range(8):
        last = scene.things[-1]
        pose = (last.track.x[t] * 64, last.track.y[t] * 48, last.track.radius[t] * 48, last.track.angle[t])
        whole = scenes.place_object(last.pyramid, 64, *pose)[:48, :, 3] > 127.5
        assert (whole != masks[t, -1]).sum() <= 2


def test_the_files_are_a2ds(written):
    listed = list(csv.reader((written / "Release" / "videoset.csv").open()))
    assert [len(row) for row in listed] == [9] * 8 and [row[8] for row in listed] == list("00001110")
    assert listed[0][4:8] == ["48", "64", "16", "16"] and listed[4][4:8] == ["48", "64", "16", "3"]
    rows = list(csv.reader((written / "text_annotations" / "a2d_annotation.txt").open()))
    assert rows[0] == ["video_id", "instance_id", "query"]
    with h5py.File(written / "text_annotations/a2d_annotation_with_instances/composedtrain0002/00005.h5") as file:
        assert set(file) == {"instance", "reMask", "reBBox", "reS_id"} and file["reMask"].shape[1:] == (64, 48)
        assert file["reBBox"].shape == (4, len(file["instance"]))


def test_what_is_read_is_what_was_drawn(written):
    for split in ("train", "test"):
        for clip in clips(written, split):
            number = int(clip.video[-4:])
            scene, _, masks = film(SMALL, split, number)
            assert clip.sentence == scene.sentences[int(clip.instance) - 1]
            for frame in clip.frames:
                found = read_masks(data_of(written), clip, frame)
                assert np.array_equal(found[clip.instance], masks[frame - 1, int(clip.instance) - 1])
            hidden = set(clip.labelled) - set(clip.frames)
            assert all(masks[frame - 1, int(clip.instance) - 1].sum() < 20 for frame in hidden)
    assert len(clips(written, "train")) == 3 * 3 + 1 and len(clips(written, "test")) == 2 * 3 + 1
    assert {clip.labelled for clip in clips(written, "test")} == {(5, 9, 13)}


def test_the_oddities_are_there_and_the_reader_meets_them(written):
    folder = written / "text_annotations" / "a2d_annotation_with_instances"
    with h5py.File(folder / video_name("train", TWICE) / "00001.h5") as file:
        ids = file["instance"][()].tolist()
    assert len(ids) == len(set(ids)) + 1
    assert read_h5(folder / video_name("train", TWICE) / "00001.h5")[str(int(ids[-1]))].any()
    with h5py.File(folder / video_name("test", ALONE) / "00005.h5") as file:
        assert file["reMask"].ndim == 2
    assert not (folder / MISSED).exists() and not (written / "Release" / "clips320H" / f"{MISSED}.mp4").exists()
    for split in ("train", "test"):
        both = r"no number: composedtrain0000 '1 \(copy\)', composedtest0000 '1 \(copy\)'"
        with pytest.warns(UserWarning, match=both):
            read_annotations(data_of(written), split)


def test_masks_are_compressed_and_a_file_takes_one_block_of_the_disk(written):
    files = sorted((written / "text_annotations" / "a2d_annotation_with_instances").glob("*/*.h5"))
    sizes = [path.stat().st_size for path in files]
    with h5py.File(files[0]) as file:
        assert file["reMask"].compression == "gzip" and file["reMask"].chunks == file["reMask"].shape
    assert len(sizes) == 4 * 16 + 3 * 3 and max(sizes) < 4096


def test_a_second_call_finds_all_and_an_interrupted_one_is_completed(written, tmp_path):
    root = Path(shutil.copytree(written, tmp_path / "set"))
    assert not write_dataset(root, SMALL, workers=1)
    folder = root / "text_annotations" / "a2d_annotation_with_instances" / "composedtrain0003"
    lost = [
        root / "Release" / "videoset.csv",
        root / "Release" / "clips320H" / "composedtest0002.mp4",
        folder / "00016.h5",
    ]
    before = [path.read_bytes() for path in lost]
    for path in lost:
        path.unlink()
    assert write_dataset(root, SMALL, workers=1) and [path.read_bytes() for path in lost[:2]] == before[:2]
    for name in ("00001.h5", "00016.h5"):
        ours, theirs = (read_h5(r / folder.relative_to(root) / name) for r in (root, written))
        assert list(ours) == list(theirs) and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert not list(root.rglob("*.tmp"))


def test_files_of_other_settings_and_other_data_stay(written, tmp_path):
    with pytest.raises(ValueError, match="another synthetic data set"):
        write_dataset(written, replace(SMALL, seed=1), workers=1)
    (tmp_path / "own" / "Release").mkdir(parents=True)
    with pytest.raises(ValueError, match="not made here; choose another --root"):
        write_dataset(tmp_path / "own", SMALL, workers=1)
    assert json.loads((written / STAMP).read_text())["num_train"] == 4


def test_settings_out_of_range_are_named():
    for wrong in ({"num_train": 2}, {"height": 47}, {"width": 16}, {"num_frames": 4}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(SMALL, **wrong)
    assert (LAPTOP.num_train, LAPTOP.num_test, Synthetic().num_train, Synthetic().num_test) == (300, 60, 40, 12)
    assert Synthetic().annotated("test") == [5, 9, 13] and len(Synthetic().annotated("train")) == 16


def test_the_tiny_set_takes_seconds():
    started = time.process_time()
    for number in range(6):
        film(Synthetic(), "train", number)
    assert time.process_time() - started < 6 * 0.25  # 0.03 each where nobody else is at work; 52 videos in all


def test_the_contact_sheet_shows_a_row_per_test_video(tmp_path):
    write_contact_sheet(tmp_path / "sheet.png", SMALL, rows=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 * 2 * 64 + 7 * 2 and sheet.height == 2 * 2 * 48 + 16 * (3 + 1) + 2 * 4
