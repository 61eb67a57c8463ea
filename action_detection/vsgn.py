"""VSGN's head: a pyramid of temporal graphs, anchors on every scale, boundaries adjusted and scored on their own.

    encoder     level l: x = pool(ReLU(conv(x) + graph(x))), half as long as the one before: strides 2, 4, 8, ... times
                graph(x)_i = max over the k nearest x_j (by feature, anywhere in the window) of W [x_j, x_i] + b
    decoder     from the last level back: y_l = ReLU conv(ReLU conv(x_l) + ReLU upsample(y_{l+1}))
    anchors     of 3 and 7.5 strides around the middle of each position; towers, the same at every level, give classes
                p and a shift and stretch of the anchor                                                     "located"
    adjustment  the finest features at a boundary and 1/8 of the length before and behind it move it        "adjusted"
    boundaries  the finest features say of each time whether an action starts, ends or goes on there
    score       of an adjusted segment: p * (start score at its start) * (end score at its end)
    loss        GIoU of located segments over anchors with IoU >= 0.6; focal loss of p, an action being what the located
                segment overlaps by 0.6; GIoU of adjusted over located segments with IoU >= 0.7; balanced cross entropy
                of start, end and action. All per window, over its positives; the best anchor of an action is positive.

Written from the paper (Zhao, Thabet, Ghanem, "Video Self-Stitching Graph Network", arXiv 2011.14598) and the settings
of its release and of OpenTAD's version. Unlike in the release: LayerNorm instead of GroupNorm in the towers, so that
padded times change nothing; sigmoid focal loss for any number of classes; moves of a boundary count in eighths of the
length; only the decoder is supervised, as in OpenTAD. Not here: self-stitching, which magnifies the *input* of short
videos, and with it the graph's edges between the two magnifications of a video; edges are free, between any two
positions of a level.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from action_detection.head import Settings, Tower, focal_loss, to_windows
from action_detection.ops import Window

ANCHOR_IOU, ADJUST_IOU = 0.6, 0.7  # an anchor, a located segment is positive from here on
FOCAL_ALPHA = 0.35
BETA = 8.0  # boundary features are taken one BETA-th of the length before and behind
BOUNDARY_WIDTH = 0.1  # of an action's length (but at least one time) around its start is "start"


class VSGNHead(nn.Module):
    """Features (B, C, N), mask (B, N) -> a dict of

    logits (B, P, K); anchors (P, 2), located and adjusted (B, P, 2), all start and end in times; mask (B, P) bool;
    boundaries (B, 3, N), logits of start, end and action; times (B, N) bool, the input's mask. P is the number of
    scales times the sum of the levels' lengths, ceil(N / 2^(l+1)). With one class the labels of a batch are not read.
    """

    def __init__(
        self,
        in_width: int,
        num_classes: int,
        *,
        width: int,
        num_levels: int,
        scales: tuple[float, ...] = (3.0, 7.5),
        num_neighbors: int = 10,
        regression_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if num_levels < 1:
            raise ValueError(f"a pyramid of {num_levels} levels: make it at least 1")
        self.num_classes, self.num_levels, self.scales = num_classes, num_levels, scales
        self.regression_weight = regression_weight
        self.embed = nn.Conv1d(in_width, width, 3, padding=1)
        self.encoder = nn.ModuleList(GraphLayer(width, num_neighbors) for _ in range(num_levels))
        self.lateral = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(num_levels - 1))
        self.upsample = nn.ModuleList(
            nn.ConvTranspose1d(width, width, 3, stride=2, padding=1, output_padding=1) for _ in range(num_levels - 1)
        )
        self.decoder = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(num_levels))
        self.classification = Tower(width, len(scales) * num_classes, num_layers=5)
        self.regression = Tower(width, len(scales) * 2, num_layers=5)
        self.adjust_start, self.adjust_end = Adjustment(width), Adjustment(width)
        self.boundaries = Tower(width, 3 * 2, num_layers=2)  # three curves for both times of a position
        self.classification.start_at(-math.log(99))  # every class starts at probability 0.01

    def forward(self, features: Tensor, mask: Tensor) -> dict[str, Tensor]:
        times, levels, masks = mask, [], []
        x = F.relu(self.embed(features * mask[:, None])) * mask[:, None]
        for layer in self.encoder:
            x = layer(x, mask)
            mask = mask[:, ::2]
            levels.append(x)
            masks.append(mask)
        y = F.relu(self.decoder[-1](x)) * mask[:, None]
        levels[-1] = y
        for i in reversed(range(self.num_levels - 1)):
            mask = masks[i][:, None]
            up = F.relu(self.upsample[i](y)[:, :, : mask.shape[2]])
            y = (F.relu(self.lateral[i](levels[i])) + up) * mask
            y = levels[i] = F.relu(self.decoder[i](y)) * mask

        logits = [self._per_anchor(self.classification(y, m)) for y, m in zip(levels, masks, strict=True)]
        shifts = [self._per_anchor(self.regression(y, m)) for y, m in zip(levels, masks, strict=True)]
        anchors = pyramid_anchors([m.shape[1] for m in masks], self.scales, features.device)
        located = move_anchors(anchors, torch.cat(shifts, dim=1).float())
        finest, count = levels[0], masks[0].sum(dim=1)
        start, end = located.detach().unbind(dim=2)
        reach = (end - start) / BETA
        move = [
            adjust(sample_around(finest, position / 2, reach / 2, count)).float() * reach
            for adjust, position in ((self.adjust_start, start), (self.adjust_end, end))
        ]
        curves = self.boundaries(finest, masks[0]).unflatten(1, (3, 2)).transpose(2, 3).flatten(2)
        return {
            "logits": torch.cat(logits, dim=1),
            "anchors": anchors,
            "located": located,
            "adjusted": torch.stack([start + move[0], end + move[1]], dim=2),
            "mask": torch.cat([m.repeat_interleave(len(self.scales), dim=1) for m in masks], dim=1),
            "boundaries": curves[:, :, : times.shape[1]],
            "times": times,
        }

    def losses(self, outputs: dict[str, Tensor], batch: dict) -> dict[str, Tensor]:
        """{"classification", "regression", "adjustment", "boundaries"}: means over windows. float32, no autocast."""
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            totals = []
            for i, (segments, labels) in enumerate(zip(batch["segments"], batch["labels"], strict=True)):
                mask, located, adjusted = (outputs[name][i] for name in ("mask", "located", "adjusted"))
                if self.num_classes == 1:
                    labels = torch.zeros_like(labels)
                targets, _, positive = assign_segments(located.detach(), mask, segments, labels, ANCHOR_IOU)
                classes = targets[:, None] == torch.arange(self.num_classes, device=labels.device)
                classes = (classes & positive[:, None]).float()
                focal = focal_loss(outputs["logits"][i].float(), classes, FOCAL_ALPHA).sum(dim=1)
                terms = [mean_over(focal * mask, positive)]
                for found, reference, threshold in (
                    (located, outputs["anchors"], ANCHOR_IOU),
                    (adjusted, located.detach(), ADJUST_IOU),
                ):
                    _, matched, positive = assign_segments(reference, mask, segments, labels, threshold)
                    terms.append(mean_over(giou_loss(found, matched) * positive, positive))
                terms.append(boundary_loss(outputs["boundaries"][i].float(), outputs["times"][i], segments))
                totals.append(torch.stack(terms))
            names = ("classification", "regression", "adjustment", "boundaries")
            weights = (1.0, self.regression_weight, self.regression_weight, 1.0)
            means = torch.stack(totals).mean(dim=0)
            return {name: weight * mean for name, weight, mean in zip(names, weights, means, strict=True)}

    @torch.no_grad()
    def detect(self, outputs: dict[str, Tensor], batch: dict, settings: Settings) -> list[Window]:
        """The candidates of each window, best first: at most `max_candidates`, none under `min_score`."""
        segments = outputs["adjusted"].float()
        curves = outputs["boundaries"].float().sigmoid()
        real = outputs["times"].sum(dim=1)
        start, end = (score_at(curves[:, i], segments[:, :, i], real) for i in range(2))
        scores = outputs["logits"].float().sigmoid() * (start * end * outputs["mask"])[:, :, None]
        return to_windows(segments, scores, batch, settings)

    def _per_anchor(self, x: Tensor) -> Tensor:
        """(B, scales * V, n) -> (B, n * scales, V): position slowest, as in `pyramid_anchors`."""
        return x.unflatten(1, (len(self.scales), -1)).permute(0, 3, 1, 2).flatten(1, 2)


class GraphLayer(nn.Module):
    """(B, C, n) -> (B, C, ceil(n / 2)): a convolution in time beside one over the k nearest by feature; pooling."""

    def __init__(self, width: int, num_neighbors: int) -> None:
        super().__init__()
        self.num_neighbors = num_neighbors
        self.temporal = nn.Conv1d(width, width, 3, padding=1)
        self.neighbor = nn.Conv1d(width, width, 1, bias=False)  # W [x_j, x_i] + b, the part of x_j, which comes out of
        self.center = nn.Conv1d(width, width, 1)  # the maximum over j: n products instead of n k

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        index = nearest(x, mask, self.num_neighbors)  # (B, n, k)
        y = self.neighbor(x).masked_fill(~mask[:, None], -torch.inf)  # fewer than k real ones: the others never win
        y = y.gather(2, index.flatten(1)[:, None].expand(-1, y.shape[1], -1)).unflatten(2, index.shape[1:]).amax(dim=3)
        y = y.masked_fill(~mask[:, None], 0) + self.center(x) + self.temporal(x)
        return F.max_pool1d(F.relu(y) * mask[:, None], 2, ceil_mode=True)


class Adjustment(nn.Module):
    """Three features around a boundary, (B, P, 3 C) -> how far to move it, (B, P), in their distance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[..., 0]


