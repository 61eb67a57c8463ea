"""Annotation files of ActivityNet-1.3 and THUMOS-14 (OpenTAD's), which have one form.

    {"database": {id: {"duration", "subset", "annotations": [{"label", "segment": [start, end]}]}}}

The classes are the labels of the whole file, sorted, or the lines of category_idx.txt beside it, sorted. Also the class
scores of outside classifiers. Not here: which videos a run uses, and what becomes of odd segments (`read_annotations`
in data.py).
"""

import hashlib
import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from engine.data.workers import first_of
from engine.files import read_json, read_text

LABELS = "category_idx.txt"  # optional, beside the annotations: one class a line
REMEDY = "mend or download it again (`python -m action_detection.prepare`), or set --data.root"
MAX_SECONDS = 86400.0  # of a video; a longer one is a duration in other units
NOT_CLASSES = ("Ambiguous",)  # THUMOS-14 marks uncertain times so; they are neither trained on nor scored

CLASS_SCORES_FORM = 'JSON {"class": [names], "results": {id: [scores]}}'
ClassScores = dict[str, np.ndarray]  # per video (K,) float64, in the order of the class names


class Video(NamedTuple):
    """One video of the annotation file."""

    duration: float  # seconds, as annotated
    subset: str
    segments: Tensor  # (M, 2) float64 seconds, inside [0, duration]
    labels: Tensor  # (M,) long, indices of `Annotations.class_names`


class Annotations(NamedTuple):
    """An annotation file: the names of the classes, sorted, and the videos by name in its order."""

    class_names: tuple[str, ...]
    videos: dict[str, Video]


def read_database(file: Path) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    """The class names and the entries of an annotation file, checked in form; what `Ambiguous` marks left out.

    Raises FileNotFoundError, or ValueError naming file, entry and remedy.
    """
    content = read_json(file, REMEDY)
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, dict) or not database:
        raise ValueError(f'{file}: has no table "database" of videos; expected the form of ActivityNet-1.3')
    labels = file.parent / LABELS
    known = set(read_text(labels, "mend it").splitlines()) - {""} if labels.is_file() else None
    found = set()
    for name, entry in database.items():
        _check_entry(file, name, entry)
        entry["annotations"] = [item for item in entry["annotations"] if item["label"] not in NOT_CLASSES]
        for item in entry["annotations"]:
            if known is not None and item["label"] not in known:
                unknown = f"video {name} has the label {item['label']!r}, not one of the {len(known)} in {labels}"
                raise ValueError(f"{file}: {unknown}; mend the label, or add it there")
            found.add(item["label"])
    return tuple(sorted(found if known is None else known)), database


def read_blocked(file: Path) -> set[str]:
    """The video names of a JSON list. Raises FileNotFoundError, or ValueError for another form."""
    names = read_json(file, "set --data.blocked to a JSON list of names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: is not a JSON list of video names")
    return set(names)


def warn_of_unknown(blocked: Collection[str], database: Collection[str], file: Path) -> None:
    """Say how many names of videos to leave out an annotation file does not have, as those with another prefix."""
    if unknown := sorted(set(blocked) - set(database)):
        names = first_of(unknown)
        warnings.warn(f"{file}: has not {len(unknown)} of the {len(blocked)} blocked videos: {names}", stacklevel=3)


def read_class_scores(
    file: Path, class_names: tuple[str, ...], videos: list[str], sha256: str | None = None
) -> ClassScores:
    """Video-level scores of an outside classifier for `videos`, in the order of `class_names`.

    JSON, the form of CUHK's cuhk_val_simp_share.json: {"class": [names], "results": {video id: [one score per class]}}
    ("classes" for "class" is taken too). Classes are found by name. Raises FileNotFoundError, or ValueError: wrong
    checksum, a class or a video missing, another number of scores, a score that is no finite number.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no class scores; put the file there or set detection.class_scores")
    data = read_json(file, f"want {CLASS_SCORES_FORM}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{file} has sha256 {digest}, expected {sha256}: another label file, other results")
    try:
        columns = {name: k for k, name in enumerate(data["class"] if "class" in data else data["classes"])}
        results = data["results"]
        results.keys()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: want {CLASS_SCORES_FORM} ({error!r})") from error
    if absent := [name for name in class_names if name not in columns]:
        raise ValueError(f"{file}: no scores for {len(absent)} classes, among them {', '.join(absent[:5])}")
    if absent := [name for name in videos if name not in results]:
        raise ValueError(
            f"{file}: no scores for {len(absent)} of {len(videos)} test videos, among them {', '.join(absent[:5])}; "
            "add them, or take the videos out of the annotation file"
        )
    scores = {}
    for name in videos:
        try:
            row = np.asarray(results[name])
        except ValueError:  # ragged
            row = np.zeros(0)
        if row.shape != (len(columns),) or row.dtype.kind not in "if" or not np.isfinite(row).all():
            raise ValueError(f"{file}: video {name}: want {len(columns)} finite numbers, got {str(results[name])[:60]}")
        scores[name] = row.astype(np.float64)[[columns[own] for own in class_names]]
    return scores


def _check_entry(file: Path, name: str, entry: Any) -> None:
    """ValueError naming the video if its entry has another form."""
    remedy = "mend it, or take the video out"
    try:
        duration, subset, items = entry["duration"], entry["subset"], entry["annotations"]
        if not isinstance(items, list):
            raise ValueError(f"the annotations {str(items)[:60]!r}")
        for item in items:
            start, end = item["segment"]
            if not (math.isfinite(start) and math.isfinite(end) and isinstance(item["label"], str)):
                raise ValueError(f"an annotation {item!r}")
        if not (isinstance(subset, str) and math.isfinite(duration) and duration > 0):
            raise ValueError(f"the duration {duration!r} and the subset {subset!r}")
        if duration > MAX_SECONDS:
            raise ValueError(f"a duration of {duration:g} seconds, more than a day; is it in milliseconds?")
    except KeyError as error:
        raise ValueError(f"{file}: video {name} lacks {error}; {remedy}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: video {name} is not in ActivityNet's form ({error}); {remedy}") from error
