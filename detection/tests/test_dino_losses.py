"""Matching, losses and denoising queries against transformers' where those compute the same, and by themselves."""

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

from detection import criterion
from detection.criterion import denoising_loss, matched_losses, matching_costs
from detection.denoising import Noise, Target, make_denoising
from engine.detr.boxes import generalized_iou, inverse_sigmoid, to_centers, to_corners
from engine.detr.matching import assign

NUM_CLASSES = 5
NOISE = Noise(queries=100, max_queries=200, box=1.0, label=0.5)


def some_targets(*numbers: int, seed: int = 0) -> list[Target]:
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for number in numbers:
        center = 0.3 + 0.4 * torch.rand(number, 2, generator=generator)
        size = 0.05 + 0.3 * torch.rand(number, 2, generator=generator)
        labels = torch.randint(NUM_CLASSES, (number,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat([center, size], dim=1)})
    return targets


def predictions(sets: int, images: int, queries: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(sets, images, queries, NUM_CLASSES, generator=generator)
    return logits, torch.rand(sets, images, queries, 4, generator=generator) * 0.5 + 0.2


def test_matching_and_losses_are_those_of_transformers_without_its_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criterion, "generalized_iou", partial(generalized_iou, epsilon=0.0))
    targets = some_targets(3, 0, 7)
    logits, boxes = predictions(2, 3, 12)
    found = matched_losses(logits, boxes, targets, num_targets=10.0)
    renamed = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    matcher = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    losses = DeformableDetrImageLoss(matcher, NUM_CLASSES, 0.25, ["labels", "boxes"])
    for one in range(2):
        outputs = {"logits": logits[one], "pred_boxes": boxes[one]}
        indices = matcher(outputs, renamed)
        classes = losses.loss_labels(outputs, renamed, indices, 10.0)["loss_ce"]
        both = losses.loss_boxes(outputs, renamed, indices, 10.0)
        wanted = torch.stack([classes, 5 * both["loss_bbox"], 2 * both["loss_giou"]])
        torch.testing.assert_close(found[one], wanted, atol=1e-6, rtol=1e-6)


def test_generalized_iou_by_hand_and_of_small_boxes() -> None:
    a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 3.0])
    # intersection 1, union 7, hull 9
    torch.testing.assert_close(generalized_iou(a, b, 0.0), torch.tensor(1 / 7 - 2 / 9))
    side = 4 / 1000
    box = torch.tensor([0.5, 0.5, 0.5 + side, 0.5 + side])
    torch.testing.assert_close(generalized_iou(box, box), torch.tensor(16 / 17), atol=1e-3, rtol=0)
    point = torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert torch.isfinite(generalized_iou(point, point))


def test_centers_and_corners_are_inverse_and_so_are_logits() -> None:
    boxes = some_targets(20)[0]["boxes"]
    torch.testing.assert_close(to_centers(to_corners(boxes)), boxes)
    torch.testing.assert_close(inverse_sigmoid(boxes).sigmoid(), boxes)
    assert torch.isfinite(inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))).all()


def test_predictions_that_are_not_finite_are_not_matched() -> None:
    with pytest.raises(FloatingPointError, match="image 1 of the batch"):
        assign(torch.full((4, 2), torch.nan), "image 1 of the batch")


def test_more_targets_than_queries_match_as_many_as_there_are() -> None:
    (target,) = some_targets(9)
    logits, boxes = predictions(1, 1, 4)
    pair = assign(matching_costs(logits[0, 0], boxes[0, 0], target), "image 0 of the batch")
    assert len(pair[0]) == 4
    assert torch.isfinite(matched_losses(logits, boxes, [target], 9.0)).all()


def test_a_batch_without_boxes_trains_the_classes_and_connects_the_boxes() -> None:
    logits, boxes = predictions(1, 2, 4)
    logits.requires_grad_(), boxes.requires_grad_()
    found = matched_losses(logits, boxes, some_targets(0, 0), 1.0)
    found.sum().backward()
    assert found[0, 0] > 0 and not found[0, 1:].any()
    assert logits.grad.any() and not boxes.grad.any()


def test_two_thousand_boxes_in_an_image_cost_the_capped_number_of_queries() -> None:
    plan = make_denoising(some_targets(2000, 3), NUM_CLASSES, NOISE)
    assert plan is not None
    assert plan.labels.shape == (2, 200) and plan.groups == 1
    assert int(plan.positive[1].sum()) == 3


