"""Predictions of a run on YOLO's files, whose ids nobody else has, against COCO's file of the same pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.configs import ROWS
from detection.evaluate import Found, read_truth, write
from detection.metric import evaluate_files
from detection.renumber import with_ids_of
from detection.tests.toy_pictures import write_yolo

FILES = {70: "val/b.PNG", 12: "val/a.jpg", 33: "val/c.bmp"}  # of COCO's file; ours are 1 a, 2 b, 3 c
NAMES = {1: "dog", 2: "cat"}  # ours are 0 cat, 1 dog


def entry(image: int, file: str, category: int, name: str) -> dict[str, Any]:
    return {"image_id": image, "file_name": file, "category_id": category, "category": name, "score": 0.5}


def test_names_decide_where_ids_are_others() -> None:
    with pytest.warns(UserWarning) as told:
        found = with_ids_of([entry(1, "a.jpg", 0, "cat"), entry(2, "b.PNG", 1, "dog")], FILES, NAMES, "d.json")
    assert [(one["image_id"], one["category_id"]) for one in found] == [(12, 2), (70, 1)]
    said = [str(one.message) for one in told]
    assert said[0] == (
        "d.json: its image_id are others than the ground truth's ('a.jpg' is 1 there, 12 in the ground truth): "
        "file_name decides"
    )
    assert "its category_id are others" in said[1] and "category decides" in said[1]


def test_what_agrees_or_has_no_names_stays(recwarn: pytest.WarningsRecorder) -> None:
    fine = [entry(12, "a.jpg", 2, "cat"), entry(70, "b.PNG", 1, "dog")]
    bare = [{"image_id": 12, "category_id": 2, "score": 0.5}]
    for content in (fine, bare, [], [5], {"images": []}, None, [*fine, *bare]):
        assert with_ids_of(content, FILES, NAMES, "d.json") == content
    assert with_ids_of(fine, {}, {}, "d.json") == fine
    assert not recwarn.list


def test_another_picture_under_a_known_id_is_an_error_and_not_a_low_score() -> None:
    with pytest.raises(
        ValueError, match=r"d.json: image_id 12 is 'z.jpg' there and 'a.jpg' in the ground truth"
    ) as error:
        with_ids_of([entry(12, "z.jpg", 2, "cat"), entry(70, "b.PNG", 1, "dog")], FILES, NAMES, "d.json")
    assert "\n" not in str(error.value)
    twice = {1: "one/a.jpg", 2: "two/a.jpg"}
    with pytest.raises(ValueError, match="which has not exactly one 'a.jpg'"):
        with_ids_of([entry(1, "b.jpg", 2, "cat"), entry(2, "a.jpg", 1, "dog")], twice, NAMES, "d.json")
    # two pictures of one name in the predictions are not one picture of the ground truth
    with pytest.raises(ValueError, match="not exactly one 'a.jpg'"):
        with_ids_of([entry(70, "a.jpg", 2, "cat"), entry(12, "a.jpg", 1, "dog")], FILES, NAMES, "d.json")


def test_a_run_on_yolo_files_scores_the_same_against_coco_of_the_same_pictures(tmp_path: Path) -> None:
    data = write_yolo(tmp_path / "own")
    config = replace(ROWS["shapes_tiny_dr2net"](), data=data)
    truth = read_truth(config)
    objects = truth.boxes.annotations
    rows = [
        Found(
            image_id=image,
            boxes=np.array([one["bbox"] for one in objects if one["image_id"] == image], np.float32).reshape(-1, 4),
            scores=np.full(sum(one["image_id"] == image for one in objects), 0.5, np.float32),
            labels=np.array([one["category_id"] for one in objects if one["image_id"] == image], np.int64),
        )
        for image in truth.boxes.images
    ]
    predictions = write(tmp_path, rows, truth, config)
    ids = {Path(name).name: number for number, name in FILES.items()}
    classes = {"cat": 2, "dog": 1}
    coco = {
        "images": [{"id": number, "file_name": name, "width": 160, "height": 120} for number, name in FILES.items()],
        "categories": [{"id": number, "name": name} for name, number in classes.items()],
        "annotations": [
            {
                **one,
                "image_id": ids[truth.boxes.files[one["image_id"]]],
                "category_id": classes[truth.boxes.categories[one["category_id"]]],
            }
            for one in objects
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    with pytest.warns(UserWarning, match="file_name decides"):
        assert evaluate_files(tmp_path / "coco.json", predictions)["AP"] == pytest.approx(100)
