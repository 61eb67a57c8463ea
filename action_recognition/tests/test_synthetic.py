"""Synthetic data: motion decides and no single frame does; balanced, disjoint, deterministic, really on disk."""

import json
from pathlib import Path

import numpy as np
import pytest

from action_recognition import synthetic
from action_recognition.synthetic import Synthetic, write_contact_sheet, write_dataset
from engine.data.video import probe, read_frames
from engine.synthetic.motion import MOTIONS, draw_track, render_clip
from engine.synthetic.sprites import SHAPES, objects_of

SMALL = Synthetic(num_train=20, num_validation=10, size=48, num_frames=(6, 8))
PAIRS = [
    ("moving left", "moving right"),
    ("moving up", "moving down"),
    ("approaching", "receding"),
    ("turning clockwise", "turning counter-clockwise"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("motion")
    assert write_dataset(root, SMALL, workers=1)
    return root


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_opposite_motions_have_the_same_frames_in_reverse(one, other):
    for number in range(3):
        frames, name = render_clip(one, key=(5, number), group="train", size=48)
        reverse, same_name = render_clip(other, key=(5, number), group="train", size=48)
        assert name == same_name
        np.testing.assert_array_equal(frames, reverse[::-1])
        assert not np.array_equal(frames, reverse)


def test_the_place_of_the_object_in_one_frame_does_not_tell_the_class():
    # The best guess from (x, y, radius) in one frame by nearest neighbors, over eight classes in pairs: chance is 1/8.
    # What the pictures add (texture, background) is drawn alike for all classes.
    rng = np.random.default_rng(0)
    kinds = list(MOTIONS)[:8]
    points, labels = [], []
    for i in range(2400):
        kind, backwards = MOTIONS[kinds[i % 8]]
        track = draw_track(rng, kind, 20)
        t = int(rng.integers(20))
        t = 19 - t if backwards else t
        points.append([track.x[t], track.y[t], np.log(track.radius[t])])
        labels.append(i % 8)
    points, labels = np.array(points) / np.std(points, axis=0), np.array(labels)
    train, test = slice(0, 1800), slice(1800, 2400)
    distance = ((points[test, None] - points[None, train]) ** 2).sum(-1)
    votes = labels[train][np.argsort(distance, axis=1)[:, :25]]
    guess = np.array([np.bincount(v, minlength=8).argmax() for v in votes])
    assert (guess == labels[test]).mean() < 0.22  # chance .125, its standard error here .014; a giveaway is above .5


def test_the_motion_does_tell_the_class():
    # The guard of the test above: with first and last place known, the same eight classes fall apart.
    rng = np.random.default_rng(0)
    right = 0
    for i in range(200):
        name = list(MOTIONS)[:8][i % 8]
        kind, backwards = MOTIONS[name]
        track = draw_track(rng, kind, 20)
        a, b = (19, 0) if backwards else (0, 19)
        change = np.array(
            [
                (track.x[b] - track.x[a]) / 0.32,
                (track.y[b] - track.y[a]) / 0.32,
                np.log(track.radius[b] / track.radius[a]) / np.log(1.7),
                (track.angle[b] - track.angle[a]) / 1.9,
            ]
        )
        axis = int(np.abs(change).argmax())
        names = ["moving right", "moving left", "moving down", "moving up"]
        names += ["approaching", "receding", "turning clockwise", "turning counter-clockwise"]
        right += names[2 * axis + int(change[axis] < 0)] == name
    assert right == 200


def test_objects_turn_clockwise_on_the_screen():
    # A quarter of a turn clockwise takes the arrow's tip from the top to the right.
    from PIL import Image

    from engine.synthetic.motion import place_object
    from engine.synthetic.sprites import draw_object

    sprite, _ = draw_object(np.random.default_rng(0), "arrow", "plain")
    mask = Image.fromarray(sprite).convert("RGBa")
    up, right = (place_object([mask], 96, 48, 48, 40, angle)[..., 3] for angle in (0.0, np.pi / 2))
    np.testing.assert_allclose(np.rot90(up, -1)[4:-4, 4:-4], right[4:-4, 4:-4], atol=160)
    assert np.abs(np.rot90(up, -1) - right).mean() < 4 < np.abs(np.rot90(up, 1) - right).mean()


def test_train_and_validation_share_no_object():
    train, validation = (set(objects_of(group)) for group in ("train", "validation"))
    for objects in (train, validation):
        assert {shape for shape, _ in objects} == set(SHAPES)
    assert not train & validation


def test_files_are_complete_decodable_and_balanced(written):
    labels = json.loads((written / "something-something-v2-labels.json").read_text())
    assert sorted(labels.values(), key=int) == [str(i) for i in range(10)]
    names = set()
    for split, count in (("train", 20), ("validation", 10)):
        items = json.loads((written / f"something-something-v2-{split}.json").read_text())
        assert len(items) == count
        found = [int(labels[item["template"].replace("[", "").replace("]", "")]) for item in items]
        assert np.ptp(np.bincount(found, minlength=10)) == 0
        for item in items:
            assert set(item) == {"id", "label", "template", "placeholders"}
            assert len(item["placeholders"]) == item["template"].lower().count("[something]")
            path = written / "20bn-something-something-v2" / f"{item['id']}.mp4"
            info = probe(path)
            assert 6 <= info.num_frames <= 8 and (info.height, info.width) == (48, 48)
            frames = read_frames(path, range(info.num_frames))
            assert frames.std(axis=(1, 2, 3)).min() > 3  # no black or empty frame
            names.add(item["id"])
    assert len(names) == 30


def test_what_is_on_disk_is_the_rendered_clip(written):
    frames, _ = synthetic._render(SMALL, "train", 1, 0)
    back = read_frames(written / "20bn-something-something-v2" / "1.mp4", range(len(frames)))
    # The codec halves the color resolution and smooths noise; a wrong clip differs by some 50.
    assert np.abs(back.astype(float) - frames).mean() < 8


def test_the_same_seed_gives_the_same_files_in_any_number_of_processes_and_another_seed_others(written, tmp_path):
    write_dataset(tmp_path / "again", SMALL, workers=2)
    for path in (written / "20bn-something-something-v2").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "20bn-something-something-v2" / path.name).read_bytes()
    other = synthetic._render(Synthetic(size=48, seed=1), "train", 1, 0)[0]
    assert not np.array_equal(other[:6], synthetic._render(Synthetic(size=48), "train", 1, 0)[0][:6])


def test_a_complete_data_set_is_left_alone_and_another_is_not_overwritten(written, tmp_path):
    assert not write_dataset(written, SMALL, workers=1)
    with pytest.raises(ValueError, match="another synthetic data set"):
        write_dataset(written, Synthetic(num_train=10, num_validation=10, size=48), workers=1)
    (tmp_path / "something-something-v2-labels.json").write_text("{}")
    with pytest.raises(ValueError, match="not made here"):
        write_dataset(tmp_path, SMALL, workers=1)


def test_a_lost_file_is_written_again(written):
    path = written / "20bn-something-something-v2" / "7.mp4"
    content = path.read_bytes()
    path.unlink()
    assert write_dataset(written, SMALL, workers=1)
    assert path.read_bytes() == content


def test_the_contact_sheet_shows_every_class(tmp_path):
    from PIL import Image

    write_contact_sheet(tmp_path / "sheet.png", SMALL, columns=5)
    assert Image.open(tmp_path / "sheet.png").size == (5 * 48, 10 * (48 + 14))


@pytest.mark.parametrize("wrong", [{"num_classes": 11}, {"size": 49}, {"num_frames": (9, 8)}, {"num_frames": (1, 8)}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Synthetic(**wrong)
    with pytest.raises(ValueError, match="unknown motion"):
        render_clip("flying", key=(0,), group="train")
