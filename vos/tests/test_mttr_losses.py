"""Matching and losses against plain loops in float64 on random predictions, and transformers where it agrees."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.detr import matching
from vos import criterion
from vos.criterion import Target, all_losses, at_cells, mask_losses, matching_costs, referred_loss

NUM_CASES = 200
ROUNDING = 1e-5  # float32 sums of some hundred pixels


def some_target(generator: torch.Generator, objects: int, time: int, size: tuple[int, int]) -> Target:
    masks = (torch.rand(objects, time, *size, generator=generator) < 0.3).to(torch.uint8)
    masks[0, 0] = 0  # absent
    referred = torch.randint(objects, (), generator=generator)
    return Target(masks, referred, torch.rand(time, generator=generator) < 0.7)


def integers(generator: torch.Generator, *ranges: tuple[int, int]) -> list[int]:
    return [int(torch.randint(low, high + 1, (), generator=generator)) for low, high in ranges]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plain_costs(logits: Tensor, masks: Tensor, target: Target) -> list[list[float]]:
    """One number after the other: for each query, for each object."""
    time, queries, height, width = masks.shape
    rows = []
    for q in range(queries):
        row = []
        for m in range(len(target.masks)):
            dice = word = 0.0
            for t in range(time):
                referred = sigmoid(float(logits[t, q, 0] - logits[t, q, 1]))
                says = m == int(target.referred) and bool(target.visible[t])
                word += (referred if says else 1 - referred) / time
                common = total = 0.0
                for y, x in itertools.product(range(height), range(width)):
                    p = sigmoid(float(masks[t, q, y, x]))
                    row_of = min(4 * y + 2, target.masks.shape[2] - 1)
                    truth = float(target.masks[m, t, row_of, min(4 * x + 2, target.masks.shape[3] - 1)])
                    common, total = common + p * truth, total + p + truth
                dice += (2 * common + 1) / (total + 1) / time
            row.append(-2 * word - 5 * dice)
        rows.append(row)
    return rows


def least(costs: list[list[float]]) -> float:
    """Of all assignments, as many pairs as both sides have, tried one after the other."""
    queries, objects = len(costs), len(costs[0])
    if queries > objects:
        costs = [list(column) for column in zip(*costs, strict=True)]
    return min(
        sum(row[choice] for row, choice in zip(costs, choices, strict=True))
        for choices in itertools.permutations(range(max(queries, objects)), min(queries, objects))
    )


def enlarged(mask: Tensor, size: tuple[int, int]) -> list[list[float]]:
    """Bilinear, centers of pixels: what align_corners=False means."""

    def weights(cells: int, pixels: int) -> list[list[tuple[int, float]]]:
        found = []
        for pixel in range(pixels):
            place = max((pixel + 0.5) * cells / pixels - 0.5, 0)
            low = min(int(place), cells - 1)
            high = min(low + 1, cells - 1)
            found.append([(low, 1 - (place - low)), (high, place - low)])
        return found

    rows, columns = weights(mask.shape[0], size[0]), weights(mask.shape[1], size[1])
    return [[sum(a * b * float(mask[y, x]) for y, a in row for x, b in column) for column in columns] for row in rows]


def plain_losses(
    logits: Tensor, masks: Tensor, targets: list[Target], num_targets: float, chosen: list[dict[int, int]]
) -> list[float]:
    """Dice, focal and reference loss of one layer. chosen: object -> query, which must be the best; of equals any."""
    dice = focal = word = 0.0
    first = 0
    for target, pairs in zip(targets, chosen, strict=True):
        time = target.masks.shape[1]
        own_logits, own_masks = logits[first : first + time], masks[first : first + time]
        first += time
        costs = plain_costs(own_logits, own_masks, target)
        assert len(pairs) == min(len(costs), len(costs[0])) == len(set(pairs.values()))
        assert sum(costs[q][m] for m, q in pairs.items()) <= least(costs) + ROUNDING
        size = (target.masks.shape[2], target.masks.shape[3])
        for (m, q), t in itertools.product(pairs.items(), range(time)):
            common = total = loss = 0.0
            for y, row in enumerate(enlarged(own_masks[t, q], size)):
                for x, value in enumerate(row):
                    p, truth = sigmoid(value), float(target.masks[m, t, y, x])
                    common, total = common + p * truth, total + p + truth
                    right = p if truth else 1 - p
                    loss += (0.25 if truth else 0.75) * -math.log(right) * (1 - right) ** 2
            dice += 1 - (2 * common + 1) / (total + 1)
            focal += loss / (size[0] * size[1])
        for t, q in itertools.product(range(time), range(logits.shape[1])):
            p = sigmoid(float(own_logits[t, q, 0] - own_logits[t, q, 1]))
            own = pairs.get(int(target.referred)) == q
            said = p if own and bool(target.visible[t]) else 1 - p
            word += (1.0 if own else 0.1) * -math.log(said) / time / len(targets)
    return [5 * dice / num_targets, 2 * focal / num_targets, 2 * word]


def test_costs_are_those_of_plain_loops_on_random_cases() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_CASES):
        time, queries, objects, height, width = integers(generator, (1, 3), (1, 4), (1, 4), (1, 3), (1, 3))
        size = (4 * height - integers(generator, (0, 3))[0], 4 * width)
        target = some_target(generator, objects, time, size)
        logits = 3 * torch.randn(time, queries, 2, generator=generator)
        masks = 3 * torch.randn(time, queries, height, width, generator=generator)
        found = matching_costs(logits, masks, target)
        expected = torch.tensor(plain_costs(logits.double(), masks.double(), target), dtype=torch.float64)
        torch.testing.assert_close(found.double(), expected, rtol=ROUNDING, atol=ROUNDING)


def test_losses_are_those_of_plain_loops_on_random_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one or two samples of unequal numbers of frames and objects; sometimes more objects than queries."""
    chosen: list[dict[int, int]] = []

    def assign(*args: Any) -> tuple[Tensor, Tensor]:
        queries, objects = matching.assign(*args)
        chosen.append(dict(zip(objects.tolist(), queries.tolist(), strict=True)))
        return queries, objects

    monkeypatch.setattr(criterion, "assign", assign)
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_CASES):
        samples, queries, height, width = integers(generator, (1, 2), (1, 4), (1, 2), (1, 2))
        size = (4 * height, 4 * width - integers(generator, (0, 3))[0])
        targets = [some_target(generator, *integers(generator, (1, 3), (1, 2)), size) for _ in range(samples)]
        frames = sum(target.masks.shape[1] for target in targets)
        logits = 3 * torch.randn(1, frames, queries, 2, generator=generator)
        masks = 3 * torch.randn(1, frames, queries, height, width, generator=generator)
        chosen.clear()
        found = all_losses(logits, masks, targets, 3.0)[0]
        expected = plain_losses(logits[0].double(), masks[0].double(), targets, 3.0, chosen)
        torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=ROUNDING, atol=ROUNDING)


