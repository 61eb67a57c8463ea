"""Suppression against a straightforward reference in plain Python floats, and its corners."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from action_detection.ops import segment_iou, soft_nms

SETTINGS = {"sigma": 0.5, "iou_threshold": 0.3, "min_score": 1e-3, "max_detections": 200}


def iou(a: list[float], b: list[float]) -> float:
    intersection = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - intersection
    return intersection / union if union > 0 else 0.0


def reference(segments, scores, labels, *, method, sigma, iou_threshold, min_score, max_detections, multi_class, vote):
    """Class by class, candidate by candidate; then merged, cut and voted."""
    found = []
    for label in sorted(set(labels)) if multi_class else [None]:
        members = [i for i in range(len(scores)) if label is None or labels[i] == label]
        left = {i: scores[i] for i in members if scores[i] >= min_score}
        while left:
            best = max(left, key=lambda i: left[i])
            score = left.pop(best)
            segment = segments[best]
            if vote > 0:
                voters = [i for i in members if iou(segment, segments[i]) >= vote]
                total = sum(scores[i] for i in voters)
                if total > 0:
                    segment = [sum(scores[i] * segments[i][side] for i in voters) / total for side in (0, 1)]
            found.append((score, segment, labels[best]))
            for i in list(left):
                overlap = iou(segments[best], segments[i])
                if method == "soft":
                    left[i] *= math.exp(-(overlap**2) / sigma)
                elif method == "hard" and overlap >= iou_threshold:
                    left[i] = -1.0
                if left[i] < min_score:
                    del left[i]
    found.sort(key=lambda row: -row[0])
    return found[:max_detections]


def candidates(rng: np.random.Generator, count: int, num_classes: int):
    starts = rng.uniform(0, 60, count)
    segments = np.stack([starts, starts + rng.exponential(8.0, count)], 1)
    return segments.tolist(), rng.uniform(0, 1, count).tolist(), rng.integers(num_classes, size=count).tolist()


def as_tensors(segments, scores, labels, dtype=torch.float64):
    return (
        torch.tensor(segments, dtype=dtype).reshape(-1, 2),
        torch.tensor(scores, dtype=dtype),
        torch.tensor(labels, dtype=torch.long),
    )


def test_a_thousand_random_cases_equal_the_reference():
    rng = np.random.default_rng(0)
    for case in range(1000):
        segments, scores, labels = candidates(rng, int(rng.integers(0, 40)), int(rng.integers(1, 5)))
        own = {
            "method": ("soft", "hard", "none")[case % 3],
            "sigma": float(rng.uniform(0.1, 1)),
            "iou_threshold": float(rng.uniform(0.05, 0.9)),
            "min_score": float(rng.choice([0.0, 1e-3, 0.2])),
            "max_detections": int(rng.choice([1, 5, 100])),
            "multi_class": bool(rng.integers(2)),
        }
        vote = float(rng.choice([0.0, 0.5, 0.9]))
        expected = reference(segments, scores, labels, vote=vote, **own)
        got = soft_nms(*as_tensors(segments, scores, labels), vote_threshold=vote, **own)
        assert got[2].tolist() == [label for _, _, label in expected]
        # numpy's vectorised exp and sums may differ from math's in the last bits.
        np.testing.assert_allclose(got[1], [score for score, _, _ in expected], rtol=1e-13)
        wanted = np.array([segment for _, segment, _ in expected]).reshape(-1, 2)
        np.testing.assert_allclose(got[0], wanted, rtol=1e-13 if vote else 0)


def test_gaussian_decay_of_a_hand_made_case():
    # tIoU of the first two is 5 / 15; the third touches nothing
    tensors = as_tensors([[0, 10], [5, 15], [20, 30]], [0.9, 0.8, 0.1], [0, 0, 0])
    segments, scores, _ = soft_nms(*tensors, method="soft", **SETTINGS)
    assert segments.tolist() == [[0, 10], [5, 15], [20, 30]]
    assert scores.tolist() == pytest.approx([0.9, 0.8 * math.exp(-((1 / 3) ** 2) / 0.5), 0.1], rel=1e-15)


def test_hard_suppression_starts_at_the_threshold_itself():
    tensors = as_tensors([[0, 4], [0, 2], [2.5, 4]], [0.9, 0.8, 0.7], [0, 0, 0])  # tIoU .5 and .375
    kept = soft_nms(*tensors, method="hard", **{**SETTINGS, "iou_threshold": 0.5})
    assert kept[1].tolist() == [0.9, 0.7]


def test_classes_suppress_each_other_only_if_told_to():
    tensors = as_tensors([[0, 4], [0, 4]], [0.9, 0.8], [0, 1])
    assert len(soft_nms(*tensors, method="hard", multi_class=True, **SETTINGS)[1]) == 2
    assert soft_nms(*tensors, method="hard", multi_class=False, **SETTINGS)[2].tolist() == [0]


def test_votes_weigh_with_scores_before_suppression_and_stay_within_a_class():
    tensors = as_tensors([[0, 10], [1, 11], [0, 9]], [0.6, 0.3, 0.9], [0, 0, 1])
    segments, _, labels = soft_nms(*tensors, method="hard", vote_threshold=0.7, **SETTINGS)
    assert labels.tolist() == [1, 0]
    np.testing.assert_allclose(segments, [[0, 9], [1 / 3, 10 + 1 / 3]])
    off = soft_nms(*tensors, method="hard", vote_threshold=0.9, **SETTINGS)
    assert off[0].tolist() == [[0, 9], [0, 10]]


def test_segments_without_length_overlap_nothing():
    tensors = as_tensors([[3, 3], [3, 3], [0, 9]], [0.9, 0.8, 0.7], [0, 0, 0])
    segments, scores, _ = soft_nms(*tensors, method="soft", vote_threshold=0.5, **SETTINGS)
    assert scores.tolist() == [0.9, 0.8, 0.7]
    assert segments.tolist() == [[3, 3], [3, 3], [0, 9]]
    assert not segment_iou(np.array([3.0, 3.0]), np.array([[3.0, 3.0], [0.0, 9.0]])).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 30), st.sampled_from(["soft", "hard", "none"]))
def test_order_of_candidates_does_not_matter_and_scores_only_fall(seed: int, count: int, method: str):
    rng = np.random.default_rng(seed)
    segments, scores, labels = candidates(rng, count, 3)
    permutation = rng.permutation(count)
    tensors = as_tensors(segments, scores, labels)
    shuffled = tuple(value[torch.from_numpy(permutation)] for value in tensors)
    got, again = soft_nms(*tensors, method=method, **SETTINGS), soft_nms(*shuffled, method=method, **SETTINGS)
    for one, other in zip(got, again, strict=True):
        assert torch.equal(one, other)
    assert (got[1].diff() <= 0).all()
    assert len(got[1]) <= count
    best = {tuple(segment): score for segment, score in zip(segments, scores, strict=True)}
    assert all(score <= best[tuple(segment)] for segment, score in zip(got[0].tolist(), got[1].tolist(), strict=True))


def test_dtypes_are_kept_and_inputs_untouched():
    tensors = as_tensors([[0, 4], [1, 5]], [0.9, 0.8], [0, 0], dtype=torch.float32)
    copies = [value.clone() for value in tensors]
    kept = soft_nms(*tensors, method="soft", **SETTINGS)
    assert [value.dtype for value in kept] == [torch.float32, torch.float32, torch.long]
    assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("method", ["soft", "hard", "none"])
def test_no_candidates_give_no_detections(method):
    segments, scores, labels = soft_nms(*as_tensors([], [], []), method=method, vote_threshold=0.5, **SETTINGS)
    assert (segments.shape, scores.shape, labels.shape) == ((0, 2), (0,), (0,))
    assert not len(soft_nms(*as_tensors([[0, 1]], [1e-9], [0]), method=method, **SETTINGS)[1])


def test_settings_and_values_out_of_range_are_named():
    tensors = as_tensors([[0, 4]], [0.9], [0])
    for wrong, message in (
        ({"method": "linear"}, "linear"),
        ({"method": "soft", "sigma": 0.0}, "sigma is 0.0"),
        ({"method": "hard", "iou_threshold": 0.0}, "iou_threshold is 0.0"),
        ({"method": "soft", "max_detections": 0}, "max_detections is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_nms(*tensors, **{**SETTINGS, **wrong})
    for broken in (as_tensors([[0, 4]], [math.nan], [0]), as_tensors([[0, math.inf]], [0.9], [0])):
        with pytest.raises(ValueError, match="not finite"):
            soft_nms(*broken, method="soft", **SETTINGS)
