"""Annotations, class scores and predictions with something else in them: one line with the file's name, at once."""

import json

import pytest

from action_detection.annotations import read_class_scores
from action_detection.configs import Data
from action_detection.data import Windows, read_annotations, read_window, window_starts
from action_detection.metric import evaluate_files
from action_detection.tests.toy_videos import DATABASE, annotate, entry
from engine.data.video import BrokenVideo, write_frames


def predictions(name: str) -> str:
    return json.dumps({"results": {name: [{"label": "run", "score": 0.5, "segment": [0, 1]}]}})


@pytest.fixture
def files(tmp_path):
    truth = {"a": entry(3.0, "validation", ("run", 0.0, 1.0)), "b": entry(3.0, "training", ("run", 0.0, 1.0))}
    (tmp_path / "truth.json").write_text(json.dumps({"database": truth}))
    return tmp_path / "truth.json", tmp_path / "predictions.json"


def test_predictions_for_other_videos_only_are_an_error_and_not_zero(files):
    for name in ("v_a", "b"):
        files[1].write_text(predictions(name))
        with pytest.raises(ValueError, match=rf"predictions.json: none of its 1 videos \(the first is '{name}'\)"):
            evaluate_files(*files)
    files[1].write_text(predictions("a"))
    assert evaluate_files(*files)["average_mAP"] == 1


def test_predictions_for_some_other_videos_are_counted_in_a_warning(files):
    content = json.loads(predictions("a"))
    content["results"] |= {f"v_{k}": [] for k in range(7)}
    files[1].write_text(json.dumps(content))
    said = r"predictions.json: 7 of its 8 videos are not in the subset 'validation' of .*truth.json: v_0, .*, v_4, ...;"
    with pytest.warns(UserWarning, match=said):
        assert evaluate_files(*files)["average_mAP"] == 1


def test_blocked_videos_that_nobody_knows_are_counted_in_a_warning(files, tmp_path):
    files[1].write_text(predictions("a"))
    with pytest.warns(UserWarning, match="truth.json: has not 1 of the 2 blocked videos: v_b"):
        evaluate_files(*files, blocked=["b", "v_b"])
    annotate(tmp_path, DATABASE)
    (tmp_path / "blocked.json").write_text('["a", "v_c"]')
    with pytest.warns(UserWarning, match="activity_net.*json: has not 1 of the 2 blocked videos: v_c"):
        found = read_annotations(Data(root=tmp_path, num_classes=2, blocked=tmp_path / "blocked.json"))
    assert "a" not in found.videos and "c" in found.videos


def test_predictions_that_name_a_video_twice_are_refused(files):
    files[1].write_text(predictions("a")[:-2] + ", " + predictions("a")[len('{"results": {') :])
    with pytest.raises(ValueError, match="predictions.json: .*'a' is listed twice"):
        evaluate_files(*files)


def test_a_byte_order_mark_before_class_names_and_annotations_is_not_content(tmp_path):
    annotate(tmp_path, DATABASE)
    data = Data(root=tmp_path, num_classes=2)
    expected = read_annotations(data)
    file = tmp_path / "activity_net.v1-3.min.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    (tmp_path / "category_idx.txt").write_text("run\njump\n", encoding="utf-8-sig")
    assert read_annotations(data).class_names == expected.class_names


@pytest.mark.parametrize("row", [[0.1], [0.1, [0.2]], [[0.1], [0.2, 0.3]], ["a", "b"], None, {"a": 1}])
def test_ragged_class_scores_are_named_with_the_video(row, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps({"class": ["run", "jump"], "results": {"a": row}}))
    with pytest.raises(ValueError, match=r"scores.json: video a: want 2 finite numbers"):
        read_class_scores(tmp_path / "scores.json", ("jump", "run"), ["a"])


@pytest.mark.parametrize("content", ["[]", "3", '{"class": 3, "results": {}}', '{"class": ["a"], "results": []}'])
def test_class_scores_of_another_form_are_named(content, tmp_path):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ValueError, match=r"scores.json: want JSON"):
        read_class_scores(tmp_path / "scores.json", ("jump",), ["a"])


def test_a_duration_in_milliseconds_is_named_before_it_makes_windows(tmp_path):
    annotate(tmp_path, DATABASE | {"x": entry(120_000.0, "training", ("run", 0.0, 1.0))})
    with pytest.raises(ValueError, match="video x .*120000 seconds, more than a day; is it in milliseconds"):
        read_annotations(Data(root=tmp_path, num_classes=2))
    with pytest.raises(ValueError, match="too many; is it in milliseconds"):
        window_starts(Data(kind="thumos", windows="sliding"), 1e8)
    annotate(tmp_path, DATABASE | {"x": entry(80_000.0, "validation", ("run", 0.0, 1.0))})
    data = Data(root=tmp_path, num_classes=2, windows="sliding", num_times=8, fps=30.0)
    with pytest.raises(ValueError, match=r"activity_net.*json: video x, of 80000 seconds, has \d+ windows, too"):
        Windows(data, read_annotations(data).videos, {"x": "x.mp4"}, train=False)


def test_a_duration_a_hundred_times_that_of_the_file_is_named(tmp_path):
    import numpy as np

    write_frames(tmp_path / "a.mp4", np.zeros((20, 32, 32, 3), np.uint8), 10)
    video = next(iter(read_annotations(_data_of(tmp_path, 2000.0)).videos.values()))
    with pytest.raises(BrokenVideo, match=r"a.mp4: lasts 2 seconds, annotated are 2000; annotate in seconds"):
        read_window(Data(), str(tmp_path / "a.mp4"), video, 0, None)


def _data_of(root, duration: float) -> Data:
    annotate(root, {"a": entry(duration, "training", ("run", 0, 1)), "b": entry(9.0, "validation", ("jump", 0, 1))})
    return Data(root=root, num_classes=2)
