"""Ground truth and prediction files with something else in them: one line with the file's name, at once."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.metric import evaluate_files, evaluate_objects

TRUTH = {
    "info": {},
    "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 90, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 5, "category_id": 90, "bbox": [0, 0, 10, 10], "area": 60, "iscrowd": 0},
        {"id": 2, "image_id": 6, "category_id": 1, "bbox": [4, 4, 10, 10], "area": 90, "iscrowd": 1},
    ],
}
FOUND = [{"image_id": 5, "category_id": 90, "bbox": [0, 0, 10, 10], "score": 0.5}]
ABSENT = object()
ALL = pytest.approx(100, abs=1e-9)  # the official precision has an epsilon of 2e-16 below its fraction line


def changed(content: Any, *path: Any) -> Any:
    """A copy with the entry at the path replaced by its last element, or removed."""
    content = json.loads(json.dumps(content))
    *way, last, value = path
    place = content
    for key in way:
        place = place[key]
    if value is ABSENT:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    (tmp_path / "found.json").write_text(json.dumps(FOUND))
    return tmp_path / "truth.json", tmp_path / "found.json"


def test_the_files_that_the_others_are_changed_from_are_fine(files):
    assert evaluate_files(*files)["AP"] == ALL


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("annotations", 0, "id", 0), r"annotation 0 \(id 0\): ids begin at 1"),
        (("annotations", 0, "id", -4), "ids begin at 1"),
        (("annotations", 0, "id", 2), "annotation id 2 is there twice"),
        (("annotations", 0, "id", ABSENT), "annotation 0: 'id' is missing, it has area, bbox"),
        (("annotations", 0, "id", True), "annotation 0: id is True, not a whole number"),
        (("annotations", 0, "id", 2**60), "not a whole number below 2"),
        (("annotations", 1, "image_id", 7), r"1 ids in image_id that the ground truth does not list \(7\)"),
        (("annotations", 1, "image_id", "6"), "image_id is '6', not a whole number"),
        (("annotations", 1, "category_id", 2), r"1 ids in category_id .* \(2\), it lists 1, 90"),
        (("annotations", 1, "category_id", 1.0), "category_id is 1.0, not a whole number"),
        (("annotations", 1, "bbox", ABSENT), r"annotation 1 \(id 2\): 'bbox' is missing"),
        (("annotations", 1, "bbox", [1, 2, 3]), r"bbox is \[1, 2, 3\], want \[x, y, width, height\]"),
        (("annotations", 1, "bbox", {"x": 1}), "bbox is {'x': 1}, want"),
        (("annotations", 1, "bbox", [1, 2, "3", 4]), "four finite numbers"),
        (("annotations", 1, "bbox", [1, math.nan, 3, 4]), "four finite numbers"),
        (("annotations", 1, "bbox", [1, 2, math.inf, 4]), "four finite numbers"),
        (("annotations", 1, "bbox", [1, 2, 1e200, 4]), "four finite numbers"),
        (("annotations", 1, "bbox", [30, 30, -20, 10]), "negative width or height; write"),
        (("annotations", 1, "bbox", [30, 30, 20, -10]), "negative width or height; write"),
        (("annotations", 1, "area", 1e300), r"area is 1e\+300, not a finite number"),
        (("annotations", 1, "area", -1), "area is -1, not a finite number"),
        (("annotations", 1, "area", "big"), "area is 'big'"),
        (("annotations", 1, "area", math.nan), "area is nan"),
        (("annotations", 1, "iscrowd", 2), "iscrowd is 2, want 0 or 1"),
        (("annotations", 1, "iscrowd", "0"), "iscrowd is '0'"),
        (("annotations", 1, 3), "annotation 1: is 3, not an object"),
        (("annotations", {}), "has no list 'annotations'"),
        (("annotations", ABSENT), "has no list 'annotations', it has categories, images, info; is it of another"),
        (("annotations", []), "no objects; is it the right file"),
        (("annotations", 0, "iscrowd", 1), "no objects; is it the right file"),
        (("images", 1, "id", 5), "image id 5 is there twice"),
        (("images", 1, "id", ABSENT), "image 1: 'id' is missing, it has file_name"),
        (("images", 1, None), "image 1: is None, not an object"),
        (("images", []), "lists no image"),
        (("categories", []), "lists no category"),
        (("categories", 1, "id", 1), "category id 1 is there twice"),
        (("categories", ["cat"]), "category 0: is 'cat', not an object"),
    ],
)
def test_ground_truth_that_cannot_be_counted_is_named(path, message, files):
    files[0].write_text(json.dumps(changed(TRUTH, *path)))
    with pytest.raises(ValueError, match=message) as error:
        evaluate_files(*files)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((0, "image_id", 99), r"image_id that the ground truth does not list \(99\), it lists 5, 6; map them back"),
        ((0, "category_id", 2), r"category_id that the ground truth does not list \(2\), it lists 1, 90; map"),
        ((0, "category_id", ABSENT), "prediction 0: 'category_id' is missing"),
        ((0, "image_id", "a.jpg"), "prediction 0: image_id is 'a.jpg'"),
        ((0, "score", math.nan), "prediction 0: score is nan, not a finite number"),
        ((0, "score", -math.inf), "score is -inf"),
        ((0, "score", "high"), "score is 'high'"),
        ((0, "score", True), "score is True"),
        ((0, "score", ABSENT), "'score' is missing"),
        ((0, "bbox", [10, 10, -10, -10]), "prediction 0: bbox .* has a negative width or height"),
        ((0, "bbox", [10, 10, 10, -1]), "prediction 0: bbox .* has a negative width or height"),
        ((0, "bbox", [10, 10, 0]), "want"),
        ((0, "bbox", [[0, 0, 1, 1]] * 4), "four finite numbers"),
        ((0, [5, 90, 0.5]), "prediction 0: is"),
    ],
)
def test_predictions_that_cannot_be_counted_are_named(path, message, files):
    files[1].write_text(json.dumps(changed(FOUND, *path)))
    with pytest.raises(ValueError, match=message) as error:
        evaluate_files(*files)
    assert str(error.value).startswith(str(files[1])) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"database": {"v1": {"subset": "validation", "annotations": []}}}, "no list 'images', it has database; is it"),
        ({"version": "1", "results": {}}, "has no list 'images', it has results, version"),
        ([], r"is \[\], not an object with images"),
        (None, "is None, not an object"),
        ("truth", "is 'truth', not an object"),
        ({"images": "many"}, "has no list 'images', it has images"),
        (FOUND, "not an object with images"),
    ],
)
def test_ground_truth_of_another_task_is_named(content, message, files):
    files[0].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        evaluate_files(*files)


@pytest.mark.parametrize("content", [TRUTH, {"results": {"v1": []}}, {}, 3, "found", None])
def test_predictions_that_are_no_list_are_named(content, files):
    files[1].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r'found.json: is .*, not a list of {"image_id", "category_id", "bbox"'):
        evaluate_files(*files)


def test_files_that_are_no_json_are_named(files):
    for content, message in (
        (b"", "cannot be read as JSON"),
        (b'{"images": [', "cannot be read as JSON"),
        (json.dumps(FOUND).encode("utf-16"), "not in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "not in UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"[1" + b"0" * 10_000 + b"]", "has 10001 digits"),
    ):
        for k, file in enumerate(files):
            whole = file.read_bytes()
            file.write_bytes(content)
            with pytest.raises(ValueError, match=rf"{file.name}: .*{message}"):
                evaluate_files(*files)
            file.write_bytes(whole)
            assert k in (0, 1)
    for absent in ((files[0], "none.json"), ("none.json", files[1])):
        with pytest.raises(FileNotFoundError, match="none.json: no such file"):
            evaluate_files(*absent)


def test_a_byte_order_mark_is_not_content(files):
    for file in files:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert evaluate_files(*files)["AP"] == ALL


def test_shares_of_the_picture_are_no_boxes_of_either_file(files):
    shares = [0.25, 0.25, 0.5, 0.5]
    files[1].write_text(json.dumps(changed(FOUND, 0, "bbox", shares)))
    with pytest.raises(ValueError, match=rf"{files[1].name}: all boxes are within one pixel, .* shares of the picture"):
        evaluate_files(*files)
    content = changed(changed(TRUTH, "annotations", 0, "bbox", shares), "annotations", 1, "bbox", shares)
    with pytest.raises(ValueError, match="ground truth: all boxes are within one pixel"):
        evaluate_objects(content, FOUND)
    # a network may have collapsed into the corner; that is no reason to end its run
    assert evaluate_objects(TRUTH, changed(FOUND, 0, "bbox", shares))["AP"] == 0


def test_predictions_for_a_part_of_the_images_are_told():
    content = changed(TRUTH, "annotations", 1, "iscrowd", 0)
    content["images"].append({"id": 7})
    content["annotations"].append({**content["annotations"][0], "id": 3, "image_id": 7})
    with pytest.warns(UserWarning, match="2 of 3 images with objects have no prediction; all of these are missed"):
        evaluate_objects(content, FOUND)


def test_numbers_of_arrays_are_numbers():
    found = [{"image_id": np.int64(5), "category_id": np.int32(90), "score": np.float32(0.5)}]
    found[0]["bbox"] = list(np.array([0, 0, 10, 10], np.float32))
    assert evaluate_objects(TRUTH, found)["AP"] == ALL


def test_other_keys_of_predictions_are_not_looked_at():
    assert (
        evaluate_objects(TRUTH, [{**FOUND[0], "id": 0, "area": -1, "segmentation": "none", "iscrowd": 1}])["AP"] == ALL
    )


ODD = [None, True, 0, -1, 1e308, math.nan, math.inf, "", "x", [], {}, [1], {"id": 1}, 10**300, 2**53, 1.5, b"x"]
ODD += [[None] * 4, [1, 2, 3, 4], [[]], [1, 1, 1e9, 1e9], [-1e9] * 4, -(2**63)]


def places(content: Any, way: tuple = ()) -> Iterator[tuple]:
    """The way to every entry."""
    yield way
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from places(value, (*way, key))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_entry_replaced_by_anything_is_counted_or_named():
    counted = 0
    for which, content in enumerate((TRUTH, FOUND)):
        for way in places(content):
            for value in ODD:
                pair: list[Any] = [TRUTH, FOUND]
                pair[which] = changed(content, *way, value) if way else value
                try:
                    metrics = evaluate_objects(*pair)
                except ValueError as error:
                    assert "\n" not in str(error) and len(str(error)) < 700
                else:
                    counted += 1
                    assert all(one is None or 0 <= one <= ALL.expected + 1e-6 for one in metrics.values())
    assert counted > 100
