"""mIoU, mAcc, OA and the confusion matrix, against a double loop and torch.bincount."""

import math

import numpy as np
import pytest
import torch

from pointcloud.metric import absent_classes, confusion_matrix, scores


def by_loops(truth, prediction, k):
    """The definitions, point by point and class by class, in Python's integers and floats."""
    counts = [[0] * k for _ in range(k)]
    for t, p in zip(truth.tolist(), prediction.tolist(), strict=True):
        counts[t][p] += 1
    ious, accuracies = [], []
    for c in range(k):
        row, column = sum(counts[c]), sum(counts[i][c] for i in range(k))
        union = row + column - counts[c][c]
        if union:
            ious.append(counts[c][c] / union)
            accuracies.append(counts[c][c] / row if row else 0.0)
    right = sum(counts[c][c] for c in range(k)) / len(truth)
    return counts, 100 * sum(ious) / len(ious), 100 * sum(accuracies) / len(accuracies), 100 * right


@pytest.mark.parametrize("seed", range(20))
def test_scores_are_those_of_a_double_loop(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 14))
    count = int(rng.integers(1, 400))
    truth, prediction = rng.integers(0, k, count), np.minimum(rng.integers(0, k, count), rng.integers(1, k))
    counts, miou, macc, oa = by_loops(truth, prediction, k)
    found = confusion_matrix(truth, prediction, k)
    assert found.dtype == np.int64 and found.tolist() == counts
    as_tensor = torch.bincount(torch.from_numpy(truth * k + prediction), minlength=k * k).view(k, k)
    assert torch.equal(torch.from_numpy(found), as_tensor)
    for matrix in (found, as_tensor, counts):
        said = scores(matrix)
        assert [said[name] for name in ("mIoU", "mAcc", "OA")] == pytest.approx([miou, macc, oa], rel=1e-12)
        assert len(said["IoU"]) == k


def test_matrices_of_rooms_are_added_and_not_their_scores_averaged():
    small, large = np.array([[1, 0], [0, 1]]), np.array([[0, 98], [0, 0]])
    assert scores(small + large)["OA"] == pytest.approx(2.0)
    assert scores(small + large)["mIoU"] == pytest.approx((100 / 99 + 100 / 99) / 2)


def test_an_absent_class_is_left_out_and_one_that_is_only_predicted_counts_zero():
    counts = np.zeros((4, 4), np.int64)
    counts[0, 0], counts[1, 1], counts[1, 2] = 10, 6, 2  # class 2 is only predicted, class 3 nowhere
    found = scores(counts)
    assert found["IoU"][:3] == pytest.approx([100, 75, 0]) and math.isnan(found["IoU"][3])
    assert found["mIoU"] == pytest.approx((100 + 75 + 0) / 3)
    assert found["mAcc"] == pytest.approx((100 + 75 + 0) / 3)
    assert absent_classes(counts) == [3]


def test_counts_beyond_what_float32_holds_are_exact():
    counts = np.array([[2**40 + 1, 1], [1, 2**40 - 1]])
    assert scores(counts)["OA"] == pytest.approx(100 * 2**41 / (2**41 + 2), rel=1e-15)
    many = confusion_matrix(np.zeros(5, np.uint8), np.full(5, 12, np.uint8), 13)
    assert many[0, 12] == 5, "labels of one byte do not overflow"


def test_labels_and_matrices_that_are_none_are_refused():
    for truth, prediction, said in (
        ([0, 13], [0, 0], "true label 13"),
        ([0, 0], [0, -1], "predicted label -1"),
        ([0, 0], [0], "one shape"),
        ([0.0, 1.0], [0, 1], "integers"),
    ):
        with pytest.raises(ValueError, match=said):
            confusion_matrix(np.array(truth), np.array(prediction), 13)
    for wrong in (np.zeros((2, 2), np.int64), np.ones((2, 3), np.int64), np.ones((2, 2)), [[1, -1], [0, 1]]):
        with pytest.raises(ValueError, match="confusion matrix"):
            scores(wrong)


def test_the_labels_given_are_not_changed():
    truth, prediction = np.array([0, 1, 2]), np.array([2, 1, 0])
    confusion_matrix(truth, prediction, 3)
    assert truth.tolist() == [0, 1, 2] and prediction.tolist() == [2, 1, 0]
