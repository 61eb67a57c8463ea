"""Lists of videos as editors, desktops and other programs leave them: read right, or named."""

from pathlib import Path

import pytest

from action_recognition.configs import Data
from action_recognition.data import read_class_names, read_entries

HEADING = "path,label\n"
LINES = "a/1.mp4,walk\na/2.mp4,run\n"


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("a/1.mp4", "a/2.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not opened here")
    return tmp_path


def test_a_byte_order_mark_is_not_part_of_the_first_line(root):
    (root / "train.csv").write_text(LINES, encoding="utf-8-sig")
    entries = read_entries(Data(kind="csv", root=root, num_classes=2), "train")
    assert [(entry.name, entry.label) for entry in entries] == [("a/1.mp4", 1), ("a/2.mp4", 0)]


@pytest.mark.parametrize("heading", ["path,label", "file,class", "Video,Action"])
def test_a_heading_is_no_class(heading, root):
    (root / "train.csv").write_text(f"{heading}\n{LINES}")
    with pytest.raises(ValueError, match=r"train.csv: line 1 .* is a heading, not a video; take the line out"):
        read_class_names(Data(kind="csv", root=root, num_classes=3))


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ("a/1.mp4,20240101\n", "class number 20240101 is too large"),
        ("a/1.mp4," + "9" * 5000 + "\n", "class number 9{40} is too large"),
        ("a/1.mp4,run,3\n", "row 1 has more columns"),
        ("a/1.mp4\n", "row 1 is incomplete"),
        ('a/1.mp4,"run\na/2.mp4,walk\n', "the quote that opens in line 1 goes on to line 2"),
        ("a/1.mp4," + "x" * 200_000 + "\n", "line 1 cannot be read as csv"),
    ],
)
def test_a_list_with_something_else_in_it_is_named_at_once(lines, match, root):
    (root / "train.csv").write_text(lines)
    with pytest.raises(ValueError, match=f"train.csv: {match}") as caught:
        read_class_names(Data(kind="csv", root=root, num_classes=2))
    assert len(str(caught.value)) < 500


def test_a_list_in_another_encoding_is_named(root):
    (root / "train.csv").write_bytes("a/1.mp4,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train.csv: is not in UTF-8"):
        read_class_names(Data(kind="csv", root=root, num_classes=2))


def test_what_desktops_and_notebooks_leave_is_neither_class_nor_video(tmp_path):
    for split in ("train", "val"):
        for name in ("run/1.mp4", "walk/2.mp4", ".ipynb_checkpoints/1-checkpoint.mp4", "run/.DS_Store", ".DS_Store"):
            (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / split / name).write_text("not opened here")
        (tmp_path / split / "run" / ".ipynb_checkpoints").mkdir()
        (tmp_path / split / "run" / "Thumbs.db").write_text("")
    data = Data(kind="folder", root=tmp_path, num_classes=2)
    assert read_class_names(data)[1] == ["run", "walk"]
    assert [entry.name for entry in read_entries(data, "train")] == ["run/1.mp4", "walk/2.mp4"]


@pytest.mark.parametrize(
    "content", ['{"id": "1"}', "3", '[{"id": ["1"], "template": "x"}]', '[{"id": "1", "template": 2}]']
)
def test_a_something_something_list_of_another_form_is_named(content, tmp_path):
    (tmp_path / "something-something-v2-labels.json").write_text('{"x": "0", "y": "1"}')
    (tmp_path / "something-something-v2-train.json").write_text(content)
    with pytest.raises(ValueError, match="something-something-v2-train.json: (is not a list|entry 1)"):
        read_entries(Data(kind="ssv2", root=tmp_path, num_classes=2), "train")
