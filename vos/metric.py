"""The metrics of referring segmentation: COCO's mAP over masks, precision at K and IoU (A2D, JHMDB), J and F (videos).

    referring_scores([{"truth": (H, W), "masks": (Q, H, W), "scores": (Q,)}, ...])   # -> {"mAP": ..., ...} in percent
    region_similarity(prediction, truth), boundary_accuracy(prediction, truth)       # J and F of a frame, 0 to 1

A sample is one sentence at one annotated frame, with one true mask and Q masks that a network proposes. `mAP` takes all
of them, as published numbers do, by pycocotools, so a right second one counts; `mAP_best` and everything below takes
the best-scored mask only. On what implementations disagree:

- mAP has a hit at IoU >= t, P@K above K: (I + 1e-6) / (U + 1e-6) in float32, then compared in float64, as MTTR's. So
  200 of 400 pixels are no hit of P@0.5, 20 of 40 and, as float32 is above .6 and .8 but below .7 and .9, 60 of 100 are.
- Of equal scores the first counts as the best, here and in COCO's stable sort; MTTR's P@K takes the last.
- An empty truth cannot be hit in mAP; in P@K and IoU an empty best mask is right there (0 / 0 is 1).
- A sample without proposals has an empty best mask. Above 100 proposals COCO takes the 100 best.
- J of two empty masks is 1. F has the boundary of DAVIS, a pixel unlike its right, lower or lower right neighbor, and
  its tolerance, a disk of .008 of the diagonal, rounded up. A mask that fills the frame has no boundary; without any
  on both sides F is 1, on one side 0.

Not here: networks and runs (`evaluate.py`), folders and zips of masks (`submission.py`).
"""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike

try:
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError as error:  # before a training, not at its end
    raise ImportError("the metrics of masks need pycocotools: pip install 'dr2net[engine]'") from error

Runs = dict[str, Any]  # a mask as COCO's run lengths: {"size": [H, W], "counts": bytes}
PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)  # K of P@K
MAX_PROPOSALS = 100  # per sample, as COCO counts
EPSILON = np.float32(1e-6)
TOLERANCE = 0.008  # of F, as a share of the diagonal


class Sample(TypedDict):
    """A sentence at a frame, with masks as run lengths."""

    truth: Runs
    masks: list[Runs]  # Q
    scores: np.ndarray  # (Q,)


def referring_scores(samples: Sequence[Mapping[str, ArrayLike]]) -> dict[str, float]:
    """mAP, mAP_best, AP50, AP75, P@0.5 to P@0.9, IoU_overall, IoU_mean in percent.

    samples: each with `truth` (H, W) and `masks` (Q, H, W), boolean or 0 and 1, and `scores` (Q,), higher is better.
    Raises ValueError, naming the sample, for other shapes or values, for scores that are not finite, and for none.
    """
    return score_samples([_encoded(sample, f"sample {k}") for k, sample in enumerate(samples)])


def score_samples(samples: Sequence[Sample]) -> dict[str, float]:
    """As `referring_scores`, of run lengths, which take some hundred bytes a mask."""
    if not samples:
        raise ValueError("there are no samples to score; is it the right file and split?")
    for k, sample in enumerate(samples):
        _check(sample, f"sample {k}")
    best = [best_only(sample) for sample in samples]
    ious, shared, joined = zip(*(iou_of(one["truth"], *one["masks"]) for one in best), strict=True)
    precision = _precision(samples)
    return {
        "mAP": 100 * float(precision.mean()),
        "mAP_best": 100 * float(_precision(best).mean()),
        "AP50": 100 * float(precision[0].mean()),
        "AP75": 100 * float(precision[5].mean()),
        **{f"P@{k}": 100 * float(np.mean([iou > k for iou in ious])) for k in PRECISIONS},
        "IoU_overall": 100 * (sum(shared) / sum(joined) if sum(joined) else 1.0),
        "IoU_mean": 100 * float(np.mean(ious)),
    }


def best_only(sample: Sample) -> Sample:
    """The sample with its best-scored mask alone, the first of several; without any it stays as it is."""
    scores = np.asarray(sample["scores"])
    if not len(scores):
        return sample
    best = int(scores.argmax())
    return Sample(truth=sample["truth"], masks=[sample["masks"][best]], scores=scores[best : best + 1])


def encode_masks(masks: ArrayLike) -> list[Runs]:
    """(Q, H, W) boolean, or 0 and 1, as run lengths. ValueError for anything else."""
    given = _boolean(masks, 3, "masks")
    return cast("list[Runs]", coco_mask.encode(np.asfortranarray(given.transpose(1, 2, 0), np.uint8)))


def decode_mask(runs: Runs) -> np.ndarray:
    """(H, W) boolean."""
    return coco_mask.decode(runs).astype(bool)


def area_of(runs: Runs) -> int:
    """Pixels of a mask."""
    return int(coco_mask.area(runs))


def iou_of(truth: Runs, mask: Runs | None = None) -> tuple[float, int, int]:
    """IoU with MTTR's float32, intersection and union in pixels, of a mask; None: an empty one."""
    shared, joined = 0, area_of(truth)
    if mask is not None:
        shared = area_of(coco_mask.merge([truth, mask], intersect=True))
        joined += area_of(mask) - shared
    return float((np.float32(shared) + EPSILON) / (np.float32(joined) + EPSILON)), shared, joined


