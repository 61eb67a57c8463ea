"""Annotation files: odd segments, unknown classes, and files of another form, each named."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from action_detection.data import Data, read_annotations
from action_detection.tests.toy_videos import DATABASE, annotate, entry


@pytest.fixture
def data(tmp_path) -> Data:
    annotate(tmp_path, DATABASE)
    return Data(root=tmp_path, num_classes=2)


def test_annotations_past_the_end_are_clipped_and_those_without_length_dropped_by_name(data):
    odd = entry(
        5.0,
        "validation",
        ("jump", 4.0, 9.5),
        ("run", 2.0, 2.0),
        ("run", 3.0, 1.0),
        ("jump", 6.0, 8.0),
        ("run", -1.0, 1.0),
    )
    annotate(data.root, DATABASE | {"d": odd})
    with pytest.warns(UserWarning, match="5 segments") as caught:
        video = read_annotations(data).videos["d"]
    assert video.segments.tolist() == [[4.0, 5.0], [0.0, 1.0]] and video.labels.tolist() == [0, 1]
    message = str(caught[0].message)
    assert "d [4.0, 9.5] (jump): clipped to [4.0, 5.0]" in message and "d [3.0, 1.0] (run): without length" in message


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"x": entry(3.0, "training", ("swim", 0, 1))},
            "has 3 classes, .* says 2; set --data.num-classes 3",
        ),
        ({"x": {"subset": "training", "annotations": []}}, "video x lacks 'duration'; mend it"),
        ({"x": entry(0.0, "training")}, "video x is not in ActivityNet's form .the duration 0.0"),
        ({"x": {"duration": 1.0, "subset": "training", "annotations": [{"label": "run", "segment": [1]}]}}, "video x"),
        ({"x": entry(float("nan"), "training")}, "video x is not in ActivityNet's form"),
        ({"x": entry(1.0, "training", ("run", 0.0, float("inf")))}, "video x is not in ActivityNet's form"),
        ({"x": 3}, "video x is not in ActivityNet's form"),
    ],
)
def test_an_annotation_file_of_another_form_is_named_with_the_video(change, match, data):
    annotate(data.root, DATABASE | change)
    with pytest.raises(ValueError, match=f"activity_net.*{match}"):
        read_annotations(data)


def test_an_annotation_file_that_is_missing_broken_or_lists_a_video_twice_is_named(data):
    file = Path(data.root) / "activity_net.v1-3.min.json"
    file.write_text('{"database": {"a": 1, "a": 2}}')
    with pytest.raises(ValueError, match="'a' is listed twice"):
        read_annotations(data)
    file.write_text('{"database": ')
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_annotations(data)
    file.write_text('{"videos": []}')
    with pytest.raises(ValueError, match='no table "database"'):
        read_annotations(data)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="set --data.root"):
        read_annotations(data)


def test_a_class_that_the_label_file_does_not_know_is_named(data):
    labels = Path(data.root) / "category_idx.txt"
    labels.write_text("run\njump\nswim\n")
    assert read_annotations(replace(data, num_classes=3)).class_names == ("jump", "run", "swim")
    labels.write_text("run\nswim\n")
    with pytest.raises(ValueError, match="video a has the label 'jump', not one of the 2 in .*category_idx.txt"):
        read_annotations(data)


def test_an_unknown_subset_is_answered_with_those_that_exist(data):
    with pytest.raises(ValueError, match="no video of the subset 'testing', there are: training, validation"):
        read_annotations(replace(data, test_subset="testing"))


def test_a_sound_annotation_file_gives_no_warning(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        annotations = read_annotations(data)
    assert annotations.class_names == ("jump", "run") and list(annotations.videos) == list("abcde")
