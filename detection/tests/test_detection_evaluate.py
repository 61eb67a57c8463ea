"""From the network's boxes to COCO's results and numbers: ids mapped in one place, runs and files alike."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from detection.configs import ROWS, Config
from detection.evaluate import as_predictions, as_widths, collect, read_truth, score, score_files, write
from detection.metric import evaluate_files
from engine.command_line import run_command

CATEGORIES = {90: "dog", 1: "cat", 44: "cup"}  # the classes 2, 0, 1
IMAGES = {12: (60, 80), 3: (100, 50), 7: (40, 40)}  # height, width; 7 has nothing in it
OBJECTS = [(12, 90, [10, 10, 20, 20]), (12, 1, [40, 5, 30.5, 40]), (3, 44, [0, 0, 50, 99])]
ALL = pytest.approx(100, abs=1e-9)  # the official precision has an epsilon of 2e-16 below its fraction line


class Detected(NamedTuple):
    """What the head gives for an image."""

    boxes: Tensor  # corners
    scores: Tensor
    labels: Tensor


class Oracle(torch.nn.Module):
    """A network that answers each image with what it was given, at most so many; its own head."""

    def __init__(self, answers: dict[int, Detected]) -> None:
        super().__init__()
        self.answers, self.head = answers, self

    def forward(self, batch: dict[str, Any]) -> list[int]:
        return batch["image_id"]

    def detect(
        self,
        outputs: list[int],
        original_size: list[tuple[int, int]],
        max_detections: int,
        *,
        max_overlap: float | None,
    ) -> list[Detected]:
        assert max_overlap is None
        assert [IMAGES[image_id] for image_id in outputs] == original_size
        return [Detected(*(value[:max_detections] for value in self.answers[image_id])) for image_id in outputs]


def detected(*rows: tuple[list[float], float, int]) -> Detected:
    """Of (corners, score, class)."""
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Detected(
        torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(scores).float(), torch.tensor(labels).long()
    )


def perfect() -> dict[int, Detected]:
    classes = sorted(CATEGORIES)
    return {
        image_id: detected(
            *(
                ([x, y, x + w, y + h], 0.5, classes.index(category))
                for owner, category, (x, y, w, h) in OBJECTS
                if owner == image_id
            )
        )
        for image_id in IMAGES
    }


def batches(size: int) -> list[dict[str, Any]]:
    ids = list(IMAGES)
    return [
        {"image_id": part, "original_size": [IMAGES[i] for i in part], "name": [f"{i}.jpg" for i in part]}
        for part in (ids[k : k + size] for k in range(0, len(ids), size))
    ]


def rows_of(answers: dict[int, Detected], config: Config, size: int = 1) -> list:
    return [row for batch in batches(size) for row in collect(Oracle(answers), batch, config)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A row on annotations without pictures."""
    table = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": h, "width": w} for i, (h, w) in IMAGES.items()],
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for k, (i, c, box) in enumerate(OBJECTS, 1)
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(table))
    base = ROWS["shapes_tiny_dr2net"]()
    data = replace(base.data, root=tmp_path, num_classes=3, test_split="val2017")
    return replace(base, data=data)


def truth_file(config: Config) -> Path:
    return config.data.root / "annotations" / "instances_val2017.json"


def change_truth(config: Config, change: Callable[[dict], Any]) -> None:
    content = json.loads(truth_file(config).read_text())
    change(content)
    truth_file(config).write_text(json.dumps(content))


def test_the_objects_as_detections_give_a_hundred_whatever_the_ids(config):
    metrics = score(rows_of(perfect(), config), read_truth(config), config)
    assert metrics == {"AP": ALL, "AP50": ALL, "AP75": ALL, "AP_S": ALL, "AP_M": ALL, "AR100": ALL}
    assert next(iter(metrics)) == "AP"


def test_classes_by_another_order_of_the_ids_give_nothing(config):
    wrong = {i: one._replace(labels=(one.labels + 1) % 3) for i, one in perfect().items()}
    assert score(rows_of(wrong, config), read_truth(config), config)["AP"] == 0


def test_metrics_do_not_depend_on_batches_their_order_or_images_seen_twice(config):
    rng = np.random.default_rng(0)
    answers = {}
    for image_id, (height, width) in IMAGES.items():
        corners = np.sort(rng.uniform(0, 1, (20, 2, 2)), axis=1).reshape(20, 4) * [width, height, width, height]
        noise = [(box, round(rng.random(), 1), int(rng.integers(3))) for box in corners.tolist()]
        right = perfect()[image_id]
        answers[image_id] = detected(
            *noise, *((box.tolist(), 0.4, int(label)) for box, _, label in zip(*right, strict=True))
        )
    truth = read_truth(config)
    rows = rows_of(answers, config)
    metrics = score(rows, truth, config)
    assert 0 < metrics["AP"] < 100
    assert score(rows_of(answers, config, 3), truth, config) == metrics
    assert score(rows[::-1] + rows[:1], truth, config) == metrics


def test_the_written_file_alone_gives_the_numbers_of_the_run(config, tmp_path):
    answers = perfect()
    answers[12] = detected(([9.3, 10, 30, 31.7], 0.3, 2), ([1, 2, 3.1, 4], 0.9, 2), ([40, 5, 70.5, 45], 1 / 3, 0))
    rows, truth = rows_of(answers, config), read_truth(config)
    path = write(tmp_path, rows, truth, config)
    content = json.loads(path.read_text())
    assert path.name == "detections.json"
    assert [(one["image_id"], one["category_id"]) for one in content] == [(3, 44), (12, 90), (12, 1), (12, 90)]
    assert content[0] == {"image_id": 3, "category_id": 44, "bbox": [0, 0, 50, 99], "score": 0.5}
    assert content[3]["bbox"] == pytest.approx([9.3, 10, 20.7, 21.7], rel=1e-6)
    alone = evaluate_files(truth_file(config), path)
    assert {name: value for name, value in alone.items() if value is not None} == score(rows, truth, config)
    assert alone["AP_L"] is None