def test_mask_losses_are_those_of_transformers() -> None:
    mask2former = pytest.importorskip("transformers.models.maskformer.modeling_maskformer")
    generator = torch.Generator().manual_seed(2)
    logits, truth = torch.randn(5, 6, 7, generator=generator), torch.rand(5, 24, 28, generator=generator) < 0.4
    found = mask_losses(logits, truth.to(torch.uint8))
    large = F.interpolate(logits[:, None], size=(24, 28), mode="bilinear", align_corners=False).flatten(1)
    wanted = truth.float().flatten(1)
    expected = torch.stack(
        [mask2former.dice_loss(large, wanted, 1), mask2former.sigmoid_focal_loss(large, wanted, 1, 0.25, 2)]
    )
    torch.testing.assert_close(found, expected)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    targets = [some_target(generator, 3, 2, (16, 12)), some_target(generator, 2, 1, (16, 12))]
    logits = torch.randn(2, 3, 5, 2, generator=generator, requires_grad=True)
    masks = torch.randn(2, 3, 5, 4, 3, generator=generator, requires_grad=True)
    found = []
    for piece in (2**22, 400, 1):
        monkeypatch.setattr(criterion, "PIECE", piece)
        losses = all_losses(logits, masks, targets, 8.0)
        found.append([losses.detach(), *torch.autograd.grad(losses.sum(), [logits, masks])])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_truth_is_taken_in_the_middle_of_each_cell_and_of_the_last_pixel_beyond_the_edge() -> None:
    picture = torch.arange(7 * 9).view(7, 9)
    found = at_cells(picture, (2, 3))
    assert found.tolist() == [[2 * 9 + 2, 2 * 9 + 6, 2 * 9 + 8], [6 * 9 + 2, 6 * 9 + 6, 6 * 9 + 8]]


def test_where_the_object_is_not_visible_its_query_should_not_say_it_and_counts_in_full() -> None:
    target = Target(torch.zeros(2, 2, 8, 8, dtype=torch.uint8), torch.tensor(1), torch.tensor([True, False]))
    logits = torch.zeros(2, 3, 2)
    logits[:, 2] = torch.tensor([4.0, 0.0])  # the query of the referred object says so in both frames
    found = referred_loss(logits, torch.tensor([0, 2]), torch.tensor([0, 1]), target)
    right, wrong = math.log(1 + math.exp(-4)), math.log(1 + math.exp(4))
    expected = (2 * 2 * 0.1 * math.log(2) + right + wrong) / 2
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_an_exact_mask_costs_least_and_predictions_that_are_not_finite_are_not_matched() -> None:
    generator = torch.Generator().manual_seed(4)
    target = some_target(generator, 2, 3, (32, 32))
    masks = torch.randn(3, 4, 8, 8, generator=generator)
    masks[:, 3] = at_cells(target.masks, (8, 8))[1] * 40.0 - 20
    assert matching_costs(torch.zeros(3, 4, 2), masks, target)[:, 1].argmin() == 3
    with pytest.raises(FloatingPointError, match="sample 0 of the batch"):
        all_losses(torch.zeros(1, 3, 4, 2), masks[None] * torch.nan, [target], 1.0)


def test_half_precision_predictions_have_losses_of_float32() -> None:
    generator = torch.Generator().manual_seed(5)
    target = some_target(generator, 2, 1, (8, 8))
    logits, masks = torch.randn(1, 1, 4, 2, generator=generator), torch.randn(1, 1, 4, 2, 2, generator=generator)
    found = all_losses(logits.bfloat16(), masks.bfloat16(), [target], 1.0)
    assert found.dtype == torch.float32
    expected = all_losses(logits.bfloat16().float(), masks.bfloat16().float(), [target], 1.0)
    torch.testing.assert_close(found, expected)
