"""Synthetic videos: exact boundaries that only the motion shows, disjoint objects, deterministic, really on disk."""

import json
from pathlib import Path

import numpy as np
import pytest

from action_detection import synthetic
from action_detection.data import Data, read_annotations
from action_detection.synthetic import Synthetic, build_scene, write_contact_sheet, write_dataset
from engine.data.video import probe, read_frames
from engine.synthetic.motion import MOTIONS

SMALL = Synthetic(num_training=3, num_validation=2, size=32, seconds=(9.0, 14.0), action_seconds=(1.5, 3.0))
SCENES = [build_scene(Synthetic(), "training", number) for number in range(1, 31)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("untrimmed")
    assert write_dataset(root, SMALL, workers=1)
    return root


def test_the_annotations_are_readable_and_tell_the_files(written):
    annotations = read_annotations(Data(root=written))
    assert annotations.class_names == tuple(sorted(MOTIONS))  # by the label file: five videos have not all of them
    content = json.loads((written / synthetic.ANNOTATIONS).read_text())
    assert [node["nodeName"] for node in content["taxonomy"]] == ["Root", *MOTIONS]
    subsets = [video["subset"] for video in content["database"].values()]
    assert subsets == ["training"] * 3 + ["validation"] * 2
    for name, video in content["database"].items():
        info = probe(written / "videos" / f"v_{name}.mp4")
        assert info.codec == "h264" and (info.height, info.width, info.fps) == (32, 32, 12)
        assert info.seconds == pytest.approx(video["duration"], abs=1e-3) and 9 <= info.seconds <= 14
        assert video["annotations"]


def test_what_is_on_disk_is_the_rendered_scene(written):
    scene, frames = synthetic._film(SMALL, "training", 2)
    stored = read_frames(written / "videos" / "v_composed0002.mp4", np.arange(0, len(frames), 10))
    assert np.abs(stored.astype(int) - frames[::10]).mean() < 4  # gray values; the codec's loss with noise
    assert len(frames) == scene.num_frames


def test_actions_are_of_the_promised_length_apart_from_each_other_and_of_all_classes_alike():
    counts = dict.fromkeys(MOTIONS, 0)
    for scene in SCENES:
        assert 20 * 12 <= scene.num_frames <= 60 * 12 and scene.actions
        ends = [0, *(action.last for action in scene.actions)]
        firsts = [*(action.first for action in scene.actions), scene.num_frames]
        assert all(first - end >= 12 for end, first in zip(ends, firsts, strict=True))  # a second of quiet
        for action in scene.actions:
            assert 24 <= action.last - action.first <= 72
            counts[action.motion] += 1
    assert max(counts.values()) <= 2 * min(counts.values()), counts


def speed(thing: synthetic.Thing) -> np.ndarray:
    """How much an object moves from frame to frame: frame widths, octaves of e and radians together, (n - 1,)."""
    track = thing.track
    parts = (np.diff(track.x), np.diff(track.y), np.diff(np.log(track.radius)), np.diff(track.angle))
    return np.sqrt(sum(part**2 for part in parts))


# A frame of the fastest drift: 0.015 frame widths a second both ways; of the slowest motion: 0.32 of them in 6 s.
DRIFT, MOTION = 0.015 * 2**0.5 / 12, 0.32 / 72


def test_nothing_moves_outside_the_actions():
    for scene in SCENES:
        busy = np.zeros(scene.num_frames, bool)
        for action in scene.actions:
            busy[action.first : action.last] = True
        for thing in scene.things:
            when = busy[thing.first : thing.first + len(thing.opacity)]
            assert speed(thing)[~(when[1:] & when[:-1])].max(initial=0) < 1.01 * DRIFT


def test_every_action_is_done_by_one_object_without_a_jump():
    for scene in SCENES:
        for action in scene.actions:
            movers = []
            for thing in scene.things:
                first, last = action.first - thing.first, action.last - thing.first
                if first < 0 or last > len(thing.opacity):
                    continue
                moves = speed(thing)[first : last - 1]
                if moves.mean() > DRIFT:
                    movers.append(thing)
                    assert moves.mean() > 0.9 * MOTION and moves.max() < 0.5
                    assert (thing.opacity[first:last] == 1).all()
                    # It was there before and is there afterwards, so no appearance marks the boundary.
                    assert first >= 6 and len(thing.opacity) - last >= 5
            assert len(movers) == 1, (action, len(movers))


def test_objects_act_again_from_where_they_rest_and_appear_at_other_times_than_the_boundaries():
    actors = sum(len({id(t) for t in s.things if speed(t).max() > 1.01 * DRIFT}) for s in SCENES)
    actions = sum(len(scene.actions) for scene in SCENES)
    assert 0.1 < 1 - actors / actions < 0.7
    boundaries = {(i, f) for i, s in enumerate(SCENES) for a in s.actions for f in (a.first, a.last)}
    cuts = {(i, first) for i, s in enumerate(SCENES) for first, _ in s.backgrounds[1:]}
    assert len(cuts) > 15 and len(cuts & boundaries) <= 2


def test_the_segment_in_the_pixels_is_the_annotated_one():
    # The change between frames, noise and light aside, begins and ends with the segment.
    scene = SCENES[0]
    action = scene.actions[0]
    steady = synthetic.Scene(
        scene.num_frames, scene.actions, scene.things, scene.backgrounds[:1], np.ones(scene.num_frames), 0.0
    )
    frames = synthetic.render(steady, 64, np.random.default_rng(0)).astype(int)
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))  # change[t] leads to frame t + 1
    inside = change[action.first : action.last - 1]
    before = change[action.first - 4 : action.first]
    assert inside.mean() > 3 * before.mean(), (inside.mean(), before)


