"""The ActivityNet metric of temporal action detection: mean average precision over thresholds of temporal IoU.

    evaluate_files("gt.json", "predictions.json", tiou=np.linspace(0.5, 0.95, 10), subset="validation")
    # -> {"mAP": [one per threshold], "average_mAP": float}, in fractions

As the official script (ActivityNet, Evaluation/eval_detection.py) has it, per class and threshold: predictions in the
order of their scores each take the free ground truth of their video that they overlap most, if the tIoU is at least the
threshold; those that find none are false. AP is the area under the interpolated precision. mAP is the mean over the
classes that the subset's ground truth has: a class without predictions counts 0. Disputed points:

- Equal scores: the earlier in the file goes first (the script's sort leaves that open). Equal tIoU: the later ground
  truth, as the script's does.
- Predictions in videos that the subset does not have are false, as in the script.
- A label that the ground truth file has in other subsets only counts nowhere; one that it has in no subset is an error
  (the script fails at both).
- Ground truth that is there twice stays, as in the script. `drop_duplicates` removes it as OpenTAD does: same label,
  both boundaries within 1 ms; with it go segments without length.
- Two segments without length have tIoU 0 (the script divides 0 by 0 and calls it a hit). Boundaries beyond the video's
  end are taken as they are.
- No list of blocked videos is asked for: the server behind the script's is gone.

Not here: suppression (`ops.py`), networks (`evaluate.py`).
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ACTIVITYNET_TIOU = tuple(np.linspace(0.5, 0.95, 10).tolist())
DUPLICATE_SECONDS = 1e-3


@dataclass(frozen=True)
class Segments:
    """Rows of a file, of all videos together."""

    video: np.ndarray  # (M,) int, number of the video
    label: np.ndarray  # (M,) int, number of the class
    segment: np.ndarray  # (M, 2) float64, seconds
    score: np.ndarray  # (M,) float64; zeros in ground truth


def evaluate_files(
    ground_truth: Path | str,
    predictions: Path | str,
    tiou: Sequence[float] = ACTIVITYNET_TIOU,
    subset: str = "validation",
    *,
    drop_duplicates: bool = False,
) -> dict[str, Any]:
    """{"mAP": [per threshold], "average_mAP": float} of a prediction file, in fractions.

    ground_truth: JSON {"database": {id: {"subset", "annotations": [{"label", "segment": [start, end]}]}}};
    predictions: JSON {"results": {id: [{"label", "score", "segment"}]}}, other keys are not looked at. Raises
    FileNotFoundError, or ValueError naming file and entry: no JSON, a key missing, a score or boundary that is no
    finite number, an end before its start, an unknown label, a subset without ground truth.
    """
    entries, known = read_ground_truth(Path(ground_truth), subset, drop_duplicates=drop_duplicates)
    detections = read_predictions(Path(predictions), known)
    return evaluate_rows(entries, detections, tiou)


# A row: video, label, start, end; a prediction has its score behind it.
Truth = tuple[str, str, float, float]
Detection = tuple[str, str, float, float, float]


def evaluate_rows(
    ground_truth: Sequence[Truth], predictions: Iterable[Detection], tiou: Sequence[float]
) -> dict[str, Any]:
    """As `evaluate_files`, of rows. Predictions with labels that the ground truth does not have count nowhere."""
    if not len(tiou) or len(tiou) > 62 or not all(0 < threshold <= 1 for threshold in tiou):
        raise ValueError(f"tIoU thresholds {list(tiou)}: give 1 to 62 numbers above 0, at most 1")
    # Classes in the order of their first appearance: the mean is then bit for bit the official one.
    classes = {label: number for number, label in enumerate(dict.fromkeys(row[1] for row in ground_truth))}
    videos = {video: number for number, video in enumerate(dict.fromkeys(row[0] for row in ground_truth))}
    if not classes:
        raise ValueError("the ground truth has no segments; is it the right subset?")
    truth = _columns([(*row, 0.0) for row in ground_truth], videos, classes)
    found = _columns([row for row in predictions if row[1] in classes], videos, classes)
    truth_of, found_of = _by_label(truth, len(classes)), _by_label(found, len(classes))
    ap = np.zeros((len(tiou), len(classes)))
    for number, (own_truth, own_found) in enumerate(zip(truth_of, found_of, strict=True)):
        ap[:, number] = average_precision(own_truth, own_found, np.asarray(tiou, dtype=np.float64))
    mean = ap.mean(axis=1)
    return {"mAP": mean.tolist(), "average_mAP": float(mean.mean())}


def average_precision(truth: Segments, predictions: Segments, tiou: np.ndarray) -> np.ndarray:
    """AP of one class per threshold. truth has at least one segment; tiou: (T,). Returns (T,)."""
    if not len(predictions.score):
        return np.zeros(len(tiou))
    order = np.argsort(-predictions.score, kind="stable")
    hits = match(truth, predictions.video[order], predictions.segment[order], tiou)
    true = hits.cumsum(axis=0, dtype=np.float64).T
    recall, precision = true / float(len(truth.score)), true / np.arange(1.0, len(order) + 1)
    return np.array([interpolated_area(p, r) for p, r in zip(precision, recall, strict=True)])


def match(truth: Segments, video: np.ndarray, segment: np.ndarray, tiou: np.ndarray) -> np.ndarray:
    """Which predictions, best first, are true at which threshold. video: (P,), segment: (P, 2). Returns bool (P, T).

    Pairs of prediction and ground truth are made for all at once; then one pass gives the ground truth away. In it the
    thresholds are the bits of an integer, so that all of them are decided together.
    """
    # Ground truth by video, within a video the later first: of equal tIoU it goes first.
    place = np.lexsort((-np.arange(len(truth.video)), truth.video))
    sorted_video, sorted_segment = truth.video[place], truth.segment[place]
    first = np.searchsorted(sorted_video, video, "left")
    count = np.searchsorted(sorted_video, video, "right") - first
    row = np.repeat(np.arange(len(video)), count)
    column = np.arange(len(row)) - np.repeat(count.cumsum() - count, count) + np.repeat(first, count)
    overlap = pair_iou(segment[row], sorted_segment[column])
    bits = (overlap[:, None] >= tiou) @ (1 << np.arange(len(tiou), dtype=np.int64))
    near = np.flatnonzero(bits)
    near = near[np.lexsort((-overlap[near], row[near]))]
    free = [(1 << len(tiou)) - 1] * len(place)
    hits = [0] * len(video)
    for r, c, b in zip(row[near].tolist(), column[near].tolist(), bits[near].tolist(), strict=True):
        taken = b & free[c] & ~hits[r]
        free[c] ^= taken
        hits[r] |= taken
    return (np.array(hits, dtype=np.int64)[:, None] >> np.arange(len(tiou)) & 1).astype(bool)


def pair_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Temporal IoU of a[i] with b[i], in the official script's order of operations; 0 for two without length."""
    intersection = (np.minimum(a[:, 1], b[:, 1]) - np.maximum(a[:, 0], b[:, 0])).clip(0)
    union = (b[:, 1] - b[:, 0]) + (a[:, 1] - a[:, 0]) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def interpolated_area(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the envelope: at each recall the best precision at this recall or beyond (VOC 2011)."""
    precision, recall = np.concatenate([[0], precision, [0]]), np.concatenate([[0], recall, [1]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * envelope[steps]))


def read_ground_truth(path: Path, subset: str, *, drop_duplicates: bool = False) -> tuple[list[Truth], set[str]]:
    """The rows of one subset, and the labels of the whole file."""
    database = _member(_read_json(path), "database", dict, str(path))
    rows: list[Truth] = []
    known: set[str] = set()
    subsets: set[str] = set()
    for video, entry in database.items():
        where = f"{path}: video {video}"
        own = _member(entry, "subset", str, where)
        subsets.add(own)
        kept: list[Truth] = []
        for number, annotation in enumerate(_member(entry, "annotations", list, where)):
            row = _row(video, annotation, f"{where}, annotation {number}")
            known.add(row[1])
            if own == subset and not (drop_duplicates and _is_superfluous(row, kept)):
                kept.append(row)
        rows += kept
    if not rows:
        raise ValueError(f"{path}: subset {subset!r} has no annotations; the file has {', '.join(sorted(subsets))}")
    return rows, known


def read_predictions(path: Path, known: set[str]) -> list[Detection]:
    """The rows of a file in the submission format. known: the labels that may appear."""
    rows: list[Detection] = []
    for video, entries in _member(_read_json(path), "results", dict, str(path)).items():
        if not isinstance(entries, list):
            raise ValueError(f"{path}: video {video}: want a list of predictions, got {type(entries).__name__}")
        for number, entry in enumerate(entries):
            where = f"{path}: video {video}, prediction {number}"
            row = _row(video, entry, where)
            if row[1] not in known:
                raise ValueError(f"{where}: label {row[1]!r} is not in the ground truth file")
            rows.append((*row, _number(entry, "score", where)))
    return rows


def _is_superfluous(row: Truth, kept: list[Truth]) -> bool:
    """Whether OpenTAD would drop this ground truth: without length, or one like it was kept before."""
    _, label, start, end = row
    return end - start <= 0 or any(
        label == other[1] and abs(start - other[2]) <= DUPLICATE_SECONDS and abs(end - other[3]) <= DUPLICATE_SECONDS
        for other in kept
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _member(entry: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        have = f"it has {', '.join(sorted(entry)[:8]) or 'none'}" if isinstance(entry, dict) else "it is no object"
        raise ValueError(f"{where}: key {key!r} is missing; {have}")
    if not isinstance(entry[key], kind):
        raise ValueError(f"{where}: {key!r} is {str(entry[key])[:60]}, want {kind.__name__}")
    return entry[key]


def _number(entry: dict, key: str, where: str) -> float:
    if key not in entry:
        raise ValueError(f"{where}: key {key!r} is missing")
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {key} is {value!r}, want a finite number")
    return float(value)


def _row(video: str, entry: Any, where: str) -> Truth:
    label, segment = _member(entry, "label", str, where), _member(entry, "segment", list, where)
    try:
        start, end = segment
        start, end = float(start), float(end)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: segment is {segment}, want [start, end] in seconds") from None
    if not (math.isfinite(start) and math.isfinite(end) and start <= end):
        raise ValueError(f"{where}: segment is {segment}, want start <= end, finite")
    return video, label, start, end


def _columns(rows: Sequence[Detection], videos: dict[str, int], classes: dict[str, int]) -> Segments:
    """Rows as arrays; a video that `videos` does not have is -1."""
    numbers = np.array([row[2:] for row in rows], dtype=np.float64).reshape(-1, 3)
    return Segments(
        video=np.array([videos.get(row[0], -1) for row in rows], dtype=np.int64),
        label=np.array([classes[row[1]] for row in rows], dtype=np.int64),
        segment=numbers[:, :2],
        score=numbers[:, 2],
    )


def _by_label(rows: Segments, num_classes: int) -> list[Segments]:
    """One per class, in the order of the file."""
    order = np.argsort(rows.label, kind="stable")
    cuts = np.searchsorted(rows.label[order], np.arange(1, num_classes))
    return [
        Segments(rows.video[own], rows.label[own], rows.segment[own], rows.score[own]) for own in np.split(order, cuts)
    ]
