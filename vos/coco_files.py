"""Masks as JSON in COCO's form, as MTTR writes its truth: one true mask per image id, any number of proposals.

    write_truth(path, {"v 5 1": runs, ...}); write_proposals(path, {"v 5 1": (masks, scores), ...})
    score_samples(read_samples(Path("ground_truth.json"), Path("predictions.json")))

An image is a sentence at a frame; its id is a name here, `<video> <frame> <instance>`, and any text or number in the
files of others. Truth: {"images": [{"id", "height", "width"}], "annotations": [{"id", "image_id", "category_id",
"segmentation": {"size", "counts"}, "area", "iscrowd"}], "categories"}; proposals: [{"image_id", "category_id",
"segmentation", "score"}]. Polygons are refused. Not here: the numbers (`metric.py`).
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.workers import first_of, tracked
from engine.files import read_json, write_text
from vos.metric import Runs, Sample, area_of, decode_mask

CATEGORY = 1  # there is one
MAX_PIXELS = 1 << 27
TRUTH_FORM = 'an object with "images" and "annotations"'
PROPOSAL_FORM = 'a list of {"image_id", "segmentation": {"size", "counts"}, "score"}'
REMEDY = "give the file in COCO's form with run lengths"
Name = str | int


def write_truth(path: Path, truths: Mapping[str, Runs]) -> None:
    """The true mask of each image."""
    images, annotations = [], []
    for number, (name, runs) in enumerate(truths.items(), 1):
        height, width = runs["size"]
        images.append({"id": name, "height": height, "width": width})
        entry = {"id": number, "image_id": name, "category_id": CATEGORY, "segmentation": _as_json(runs)}
        annotations.append({**entry, "area": area_of(runs), "iscrowd": 0})
    categories = [{"id": CATEGORY, "name": "referred"}]
    tables = {"images": images, "categories": categories, "annotations": annotations}
    lines = ",\n".join(f'"{key}": [' + ",\n".join(map(json.dumps, table)) + "]" for key, table in tables.items())
    write_text(path, "{" + lines + "}\n")


def write_proposals(path: Path, found: Mapping[str, tuple[Sequence[Runs], Sequence[float]]]) -> None:
    """The masks and scores of each image, a mask a line, in the given order."""
    entries = [
        {"image_id": name, "category_id": CATEGORY, "segmentation": _as_json(runs), "score": float(score)}
        for name, (masks, scores) in found.items()
        for runs, score in zip(masks, scores, strict=True)
    ]
    write_text(path, "[" + ",\n".join(map(json.dumps, entries)) + "]\n")


def read_samples(truth: Path, proposals: Path) -> list[Sample]:
    """What `metric.score_samples` takes, in the order of the truth's file.

    A warning names images without proposals. Raises FileNotFoundError, or ValueError naming file, entry and remedy: not
    JSON or of another form, an image without or with two true masks, an image that the truth does not list, run lengths
    that are no mask of their size.
    """
    truths = read_truth_file(truth)
    found: dict[Name, tuple[list[Runs], list[float]]] = {name: ([], []) for name in truths}
    content = read_json(proposals, REMEDY)
    if not isinstance(content, list):
        raise ValueError(f"{proposals}: is not {PROPOSAL_FORM}; {REMEDY}")
    for k, entry in enumerate(tracked("reading masks", content)):
        where = f"{proposals}: prediction {k}"
        name = _name(entry, "image_id", where)
        if name not in found:
            some = ", ".join(repr(one) for one in list(truths)[:3])
            raise ValueError(f"{where}: image_id {name!r} is not in {truth}, which has {some}, ...; give its truth")
        runs, score = _runs(entry, where), entry.get("score")
        if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
            raise ValueError(f"{where}: score is {score!r:.60}, not a finite number; {REMEDY}")
        if runs["size"] != truths[name]["size"]:
            raise ValueError(f"{where}: a mask of {runs['size']} pixels, the truth has {truths[name]['size']}")
        found[name][0].append(runs)
        found[name][1].append(float(score))
    if lacking := [str(name) for name, (masks, _) in found.items() if not masks]:
        text = f"{len(lacking)} of {len(truths)} images have no predictions and count as missed: {first_of(lacking)}"
        warnings.warn(f"{proposals}: {text}", stacklevel=2)
    return [Sample(truth=truths[name], masks=masks, scores=np.array(scores)) for name, (masks, scores) in found.items()]


def read_truth_file(path: Path) -> dict[Name, Runs]:
    """The true mask of each image of a file. Raises as `read_samples`."""
    content = read_json(path, REMEDY)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise ValueError(f"{path}: is not {TRUTH_FORM}; {REMEDY}")
    names = [_name(entry, "id", f"{path}: image {k}") for k, entry in enumerate(content["images"])]
    truths: dict[Name, Runs] = {}
    for k, entry in enumerate(content["annotations"]):
        where = f"{path}: annotation {k}"
        name = _name(entry, "image_id", where)
        if name in truths:
            raise ValueError(f"{where}: image {name!r} has a true mask already; an image is a sentence at a frame")
        truths[name] = _runs(entry, where)
    if lacking := [name for name in names if name not in truths]:
        raise ValueError(
            f"{path}: {len(lacking)} images have no true mask, the first is {lacking[0]!r}; leave them out"
        )
    if not truths:
        raise ValueError(f"{path}: has no true masks; is it the right file?")
    return truths


def _as_json(runs: Runs) -> dict[str, Any]:
    return {"size": list(runs["size"]), "counts": runs["counts"].decode("ascii")}


def _name(entry: Any, key: str, where: str) -> Name:
    name = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"{where}: {key} is {name!r:.60}, want a text or a whole number; {REMEDY}")
    return name


def _runs(entry: dict[str, Any], where: str) -> Runs:
    """Run lengths that are a mask of their size."""
    given = entry.get("segmentation")
    if not isinstance(given, dict) or not isinstance(given.get("counts"), str):
        raise ValueError(f'{where}: segmentation is {given!r:.60}, want {{"size", "counts"}} with counts as text')
    size: Any = given.get("size")
    whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not whole or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{where}: size is {size!r:.60}, want [height, width] in pixels; {REMEDY}")
    try:
        runs = {"size": list(size), "counts": given["counts"].encode("ascii")}
        if _total(runs["counts"]) != size[0] * size[1]:
            raise ValueError(f"its runs do not add up to {size[0]} x {size[1]} pixels")
        decode_mask(runs)
    except ValueError as error:
        raise ValueError(f"{where}: counts are no mask ({error}); {REMEDY}") from None
    return runs


def _total(counts: bytes) -> int:
    """The sum of COCO's run lengths: 6 bits a letter from "0" on, the sixth says that more follow, the fifth of the
    last one is the sign; from the fourth run on the difference to the one before the last. ValueError if they are none.
    """
    runs: list[int] = []
    place = value = 0
    for letter in counts:
        bits = letter - 48
        if not 0 <= bits < 64 or place > 6:
            raise ValueError("letters that are no run lengths")
        value |= (bits & 31) << 5 * place
        place += 1
        if not bits & 32:
            if bits & 16:
                value -= 1 << 5 * place
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            if runs[-1] < 0:
                raise ValueError("a run of negative length")
            place = value = 0
    if place:
        raise ValueError("its last run is cut off")
    return sum(runs)