def test_train_and_validation_share_no_object(monkeypatch):
    drawn, draw_object = {"train": set(), "validation": set()}, synthetic.draw_object
    for subset, group in synthetic.SUBSETS.items():
        monkeypatch.setattr(
            synthetic,
            "draw_object",
            lambda rng, shape, texture, group=group: (
                drawn[group].add((shape, texture)) or draw_object(rng, shape, texture)
            ),
        )
        for number in range(6):
            build_scene(SMALL, subset, number)
    assert len(drawn["train"]) > 10 and drawn["validation"] and not drawn["train"] & drawn["validation"]


def test_the_same_seed_gives_the_same_files_in_any_number_of_processes_and_another_seed_others(written, tmp_path):
    write_dataset(tmp_path / "again", SMALL, workers=2)
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(written)).read_bytes(), path
    other = build_scene(Synthetic(seed=1), "training", 1)
    assert other.num_frames != SCENES[0].num_frames or other.actions != SCENES[0].actions


def test_an_interrupted_set_is_completed_and_what_is_there_is_kept(written, tmp_path, monkeypatch):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(written, root)
    assert not write_dataset(root, SMALL, workers=1)
    lost = root / "videos" / "v_composed0004.mp4"
    content = lost.read_bytes()
    lost.unlink()
    (root / synthetic.ANNOTATIONS).unlink()
    made, write_video = [], synthetic.write_video
    monkeypatch.setattr(synthetic, "write_video", lambda path, *rest: (made.append(path), write_video(path, *rest)))
    done = []
    assert write_dataset(root, SMALL, workers=1, on_done=lambda: done.append(1))
    assert made == [lost] and lost.read_bytes() == content and len(done) == 5
    assert (root / synthetic.ANNOTATIONS).read_bytes() == (written / synthetic.ANNOTATIONS).read_bytes()


def test_other_data_is_never_overwritten(written, tmp_path):
    with pytest.raises(ValueError, match="another synthetic data set"):
        write_dataset(written, Synthetic(), workers=1)
    (tmp_path / synthetic.ANNOTATIONS).write_text("{}")
    with pytest.raises(ValueError, match="not made here"):
        write_dataset(tmp_path, SMALL, workers=1)


def test_the_contact_sheet_shows_the_videos_and_a_timeline(tmp_path):
    from PIL import Image

    write_contact_sheet(tmp_path / "sheet.png", SMALL, columns=6)
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert picture.shape == (2 * (32 + 28), 6 * 32, 3)
    assert (picture[34:40].min(-1) < 100).any()  # a bar


@pytest.mark.parametrize(
    "wrong",
    [{"size": 63}, {"fps": 2.0}, {"action_seconds": (3.0, 2.0)}, {"seconds": (8.0, 60.0)}, {"seconds": (30.0, 20.0)}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Synthetic(**wrong)