def test_an_image_without_boxes_has_empty_slots_and_a_batch_without_has_none() -> None:
    assert make_denoising(some_targets(0, 0), NUM_CLASSES, NOISE) is None
    assert make_denoising(some_targets(2), NUM_CLASSES, Noise(0, 200, 1.0, 0.5)) is None
    plan = make_denoising(some_targets(0, 4), NUM_CLASSES, NOISE)
    assert plan is not None and plan.groups == 25 and plan.labels.shape == (2, 200)
    assert not plan.real[0].any() and plan.real[1].all()
    assert not plan.positive[0].any() and int(plan.positive[1].sum()) == 100
    logits, boxes = predictions(2, 2, 200)
    assert torch.isfinite(denoising_loss(logits, boxes, plan, 4.0))


def test_noised_boxes_and_the_mask_are_those_of_transformers() -> None:
    targets = some_targets(3, 5)
    renamed = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]

    def embed(labels: Tensor) -> Tensor:
        return labels[..., None].float()

    torch.manual_seed(3)
    plan = make_denoising(targets, NUM_CLASSES, Noise(100, 200, 1.0, 0.0))
    assert plan is not None
    torch.manual_seed(3)
    torch.rand(plan.labels.shape), torch.randint(NUM_CLASSES, plan.labels.shape)  # drawn for labels, which stay
    labels, boxes, blocked, meta = get_contrastive_denoising_training_group(
        renamed, NUM_CLASSES, 30, embed, 100, label_noise_ratio=0.0, box_noise_scale=1.0
    )
    assert meta["dn_num_group"] == plan.groups == 20
    inside = plan.real[..., None] & (plan.boxes > 2e-3) & (plan.boxes < 1 - 2e-3)  # theirs clamps logits elsewhere
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(plan.boxes[inside], boxes.sigmoid()[inside], atol=1e-6, rtol=1e-5)
    assert torch.equal(plan.labels[plan.real], labels[..., 0].long()[plan.real])
    number = plan.labels.shape[1]
    assert torch.equal(plan.blocked(30), blocked < 0)
    places = [torch.nonzero(row)[:, 0] for row in plan.positive]
    for own, theirs in zip(places, meta["dn_positive_idx"], strict=True):
        assert torch.equal(own, theirs)
    assert number == 200


def test_positives_stay_near_and_negatives_do_not_and_a_quarter_of_the_labels_is_drawn_anew() -> None:
    targets = some_targets(50, 50, seed=2)
    torch.manual_seed(0)
    plan = make_denoising(targets, NUM_CLASSES, Noise(2000, 4000, 1.0, 0.5))
    assert plan is not None
    half = to_corners(plan.true_boxes)
    moved = (to_corners(plan.boxes) - half).abs() / (plan.true_boxes[..., 2:].repeat(1, 1, 2) / 2)
    assert (moved[plan.positive] <= 1 + 1e-3).all()
    assert (moved[~plan.positive] > 0.9).float().mean() > 0.6  # but for clamps at the border and swapped corners
    changed = (plan.labels != plan.true_labels).float().mean()
    assert abs(float(changed) - 0.25 * (1 - 1 / NUM_CLASSES)) < 0.02


def test_the_denoising_loss_by_a_loop() -> None:
    targets = some_targets(2, 3)
    torch.manual_seed(0)
    plan = make_denoising(targets, NUM_CLASSES, Noise(6, 200, 1.0, 0.5))
    assert plan is not None and plan.groups == 2
    logits, boxes = predictions(2, 2, plan.labels.shape[1])
    total = torch.zeros(())
    for layer in range(2):
        for image, target in enumerate(targets):
            for slot in range(plan.labels.shape[1]):
                group_slot = slot % 6
                index = group_slot if group_slot < 3 and group_slot < len(target["labels"]) else None
                wanted = torch.zeros(NUM_CLASSES)
                if index is not None:
                    wanted[target["labels"][index]] = 1
                    box = boxes[layer, image, slot]
                    total = total + 5 * (box - target["boxes"][index]).abs().sum()
                    total = total + 2 * (1 - generalized_iou(to_corners(box), to_corners(target["boxes"][index])))
                p = logits[layer, image, slot].sigmoid()
                positive = 0.25 * (1 - p) ** 2 * -p.log() * wanted
                total = total + (positive + 0.75 * p**2 * -(1 - p).log() * (1 - wanted)).sum()
    torch.testing.assert_close(denoising_loss(logits, boxes, plan, 5.0), total / (5.0 * 2), atol=1e-4, rtol=1e-5)