def test_a_network_that_finds_nothing_writes_an_empty_list_and_scores_zero(config, tmp_path):
    rows, truth = rows_of({i: detected() for i in IMAGES}, config), read_truth(config)
    assert json.loads(write(tmp_path, rows, truth, config).read_text()) == []
    with pytest.warns(UserWarning, match="no predictions at all"):
        assert set(score(rows, truth, config).values()) == {0}


def test_at_most_so_many_detections_are_taken_as_the_configuration_says(config):
    answers = {i: detected(*[([0, 0, 9, 9], 0.5, 0)] * 500) for i in IMAGES}
    assert {len(row["scores"]) for row in rows_of(answers, config)} == {config.detection.max_detections}


def test_rows_are_small_arrays_of_widths(config):
    row = rows_of(perfect(), config)[0]
    assert row["image_id"] == 12 and row["boxes"].dtype == row["scores"].dtype == np.float32
    assert row["boxes"].tolist() == [[10, 10, 20, 20], [40, 5, 30.5, 40]] and row["labels"].tolist() == [2, 0]
    assert as_widths(np.array([[5, 5, 4, 9]], np.float32)).tolist() == [[5, 5, 0, 4]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_boxes_and_scores_that_are_not_finite_name_their_image(config, value):
    for wrong in (([0, 0, value, 9], 0.5, 0), ([0, 0, 9, 9], value, 0)):
        with pytest.raises(ValueError, match="3.jpg: the network's boxes or scores are not finite"):
            rows_of(perfect() | {3: detected(wrong)}, config)


def test_images_that_were_not_looked_at_are_told(config):
    rows = [row for row in rows_of(perfect(), config) if row["image_id"] != 3]
    with pytest.warns(UserWarning, match=r"1 of 3 images were not looked at \(ids 3\)"):
        metrics = score(rows, read_truth(config), config)
    assert metrics["AP"] == pytest.approx(200 / 3)


def test_a_class_that_the_annotations_do_not_have_is_named(config):
    rows = rows_of(perfect() | {3: detected(([0, 0, 9, 9], 0.5, 3))}, config)
    with pytest.raises(ValueError, match="image 3: the annotations have 3 classes, the network found 3 to 3; set"):
        as_predictions(rows, read_truth(config).category_ids)


def test_of_a_shortened_set_only_its_images_count(config):
    config = replace(config, data=replace(config.data, num_images=1))
    truth = read_truth(config)
    assert truth.boxes.images == (12,) and truth.category_ids == (1, 44, 90)
    rows = [row for row in rows_of(perfect(), config) if row["image_id"] == 12]
    assert score(rows, truth, config)["AP"] == ALL


def test_boxes_past_the_border_count_as_the_file_has_them(config):
    change_truth(config, lambda content: content["annotations"][0].update(bbox=[70, 10, 20, 20]))
    with pytest.warns(UserWarning, match="clipped"):
        truth = read_truth(config)
    assert truth.boxes.annotations[0]["bbox"] == [70, 10, 20, 20]


def test_truth_that_training_could_not_be_scored_with_is_refused_before_it(config):
    with pytest.raises(ValueError, match="has 3 classes, the configuration says 80"):
        read_truth(replace(config, data=replace(config.data, num_classes=80)))
    with pytest.raises(FileNotFoundError, match="instances_absent.json"):
        read_truth(replace(config, data=replace(config.data, test_split="absent")))
    change_truth(config, lambda content: content["annotations"].clear())
    with pytest.raises(ValueError, match=r"instances_val2017.json: the split 'val2017' has no objects to find"):
        read_truth(config)


def test_entries_left_out_of_training_are_left_out_of_the_truth(config):
    change_truth(config, lambda content: content["annotations"][0].update(category_id=5))
    with pytest.raises(ValueError, match="category"):
        read_truth(config)
    with pytest.warns(UserWarning, match="1 entries left out"):
        truth = read_truth(replace(config, data=replace(config.data, on_broken="skip")))
    assert [one["category_id"] for one in truth.boxes.annotations] == [1, 44]


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str:
    """The exit status of the command line, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    with pytest.raises(SystemExit) as stop:
        run_command(score_files)
    return stop.value.code or 0


def test_files_on_the_command_line_give_percent_and_one_line_for_bad_input(config, tmp_path, monkeypatch, capsys):
    path = write(tmp_path, rows_of(perfect(), config), read_truth(config), config)
    files = ("--ground-truth", str(truth_file(config)), "--predictions", str(path))
    assert run_main(monkeypatch, *files) == 0
    expected = ["AP 100.00", "AP50 100.00", "AP75 100.00", "AP_S 100.00", "AP_M 100.00", "AP_L -", "AR100 100.00"]
    assert capsys.readouterr().out.splitlines() == expected
    assert run_main(monkeypatch, *files, "--max-detections", "300") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "AR300 100.00"
    for words, what in (
        ((), "ground-truth"),
        (files[:2], "predictions"),
        ((*files[:3], "absent.json"), "absent.json: no such file"),
        ((*files[:3], files[1]), "is an object with images"),
        (("--ground-truth", files[3], *files[2:]), "not an object with images"),
        ((*files, "--max-detections", "0"), "max-detections"),
    ):
        said = run_main(monkeypatch, *words)
        assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said and what in said
