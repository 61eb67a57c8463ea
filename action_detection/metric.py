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
- A label that the ground truth file has in other subsets only, in its taxonomy or in a category_idx.txt beside it
  counts nowhere; one that it does not know at all is an error (the script fails at both).
- Ground truth that is there twice stays, as in the script. `drop_duplicates` removes it as OpenTAD does: same label,
  both boundaries within 1 ms; with it go segments without length.
- Two segments without length have tIoU 0 (the script divides 0 by 0 and calls it a hit). Boundaries beyond the video's
  end are taken as they are.
- `blocked` names videos to leave out on both sides, as the script does with a list that its server once gave, and
  OpenTAD with its blocked.json.
- THUMOS-14's label "Ambiguous" is no class: such ground truth is left out, as in training (`annotations.py`).

Not here: suppression (`ops.py`), networks (`evaluate.py`).
"""

import math
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from action_detection.annotations import LABELS, NOT_CLASSES, warn_of_unknown
from action_detection.ops import segment_iou
from engine.data.workers import first_of
from engine.files import read_json, read_text

ACTIVITYNET_TIOU = tuple(np.linspace(0.5, 0.95, 10).tolist())
DUPLICATE_SECONDS = 1e-3


class Rows(NamedTuple):
    """The segments of a file, of all videos together."""

    names: list[str]  # of the videos
    video: np.ndarray  # (M,) int, index into names
    labels: list[str]  # (M,)
    segments: np.ndarray  # (M, 2) float64, seconds
    scores: np.ndarray  # (M,) float64; zeros in ground truth


class Class(NamedTuple):
    """The rows of one class; video: their numbers in the ground truth, -1 for one that it does not have."""

    video: np.ndarray
    segments: np.ndarray
    scores: np.ndarray


def evaluate_files(
    ground_truth: Path | str,
    predictions: Path | str,
    tiou: Sequence[float] = ACTIVITYNET_TIOU,
    subset: str = "validation",
    *,
    drop_duplicates: bool = False,
    blocked: Collection[str] = (),
) -> dict[str, Any]:
    """{"mAP": [per threshold], "average_mAP": float} of a prediction file, in fractions.

    ground_truth: JSON {"database": {id: {"subset", "annotations": [{"label", "segment": [start, end]}]}}};
    predictions: JSON {"results": {id: [{"label", "score", "segment"}]}}, other keys are not looked at. Raises
    FileNotFoundError, or ValueError naming file and entry: no JSON, a key missing, a score or boundary that is no
    finite number, an end before its start, an unknown label, a subset without ground truth, no video in common. Warns
    with their number of predicted videos that the subset does not have, and of blocked ones that the file does not.
    """
    truth, known = read_ground_truth(Path(ground_truth), subset, drop_duplicates=drop_duplicates, blocked=blocked)
    predicted = read_predictions(Path(predictions), known, blocked=blocked)
    if predicted.labels and not set(predicted.names) & set(truth.names):
        own, other = predicted.names[0], truth.names[0]
        raise ValueError(
            f"{predictions}: none of its {len(predicted.names)} videos (the first is {own!r}) is in the subset "
            f"{subset!r} of {ground_truth} (the first is {other!r}); give the right subset, or name the videos alike"
        )
    if others := sorted(set(predicted.names) - set(truth.names)):
        some = first_of(others)
        where = f"{len(others)} of its {len(predicted.names)} videos are not in the subset {subset!r} of {ground_truth}"
        warnings.warn(f"{predictions}: {where}: {some}; what is predicted for them counts as false", stacklevel=2)
    return evaluate_rows(truth, predicted, tiou)


def evaluate_rows(truth: Rows, predictions: Rows, tiou: Sequence[float]) -> dict[str, Any]:
    """As `evaluate_files`, of rows. Predictions with labels that the ground truth does not have count nowhere."""
    if not 0 < len(tiou) < 63 or not all(0 < threshold <= 1 for threshold in tiou):
        raise ValueError(f"tIoU thresholds {list(tiou)}: give 1 to 62 numbers above 0, at most 1")
    if not truth.labels:
        raise ValueError("the ground truth has no segments; is it the right subset?")
    # Classes in the order of their first appearance: the mean is then bit for bit the official one.
    classes = {label: number for number, label in enumerate(dict.fromkeys(truth.labels))}
    videos = {name: number for number, name in enumerate(truth.names)}
    ap = np.zeros((len(tiou), len(classes)))
    thresholds = np.asarray(tiou, dtype=np.float64)
    pairs = zip(_by_class(truth, videos, classes), _by_class(predictions, videos, classes), strict=True)
    for number, (own_truth, own_predictions) in enumerate(pairs):
        ap[:, number] = average_precision(own_truth, own_predictions, thresholds)
    mean = ap.mean(axis=1)
    return {"mAP": mean.tolist(), "average_mAP": float(mean.mean())}


def average_precision(truth: Class, predictions: Class, tiou: np.ndarray) -> np.ndarray:
    """AP of one class per threshold. truth has at least one segment; tiou: (T,). Returns (T,)."""
    if not len(predictions.scores):
        return np.zeros(len(tiou))
    order = np.argsort(-predictions.scores, kind="stable")
    hits = match(truth, predictions.video[order], predictions.segments[order], tiou)
    true = hits.cumsum(axis=0, dtype=np.float64).T
    recall, precision = true / float(len(truth.scores)), true / np.arange(1.0, len(order) + 1)
    return np.array([interpolated_area(p, r) for p, r in zip(precision, recall, strict=True)])


def match(truth: Class, video: np.ndarray, segment: np.ndarray, tiou: np.ndarray) -> np.ndarray:
    """Which predictions, best first, are true at which threshold. video: (P,), segment: (P, 2). Returns bool (P, T).

    Pairs of prediction and ground truth are made for all at once; then one pass gives the ground truth away. In it the
    thresholds are the bits of an integer, so that all of them are decided together.
    """
    # Ground truth by video, within a video the later first: of equal tIoU it goes first.
    place = np.lexsort((-np.arange(len(truth.video)), truth.video))
    sorted_video, sorted_segment = truth.video[place], truth.segments[place]
    first = np.searchsorted(sorted_video, video, "left")
    count = np.searchsorted(sorted_video, video, "right") - first
    row = np.repeat(np.arange(len(video)), count)
    column = np.arange(len(row)) - np.repeat(count.cumsum() - count, count) + np.repeat(first, count)
    overlap = segment_iou(segment[row], sorted_segment[column])
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


def interpolated_area(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the envelope: at each recall the best precision at this recall or beyond (VOC 2011)."""
    precision, recall = np.concatenate([[0], precision, [0]]), np.concatenate([[0], recall, [1]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * envelope[steps]))


