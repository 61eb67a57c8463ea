"""Data in YOLO's form: classes, folders, lines of boxes, pictures of unlike suffix, and what is odd in them."""

import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from detection.annotations import as_coco, read_annotations, read_categories
from detection.data import build_dataset, class_names
from detection.images import BrokenImage
from detection.tests.toy_pictures import config_of, draw, write_yolo
from detection.tests.toy_pictures import yolo_line as line
from engine.data.fingerprint import inputs_of


@pytest.fixture
def data(tmp_path):
    return write_yolo(tmp_path / "own")


def labels_of(data, split="train"):
    return data.root / "labels" / split / "a.txt"


def test_pictures_boxes_and_classes_come_as_written(data):
    found = read_annotations(data, "train")
    assert [(c.id, c.name) for c in found.categories] == [(0, "cat"), (1, "dog")]
    assert [(key, p.id, p.path.name) for key, p in found.pictures.items()] == [
        *((1, 1, "a.jpg"), (2, 2, "b.PNG"), (3, 3, "c.bmp"))
    ]
    first = found.pictures[1]
    assert (first.width, first.height) == (160, 120) and first.labels.tolist() == [1, 0]
    np.testing.assert_allclose(first.boxes, [[20, 30, 50, 40], [90, 10, 60, 100]], atol=1e-9)
    np.testing.assert_allclose(first.areas, [2000, 6000], atol=1e-6)
    assert found.pictures[3].boxes.shape == (0, 4) and not first.crowd.any()
    assert [c.name for c in read_categories(data)] == class_names(config_of(data)) == ["cat", "dog"]


