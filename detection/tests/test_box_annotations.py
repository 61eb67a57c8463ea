"""COCO's JSON by our reader: what it gives, and every odd entry as one line with file, id and remedy."""

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO

from detection.annotations import annotation_file, as_coco, read_annotations, read_categories
from detection.metric import read_ground_truth
from detection.tests.toy_pictures import coco_of, write_coco

FILE = "instances_train2017.json"


def read(tmp_path, content=None, split="train", **changes):
    return read_annotations(replace(write_coco(tmp_path, content), **changes), split)


def refused(tmp_path, content, words, **changes):
    """The reader's one line about `content`, which must name the file and hold `words`."""
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path, content, **changes)
    text = str(caught.value)
    assert FILE in text and "\n" not in text and len(text) < 600, text
    return text


def test_pictures_and_boxes_come_as_written_with_contiguous_classes(tmp_path):
    found = read(tmp_path)
    assert found.file == tmp_path / "annotations" / FILE
    assert [(c.id, c.name) for c in found.categories] == [(3, "car"), (44, "cup")]
    assert list(found.pictures) == [7, 8, 9]
    first, last = found.pictures[7], found.pictures[9]
    assert first.path == tmp_path / "train2017" / "a.jpg" and (first.width, first.height) == (160, 120)
    assert first.labels.tolist() == [0, 1] and first.labels.dtype == np.int64
    assert first.boxes.tolist() == [[20, 30, 50, 40], [90, 10, 60, 100]] and first.boxes.dtype == np.float64
    assert first.areas.tolist() == [2000, 6000] and first.crowd.tolist() == [False, False]
    assert last.boxes.shape == (0, 4) and last.labels.dtype == np.int64 and last.crowd.dtype == bool


def test_test_and_train_are_read_from_their_own_files_and_no_more_than_asked(tmp_path):
    data = write_coco(tmp_path)
    assert annotation_file(data, "test").name == "instances_val2017.json"
    assert read_annotations(data, "test").pictures[7].path.parent.name == "val2017"
    assert list(read_annotations(replace(data, num_images=2), "train").pictures) == [7, 8]
    assert [c.name for c in read_categories(data)] == ["car", "cup"]


def test_what_is_written_back_is_what_pycocotools_reads_in_the_file(tmp_path, capsys):
    found = read(tmp_path)
    own, theirs = COCO(), COCO(str(found.file))
    own.dataset = as_coco(found)
    own.createIndex()
    assert own.getImgIds() == theirs.getImgIds() and own.getCatIds() == sorted(theirs.getCatIds())
    for image_id in own.getImgIds():
        rows = [
            [(item["category_id"], item["bbox"], item["area"], item["iscrowd"]) for item in coco.imgToAnns[image_id]]
            for coco in (own, theirs)
        ]
        assert rows[0] == rows[1]
    assert min(own.anns) == 1


def test_boxes_are_clipped_and_those_of_no_size_dropped_by_name(tmp_path):
    content = coco_of()
    content["annotations"][0]["bbox"] = [-10, 100, 50, 40]
    content["annotations"][1]["bbox"] = [90, 10, 60, 0]  # two of these are in COCO
    content["annotations"][2]["bbox"] = [300, 300, 5, 5]
    with pytest.warns(
        UserWarning, match=f"{FILE}: 3 boxes dropped or clipped: annotation 1 of image 7: .*annotation 2"
    ):
        found = read(tmp_path, content)
    assert found.pictures[7].boxes.tolist() == [[0, 100, 40, 20]] and len(found.pictures[8].boxes) == 0


def test_rounding_past_the_border_is_not_worth_a_warning(tmp_path, recwarn):
    content = coco_of()
    content["annotations"][0]["bbox"] = [110.0, 30, 50.01, 40]
    assert read(tmp_path, content).pictures[7].boxes[0].tolist() == [110, 30, 50, 40]
    assert not recwarn.list


def test_many_boxes_past_the_border_may_be_corners(tmp_path):
    content = coco_of()
    corners = [[60, 50, 150, 110], [80, 70, 120, 90], [90, 20, 140, 60], [85, 80, 110, 100], [100, 100, 130, 110]]
    content["annotations"] = [
        {"id": k, "image_id": 7, "category_id": 3, "bbox": box} for k, box in enumerate(corners, start=1)
    ]
    with pytest.warns(UserWarning, match=r"5 boxes dropped or clipped: .*; so many: are they corners x0, y0, x1, y1"):
        read(tmp_path, content)


