"""The metric of S3DIS from one confusion matrix over all points: mIoU, mAcc, OA, in percent.

    C = confusion_matrix(truth, prediction, 13)      # int64, rows truth, columns prediction; add those of all rooms
    scores(C)                                        # {"mIoU": ..., "mAcc": ..., "OA": ..., "IoU": [13 numbers]}

    IoU_i = C_ii / (row_i + column_i - C_ii)      mIoU  mean of IoU_i
    Acc_i = C_ii / row_i                          mAcc  mean of Acc_i      OA  trace / sum

A class with neither truth nor prediction is left out of both means (its IoU is NaN); one that is predicted and nowhere
true counts 0 in both. One matrix for the whole area, never a mean over rooms. Counts are int64: 78 million points
overflow float32 and, weighted, int32. Public code differs on absent classes (0, 100 or the mean of the others).
Not here: which points are counted (`evaluate.py`).
"""

from typing import Any

import numpy as np


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) int64: how many points of each true class (row) were given each class (column). Changes nothing.

    truth, prediction: integers of one shape. ValueError for other shapes or kinds, and for a class out of range, named.
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.shape != prediction.shape:
        raise ValueError(f"{truth.shape} true labels and {prediction.shape} predicted ones: they must be of one shape")
    for name, labels in (("true", truth), ("predicted", prediction)):
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{name} labels must be integers, not {labels.dtype}")
        if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(f"{name} label {wrong} is not one of 0 to {num_classes - 1}")
    cells = truth.astype(np.int64).ravel() * num_classes + prediction.astype(np.int64).ravel()
    return np.bincount(cells, minlength=num_classes**2).astype(np.int64).reshape(num_classes, num_classes)


def scores(confusion: Any) -> dict[str, Any]:
    """{"mIoU", "mAcc", "OA", "IoU": [per class]} in percent.

    confusion: (K, K) integer counts, rows truth (numpy, a tensor on the CPU, or lists). ValueError for anything else.
    """
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.dtype.kind not in "iu":
        raise ValueError(f"a confusion matrix is square, of integers, not {counts.shape} of {counts.dtype}")
    counts = counts.astype(np.int64)
    if (counts < 0).any() or not counts.any():
        raise ValueError("a confusion matrix counts points: it has none, or a negative number of them")
    hit, rows, columns = np.diag(counts), counts.sum(1), counts.sum(0)
    union = rows + columns - hit
    present = union > 0
    # 0 where the class is predicted and nowhere true: hit is 0 there, whatever it is divided by
    iou = np.where(present, hit / np.maximum(union, 1), np.nan) * 100
    accuracy = hit / np.maximum(rows, 1) * 100
    return {
        "mIoU": float(iou[present].mean()),
        "mAcc": float(accuracy[present].mean()),
        "OA": float(hit.sum() / counts.sum() * 100),
        "IoU": [float(value) for value in iou],
    }


def absent_classes(confusion: np.ndarray) -> list[int]:
    """Classes that no point has and none was given: those the means leave out."""
    return np.flatnonzero((confusion.sum(0) == 0) & (confusion.sum(1) == 0)).tolist()
