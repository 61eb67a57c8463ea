"""ActionFormer's head: features of a window's times to classes and boundaries at every moment of a temporal pyramid.

    projection      2 x (convolution, LayerNorm, ReLU), then 2 transformer blocks at full length        level 0
    pyramid         one block per further level; its depthwise convolutions have stride 2               level l
    towers          2 x (convolution, LayerNorm, ReLU), convolution; the same weights at every level
    points          point j of level l is at time j 2^l + 0.5; classes p, distances d >= 0 to start and end in units 2^l
    loss            sum of focal(p, target) / positives + DIoU(d, target) over the positives / positives     per window

A point is positive for an action in which it lies, not further than radius 2^l from its center, if the further of the
two boundaries is 4 2^(l-1) <= distance < 4 2^l away (from 0 at the first level, without limit at the last); of several
actions the shortest one counts. Written from the paper (Zhang, Wu, Li, "ActionFormer", arXiv 2202.07925) and the
settings of its release. Unlike there, losses are normalized by the window's own positives, so that nothing depends on
how a batch is split. Padded times change no output at real ones. Not here: suppression of duplicates (`ops.py`).
"""

import itertools
import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss, stochastic_depth

from action_detection.ops import Window

FIRST_RANGE = 4.0  # times: level 0 finds boundaries nearer than this, each further level twice as far


class Settings(Protocol):
    """What `detect` reads of `configs.Detection`."""

    min_score: float
    max_candidates: int


