"""The ActivityNet metric: each disputed point, and a straightforward reference in plain Python floats."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from action_detection.metric import ACTIVITYNET_TIOU, Rows, evaluate_files, evaluate_rows

Truth = list[tuple[str, str, float, float]]
Found = list[tuple[str, str, float, float, float]]


def reference(truth: Truth, found: Found, tiou: list[float]) -> list[float]:
    """mAP per threshold, by the definition: nothing shared with the implementation, nothing quick."""
    classes = sorted({row[1] for row in truth})
    result = []
    for threshold in tiou:
        total = 0.0
        for label in classes:
            free = [row for row in truth if row[1] == label]
            count, hits, curve = len(free), 0, []
            own = sorted((row for row in found if row[1] == label), key=lambda row: -row[4])
            for rank, (video, _, start, end, _) in enumerate(own, 1):
                best, best_row = 0.0, None
                for row in free:
                    inside = max(0.0, min(end, row[3]) - max(start, row[2]))
                    union = (row[3] - row[2]) + (end - start) - inside
                    overlap = inside / union if union > 0 else 0.0
                    if row[0] == video and overlap >= threshold and overlap > best:
                        best, best_row = overlap, row
                if best_row is not None:
                    free.remove(best_row)
                    hits += 1
                    curve.append((hits / count, hits / rank))
            recalls = [0.0] + [recall for recall, _ in curve]
            for k, (recall, _) in enumerate(curve):
                total += (recall - recalls[k]) * max(precision for _, precision in curve[k:])
        result.append(total / len(classes))
    return result


def rows(entries: list[tuple]) -> Rows:
    names = list(dict.fromkeys(entry[0] for entry in entries))
    return Rows(
        names,
        np.array([names.index(entry[0]) for entry in entries], dtype=np.int64),
        [entry[1] for entry in entries],
        np.array([entry[2:4] for entry in entries], dtype=np.float64).reshape(-1, 2),
        np.array([entry[4] if len(entry) > 4 else 0 for entry in entries], dtype=np.float64),
    )


def mean_ap(truth: Truth, found: Found, tiou: list[float]) -> list[float]:
    return evaluate_rows(rows(truth), rows(found), tiou)["mAP"]


def random_case(rng: np.random.Generator) -> tuple[Truth, Found]:
    """A few videos and classes; predictions scattered around the ground truth, some in unknown videos and classes."""
    num_videos, num_classes = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    truth, found = [], []
    for video in range(num_videos):
        for _ in range(rng.integers(0, 5)):
            start = rng.uniform(0, 50)
            truth.append((f"v{video}", f"c{rng.integers(num_classes)}", start, start + rng.exponential(10)))
    truth = truth or [("v0", "c0", 1.0, 2.0)]
    for _ in range(rng.integers(0, 40)):
        video, label, start, end = truth[rng.integers(len(truth))]
        start, end = np.sort(np.array([start, end]) + rng.normal(0, 3, 2))
        other = rng.random() < 0.2
        video = f"v{rng.integers(num_videos + 1)}" if other else video
        label = f"c{rng.integers(num_classes + 1)}" if rng.random() < 0.2 else label
        found.append((video, label, float(start), float(end), float(rng.random())))
    return truth, found


def write(folder: Path, truth: Truth, found: Found, *, subset: str = "validation") -> tuple[Path, Path]:
    database: dict = {}
    for video, label, start, end in truth:
        entry = database.setdefault(video, {"duration": 99.0, "subset": subset, "annotations": []})
        entry["annotations"].append({"label": label, "segment": [start, end]})
    results: dict = {}
    for video, label, start, end, score in found:
        results.setdefault(video, []).append({"label": label, "score": score, "segment": [start, end]})
    paths = folder / "gt.json", folder / "predictions.json"
    paths[0].write_text(json.dumps({"version": "1", "taxonomy": [], "database": database}))
    paths[1].write_text(json.dumps({"version": "1", "results": results, "external_data": {}}))
    return paths


def test_a_thousand_random_cases_equal_the_reference():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        truth, found = random_case(rng)
        tiou = np.sort(rng.uniform(0.05, 1, 4)).tolist()
        # The sums run in another order: a few last bits.
        assert mean_ap(truth, found, tiou) == pytest.approx(reference(truth, found, tiou), rel=1e-13, abs=1e-15)


def test_files_give_the_numbers_of_their_rows(tmp_path):
    truth, found = random_case(np.random.default_rng(5))
    known = {row[1] for row in truth}
    found = [row for row in found if row[1] in known]
    result = evaluate_files(*write(tmp_path, truth, found), tiou=(0.3, 0.5), subset="validation")
    assert result["mAP"] == pytest.approx(reference(truth, found, [0.3, 0.5]), rel=1e-13)
    assert result["average_mAP"] == pytest.approx(sum(result["mAP"]) / 2)
    assert len(evaluate_files(*write(tmp_path, truth, found))["mAP"]) == 10


def test_tiou_equal_to_the_threshold_is_a_hit():
    truth, found = [("v", "a", 0, 10)], [("v", "a", 0, 5, 0.9)]
    assert mean_ap(truth, found, [0.5, np.nextafter(0.5, 1)]) == [1.0, 0.0]


def test_each_prediction_takes_the_best_that_is_still_free_not_only_the_best():
    # Both overlap the first action most; the second prediction goes down to the second action.
    truth = [("v", "a", 0, 10), ("v", "a", 4, 14)]
    found = [("v", "a", 0, 10, 0.9), ("v", "a", 1, 11, 0.8)]
    assert mean_ap(truth, found, [0.5, 0.6]) == [1.0, 0.5]


def test_an_action_is_found_once():
    truth, found = [("v", "a", 0, 10)], [("v", "a", 0, 10, 0.9), ("v", "a", 0, 10, 0.8)]
    assert mean_ap(truth, found, [0.5]) == [1.0]
    assert mean_ap([*truth, ("w", "a", 0, 1)], found, [0.5]) == [0.5]


def test_thresholds_are_matched_independently():
    # At .5 the first prediction takes what the second would need; at .8 it takes nothing.
    truth = [("v", "a", 0, 10)]
    found = [("v", "a", 0, 6, 0.9), ("v", "a", 0, 9, 0.8)]
    assert mean_ap(truth, found, [0.5, 0.8]) == [1.0, 0.5]
    assert mean_ap(truth, found, [0.8, 0.5]) == [0.5, 1.0]


def test_precision_is_interpolated_from_the_right():
    truth = [("v", "a", 0, 1), ("v", "a", 2, 3)]
    found = [("v", "a", 8, 9, 0.9), ("v", "a", 0, 1, 0.8), ("v", "a", 2, 3, 0.7)]  # precision 0, 1/2, 2/3
    assert mean_ap(truth, found, [0.5]) == [2 / 3]


def test_a_class_without_predictions_counts_zero_and_a_class_without_ground_truth_nothing():
    truth = [("v", "a", 0, 1), ("v", "b", 0, 1)]
    assert mean_ap(truth, [("v", "a", 0, 1, 0.5)], [0.5]) == [0.5]
    assert mean_ap(truth[:1], [("v", "a", 0, 1, 0.5), ("v", "b", 0, 1, 0.9)], [0.5]) == [1.0]


def test_predictions_in_videos_without_ground_truth_are_false():
    truth, hit = [("v", "a", 0, 1), ("w", "b", 0, 1)], ("v", "a", 0, 1, 0.5)
    assert mean_ap(truth, [hit, ("unknown", "a", 0, 1, 0.9), ("w", "b", 0, 1, 0.5)], [0.5]) == [0.75]
    # of the subset, but without an action of this class
    assert mean_ap(truth, [hit, ("w", "a", 0, 1, 0.9), ("w", "b", 0, 1, 0.5)], [0.5]) == [0.75]


def test_of_equal_scores_the_earlier_goes_first():
    truth, right, wrong = [("v", "a", 0, 1)], ("v", "a", 0, 1, 0.5), ("v", "a", 5, 6, 0.5)
    assert mean_ap(truth, [right, wrong], [0.5]) == [1.0]
    assert mean_ap(truth, [wrong, right], [0.5]) == [0.5]
    # more rows than a sort that is stable only for short inputs would forgive
    assert mean_ap(truth, [right] + [wrong] * 100, [0.5]) == [1.0]


def test_of_equal_overlaps_the_later_ground_truth_goes_first():
    # The first prediction overlaps both by 1/3; the second fits the first only.
    truth = [("v", "a", 0, 2), ("v", "a", 3, 5)]
    found = [("v", "a", 1, 4, 0.9), ("v", "a", 0, 2, 0.8)]
    assert mean_ap(truth, found, [0.25]) == [1.0]
    assert mean_ap(truth[::-1], found, [0.25]) == [0.5]


def test_duplicate_ground_truth_stays_unless_asked(tmp_path):
    truth = [("v", "a", 0, 10), ("v", "a", 0.0005, 10), ("v", "b", 0, 10), ("v", "b", 3, 3)]
    found = [("v", "a", 0, 10, 0.9), ("v", "b", 0, 10, 0.9)]
    paths = write(tmp_path, truth, found)
    assert evaluate_files(*paths, tiou=[0.5])["mAP"] == [0.5]
    assert evaluate_files(*paths, tiou=[0.5], drop_duplicates=True)["mAP"] == [1.0]


def test_segments_without_length_hit_nothing_and_boundaries_beyond_the_end_are_taken_as_they_are(tmp_path):
    truth = [("v", "a", 3, 3), ("v", "a", 90, 200)]
    found = [("v", "a", 3, 3, 0.9), ("v", "a", -5, 300, 0.8)]
    paths = write(tmp_path, truth, found)
    assert evaluate_files(*paths, tiou=[0.3])["mAP"] == [0.25]  # 110 / 305


def test_a_label_of_another_subset_counts_nowhere_and_an_unknown_label_is_named(tmp_path):
    paths = write(tmp_path, [("v", "a", 0, 1)], [("v", "a", 0, 1, 0.5), ("v", "b", 0, 1, 0.9)])
    with pytest.raises(ValueError, match=r"predictions.json: video v: label 'b' is not in the ground truth file"):
        evaluate_files(*paths, tiou=[0.5])
    content = json.loads(paths[0].read_text())
    content["database"]["w"] = {"subset": "training", "annotations": [{"label": "b", "segment": [0, 1]}]}
    paths[0].write_text(json.dumps(content))
    assert evaluate_files(*paths, tiou=[0.5])["mAP"] == [1.0]
    del content["database"]["w"]
    paths[0].write_text(json.dumps({**content, "taxonomy": [{"nodeName": "b", "nodeId": 1}]}))
    assert evaluate_files(*paths, tiou=[0.5])["mAP"] == [1.0]


def test_blocked_videos_and_ambiguous_times_are_left_out(tmp_path):
    truth = [("v", "a", 0, 1), ("w", "a", 0, 1), ("v", "Ambiguous", 3, 4)]
    found = [("v", "a", 0, 1, 0.5), ("w", "a", 5, 6, 0.9), ("v", "Ambiguous", 3, 4, 0.9)]
    paths = write(tmp_path, truth, found)
    assert evaluate_files(*paths, tiou=[0.5])["mAP"] == [0.25]
    assert evaluate_files(*paths, tiou=[0.5], blocked=["w"])["mAP"] == [1.0]


def test_only_the_subset_counts(tmp_path):
    paths = write(tmp_path, [("v", "a", 0, 1)], [("v", "a", 0, 1, 0.5)], subset="testing")
    assert evaluate_files(*paths, tiou=[0.5], subset="testing")["mAP"] == [1.0]
    with pytest.raises(ValueError, match="'validation' has no annotations; the file has testing"):
        evaluate_files(*paths)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31))
def test_order_of_videos_and_predictions_does_not_matter_and_more_is_not_less(seed: int):
    rng = np.random.default_rng(seed)
    truth, found = random_case(rng)
    tiou = [0.3, 0.5, 0.7]
    result = mean_ap(truth, found, tiou)
    shuffled = [found[i] for i in rng.permutation(len(found))]
    # Ground truth in another order sums the classes in another order.
    assert mean_ap([truth[i] for i in rng.permutation(len(truth))], shuffled, tiou) == pytest.approx(result, abs=1e-14)
    assert all(0 <= value <= 1 for value in result)
    # A false one below all others changes nothing; the ground truth itself at the top gives everything.
    assert mean_ap(truth, [*found, ("v0", "c0", 500.0, 501.0, -1.0)], tiou) == result
    perfect = [(*row, 2.0) for row in truth]
    assert mean_ap(truth, perfect + found, tiou) == pytest.approx([1.0] * 3)


def test_no_predictions_give_zero(tmp_path):
    assert mean_ap([("v", "a", 0, 1)], [], [0.5, 0.7]) == [0.0, 0.0]
    assert evaluate_files(*write(tmp_path, [("v", "a", 0, 1)], []), tiou=[0.5]) == {"mAP": [0.0], "average_mAP": 0.0}


ENTRY: dict = {"label": "a", "score": 0.5, "segment": [0, 1]}
BROKEN_ENTRIES = (
    ({**ENTRY, "score": float("nan")}, "score is nan"),
    ({**ENTRY, "score": "0.9"}, "score is '0.9'"),
    ({**ENTRY, "segment": [2, 1]}, r"segment is \[2, 1\]"),
    ({**ENTRY, "segment": [0, float("inf")]}, r"segment is \[0, inf\]"),
    ({**ENTRY, "segment": [0, 1, 2]}, r"segment is \[0, 1, 2\]"),
    ({**ENTRY, "label": 3}, "'label' is 3, want str"),
    ({"label": "a", "segment": [0, 1]}, "key 'score' is missing; it has label, segment"),
    ([1, 2], "key 'label' is missing; it is no object"),
)
BROKEN_FILES = (
    ('{"results": ', "cannot be read as JSON"),
    ('{"version": "1"}', "key 'results' is missing; it has version"),
    ("[]", "key 'results' is missing; it is no object"),
    ('{"results": {"v": {"label": "a"}}}', "results: 'v' is .* want list"),
)


@pytest.mark.parametrize("entry, message", BROKEN_ENTRIES)
def test_a_malformed_prediction_is_named_with_its_file_and_place(tmp_path, entry, message):
    paths = write(tmp_path, [("v", "a", 0, 1)], [])
    paths[1].write_text(json.dumps({"results": {"u": [ENTRY], "v": [ENTRY, entry]}}))
    with pytest.raises(ValueError, match=f"predictions.json: video v, prediction 1: {message}"):
        evaluate_files(*paths)


@pytest.mark.parametrize("content, message", BROKEN_FILES)
def test_a_malformed_prediction_file_is_named(tmp_path, content, message):
    paths = write(tmp_path, [("v", "a", 0, 1)], [])
    paths[1].write_text(content)
    with pytest.raises(ValueError, match=f"predictions.json:? {message}"):
        evaluate_files(*paths)


def test_malformed_ground_truth_is_named_with_its_file(tmp_path):
    paths = write(tmp_path, [("v", "a", 0, 1)], [])
    for content, message in (
        ("{", "gt.json: cannot be read as JSON"),
        ('{"results": {}}', "gt.json: key 'database' is missing"),
        ('{"database": {"v": {"annotations": []}}}', "video v: key 'subset' is missing"),
        ('{"database": {"v": {"subset": "validation"}}}', "video v: key 'annotations' is missing"),
        (
            '{"database": {"v": {"subset": "validation", "annotations": [{"label": "a", "segment": [5, 1]}]}}}',
            r"video v, annotation 0: segment is \[5, 1\]",
        ),
    ):
        paths[0].write_text(content)
        with pytest.raises(ValueError, match=message):
            evaluate_files(*paths)
    with pytest.raises(FileNotFoundError, match="absent.json"):
        evaluate_files(tmp_path / "absent.json", paths[1])


def test_thresholds_out_of_range_are_named():
    for tiou in ([], [0.0], [1.5], [0.5] * 63):
        with pytest.raises(ValueError, match="tIoU thresholds"):
            mean_ap([("v", "a", 0, 1)], [], tiou)


def test_the_default_thresholds_are_those_of_the_official_script():
    assert tuple(np.linspace(0.5, 0.95, 10)) == ACTIVITYNET_TIOU