def test_a_null_area_or_crowd_is_one_that_is_missing(tmp_path):
    content = coco_of()
    content["annotations"][0] |= {"area": None, "iscrowd": None}
    content["annotations"][1]["iscrowd"] = 0.0  # as tables of numbers are exported
    found = read(tmp_path, content)
    assert found.pictures[7].areas.tolist() == [2000, 6000] and not found.pictures[7].crowd.any()
    with pytest.warns(UserWarning, match="1 have no area: .*1 have no iscrowd"):
        assert [one["iscrowd"] for one in read_ground_truth(found.file).annotations] == [0, 0, 0]


def test_area_and_crowd_may_be_missing(tmp_path):
    content = coco_of()
    del content["annotations"][0]["area"], content["annotations"][0]["iscrowd"]
    content["annotations"][1]["area"] = 12.5  # that of a mask
    found = read(tmp_path, content).pictures[7]
    assert found.areas.tolist() == [2000, 12.5] and not found.crowd.any()


ENTRIES = {
    "an annotation id of 0": ("annotations", {"id": 0}, r"no whole number `id` of at least 1"),
    "an annotation id of words": ("annotations", {"id": "one"}, r"no whole number `id`"),
    "an annotation id twice": ("annotations", {"id": 2}, r"annotation id 2 is listed twice"),
    "an unknown category": ("annotations", {"category_id": 5}, r"annotation 1 has the category 5, which is not in"),
    "a category in quotes": (
        "annotations",
        {"category_id": "3"},
        r"annotation 1 has the category '3', which is not in",
    ),
    "a category of truth": ("annotations", {"category_id": True}, r"annotation 1 has the category True"),
    "an unknown image": ("annotations", {"image_id": 99}, r"annotation 1 is of the image 99, which is not in"),
    "an image in a list": ("annotations", {"image_id": [7]}, r"annotation 1 is of the image"),
    "no box": ("annotations", {"bbox": None}, r"annotation 1 has the box None, not x, y, width, height"),
    "a box of three": ("annotations", {"bbox": [1, 2, 3]}, r"annotation 1 has the box \[1, 2, 3\]"),
    "a negative box": ("annotations", {"bbox": [1, 2, -3, 4]}, r"annotation 1 has the box \[1, 2, -3, 4\]"),
    "a box of NaN": ("annotations", {"bbox": [1, 2, math.nan, 4]}, r"annotation 1 has the box .*nan"),
    "an infinite box": ("annotations", {"bbox": [1, 2, math.inf, 4]}, r"annotation 1 has the box .*inf"),
    "a box of words": ("annotations", {"bbox": ["1", 2, 3, 4]}, r"annotation 1 has the box \['1', 2, 3, 4\]"),
    "a box of truth": ("annotations", {"bbox": [True, 2, 3, 4]}, r"annotation 1 has the box"),
    "a box of astronomers": ("annotations", {"bbox": [1, 2, 10**200, 4]}, r"annotation 1 has the box"),
    "a crowd of two": ("annotations", {"iscrowd": 2}, r"annotation 1 has the iscrowd 2"),
    "an area in quotes": ("annotations", {"area": "2000"}, r"annotation 1 has the area '2000', not square pixels"),
    "a negative area": ("annotations", {"area": -1}, r"annotation 1 has the area -1"),
    "an area of NaN": ("annotations", {"area": math.nan}, r"annotation 1 has the area nan"),
    "an image id twice": ("images", {"id": 8}, r"image id 8 is listed twice, the second time with 'b.png'"),
    "a file twice": ("images", {"file_name": "b.png"}, r"the images 7 and 8 are both of the file 'b.png'"),
    "an image without id": ("images", {"id": None}, r"the image .* has no whole number `id`"),
    "an image id of a float": ("images", {"id": 7.0}, r"no whole number `id`"),
    "no width": ("images", {"width": None}, r"image 7 has the width and height \[None, 120\]"),
    "a height of 0": ("images", {"height": 0}, r"image 7 has the width and height \[160, 0\]"),
    "an absolute name": ("images", {"file_name": "/etc/passwd"}, r"image 7 .*'/etc/passwd', which leaves the folder"),
    "a name of another folder": ("images", {"file_name": "../val2017/a.jpg"}, r"image 7 .*which leaves the folder"),
    "no name": ("images", {"file_name": None}, r"image 7 has the file_name 'None'"),
    "an empty name": ("images", {"file_name": " "}, r"image 7 has the file_name ' '"),
    "a name with a zero": ("images", {"file_name": "a\0.jpg"}, r"image 7 has the file_name"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_odd_entry_is_refused_or_left_out_by_name(tmp_path, name):
    table, changes, words = ENTRIES[name]
    content = coco_of()
    content[table][0] |= changes
    assert "--data.on-broken skip" in refused(tmp_path, content, words)
    with pytest.warns(UserWarning, match=f"{FILE}: [123] entries left out: .*" + words):
        found = read(tmp_path, content, on_broken="skip")
    left = sum(len(picture.boxes) for picture in found.pictures.values())
    assert left == 2 if table == "annotations" else left < 3
    assert len(found.pictures) == (3 if table == "annotations" else 2)


def test_many_odd_entries_are_counted_and_the_first_named(tmp_path):
    content = coco_of()
    content["annotations"] += [
        {"id": 100 + k, "image_id": 7, "category_id": 6, "bbox": [1, 1, 2, 2]} for k in range(30)
    ]
    with pytest.warns(UserWarning, match=r"30 entries left out: annotation 100 .*annotation 109 .*and 20 more") as said:
        read(tmp_path, content, on_broken="skip")
    assert "annotation 110" not in str(said[0].message)


OTHERS = {
    "captions": ({"annotations": [{"id": 1, "image_id": 7, "caption": "a cup"}]}, "holds captions, not boxes"),
    "panoptic": ({"annotations": [{"image_id": 7, "segments_info": []}]}, "holds panoptic segments, not boxes"),
    "no annotations": ({"annotations": None}, "has no list annotations"),
    "categories in a table": ({"categories": {"3": "car"}}, "has no list categories"),
    "a category without a name": ({"categories": [{"id": 3}, {"id": 44, "name": "cup"}]}, "lacks a whole number"),
    "a category id twice": ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "'a' and 'b' both have"),
    "no pictures": ({"images": [], "annotations": []}, "its list images is empty"),
    "no classes": ({"categories": []}, "its list categories is empty"),
    "shares": (
        {"annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [0.25, 0.25, 0.5, 0.5]}]},
        r"all boxes are within one pixel, as \[0.25, 0.25, 0.5, 0.5\]; they seem to be shares of the picture",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_tasks_are_named(tmp_path, name):
    changes, words = OTHERS[name]
    refused(tmp_path, coco_of() | changes, words)
    refused(tmp_path, coco_of() | changes, words, on_broken="skip")


def test_files_of_detections_videos_and_nothing_are_named(tmp_path):
    refused(
        tmp_path, [{"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 1.0}], "files of detections are"
    )
    refused(tmp_path, {"database": {}}, r"has no list images and no list annotations .*\(it has database\)")
    refused(tmp_path, {}, "it has nothing")
    refused(tmp_path, 5, "is '5', not annotations")


def test_another_number_of_classes_names_both_and_the_flag(tmp_path):
    refused(tmp_path, None, r"has 2 classes, the configuration says 80 .*--data.num-classes 2", num_classes=80)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"images": [' + "9" * 400 + "]}", "400 digits"),
        ('{"images": [], "images": []}', "'images' is listed twice"),
        ('{"images": [', "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
    ],
)
def test_hostile_texts_are_one_line(tmp_path, text, words):
    data = write_coco(tmp_path)
    annotation_file(data, "train").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_annotations(data, "train")
    assert FILE in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_that_is_not_there_names_the_script(tmp_path):
    data = write_coco(tmp_path)
    annotation_file(data, "train").unlink()
    with pytest.raises(FileNotFoundError, match=f"{FILE}: no such file; .*download_coco.sh"):
        read_annotations(data, "train")


def test_random_content_is_read_or_refused_in_one_line(tmp_path):
    rng = np.random.default_rng(0)
    values = [None, True, -1, 0, 7, 3, 1.5, "a", [], {}, [1, 2, 3, 4], {"id": 7}, 10**200]
    data = replace(write_coco(tmp_path), on_broken="skip")
    file = annotation_file(data, "train")
    for _ in range(400):
        content = json.loads(json.dumps(coco_of()))
        for _ in range(rng.integers(1, 5)):
            table = content[["images", "annotations", "categories"][rng.integers(3)]]
            place = int(rng.integers(len(table)))
            value = values[rng.integers(len(values))]
            if rng.random() < 0.2:
                table[place] = value
            elif isinstance(table[place], dict):
                key = str(rng.choice(list(table[place]) or ["id"]))
                table[place][key] = value
        file.write_text(json.dumps(content))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read_annotations(data, "train")
        except ValueError as error:
            assert FILE in str(error) and "\n" not in str(error)
            continue
        for picture in found.pictures.values():
            x, y, w, h = picture.boxes.T
            assert (w > 0).all() and (h > 0).all() and (x >= 0).all() and (y >= 0).all()
            assert (x + w <= picture.width).all() and (y + h <= picture.height).all()
            assert ((picture.labels >= 0) & (picture.labels < 2)).all() and np.isfinite(picture.areas).all()
