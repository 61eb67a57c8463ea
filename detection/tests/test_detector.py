"""The whole detector: its losses, how a batch may be split, its detections, unusual batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dr2net
from detection.configs import ROWS, Config, shapes_tiny
from detection.model import Detector, build_model, example_batch
from engine.rows import methods_of
from engine.training.finetuning import apply_method, set_coefficients, set_mode

# Sums over eight images are taken in another order.
SPLIT_TOLERANCE = 1e-5


def small_config(method: str = "conventional", **changes: Any) -> Config:
    config = ROWS[f"shapes_tiny_{method}"]()
    return replace(config, model=replace(config.model, weights=None, queries=30, **changes))


def build(config: Config) -> Detector:
    torch.manual_seed(0)
    return build_model(config)


def some_batch(counts: list[int], size: int = 96) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    targets = []
    for count in counts:
        center = 0.3 + 0.4 * torch.rand(count, 2, generator=generator)
        extent = 0.1 + 0.3 * torch.rand(count, 2, generator=generator)
        labels = torch.randint(5, (count,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat([center, extent], 1)})
    padding = torch.zeros(len(counts), size, size, dtype=torch.bool)
    padding[1::2, :, size * 3 // 4 :] = True
    image = torch.randn(len(counts), 3, size, size, generator=generator).masked_fill(padding[:, None], 0)
    return {"image": image, "padding": padding, "targets": targets, "num_targets": float(max(sum(counts), 1))}


def piece_of(batch: dict[str, Any], part: slice, num_targets: float) -> dict[str, Any]:
    return {**{key: batch[key][part] for key in ("image", "padding", "targets")}, "num_targets": num_targets}


def gradient(model: Detector) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def test_a_step_of_eight_is_two_of_four_and_four_of_two() -> None:
    model = build(small_config(denoising=0)).train()
    batch = some_batch([3, 0, 7, 1, 0, 0, 2, 5])
    gradients = []
    for pieces in (1, 2, 4):
        size = 8 // pieces
        for start in range(0, 8, size):
            piece = piece_of(batch, slice(start, start + size), batch["num_targets"] / pieces)
            (sum(model.losses(model(piece), piece).values()) / pieces).backward()
        gradients.append(gradient(model))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= SPLIT_TOLERANCE * gradients[0].norm()


def test_the_sum_of_the_losses_is_that_of_all_terms() -> None:
    model = build(small_config()).train()
    batch = some_batch([3, 2])
    losses = model.losses(model(batch), batch)
    assert list(losses) == ["class", "box", "giou", "auxiliary", "encoder", "denoising"]
    assert all(loss.dtype == torch.float32 and loss.shape == () and loss > 0 for loss in losses.values())


@pytest.mark.parametrize("counts", [[0, 0], [0, 3], [120, 0], [1, 1]])
def test_every_parameter_gets_a_gradient_whatever_is_in_the_batch(counts: list[int]) -> None:
    model = build(small_config()).train()
    batch = some_batch(counts)
    sum(model.losses(model(batch), batch).values()).backward()
    # distributed training forgives no parameter without a gradient
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert torch.isfinite(gradient(model)).all()


@pytest.mark.parametrize("method", methods_of(shapes_tiny))
def test_reversible_gradients_of_backbone_and_encoder_are_those_of_stored_activations(method: str) -> None:
    config = small_config(method)
    model = build(config)
    apply_method(model, config.finetuning)
    set_mode(model, config.finetuning)
    set_coefficients(model, config.finetuning, 0.0)
    batch = some_batch([3, 0, 120])
    if method in ("reversible", "dr2net", "dr2net_dynamic"):
        found = dr2net.gradient_error(
            model, batch, lambda model, batch: sum(model.losses(model(batch), batch).values())
        )
        assert found.overall == 0.0
    else:
        sum(model.losses(model(batch), batch).values()).backward()
        frozen = {name for name, p in model.named_parameters() if p.grad is None}
        assert all(name.startswith("backbone.") for name in frozen) and bool(frozen) == (method == "frozen")


def test_the_encoder_is_checkpointed_and_reversible_with_the_backbone() -> None:
    config = small_config("dr2net")
    model = build(config)
    apply_method(model, config.finetuning)
    names = [name for name, module in model.named_modules() if isinstance(module, dr2net.ReversibleSequence)]
    assert "head.transformer.encoder.layers" in names and len(names) == 4


def test_heads_losses_and_boxes_are_float32_under_autocast() -> None:
    model = build(small_config()).train()
    batch = some_batch([3, 2])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
    for name in ("logits", "boxes", "encoder_logits", "encoder_boxes"):
        assert outputs[name].dtype == torch.float32
    losses = model.losses(outputs, batch)
    assert torch.isfinite(sum(losses.values()))


def test_detections_are_the_best_over_queries_and_classes_in_pixels_of_the_original() -> None:
    model = build(small_config())
    logits = torch.full((1, 1, 3, 5), -9.0)
    logits[0, 0, 1, 4], logits[0, 0, 1, 2], logits[0, 0, 2, 0] = 2.0, 1.0, 0.0
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0], [0.9, 0.9, 0.2, 0.2]])[None, None]
    (found,) = model.head.detect({"logits": logits, "boxes": boxes}, [(100, 200)], max_detections=3)
    assert found.labels.tolist() == [4, 2, 0]
    torch.testing.assert_close(found.scores, torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    torch.testing.assert_close(found.boxes[0], torch.tensor([0.0, 0.0, 100.0, 100.0]))
    assert torch.equal(found.boxes[0], found.boxes[1])  # a query may be there twice
    (all_of_them,) = model.head.detect({"logits": logits, "boxes": boxes}, [(100, 200)], max_detections=300)
    assert len(all_of_them.scores) == 15


def test_what_overlaps_a_better_detection_of_its_class_is_dropped_on_demand() -> None:
    model = build(small_config())
    logits = torch.full((1, 1, 4, 5), -9.0)
    logits[0, 0, :, 0] = torch.tensor([2.0, 1.0, 0.0, 3.0])
    logits[0, 0, 1, 1] = 1.5  # the same box as another class
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.3], [0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]])
    outputs = {"logits": logits, "boxes": boxes[None, None]}

    def scores(max_overlap: float | None) -> list[float]:
        (found,) = model.head.detect(outputs, [(100, 100)], max_detections=5, max_overlap=max_overlap)
        return found.scores.logit().round(decimals=3).tolist()

    assert scores(None) == [3.0, 2.0, 1.5, 1.0, 0.0]
    assert scores(0.7) == [3.0, 2.0, 1.5, 0.0]  # IoU .75 and .5 with the best
    assert scores(0.4) == [3.0, 2.0, 1.5]


@torch.no_grad()
def test_a_picture_of_20_pixels_has_fewer_queries_and_finite_boxes() -> None:
    config = small_config()
    model = build(replace(config, model=replace(config.model, queries=100)))
    outputs = model.eval()(some_batch([0], size=20))
    assert outputs["logits"].shape[2] < 100 and torch.isfinite(outputs["boxes"]).all()


def test_the_example_is_the_largest_batch() -> None:
    config = ROWS["coco_swint_dr2net"]()
    batch = example_batch(replace(config, run=replace(config.run, micro_batch=1)))
    assert batch["image"].shape == (1, 3, 1333, 1333) and batch["num_targets"] == 8.0