def region_similarity(prediction: ArrayLike, truth: ArrayLike) -> float:
    """J: intersection over union of two masks (H, W), 1 where both are empty. ValueError for unequal shapes."""
    ours, theirs = _pair(prediction, truth)
    union = int((ours | theirs).sum())
    return int((ours & theirs).sum()) / union if union else 1.0


def boundary_accuracy(prediction: ArrayLike, truth: ArrayLike) -> float:
    """F: harmonic mean of the shares of each boundary that lie near the other; masks (H, W). As `region_similarity`."""
    ours, theirs = _pair(prediction, truth)
    radius = math.ceil(TOLERANCE * math.hypot(*ours.shape))
    found, wanted = boundary(ours), boundary(theirs)
    if not (found.any() and wanted.any()):
        return float(not found.any() and not wanted.any())
    rows, columns = ((found | wanted).any(axis=axis).nonzero()[0] for axis in (1, 0))
    place = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))  # all that is compared lies in it
    found, wanted = found[place], wanted[place]
    precision = float(_near(wanted, radius)[found].mean())
    recall = float(_near(found, radius)[wanted].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (H, W) that differ from their right, lower or lower right neighbor; (H, W) boolean.

    The last row and column compare along themselves only.
    """
    edge = np.zeros_like(mask, bool)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def _near(pixels: np.ndarray, radius: int) -> np.ndarray:
    """Dilated by the disk of this radius: where the nearest of the pixels is at most that far."""
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(~pixels) <= radius + 1e-9  # roots of whole numbers: the next one is farther


def _precision(samples: Sequence[Sample]) -> np.ndarray:
    """COCO's interpolated precision at 10 IoU thresholds and 101 recalls."""
    images, truths = [], []
    proposals: list[dict[str, Any]] = []
    for number, sample in enumerate(samples, 1):
        height, width = sample["truth"]["size"]
        images.append({"id": number, "height": height, "width": width})
        truths.append(_annotation(number, number, sample["truth"]))
        for runs, score in zip(sample["masks"], np.asarray(sample["scores"]).tolist(), strict=True):
            proposals.append({**_annotation(len(proposals) + 1, number, runs), "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        tables = []
        for annotations in (truths, proposals):  # not by loadRes, which fails on an empty list
            table = COCO()
            table.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations}
            table.createIndex()
            tables.append(table)
        scorer = COCOeval(*tables, iouType="segm")
        scorer.params.useCats = 0
        scorer.params.maxDets = [MAX_PROPOSALS]
        scorer.params.areaRng, scorer.params.areaRngLbl = [[0, 1e10]], ["all"]
        scorer.evaluate()
        scorer.accumulate()
    return scorer.eval["precision"][:, :, 0, 0, 0]


def _annotation(number: int, image: int, runs: Runs) -> dict[str, Any]:
    """As pycocotools wants it; a number of 0 it would never match."""
    area = area_of(runs)
    return {"id": number, "image_id": image, "category_id": 1, "segmentation": runs, "area": area, "iscrowd": 0}


def _encoded(sample: Mapping[str, ArrayLike], where: str) -> Sample:
    lacking = [key for key in ("truth", "masks", "scores") if key not in sample]
    if lacking:
        raise ValueError(f"{where}: {lacking[0]!r} is missing; give truth (H, W), masks (Q, H, W) and scores (Q,)")
    try:
        truth = _boolean(sample["truth"], 2, "truth")
        masks = np.asarray(sample["masks"])
        if masks.size == 0 and masks.shape[:1] == (0,):  # no proposals, whatever their shape would be
            masks = np.zeros((0, *truth.shape), bool)
        runs = encode_masks(masks)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Sample(truth=encode_masks(truth[None])[0], masks=runs, scores=np.asarray(sample["scores"], np.float64))


def _check(sample: Sample, where: str) -> None:
    """ValueError for sizes and numbers that do not fit."""
    scores, size = np.asarray(sample["scores"]), list(sample["truth"]["size"])
    if scores.ndim != 1 or len(scores) != len(sample["masks"]):
        raise ValueError(f"{where}: {len(sample['masks'])} masks, but scores of shape {scores.shape}; one for each")
    if not np.isfinite(scores).all():
        raise ValueError(f"{where}: its scores are not all finite")
    for runs in sample["masks"]:
        if list(runs["size"]) != size:
            raise ValueError(f"{where}: a mask of {_by(runs['size'])} pixels, the truth has {_by(size)}")


def _pair(prediction: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = _boolean(prediction, 2, "prediction"), _boolean(truth, 2, "truth")
    if ours.shape != theirs.shape:
        raise ValueError(f"a prediction of {_by(ours.shape)} pixels, the truth has {_by(theirs.shape)}")
    return ours, theirs


def _boolean(mask: ArrayLike, dimensions: int, what: str) -> np.ndarray:
    """The mask as booleans; numbers are taken where they are 0 and 1."""
    given = np.asarray(mask)
    if given.ndim != dimensions or 0 in given.shape[-2:]:
        want = "(H, W)" if dimensions == 2 else "(Q, H, W)"
        raise ValueError(f"{what} has shape {given.shape}, want {want} with at least a pixel")
    if given.dtype == bool:
        return given
    boolean = given.astype(bool)
    if not np.array_equal(given, boolean):
        raise ValueError(f"{what} has values other than 0 and 1, up to {given.max()}; compare with a threshold first")
    return boolean


def _by(size: Sequence[int]) -> str:
    """ "height x width"."""
    return " x ".join(map(str, size))