@torch.no_grad()
def nearest(x: Tensor, mask: Tensor, k: int) -> Tensor:
    """x (B, C, n), mask (B, n) -> indices (B, n, min(k, n)) of the real positions nearest in feature, itself included.

    The graph is made anew from the features of each forward and is not differentiated. float32, outside autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float().transpose(1, 2)
        square = x.square().sum(dim=2)
        distance = square[:, :, None] + square[:, None] - 2 * x @ x.transpose(1, 2)
        return distance.masked_fill(~mask[:, None], torch.inf).topk(min(k, x.shape[1]), dim=2, largest=False).indices


def pyramid_anchors(lengths: list[int], scales: tuple[float, ...], device: torch.device) -> Tensor:
    """(P, 2) start and end in times: level after level, position after position, one anchor per scale.

    Position j of level l covers the times [j s, (j + 1) s), s = 2^(l+1); its anchors, around the middle, are `scale` s
    long.
    """
    levels = []
    for level, length in enumerate(lengths):
        stride = 2.0 ** (level + 1)
        center = (torch.arange(length, device=device) + 0.5)[:, None] * stride
        half = torch.tensor(scales, device=device) * stride / 2
        levels.append(torch.stack([center - half, center + half], dim=2).flatten(0, 1))
    return torch.cat(levels)


def move_anchors(anchors: Tensor, shifts: Tensor) -> Tensor:
    """anchors (P, 2), shifts (B, P, 2) -> (B, P, 2): the center moves by 0.1 lengths per unit, the length is multiplied
    by exp(0.2 per unit), at most by e^4: the coding of two-stage detectors, with their weights 10 and 5."""
    length = anchors[:, 1] - anchors[:, 0]
    center = anchors.mean(dim=1) + 0.1 * shifts[..., 0] * length
    half = length * (0.2 * shifts[..., 1]).clamp(max=4).exp() / 2
    return torch.stack([center - half, center + half], dim=2)


def sample_around(x: Tensor, position: Tensor, reach: Tensor, count: Tensor) -> Tensor:
    """Features at the cells in which position - reach, position, position + reach lie, the nearest real one if outside.

    x: (B, C, n); position, reach: (B, P), in cells; count: (B,) real cells. Returns (B, P, 3 C).
    """
    at = torch.stack([position - reach, position, position + reach], dim=2).floor().long()
    last = (count[:, None, None] - 1).clamp(min=0)
    at = torch.minimum(at.clamp(min=0), last).flatten(1)
    return x.transpose(1, 2).gather(1, at[:, :, None].expand(-1, -1, x.shape[1])).unflatten(1, (-1, 3)).flatten(2)


def score_at(curve: Tensor, position: Tensor, count: Tensor) -> Tensor:
    """curve (B, N), of which `count` (B,) times are real, read at position (B, P) in times, linear between middles."""
    last = (count[:, None] - 1).clamp(min=0)
    at = torch.minimum((position - 0.5).clamp(min=0), last)
    low = at.floor().long()
    high = torch.minimum(low + 1, last)
    return torch.lerp(curve.gather(1, low), curve.gather(1, high), at - low)


def assign_segments(
    candidates: Tensor, mask: Tensor, segments: Tensor, labels: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The action of each candidate: label (P,), segment (P, 2), positive (P,) bool.

    candidates: (P, 2), mask: (P,) bool; segments: (M, 2); labels: (M,). A candidate takes the action that it overlaps
    most, and is positive if the IoU is at least `threshold` or no candidate overlaps some action more.
    """
    segments = torch.cat([segments, segments.new_zeros(1, 2)])  # one that nothing overlaps: never empty
    labels = torch.cat([labels, labels.new_zeros(1)])
    iou, _ = iou_and_hull(candidates[:, None], segments)
    iou = iou * mask[:, None]  # (P, M + 1)
    best, index = iou.max(dim=1)
    favorite = ((iou == iou.amax(dim=0)) & (iou > 0)).any(dim=1)
    return labels[index], segments[index], ((best >= threshold) | favorite) & (best > 0)


