"""The COCO metric of object detection: pycocotools counts, this file sees that it is given what it can count.

    evaluate_files("instances_val2017.json", "detections.json")
    # -> {"AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR100"} in percent; None: no ground truth of this size

AP is the mean over IoU thresholds .50:.05:.95, classes and 101 recalls of the interpolated precision; a class without
ground truth is left out of the mean. Of the detections of an image the `max_detections` best of each class count. Small
is up to 32 x 32 pixels, medium from there to 96 x 96, large from there, by the `area` of the annotation, which in COCO
is that of the mask, not of the box. Detections in a crowd region count neither for nor against.

What pycocotools computes silently or dies of, and what happens here:

- An annotation with id 0 is never matched, two with the same id become one: ids below 1 and repeated ones are refused.
- No detections at all are an IndexError there; here every metric is 0, with a warning.
- Annotations without `area` or `iscrowd` are a KeyError; here width times height, and 0, with a warning.
- Detections of a class that the ground truth does not list are passed over; here an error names the ids.
- With other `maxDets` than 100 its AP is -1: here every number is taken from the table of precisions.
- Predictions of pictures that were numbered otherwise are compared with other pictures: names decide (renumber.py).
- Boxes without width or height in the ground truth count and cannot be found, as there; a warning gives their number.

Not here: networks and runs (`evaluate.py`), what training does with odd boxes (`annotations.py`).
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detection.pictures import refuse_shares
from detection.renumber import with_ids_of
from engine.files import read_json

try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError as error:  # before a training, not at its end
    raise ImportError("the COCO metric needs pycocotools: pip install 'dr2net[engine]'") from error

MAX_DETECTIONS = 100  # per image and class, as COCO's server counts
MAX_ID = 1 << 53  # above it two ids may be one as floats
MAX_PIXELS = 1e9  # a coordinate beyond it is none, and areas of such boxes are not finite
UNUSED = ("segmentation",)  # most of a file's size
SIZES = {"": "all", "_S": "small", "_M": "medium", "_L": "large"}
PREDICTION_FORM = 'a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}'
REMEDY = "give the file in COCO's form, or mend it"

Metrics = dict[str, float | None]
Prediction = dict[str, Any]  # {"image_id": int, "category_id": int, "bbox": [x, y, width, height], "score": float}


class GroundTruth(NamedTuple):
    """The part of an annotation file that counts, checked and complete."""

    images: tuple[int, ...]  # ids, in the file's order
    categories: dict[int, str]  # names by id, ascending
    annotations: list[dict[str, Any]]  # id, image_id, category_id, bbox, area, iscrowd
    files: dict[int, str]  # names of the images that have one, by id

    def of_images(self, images: Iterable[int]) -> "GroundTruth":
        """The same of some of its images only."""
        kept = set(images)
        own = [one for one in self.annotations if one["image_id"] in kept]
        return self._replace(images=tuple(image for image in self.images if image in kept), annotations=own)


def evaluate_files(ground_truth: Path | str, predictions: Path | str, max_detections: int = MAX_DETECTIONS) -> Metrics:
    """The metrics of a prediction file in COCO's results form, in percent.

    Raises FileNotFoundError, or ValueError naming file, entry and remedy: no JSON, the form of another task, an entry
    missing or of the wrong kind, a score or box that is not finite, a negative size, an id that is repeated, below 1
    (annotations) or unknown, names that are not the ground truth's under known ids, ground truth without an object.
    """
    truth = read_ground_truth(Path(ground_truth))
    content = read_json(Path(predictions), REMEDY, without=UNUSED)
    content = with_ids_of(content, truth.files, truth.categories, str(predictions))
    checked = check_predictions(content, truth, str(predictions))
    refuse_shares([one["bbox"] for one in checked], str(predictions))  # not of a run, whose network may have collapsed
    return evaluate_boxes(truth, checked, max_detections)


def evaluate_objects(ground_truth: Any, predictions: Any, max_detections: int = MAX_DETECTIONS) -> Metrics:
    """As `evaluate_files`, of what such files hold; neither is changed."""
    truth = check_ground_truth(ground_truth, "ground truth")
    return evaluate_boxes(truth, check_predictions(predictions, truth, "predictions"), max_detections)


def evaluate_boxes(
    truth: GroundTruth, predictions: Sequence[Prediction], max_detections: int = MAX_DETECTIONS
) -> Metrics:
    """As `evaluate_files`, of what the checks below return. Key of the last: AR and `max_detections`."""
    if max_detections < 1:
        raise ValueError(f"max_detections {max_detections}: want at least 1")
    if all(annotation["iscrowd"] for annotation in truth.annotations):
        raise ValueError("the ground truth has no objects; is it the right file and split?")
    if not predictions:
        warnings.warn("there are no predictions at all: every metric is 0", stacklevel=2)
    precision, recall = _count(truth, predictions, max_detections)
    metrics = {f"AP{name}": _percent(precision[..., a]) for a, name in enumerate(SIZES)}
    metrics |= {"AP50": _percent(precision[0, ..., 0]), "AP75": _percent(precision[5, ..., 0])}
    names = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
    return {**{name: metrics[name] for name in names}, f"AR{max_detections}": _percent(recall[..., 0])}


def in_order(predictions: Iterable[Prediction]) -> list[Prediction]:
    """By image, the best first; of equal scores the earlier stays before the later, as the metric takes them."""
    return sorted(predictions, key=lambda one: (one["image_id"], -one["score"]))


def read_ground_truth(path: Path) -> GroundTruth:
    """The ground truth of a file in COCO's form. Raises as `evaluate_files`."""
    return check_ground_truth(read_json(path, REMEDY, without=UNUSED), str(path))


