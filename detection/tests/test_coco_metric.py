"""COCO's metric: a plain reference written from the definition, the official summary, and each disputed point."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.metric import (
    check_ground_truth,
    check_predictions,
    evaluate_boxes,
    evaluate_files,
    evaluate_objects,
    in_order,
)

# The official script's floats: .05 k and .01 k would decide some ties otherwise.
THRESHOLDS, RECALLS = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
RANGES = {"AP": (0, 1e10), "AP_S": (0, 32**2), "AP_M": (32**2, 96**2), "AP_L": (96**2, 1e10)}
# The official precision has an epsilon of 2e-16 below its fraction line.
ALL, HALF = pytest.approx(100, abs=1e-9), pytest.approx(50, abs=1e-9)
EMPTY = "no predictions at all"


def overlap(found: list, given: dict) -> float:
    """IoU; with a crowd region the share of the detection that is inside."""
    (x, y, w, h), (a, b, c, d) = found, given["bbox"]
    inside = max(0, min(x + w, a + c) - max(x, a)) * max(0, min(y + h, b + d) - max(y, b))
    whole = w * h if given["iscrowd"] else w * h + c * d - inside
    return inside / whole if inside > 0 else 0.0


def judge(given: list[dict], found: list[dict], threshold: float, low: float, high: float) -> list[tuple]:
    """(score, True or False or None for ignored) of the detections of a class in an image, best first."""
    ignored = [bool(one["iscrowd"]) or not low <= one["area"] <= high for one in given]
    taken, judged = set(), []
    for one in found:
        best = None
        for wanted in (False, True):  # what is ignored only if nothing else fits
            best_overlap = threshold
            for k, other in enumerate(given):
                if ignored[k] != wanted or (k in taken and not other["iscrowd"]):
                    continue
                if (value := overlap(one["bbox"], other)) >= best_overlap:  # of equal ones the last
                    best, best_overlap = k, value
            if best is not None:
                break
        if best is None:
            outside = not low <= one["bbox"][2] * one["bbox"][3] <= high
            judged.append((one["score"], None if outside else False))
        else:
            taken.add(best)
            judged.append((one["score"], None if ignored[best] else True))
    return judged


def curve(truth: dict, found: list[dict], category: int, threshold: float, area: tuple, top: int) -> tuple | None:
    """(mean interpolated precision, last recall) of a class; None without ground truth."""
    low, high = area
    pooled, count = [], 0
    for image in sorted(entry["id"] for entry in truth["images"]):
        given = [a for a in truth["annotations"] if a["image_id"] == image and a["category_id"] == category]
        own = [a for a in found if a["image_id"] == image and a["category_id"] == category]
        own = sorted(own, key=lambda one: -one["score"])[:top]
        count += sum(not one["iscrowd"] and low <= one["area"] <= high for one in given)
        pooled += judge(given, own, threshold, low, high)
    if not count:
        return None
    points, hits, misses = [], 0, 0
    for _, hit in sorted(pooled, key=lambda one: -one[0]):
        hits, misses = hits + (hit is True), misses + (hit is False)
        points.append((hits / count, hits / (hits + misses) if hits + misses else 0.0))
    heights = [max((p for r, p in points if r >= recall), default=0.0) for recall in RECALLS]
    return sum(heights) / len(RECALLS), hits / count


def reference(truth: dict, found: list[dict], top: int) -> dict:
    """The metrics by the definition: nothing shared with the implementation, nothing quick."""

    def mean(thresholds: list, area: tuple, what: int) -> float | None:
        categories = [category["id"] for category in truth["categories"]]
        curves = [curve(truth, found, category, t, area, top) for category in categories for t in thresholds]
        values = [one[what] for one in curves if one is not None]
        return 100 * math.fsum(values) / len(values) if values else None

    result = {name: mean(THRESHOLDS, area, 0) for name, area in RANGES.items()}
    result |= {"AP50": mean([0.5], RANGES["AP"], 0), "AP75": mean([THRESHOLDS[5]], RANGES["AP"], 0)}
    return {**result, f"AR{top}": mean(THRESHOLDS, RANGES["AP"], 1)}


def random_case(rng: np.random.Generator) -> tuple[dict, list[dict]]:
    """A few images out of order, crowds, areas of masks, classes and images without objects; tied scores and boxes."""
    images = rng.permutation(50)[: rng.integers(1, 5)].tolist()
    categories = rng.permutation(90)[: rng.integers(1, 4)].tolist()
    annotations, found = [], []
    for number in range(rng.integers(1, 14)):
        x, y, w, h = (int(v) for v in (*rng.integers(0, 60, 2), *rng.integers(4, 14, 2) ** 2))
        area = w * h if rng.random() < 0.6 else int(w * h * rng.uniform(0.3, 1))
        annotations.append(
            {
                "id": 100 - number,
                "image_id": int(rng.choice(images)),
                "category_id": int(rng.choice(categories)),
                "bbox": [x, y, w, h],
                "area": float(rng.choice([area, 32**2, 96**2], p=[0.9, 0.05, 0.05])),
                "iscrowd": int(number > 0 and rng.random() < 0.2),
            }
        )
    for _ in range(rng.integers(0, 60)):
        near = annotations[rng.integers(len(annotations))]
        x, y, w, h = (np.array(near["bbox"]) + rng.integers(-3, 4, 4) * (rng.random() < 0.7)).tolist()
        away = rng.random(2) < 0.15
        found.append(
            {
                "image_id": int(rng.choice(images)) if away[0] else near["image_id"],
                "category_id": int(rng.choice(categories)) if away[1] else near["category_id"],
                "bbox": [x, y, w, h],
                "score": float(np.round(rng.random(), 1)),
            }
        )
    table = {"images": [{"id": i} for i in images], "categories": [{"id": i, "name": f"c{i}"} for i in categories]}
    return {**table, "annotations": annotations}, found


def case(*boxes: list, areas: dict | None = None, crowd: tuple = ()) -> dict:
    """Ground truth of one class; image k has the k-th list of boxes."""
    flat = [(k, box) for k, own in enumerate(boxes) for box in own]
    return {
        "images": [{"id": k} for k in range(len(boxes))],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [
            {"id": n, "image_id": k, "category_id": 7, "bbox": box, "area": (areas or {}).get(n, box[2] * box[3])}
            | {"iscrowd": int(n in crowd)}
            for n, (k, box) in enumerate(flat, 1)
        ],
    }


def hit(box: list, score: float = 0.9, image: int = 0) -> dict:
    return {"image_id": image, "category_id": 7, "bbox": box, "score": score}


@pytest.mark.filterwarnings(f"ignore:.*{EMPTY}")
@pytest.mark.parametrize("top", [100, 3])
def test_sixty_random_files_equal_the_definition(top):
    rng = np.random.default_rng(top)
    seen = []
    for _ in range(60):
        truth, found = random_case(rng)
        metrics, expected = evaluate_objects(truth, found, top), reference(truth, found, top)
        assert metrics == {name: pytest.approx(value, abs=1e-9) for name, value in expected.items()}
        seen.append(metrics)
    assert len({metrics["AP"] for metrics in seen}) > 40, "the cases differ"
    assert any(metrics["AP_S"] is None for metrics in seen) and any(metrics["AP_L"] for metrics in seen)


def test_ten_random_files_equal_the_official_summary(tmp_path):
    rng = np.random.default_rng(7)
    for _ in range(10):
        truth, found = random_case(rng)
        found = found or [hit([0, 0, 5, 5]) | {"category_id": truth["categories"][0]["id"]}]
        found[0]["image_id"] = truth["images"][0]["id"]
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        (tmp_path / "found.json").write_text(json.dumps(found))
        with contextlib.redirect_stdout(io.StringIO()):
            table = COCO(str(tmp_path / "truth.json"))
            official = COCOeval(table, table.loadRes(str(tmp_path / "found.json")), "bbox")
            official.evaluate()
            official.accumulate()
            official.summarize()
        metrics = evaluate_files(tmp_path / "truth.json", tmp_path / "found.json")
        assert list(metrics) == ["AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR100"]
        expected = [*official.stats[:6].tolist(), float(official.stats[8])]
        assert [-100 if value is None else value for value in metrics.values()] == [100 * value for value in expected]


def test_ground_truth_as_detections_gives_a_hundred(tmp_path):
    rng, sizes = np.random.default_rng(3), set()
    for _ in range(20):
        truth, _ = random_case(rng)
        found = [{**one, "score": 0.5} for one in truth["annotations"] if not one["iscrowd"]]
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        (tmp_path / "found.json").write_text(json.dumps(found))
        metrics = evaluate_files(str(tmp_path / "truth.json"), str(tmp_path / "found.json"))
        assert all(value in (None, ALL) for value in metrics.values())
        sizes |= {name for name, value in metrics.items() if value is not None}
    assert sizes == set(metrics)


def test_the_scorer_says_nothing_and_changes_nothing_that_it_was_given(capsys):
    truth, found = random_case(np.random.default_rng(1))
    before = json.dumps([truth, found])
    evaluate_objects(truth, found)
    assert capsys.readouterr() == ("", "")
    assert json.dumps([truth, found]) == before
    checked = check_ground_truth(truth, "truth")
    counted = check_predictions(found, checked, "found")
    before = json.dumps([checked, counted])
    assert evaluate_boxes(checked, counted) == evaluate_boxes(checked, counted)
    assert json.dumps([checked, counted]) == before


def test_the_size_class_is_that_of_the_area_not_of_the_box():
    metrics = evaluate_objects(case([[0, 0, 40, 40]], areas={1: 900}), [hit([0, 0, 40, 40])])
    assert (metrics["AP_S"], metrics["AP_M"], metrics["AP_L"]) == (ALL, None, None)
    metrics = evaluate_objects(case([[0, 0, 32, 32]]), [hit([0, 0, 32, 32])])
    assert (metrics["AP_S"], metrics["AP_M"], metrics["AP_L"]) == (ALL, ALL, None)


def test_detections_in_a_crowd_region_do_not_count():
    truth = case([[0, 0, 10, 10], [50, 0, 100, 100]], crowd=(2,))
    inside = [hit([60 + 9 * k, 10, 8, 8], 0.95) for k in range(5)]
    assert evaluate_objects(truth, [hit([0, 0, 10, 10]), *inside])["AP"] == ALL
    assert evaluate_objects(case([[0, 0, 10, 10]]), [hit([0, 0, 10, 10]), *inside])["AP"] == pytest.approx(100 / 6)


def test_detections_in_an_image_without_objects_are_false():
    metrics = evaluate_objects(case([[0, 0, 10, 10]], []), [hit([0, 0, 10, 10], 0.5), hit([0, 0, 10, 10], 0.9, 1)])
    assert metrics["AP"] == HALF


def test_a_class_without_objects_is_left_out_and_one_without_detections_counts_zero():
    truth = case([[0, 0, 10, 10]])
    truth["categories"] += [{"id": 8, "name": "other"}, {"id": 9, "name": "absent"}]
    truth["annotations"].append({**truth["annotations"][0], "id": 2, "category_id": 8})
    stray = {**hit([0, 0, 10, 10]), "category_id": 9}
    assert evaluate_objects(truth, [hit([0, 0, 10, 10]), stray])["AP"] == HALF


def test_more_detections_per_image_count_where_asked():
    boxes = [[12 * (k % 15), 12 * (k // 15), 10, 10] for k in range(200)]
    truth, found = case(boxes), [hit(box) for box in boxes]
    few, many = evaluate_objects(truth, found), evaluate_objects(truth, found, 300)
    # Half of the recall points: 0 to .5 of 101.
    assert few["AP"] == pytest.approx(100 * 51 / 101) and few["AR100"] == HALF
    assert many["AP"] == ALL and many["AR300"] == ALL and "AR100" not in many
    with pytest.raises(ValueError, match="max_detections 0"):
        evaluate_objects(truth, found, 0)


def test_no_detections_at_all_are_zeros_with_a_warning():
    with pytest.warns(UserWarning, match=EMPTY):
        metrics = evaluate_objects(case([[0, 0, 10, 10]]), [])
    assert metrics == {"AP": 0, "AP50": 0, "AP75": 0, "AP_S": 0, "AP_M": None, "AP_L": None, "AR100": 0}


def test_results_are_ordered_by_image_and_score_and_ties_stay():
    found = [hit([k, 0, 1, 1], score, image) for k, (score, image) in enumerate([(0.1, 2), (0.5, 1), (0.5, 1), (1, 2)])]
    assert [one["bbox"][0] for one in in_order(found)] == [1, 2, 3, 0]
    right, wrong = hit([0, 0, 10, 10], 0.5), hit([50, 50, 9, 9], 0.5)
    truth = case([[0, 0, 10, 10]])
    for pair, expected in (([right, wrong], ALL), ([wrong, right], HALF)):
        assert evaluate_objects(truth, pair)["AP"] == expected
        assert evaluate_objects(truth, in_order(pair))["AP"] == expected


def test_a_box_without_height_counts_as_an_object_that_nobody_finds():
    truth = case([[0, 0, 10, 10], [5, 5, 4, 0]])
    with pytest.warns(UserWarning, match="of 2 annotations 1 have no width or height"):
        metrics = evaluate_objects(truth, [hit([0, 0, 10, 10]), hit([5, 5, 4, 0])])
    assert metrics["AR100"] == HALF


def test_missing_areas_and_crowd_marks_are_filled_in_and_told(tmp_path: Path):
    truth = case([[0, 0, 10, 10], [20, 0, 40, 40]])
    expected = evaluate_objects(truth, [hit([0, 0, 10, 10]), hit([20, 0, 40, 40])])
    for one in truth["annotations"]:
        del one["iscrowd"]
    del truth["annotations"][1]["area"]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps([hit([0, 0, 10, 10]), hit([20, 0, 40, 40])]))
    said = r"truth.json: of 2 annotations 1 have no area: width times height is taken; 2 have no iscrowd: 0 is taken"
    with pytest.warns(UserWarning, match=said):
        assert evaluate_files(tmp_path / "truth.json", tmp_path / "found.json") == expected


def test_categories_come_by_id_and_of_some_images_only_their_objects_remain():
    table = case([[0, 0, 10, 10]], [[5, 5, 10, 10]], [])
    table["categories"] = [{"id": 90, "name": "dog"}, {"id": 7, "name": "thing"}, {"id": 8}]
    truth = check_ground_truth(table, "truth")
    assert list(truth.categories.items()) == [(7, "thing"), (8, "8"), (90, "dog")]
    part = truth.of_images([2, 1, 99])
    assert part.images == (1, 2) and [one["id"] for one in part.annotations] == [2]
    assert len(truth.annotations) == 2
    with pytest.raises(ValueError, match="the ground truth has no objects"):
        evaluate_boxes(truth.of_images([2]), [])