def iou_and_hull(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2) and (..., 2), start <= end -> IoU (...), and the share of the hull that neither covers (...)."""
    inside = (torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - inside
    hull = torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])
    return inside / union.clamp(min=1e-6), (hull - union) / hull.clamp(min=1e-6)


def giou_loss(found: Tensor, target: Tensor) -> Tensor:
    """1 - IoU + share of the hull that neither covers, (...), for segments (..., 2). Swapped ends are swapped back."""
    found = torch.stack([found.amin(dim=-1), found.amax(dim=-1)], dim=-1)
    iou, empty = iou_and_hull(found, target)
    return 1 - iou + empty


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """Sum of `values` over the number of `chosen`, at least 1."""
    return values.sum() / chosen.sum().clamp(min=1)


def boundary_targets(segments: Tensor, num_times: int) -> Tensor:
    """(3, N) float: times whose middle lies within an action's start region, its end region, the action itself."""
    segments = torch.cat([segments, segments.new_full((1, 2), -1e6)])
    middle = torch.arange(num_times, device=segments.device)[:, None] + 0.5
    start, end = segments.unbind(dim=1)
    half = (BOUNDARY_WIDTH * (end - start)).clamp(min=1) / 2
    near = [(middle - boundary).abs() <= half for boundary in (start, end)]
    return torch.stack([*near, (middle >= start) & (middle <= end)]).any(dim=2).float()


def boundary_loss(logits: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
    """Cross entropy of the three curves (3, N), summed; positives and negatives of each weigh half."""
    targets = boundary_targets(segments, logits.shape[1])
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    sides = [(loss * side).sum(dim=1) / side.sum(dim=1).clamp(min=1) for side in (targets * mask, (1 - targets) * mask)]
    return (sides[0] + sides[1]).sum() / 2