class ActionFormerHead(nn.Module):
    """Features (B, C, N), mask (B, N) -> {"logits" (B, P, K), "offsets" (B, P, 2), "points" (P, 4), "mask" (B, P)}.

    offsets: distances to start and end, >= 0, in strides. points: position, low and high end of the regression range,
    stride, all in times. P is the sum of the levels' lengths, ceil(N / 2^l). With one class the labels of a batch are
    not read: every action is class 0.
    """

    def __init__(
        self,
        in_width: int,
        num_classes: int,
        *,
        width: int,
        num_levels: int,
        window: int,
        num_heads: int = 4,
        num_embed: int = 2,
        num_stem: int = 2,
        drop_path: float = 0.0,
        position_embedding: bool = False,
        radius: float = 1.5,
        label_smoothing: float = 0.0,
        regression_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"a head of width {width} does not split into {num_heads} attention heads: make it a multiple"
            )
        if window < 0 or (window > 0 and window % 2 == 0):
            raise ValueError(f"attention window {window} has no middle time: make it odd, or 0 for all times")
        if num_levels < 1:
            raise ValueError(f"a pyramid of {num_levels} levels: make it at least 1")
        self.num_classes, self.num_levels, self.radius = num_classes, num_levels, radius
        self.position_embedding = position_embedding
        self.label_smoothing, self.regression_weight = label_smoothing, regression_weight
        widths = [in_width] + [width] * num_embed
        self.embed = nn.ModuleList(ConvNormReLU(a, b) for a, b in itertools.pairwise(widths))
        self.stem = nn.ModuleList(Block(width, num_heads, window, drop_path) for _ in range(num_stem))
        self.branch = nn.ModuleList(Block(width, num_heads, window, drop_path, stride=2) for _ in range(num_levels - 1))
        self.neck = nn.ModuleList(ChannelNorm(width) for _ in range(num_levels))
        self.classification = Tower(width, num_classes)
        self.regression = Tower(width, 2)
        self.scale = nn.Parameter(torch.ones(num_levels))  # of the distances, per level
        self.classification.start_at(-math.log(99))  # every class starts at probability 0.01
        self.regression.start_at(1.0)  # a distance that starts below zero would get no gradient, and stay

    def forward(self, features: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = features * mask[:, None]
        for layer in self.embed:
            x = layer(x, mask)
        if self.position_embedding:
            x = (x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)) * mask[:, None]
        for block in self.stem:
            x = block(x, mask)
        logits, offsets, masks = [], [], []
        for level in range(self.num_levels):
            if level > 0:
                x = self.branch[level - 1](x, mask)
                mask = mask[:, ::2]
            y = self.neck[level](x) * mask[:, None]
            logits.append(self.classification(y, mask))
            offsets.append(F.relu(self.scale[level] * self.regression(y, mask)))
            masks.append(mask)
        return {
            "logits": torch.cat(logits, dim=2).transpose(1, 2),
            "offsets": torch.cat(offsets, dim=2).transpose(1, 2),
            "points": pyramid_points([m.shape[1] for m in masks], features.device),
            "mask": torch.cat(masks, dim=1),
        }

    def losses(self, outputs: dict[str, Tensor], batch: dict) -> dict[str, Tensor]:
        """{"classification", "regression"}, each a scalar: the mean over windows. float32, outside autocast."""
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            totals = []
            for i, (segments, labels) in enumerate(zip(batch["segments"], batch["labels"], strict=True)):
                if self.num_classes == 1:
                    labels = torch.zeros_like(labels)
                targets, distances, positive = assign_points(
                    outputs["points"], segments, labels, self.num_classes, radius=self.radius
                )
                mask = outputs["mask"][i]
                positive = (positive & mask).float()
                count = positive.sum().clamp(min=1)
                smooth = self.label_smoothing
                targets = targets * (1 - smooth) + smooth / (self.num_classes + 1)
                focal = focal_loss(outputs["logits"][i].float(), targets)
                overlap = diou_loss(outputs["offsets"][i].float(), distances)
                totals.append(torch.stack([(focal * mask[:, None]).sum(), (overlap * positive).sum()]) / count)
            classification, regression = torch.stack(totals).mean(dim=0)
            return {"classification": classification, "regression": self.regression_weight * regression}

    @torch.no_grad()
    def detect(self, outputs: dict[str, Tensor], batch: dict, settings: Settings) -> list[Window]:
        """The candidates of each window, best first: at most `max_candidates`, none under `min_score`."""
        position, stride = outputs["points"][:, 0], outputs["points"][:, 3]
        offsets = outputs["offsets"].float() * stride[:, None]
        segments = torch.stack([position - offsets[..., 0], position + offsets[..., 1]], dim=2)
        scores = outputs["logits"].float().sigmoid() * outputs["mask"][:, :, None]
        return to_windows(segments, scores, batch, settings)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, N)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvNormReLU(nn.Module):
    """Convolution over 3 times, LayerNorm, ReLU; padded times, which must be zero, stay zero."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_width, width, 3, padding=1, bias=False)
        self.norm = ChannelNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) * mask[:, None]


class Tower(nn.Module):
    """(B, C, N) -> (B, out, N) through `num_layers` convolutions. Values at padded times mean nothing."""

    def __init__(self, width: int, out: int, *, num_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConvNormReLU(width, width) for _ in range(num_layers - 1))
        self.last = nn.Conv1d(width, out, 3, padding=1)
        self.start_at(0.0)

    def start_at(self, value: float) -> None:
        """Give the bias of the last layer this value."""
        assert self.last.bias is not None
        nn.init.constant_(self.last.bias, value)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return self.last(x)


class Block(nn.Module):
    """x = pool(x) + a Attention(LN(x)); x = x + b MLP(LN(x)), a and b per channel and small at first.

    Query, key and value each pass a depthwise convolution over 3 times, which also tells attention where things are.
    With stride 2 these convolutions and the pool (a maximum over 3 times) halve the length, N to ceil(N / 2).
    """

    def __init__(self, width: int, num_heads: int, window: int, drop_path: float, *, stride: int = 1) -> None:
        super().__init__()
        self.num_heads, self.window, self.drop_path, self.stride = num_heads, window, drop_path, stride
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(width)
        self.local = nn.ModuleList(
            nn.Conv1d(width, width, 3, stride=stride, padding=1, groups=width, bias=False) for _ in range(3)
        )
        self.local_norm = nn.ModuleList(ChannelNorm(width) for _ in range(3))
        self.qkv = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))
        self.out = nn.Conv1d(width, width, 1)
        self.mlp = nn.Sequential(nn.Conv1d(width, 4 * width, 1), nn.GELU(), nn.Conv1d(4 * width, width, 1))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 1e-4)) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (B, C, N), zero at padded times; mask: (B, N), before the stride. So is the result, (B, C, N / stride)."""
        y = self.norm1(x) * mask[:, None]
        if self.stride > 1:
            x = F.max_pool1d(x.masked_fill(~mask[:, None], -torch.inf), 3, stride=self.stride, padding=1)
            mask = mask[:, :: self.stride]
            x = x.masked_fill(~mask[:, None], 0)
        q, k, v = [  # (B, heads, N, C / heads) each of query, key, value
            linear(norm(conv(y))).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
            for conv, norm, linear in zip(self.local, self.local_norm, self.qkv, strict=True)
        ]
        y = self.out(local_attention(q, k, v, mask, self.window).transpose(2, 3).flatten(1, 2))
        x = x + stochastic_depth(self.scale1[:, None] * y, self.drop_path, "row", self.training) * mask[:, None]
        y = self.mlp(self.norm2(x))
        return x + stochastic_depth(self.scale2[:, None] * y, self.drop_path, "row", self.training) * mask[:, None]