def read_ground_truth(
    path: Path, subset: str, *, drop_duplicates: bool = False, blocked: Collection[str] = ()
) -> tuple[Rows, set[str]]:
    """The rows of one subset, and all labels that the file knows."""
    content = read_json(path, "mend it")
    own: dict[str, list[dict]] = {}
    subsets: set[str] = set()
    known = set(read_text(path.parent / LABELS, "mend it").splitlines()) if (path.parent / LABELS).is_file() else set()
    for name, entry in _member(content, "database", dict, str(path)).items():
        where = f"{path}: video {name}"
        annotations = _member(entry, "annotations", list, where)
        known.update(_member(row, "label", str, f"{where}, annotation {k}") for k, row in enumerate(annotations))
        subsets.add(_member(entry, "subset", str, where))
        if entry["subset"] == subset and name not in blocked:
            own[name] = [row for row in annotations if row["label"] not in NOT_CLASSES]
    warn_of_unknown(blocked, content["database"], path)
    if "taxonomy" in content:
        nodes = _member(content, "taxonomy", list, str(path))
        known.update(_member(node, "nodeName", str, f"{path}: taxonomy") for node in nodes)
    rows = _rows(own, path, "annotation")
    if drop_duplicates:
        keep = _needed(rows)
        labels = [label for label, kept in zip(rows.labels, keep, strict=True) if kept]
        rows = Rows(rows.names, rows.video[keep], labels, rows.segments[keep], rows.scores[keep])
    if not rows.labels:
        raise ValueError(f"{path}: subset {subset!r} has no annotations; the file has {', '.join(sorted(subsets))}")
    return rows, known