def test_the_dictionary_for_the_metric_has_ids_from_one_and_areas(data):
    content = as_coco(read_annotations(data, "test"))
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.PNG", "c.bmp"]
    assert [item["id"] for item in content["annotations"]] == [1, 2, 3]
    assert content["annotations"][0]["category_id"] == 1 and content["annotations"][0]["iscrowd"] == 0
    assert content["annotations"][0]["area"] == pytest.approx(2000)
    assert content["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]


@pytest.mark.parametrize("form", ["images/{}", "{}/images"])
def test_both_ways_to_lay_out_folders_are_read(tmp_path, form):
    data = write_yolo(tmp_path / "own", form=form)
    assert len(read_annotations(data, "train").pictures) == 3
    # a split of another name: the folder that data.yaml names for it
    other = replace(data, train_split="train2017", test_split="val2017")
    if form == "{}/images":
        assert read_annotations(other, "train").pictures[1].path.parent == data.root / "train" / "images"
    else:
        assert read_annotations(other, "test").pictures[1].path.parent == data.root / "images" / "val"


def test_a_split_that_is_nowhere_names_the_places(data):
    with pytest.raises(FileNotFoundError, match=r"'train2017', looked in .*images/train2017.*--data.test-split"):
        read_annotations(replace(data, train_split="train2017"), "train")


def test_a_polygon_counts_as_its_box(data):
    labels_of(data).write_text("0 0.25 0.5 0.75 0.5 0.5 0.25\n")
    np.testing.assert_allclose(read_annotations(data, "train").pictures[1].boxes, [[40, 30, 80, 30]])


def test_boxes_past_the_border_are_clipped_and_those_of_no_size_dropped_by_name(data):
    labels_of(data).write_text("0 0.1 0.5 0.24 0.5\n1 0.5 0.5 0 0.2\n")
    with pytest.warns(
        UserWarning, match=r"2 boxes dropped or clipped: .*a.txt: line 1: the box reaches past .*a.txt: line 2"
    ):
        found = read_annotations(data, "train").pictures[1]
    np.testing.assert_allclose(found.boxes, [[0, 30, 35.2, 60]], atol=1e-9)


LINES = {
    "1 0.5 0.5 0.2": "line 2 is not `class x y width height`: '1 0.5 0.5 0.2'",
    "1 0.5 0.5 0.2 0.2 0.9": "line 2 is not `class x y width height`",
    "dog 0.5 0.5 0.2 0.2": "line 2 is not `class x y width height`: 'dog",
    "1 nan 0.5 0.2 0.2": "line 2 is not `class",
    "1 1e999 0.5 0.2 0.2": "line 2 is not `class",
    "2 0.5 0.5 0.2 0.2": "line 2 has the class 2, not one of 0 to 1",
    "-1 0.5 0.5 0.2 0.2": "line 2 has the class -1",
    "0.5 0.5 0.5 0.2 0.2": "line 2 has the class 0.5",
    "1 80 60 50 40": r"line 2 has 80 60 50 40, not shares of the picture \(are they pixels\?\)",
    "1 0.5 0.5 -0.2 0.2": r"line 2 has 0.5 0.5 -0.2 0.2, not shares of the picture \(are they pixels\?\)",
    "1 0.1 0.1 0.9 0.9": r"line 2 has 0.1 0.1 0.9 0.9, which reaches far past the picture \(are they corners",
    "1 " + "9" * 400 + " 0.5 0.2 0.2": "line 2 is not `class",
}


@pytest.mark.parametrize("text", LINES)
def test_a_line_that_is_no_box_is_refused_or_left_out_by_name(data, text):
    labels_of(data).write_text(f"0 0.5 0.5 0.2 0.2\n{text}\n")
    with pytest.raises(ValueError, match=r"a.txt: " + LINES[text]) as caught:
        read_annotations(data, "train")
    assert "\n" not in str(caught.value) and "--data.on-broken skip" in str(caught.value)
    with pytest.warns(UserWarning, match="1 entries left out: .*a.txt: " + LINES[text]):
        found = read_annotations(replace(data, on_broken="skip"), "train")
    assert len(found.pictures[1].boxes) == 1


def test_labels_without_a_picture_and_pictures_of_one_name_are_told(data):
    folder = data.root / "labels" / "train"
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "ghost.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(ValueError, match=r"ghost.txt have no picture in"):
        read_annotations(data, "train")
    (folder / "ghost.txt").unlink()
    Image.new("RGB", (20, 20)).save(data.root / "images" / "train" / "a.png")
    with pytest.raises(ValueError, match=r"a.jpg and a.png in .* share the labels a.txt"):
        read_annotations(data, "train")


def test_pictures_that_would_be_passed_over_are_told(data):
    folder = data.root / "images" / "train"
    (folder / "labeled").mkdir()
    (folder / ".cache").mkdir()
    for place in (folder / "labeled", folder / ".cache"):
        Image.new("RGB", (20, 20)).save(place / "more.jpg")
    with pytest.raises(ValueError, match=r"images/train/labeled are in a folder below the split's: move them up"):
        read_annotations(data, "train")
    shutil.rmtree(folder / "labeled")
    (folder / "phone.HEIC").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"phone.HEIC is in a format that is not read: convert it to JPEG or PNG"):
        read_annotations(data, "train")
    with pytest.warns(UserWarning, match=r"1 entries left out: .*phone.HEIC"):
        assert len(read_annotations(replace(data, on_broken="skip"), "train").pictures) == 3


def test_a_damaged_picture_is_named_or_left_out(data):
    (data.root / "images" / "train" / "b.PNG").write_bytes(b"nothing")
    with pytest.raises(BrokenImage, match="b.PNG: is no picture"):
        read_annotations(data, "train")
    with pytest.warns(UserWarning, match="b.PNG: is no picture"):
        found = read_annotations(replace(data, on_broken="skip"), "train")
    assert list(found.pictures) == [1, 3]


CLASSES = {
    "names:\n  0: cat\n  1: dog\n": ["cat", "dog"],
    "names:\n  - cat\n  - 7\n": ["cat", "7"],
    "names: {1: dog, 0: cat}\n": ["cat", "dog"],
}