def check_ground_truth(content: Any, where: str) -> GroundTruth:
    """The part that counts of an annotation file's content; `where` begins the messages. Raises as `evaluate_files`."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {_kind(content)}, not an object with images, annotations, categories; {REMEDY}")
    images, categories, annotations = (_table(content, key, where) for key in ("images", "categories", "annotations"))
    image_ids = [_identity(entry, "id", f"{where}: image {k}") for k, entry in enumerate(images)]
    category_ids = [_identity(entry, "id", f"{where}: category {k}") for k, entry in enumerate(categories)]
    for what, ids in (("image", image_ids), ("category", category_ids)):
        if not ids:
            raise ValueError(f"{where}: lists no {what}; {REMEDY}")
        _refuse_repeated(ids, f"{where}: {what} id")
    names = {ids: str(entry.get("name", ids)) for ids, entry in zip(category_ids, categories, strict=True)}
    checked = [_annotation(entry, f"{where}: annotation {k}") for k, entry in enumerate(annotations)]
    _refuse_repeated([one["id"] for one in checked], f"{where}: annotation id")
    _refuse_unknown(checked, "image_id", set(image_ids), f"{where}: its annotations")
    _refuse_unknown(checked, "category_id", set(category_ids), f"{where}: its annotations")
    refuse_shares([one["bbox"] for one in checked], where)
    _tell_what_was_odd(annotations, checked, where)
    named = zip(image_ids, (entry.get("file_name") for entry in images), strict=True)
    files = {number: name for number, name in named if isinstance(name, str)}
    return GroundTruth(tuple(image_ids), dict(sorted(names.items())), checked, files)


def check_predictions(content: Any, truth: GroundTruth, where: str) -> list[Prediction]:
    """The predictions of a results file's content, as new objects. Raises as `evaluate_files`."""
    if not isinstance(content, list):
        raise ValueError(f"{where}: {_kind(content)}, not {PREDICTION_FORM}; {REMEDY}")
    checked = []
    for k, entry in enumerate(content):
        at = f"{where}: prediction {k}"
        image, category = _identity(entry, "image_id", at), _identity(entry, "category_id", at)
        box, score = _box(entry, at), _member(entry, "score", at)
        if not _is_number(score) or not math.isfinite(score):
            raise ValueError(f"{at}: score is {score!r:.60}, not a finite number; {REMEDY}")
        checked.append(
            {"id": k + 1, "image_id": image, "category_id": category, "bbox": box, "score": float(score)}
            | {"area": box[2] * box[3], "iscrowd": 0}  # as pycocotools wants them
        )
    _refuse_unknown(checked, "image_id", set(truth.images), f"{where}: its predictions")
    _refuse_unknown(checked, "category_id", set(truth.categories), f"{where}: its predictions")
    _tell_what_has_none(truth, checked, where)
    return checked