def read_predictions(path: Path, known: set[str], *, blocked: Collection[str] = ()) -> Rows:
    """The rows of a file in the submission format. known: the labels that may appear."""
    everything = _member(read_json(path, "mend it"), "results", dict, str(path))
    results = {name: _member(everything, name, list, f"{path}: results") for name in everything if name not in blocked}
    rows = _rows(results, path, "prediction", scored=True)
    if unknown := set(rows.labels) - known:
        k = next(k for k, label in enumerate(rows.labels) if label in unknown)
        where = f"{path}: video {rows.names[rows.video[k]]}"
        raise ValueError(f"{where}: label {rows.labels[k]!r} is not in the ground truth file's annotations or taxonomy")
    return rows


def _rows(videos: dict[str, list[dict]], path: Path, what: str, *, scored: bool = False) -> Rows:
    """All entries at once; if anything is wrong, one by one, to name the first that is."""
    try:
        entries = [entry for own in videos.values() for entry in own]
        labels = [entry["label"] for entry in entries]
        segments = np.array([entry["segment"] for entry in entries] or np.zeros((0, 2)))
        scores = np.array([entry["score"] for entry in entries] if scored else np.zeros(len(entries)))
        fine = segments.shape == (len(entries), 2) and scores.shape == (len(entries),)
        fine &= {type(label) for label in labels} <= {str} and {segments.dtype.kind, scores.dtype.kind} <= {"f", "i"}
        fine = fine and bool(np.isfinite(scores).all() and np.isfinite(segments).all())
        fine = fine and bool((segments[:, 0] <= segments[:, 1]).all())
    except (KeyError, TypeError, ValueError, OverflowError):
        fine = False
    if not fine:
        _name_the_fault(videos, path, what, scored)
    video = np.repeat(np.arange(len(videos)), [len(own) for own in videos.values()])
    return Rows(list(videos), video, labels, segments.astype(np.float64), scores.astype(np.float64))


def _name_the_fault(videos: dict[str, list[dict]], path: Path, what: str, scored: bool) -> None:
    """Raise the ValueError that says which entry is wrong, and how."""
    for name, own in videos.items():
        for k, entry in enumerate(own):
            where = f"{path}: video {name}, {what} {k}"
            _member(entry, "label", str, where)
            segment = _member(entry, "segment", list, where)
            if len(segment) != 2 or not all(map(_is_number, segment)) or segment[0] > segment[1]:
                raise ValueError(f"{where}: segment is {segment}, want [start, end] in seconds, start <= end")
            if scored and not _is_number(_member(entry, "score", object, where)):
                raise ValueError(f"{where}: score is {entry['score']!r}, want a finite number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _needed(rows: Rows) -> np.ndarray:
    """Which ground truth OpenTAD would keep: with length, and unlike those kept before it. Returns bool (M,)."""
    keep = np.zeros(len(rows.labels), dtype=bool)
    kept: dict[tuple[int, str], list[np.ndarray]] = {}
    for k, (video, label, segment) in enumerate(zip(rows.video.tolist(), rows.labels, rows.segments, strict=True)):
        others = kept.setdefault((video, label), [])
        if segment[1] > segment[0] and not any((abs(segment - other) <= DUPLICATE_SECONDS).all() for other in others):
            others.append(segment)
            keep[k] = True
    return keep


def _member(entry: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        have = f"it has {', '.join(sorted(entry)[:8]) or 'none'}" if isinstance(entry, dict) else "it is no object"
        raise ValueError(f"{where}: key {key!r} is missing; {have}")
    if not isinstance(entry[key], kind):
        raise ValueError(f"{where}: {key!r} is {str(entry[key])[:60]}, want {kind.__name__}")
    return entry[key]


def _by_class(rows: Rows, videos: dict[str, int], classes: dict[str, int]) -> list[Class]:
    """One per class, in the order of the file; other classes are left out."""
    numbers = np.array([videos.get(name, -1) for name in rows.names], dtype=np.int64)
    label = np.fromiter((classes.get(label, -1) for label in rows.labels), np.int64, len(rows.labels))
    order = np.argsort(label, kind="stable")
    cuts = np.searchsorted(label[order], np.arange(len(classes) + 1))
    return [
        Class(numbers[rows.video[own]], rows.segments[own], rows.scores[own]) for own in np.split(order, cuts)[1:-1]
    ]