def local_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, window: int) -> Tensor:
    """Each time attends to the real ones among the `window` times around it; window 0: to all real ones.

    query, key, value: (B, heads, N, D); mask: (B, N). Returns (B, heads, N, D), finite also at padded times. The
    sequence is cut into pieces of `window` queries, each with the keys it can reach: memory is N x 2 window, not N x N.
    """
    num_times, reach = query.shape[2], window // 2
    if window == 0 or reach >= num_times - 1:
        itself = torch.eye(
            num_times, dtype=torch.bool, device=mask.device
        )  # a padded time sees itself: softmax of something
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :] | itself)
    num_pieces, num_keys = -(-num_times // window), window + 2 * reach
    left, right = reach, reach + num_pieces * window - num_times

    def pieces(x: Tensor) -> Tensor:  # (B, heads, N, D) -> (B * pieces, heads, keys, D)
        x = F.pad(x, (0, 0, left, right)).unfold(2, num_keys, window)
        return x.permute(0, 2, 1, 4, 3).flatten(0, 1)

    real = F.pad(mask, (left, right)).unfold(1, num_keys, window).flatten(0, 1)[:, None, None, :]
    times = torch.arange(num_keys, device=mask.device)
    apart = times[None, :] - times[:window, None]  # of query i and key j; the query itself is key i + reach
    allowed = ((apart >= 0) & (apart <= 2 * reach) & real) | (apart == reach)
    queries = F.pad(query, (0, 0, 0, right - reach)).unflatten(2, (num_pieces, window)).transpose(1, 2).flatten(0, 1)
    y = F.scaled_dot_product_attention(queries, pieces(key), pieces(value), attn_mask=allowed)
    return y.unflatten(0, (-1, num_pieces)).transpose(1, 2).flatten(2, 3)[:, :, :num_times]


def sinusoids(width: int, num_times: int, device: torch.device) -> Tensor:
    """(C, N): the usual sines and cosines of the position, over sqrt(C) so that they do not drown the features."""
    position = torch.arange(num_times, device=device, dtype=torch.float32)
    rate = 10000 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angle = rate[:, None] * position
    return torch.stack([angle.sin(), angle.cos()], dim=1).flatten(0, 1)[:width] / math.sqrt(width)


def pyramid_points(lengths: list[int], device: torch.device) -> Tensor:
    """(P, 4): position, low and high end of the regression range, stride, in times; level after level."""
    levels = []
    for level, length in enumerate(lengths):
        stride = float(2**level)
        low = 0.0 if level == 0 else FIRST_RANGE * stride / 2
        high = torch.inf if level == len(lengths) - 1 else FIRST_RANGE * stride
        position = torch.arange(length, device=device, dtype=torch.float32) * stride + 0.5
        levels.append(torch.stack([position, *(torch.full_like(position, v) for v in (low, high, stride))], dim=1))
    return torch.cat(levels)


def assign_points(
    points: Tensor, segments: Tensor, labels: Tensor, num_classes: int, *, radius: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets of each point: classes (P, K) float, distances to start and end in strides (P, 2), positive (P,) bool.

    points: as in the outputs; segments: (M, 2) in times; labels: (M,). A point takes the shortest action of those whose
    rule it meets (see above); of equally short ones (to 1e-3) it takes all classes and the boundaries of the first.
    Distances of a point that is not positive are one stride.
    """
    segments = torch.cat([segments, segments.new_zeros(1, 2)])  # one without length, which no point meets: never empty
    labels = torch.cat([labels, labels.new_zeros(1)])
    position, low, high, stride = (column[:, None] for column in points.unbind(dim=1))  # (P, 1)
    start, end = segments.unbind(dim=1)  # (M,)
    distances = torch.stack([position - start, end - position], dim=2)  # (P, M, 2)
    nearest, furthest = distances.amin(dim=2), distances.amax(dim=2)
    central = (position - (start + end) / 2).abs() < radius * stride
    candidate = (nearest > 0) & central & (furthest >= low) & (furthest < high)
    length = torch.where(candidate, end - start, torch.inf)
    shortest, index = length.min(dim=1)
    positive = shortest.isfinite()
    chosen = candidate & (length <= shortest[:, None] + 1e-3)
    one_hot = labels[:, None] == torch.arange(num_classes, device=labels.device)
    classes = (chosen[:, :, None] & one_hot).any(dim=1).float()
    distances = distances.gather(1, index[:, None, None].expand(-1, 1, 2))[:, 0] / stride
    return classes, torch.where(positive[:, None], distances, 1.0), positive


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25) -> Tensor:
    """-alpha_t (1 - p_t)^2 log p_t per element (Lin et al., 2017); targets in [0, 1], smoothed ones as well."""
    return sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=2.0)


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - IoU + (distance of the centers / length of the hull)^2, for segments given as distances from one point.

    predicted, target: (..., 2) distances to start and end, >= 0. Returns (...). Finite for segments without length.
    """
    intersection = torch.minimum(predicted, target).sum(dim=-1)
    hull = torch.maximum(predicted, target).sum(dim=-1).clamp(min=1e-8)  # both contain the point: hull = union
    difference = predicted - target
    apart = (difference[..., 1] - difference[..., 0]) / 2
    return 1 - intersection / hull + (apart / hull) ** 2


def to_windows(segments: Tensor, scores: Tensor, batch: dict, settings: Settings) -> list[Window]:
    """segments (B, P, 2) in times, scores (B, P, K) in [0, 1] -> a `Window` per sample, best first, on the CPU.

    Cut to [0, duration]; what has no length is dropped.
    """
    windows = []
    num_classes = scores.shape[2]
    for i, name in enumerate(batch["name"]):
        seconds = batch["start"][i] + segments[i] * batch["seconds_per_time"][i]
        seconds = seconds.clamp(min=0).minimum(batch["duration"][i])
        valid = (scores[i] > settings.min_score) & (seconds[:, 1] > seconds[:, 0])[:, None]
        score = torch.where(valid, scores[i], 0).flatten()
        score, order = score.topk(min(settings.max_candidates, score.numel()))
        order, score = order[score > 0], score[score > 0]
        windows.append(
            Window(
                name=name,
                window=int(batch["window"][i]),
                segments=seconds[order // num_classes].float().cpu(),
                scores=score.cpu(),
                labels=(order % num_classes).cpu(),
            )
        )
    return windows