def _count(truth: GroundTruth, predictions: Sequence[Prediction], max_detections: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision (10 thresholds, 101 recalls, classes, 4 sizes) and recall (10, classes, 4), -1 without ground truth."""
    given = [{**one} for one in truth.annotations]  # it writes into them
    with contextlib.redirect_stdout(io.StringIO()):
        tables = []
        for annotations in (
            given,
            list(predictions),
        ):  # not by loadRes, which fails on an empty list and adds a polygon to each
            table = COCO()
            table.dataset = {
                "images": [{"id": image} for image in truth.images],
                "categories": [{"id": category} for category in truth.categories],
                "annotations": annotations,
            }
            table.createIndex()
            tables.append(table)
        scorer = COCOeval(*tables, iouType="bbox")
        assert scorer.params.areaRngLbl == list(SIZES.values())
        scorer.params.maxDets = [max_detections]
        scorer.evaluate()
        scorer.accumulate()
    return scorer.eval["precision"][..., 0], scorer.eval["recall"][..., 0]


def _percent(table: np.ndarray) -> float | None:
    """100 times the mean over the cells that have ground truth; None if none has."""
    cells = table[table > -1]
    return 100 * float(cells.mean()) if cells.size else None


def _annotation(entry: Any, where: str) -> dict[str, Any]:
    """One annotation, complete."""
    number = _identity(entry, "id", where)
    where = f"{where} (id {number})"
    if number < 1:
        raise ValueError(f"{where}: ids begin at 1, as the scorer never matches 0; number the annotations anew")
    image, category = _identity(entry, "image_id", where), _identity(entry, "category_id", where)
    box, area, crowd = _box(entry, where), entry.get("area"), entry.get("iscrowd")
    if area is None:
        area = box[2] * box[3]
    elif not _is_number(area) or not 0 <= area <= MAX_PIXELS**2:
        raise ValueError(f"{where}: area is {area!r:.60}, not a finite number of pixels; {REMEDY}")
    if crowd is None:
        crowd = 0
    elif not isinstance(crowd, int | float | np.integer) or crowd not in (0, 1):
        raise ValueError(f"{where}: iscrowd is {crowd!r:.60}, want 0 or 1; {REMEDY}")
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": float(area),
        "iscrowd": int(crowd),
    }


def _tell_what_was_odd(annotations: list[Any], checked: list[dict[str, Any]], where: str) -> None:
    """A warning about what was filled in and what cannot be found."""
    no_area, no_crowd = (sum(entry.get(key) is None for entry in annotations) for key in ("area", "iscrowd"))
    flat = sum(not ((one["bbox"][2] and one["bbox"][3]) or one["iscrowd"]) for one in checked)
    said = [
        *([f"{no_area} have no area: width times height is taken"] if no_area else []),
        *([f"{no_crowd} have no iscrowd: 0 is taken"] if no_crowd else []),
        *([f"{flat} have no width or height: they count, and no detection can match them"] if flat else []),
    ]
    if said:
        warnings.warn(f"{where}: of {len(checked)} annotations {'; '.join(said)}", stacklevel=4)


def _tell_what_has_none(truth: GroundTruth, predictions: list[Prediction], where: str) -> None:
    """A warning where most images with objects have no prediction: of a part of the data, all else counts as missed."""
    objects = {one["image_id"] for one in truth.annotations if not one["iscrowd"]}
    without = objects - {one["image_id"] for one in predictions}
    if predictions and 2 * len(without) > len(objects):
        text = (
            f"{where}: {len(without)} of {len(objects)} images with objects have no prediction; all of these are missed"
        )
        warnings.warn(text, stacklevel=4)


def _table(content: dict[str, Any], key: str, where: str) -> list[Any]:
    """A list of objects in the file."""
    if not isinstance(content.get(key), list):
        have = ", ".join(map(str, sorted(content, key=str)[:8])) or "nothing"
        raise ValueError(f"{where}: has no list {key!r}, it has {have:.200}; is it of another task? {REMEDY}")
    return content[key]


def _member(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {_kind(entry)}, not an object; {REMEDY}")
    if key not in entry:
        have = ", ".join(map(str, sorted(entry, key=str)[:8])) or "nothing"
        raise ValueError(f"{where}: {key!r} is missing, it has {have:.200}; {REMEDY}")
    return entry[key]


def _identity(entry: Any, key: str, where: str) -> int:
    value = _member(entry, key, where)
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or abs(int(value)) > MAX_ID:
        raise ValueError(f"{where}: {key} is {value!r:.60}, not a whole number below 2^53; {REMEDY}")
    return int(value)


def _box(entry: Any, where: str) -> list[float]:
    """x, y, width, height."""
    box = _member(entry, "bbox", where)
    if not isinstance(box, list | tuple) or len(box) != 4:
        raise ValueError(f"{where}: bbox is {box!r:.80}, want [x, y, width, height]; {REMEDY}")
    if not all(_is_number(value) and abs(value) <= MAX_PIXELS for value in box):
        raise ValueError(f"{where}: bbox is {box!r:.80}, want four finite numbers of pixels; {REMEDY}")
    if box[2] < 0 or box[3] < 0:
        raise ValueError(f"{where}: bbox {box!r:.80} has a negative width or height; write [x, y, width, height]")
    return [float(value) for value in box]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """What an object is, for a message."""
    if isinstance(value, dict):
        return f"is an object with {', '.join(map(str, list(value)[:6])) or 'nothing in it':.200}"
    return f"is {value!r:.60}"


def _refuse_repeated(ids: list[int], what: str) -> None:
    seen: set[int] = set()
    for one in ids:
        if one in seen:
            raise ValueError(f"{what} {one} is there twice; number them anew")
        seen.add(one)


def _refuse_unknown(entries: list[dict[str, Any]], key: str, known: set[int], where: str) -> None:
    unknown = sorted({one[key] for one in entries} - known)
    if unknown:
        some, have = ", ".join(map(str, unknown[:5])), ", ".join(map(str, sorted(known)[:5]))
        raise ValueError(
            f"{where} have {len(unknown)} ids in {key} that the ground truth does not list ({some}), it lists {have}"
            f"{', ...' if len(known) > 5 else ''}; map them back to its ids, or give the right ground truth"
        )
