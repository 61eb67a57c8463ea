"""One-dimensional operations on segments: overlap and non-maximum suppression. No compiled extension, no gradient.

    segments, scores, labels = soft_nms(segments, scores, labels, method="soft", sigma=0.5, iou_threshold=0.1,
                                        min_score=1e-3, max_detections=200)

The best candidate is taken, the scores of all that overlap it decay, and so on with what is left, until
`max_detections` are taken or nothing of at least `min_score` is left:

    soft   score * exp(-tIoU^2 / sigma)                 Bodla et al., "Soft-NMS", ICCV 2017, with the Gaussian
    hard   0 where tIoU >= iou_threshold
    none   unchanged: only sorted and cut

That is what the compiled operators of ActionFormer and OpenTAD do, but for three corners: they add 1e-6 to each length
before they divide, they let the very first candidate pass `min_score`, and their boundary voting is off when classes
are suppressed one by one; here it then votes within the class. Not here: which candidates there are (`head.py`).
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Method = Literal["soft", "hard", "none"]


class Window(NamedTuple):
    """The candidates of one window of a video, on the CPU."""

    name: str  # of the video
    window: int  # its number within the video
    segments: Tensor  # (M, 2) float32, seconds in the video, within [0, duration]
    scores: Tensor  # (M,)
    labels: Tensor  # (M,) long


def segment_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Temporal intersection over union; 0 where both segments have no length.

    a, b: (..., 2), start and end, broadcast against each other. Returns (...). The order of the operations is that of
    ActivityNet's script.
    """
    intersection = (np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])).clip(0)
    union = (b[..., 1] - b[..., 0]) + (a[..., 1] - a[..., 0]) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def soft_nms(
    segments: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    method: Method,
    sigma: float,
    iou_threshold: float,
    min_score: float,
    max_detections: int,
    multi_class: bool = True,
    vote_threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of one video, best first; computed in float64, returned in the dtypes given.

    segments: (M, 2); scores: (M,), not negative; labels: (M,). multi_class: a candidate suppresses only those of its
    own label. Of equal scores of a label the earlier is taken first. vote_threshold: if positive, the boundaries of a
    detection become the mean over the candidates that it could suppress (itself included) with tIoU >= vote_threshold,
    weighted with their scores before suppression. ValueError for settings out of range and values that are not finite.
    """
    if method not in ("soft", "hard", "none"):
        raise ValueError(f"nms method {method!r}; use soft, hard or none")
    if method == "soft" and not sigma > 0:
        raise ValueError(f"sigma is {sigma}; soft suppression needs it above 0")
    if method == "hard" and not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; hard suppression needs it above 0, at most 1")
    if max_detections < 1:
        raise ValueError(f"max_detections is {max_detections}; it must be at least 1")
    given, original = _float64(segments), _float64(scores)
    if not (np.isfinite(given).all() and np.isfinite(original).all()):
        raise ValueError("candidates have boundaries or scores that are not finite; has training diverged?")
    classes = labels.detach().cpu().numpy() if multi_class else np.zeros(len(given), np.int64)
    alive = np.where(original >= min_score, original, -np.inf)
    if method == "none":
        order = np.argsort(-alive, kind="stable")[:max_detections]
        taken, values = order[alive[order] > -np.inf], alive
    else:
        taken, values = _suppress(given, classes, alive, method, sigma, iou_threshold, min_score, max_detections)
    kept = given[taken]
    if vote_threshold > 0 and len(taken):
        weights = (segment_iou(kept[:, None], given) >= vote_threshold) * original
        weights *= classes[taken][:, None] == classes
        total = weights.sum(1, keepdims=True)
        # Segments without length overlap nothing, not even themselves.
        kept = np.where(total > 0, (weights @ given) / np.where(total > 0, total, 1), kept)
    index = torch.from_numpy(taken)
    return (
        torch.from_numpy(kept).to(segments.dtype),
        torch.from_numpy(values[taken]).to(scores.dtype),
        labels.detach().cpu()[index],
    )


def _suppress(
    segments: np.ndarray,
    classes: np.ndarray,
    alive: np.ndarray,
    method: Method,
    sigma: float,
    iou_threshold: float,
    min_score: float,
    max_detections: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices in the order taken, and every candidate's score when it was taken.

    alive: (M,), -inf for candidates that are out. The best of all classes is taken next, and only its class changes: as
    one class after the other, merged, but it can stop as soon as there are enough.
    """
    order = np.argsort(classes, kind="stable")
    starts, ends, alive = segments[order, 0], segments[order, 1], alive[order]
    lengths, final = ends - starts, np.zeros_like(alive)
    cuts = np.flatnonzero(np.diff(classes[order])) + 1
    slices = [slice(low, high) for low, high in zip([0, *cuts], [*cuts, len(order)], strict=True) if low < high]
    peaks = np.array([alive[own].max() for own in slices])
    taken: list[int] = []
    while len(taken) < min(max_detections, len(order)):
        group = int(peaks.argmax())
        if peaks[group] == -np.inf:
            break
        own = slices[group]
        left, score = own.start, alive[own]
        best = left + int(score.argmax())
        taken.append(best)
        final[best] = alive[best]
        alive[best] = -np.inf
        # Only candidates that overlap change; the others need neither a division nor an exponential.
        overlap = np.minimum(ends[own], ends[best]) - np.maximum(starts[own], starts[best])
        hit = left + np.flatnonzero((overlap > 0) & (score > -np.inf))
        intersection = overlap[hit - left]
        iou = intersection / (lengths[hit] + lengths[best] - intersection)
        if method == "soft":
            decayed = alive[hit] * np.exp(-(iou * iou) / sigma)
            alive[hit] = np.where(decayed >= min_score, decayed, -np.inf)
        else:
            alive[hit[iou >= iou_threshold]] = -np.inf
        peaks[group] = score.max()
    values = np.zeros_like(final)
    values[order] = final
    return order[np.array(taken, dtype=np.int64)], values


def _float64(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