@pytest.mark.parametrize("text", CLASSES)
def test_classes_are_a_list_or_a_table(data, text):
    (data.root / "data.yaml").write_text(text)
    assert class_names(config_of(data)) == CLASSES[text]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: {1: cat, 2: dog}", r"the classes have the numbers \[1, 2\]"),
        ("names: []", "has no list of classes"),
        ("names: 5", "has no list of classes"),
        ("names: [[a], [b]]", "has no list of classes"),
        ("nc: 3\nnames: [a, b]", "has 2 names, but says nc: 3"),
        ("- a\n- b", "is no table"),
        ("", "is no table"),
        ("names: [a, b", "cannot be read as YAML"),
        ("names: {0: cat, 0: dog, 1: cup}", "'0' is listed twice"),
        ("names: [cat, dog]\nnames: [a, b]", "'names' is listed twice"),
        ("names: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("[" * 5000, "cannot be read as YAML"),
        ("names: {" + "9" * 5000 + ": a}", "cannot be read as YAML|the classes have the numbers"),
        ("names: [a, b, c]", r"has 3 classes, the configuration says 2 .*--data.num-classes 3"),
    ],
)
def test_a_list_of_classes_in_another_form_is_one_line(data, text, words):
    (data.root / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"data.yaml: .*(" + words + ")") as caught:
        read_annotations(data, "train")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_list_of_classes_that_is_not_there_says_so(data):
    (data.root / "data.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"data.yaml: no such file; put a data.yaml there"):
        read_annotations(data, "train")


def test_a_turned_picture_has_its_boxes_as_it_is_seen(data):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it clockwise
    seen = draw(80, 160, [[10, 20, 40, 60]])
    Image.fromarray(np.rot90(seen)).save(data.root / "images" / "val" / "a.jpg", exif=exif, quality=98)
    (data.root / "labels" / "val" / "a.txt").write_text(line([10, 20, 40, 60], 1, 80, 160))
    dataset = build_dataset(config_of(replace(data, test_size=80)), "test")
    sample = dataset[0, 0]
    assert sample["original_size"] == (160, 80) and sample["image"].shape == (3, 160, 80)
    ys, xs = torch.nonzero(sample["image"][0] > 0, as_tuple=True)
    found = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
    assert found == pytest.approx([10, 20, 50, 80], abs=1)
    torch.testing.assert_close(sample["boxes"][0], torch.tensor([30 / 80, 50 / 160, 40 / 80, 60 / 160]))


def test_a_run_notices_when_a_label_changes(data):
    def word():
        return inputs_of(data, {"train": build_dataset(config_of(data), "train")})["train"]

    before = word()
    labels_of(data).write_text("0 0.5 0.5 0.2 0.2\n")
    assert before.startswith("3 samples") and before != word()


def test_labels_that_are_not_there_are_no_empty_pictures(data):
    shutil.rmtree(data.root / "labels" / "train")
    with pytest.raises(FileNotFoundError, match=r"its labels are missing, there is no folder .*labels/train"):
        read_annotations(data, "train")
    (data.root / "labels" / "train").mkdir()
    with pytest.raises(ValueError, match="none of the 3 pictures has a box to train on"):
        build_dataset(config_of(data), "train")


def test_labels_of_capital_suffix_count_and_hidden_files_do_not(data):
    labels_of(data).rename(labels_of(data).with_suffix(".TXT"))
    (data.root / "images" / "train" / "._a.jpg").write_bytes(b"mac")
    (data.root / "labels" / "train" / "._a.txt").write_bytes(b"mac")
    found = read_annotations(data, "train")
    assert [len(p.labels) for p in found.pictures.values()] == [2, 1, 0]


@pytest.mark.parametrize("kind", ["folder", "latin", "dangling"])
def test_labels_that_cannot_be_read_are_named_or_left_out_with_their_picture(data, kind):
    file = labels_of(data)
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "latin":
        file.write_bytes(b"\xff\xfe")
    else:
        file.symlink_to("/nowhere/at/all")
    with pytest.raises((OSError, ValueError), match=r"a\.txt"):
        read_annotations(data, "train")
    with pytest.warns(UserWarning, match=r"1 entries left out: .*a\.txt"):
        found = read_annotations(replace(data, on_broken="skip"), "train")
    assert [p.path.name for p in found.pictures.values()] == ["b.PNG", "c.bmp"]


TENFOLD = "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in pairwise("abcdefghij"))


@pytest.mark.parametrize(
    "text",
    [
        'names: !!int ""',
        'names: !!float ""',
        "names: !!bool x",
        "names: !!timestamp x",
        "names: [yes, no]",
        f"a: &a [x]\n{TENFOLD}names: *j",
        f"a: &a [x]\n{TENFOLD}names: [a, b]\nnc: *j",
    ],
)
def test_a_hostile_list_of_classes_is_one_short_line_at_once(data, text):
    (data.root / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"data\.yaml: ") as error:
        read_categories(data)
    assert len(str(error.value)) < 400 + len(str(data.root))
