"""The whole model: its losses, how a batch may be split, unequal samples, its masks in the original video's pixels."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dr2net
from engine.config import METHODS
from engine.training.finetuning import apply_method, set_coefficients, set_mode
from engine.training.plan import plan_row
from vos.configs import ROWS, Config
from vos.head import Frames
from vos.model import Segmenter, build_model, example_batch

# Sums over four clips are taken in another order; one forward of two clips rounds otherwise than two of one.
SPLIT_TOLERANCE = 1e-5
ROUNDING = 1e-4


def small_config(method: str = "conventional", **changes: Any) -> Config:
    config = ROWS[f"referring_tiny_{method}"]()
    return replace(config, model=replace(config.model, weights=None, dropout=0.0, **changes))


def build(config: Config) -> Segmenter:
    torch.manual_seed(0)
    return build_model(config)


def sample(height: int, width: int, time: int, annotated: list[int], objects: int, words: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.zeros(time, dtype=torch.bool)
    frames[annotated] = True
    masks = torch.zeros(objects, len(annotated), height, width, dtype=torch.uint8)
    for index in range(objects):
        for frame in range(len(annotated)):
            y, x = (int(torch.randint(side - 8, (), generator=generator)) for side in (height, width))
            masks[index, frame, y : y + 8, x : x + 8] = 1
    return {
        "video": torch.randn(3, time, height, width, generator=generator),
        "text": torch.randint(1, 2049, (words,), generator=generator),
        "annotated": frames,
        "masks": masks,
        "referred": objects - 1,
        "visible": torch.rand(len(annotated), generator=generator) < 0.7,
    }


def batch_of(*samples: dict) -> dict[str, Any]:
    """As `data.collate`."""
    height, width = (max(s["video"].shape[axis] for s in samples) for axis in (-2, -1))
    words = max(len(s["text"]) for s in samples)
    number, time = len(samples), samples[0]["video"].shape[1]
    batch: dict[str, Any] = {
        "video": torch.zeros(number, 3, time, height, width),
        "padding": torch.ones(number, height, width, dtype=torch.bool),
        "text": torch.zeros(number, words, dtype=torch.int64),
        "text_padding": torch.ones(number, words, dtype=torch.bool),
        "annotated": torch.stack([s["annotated"] for s in samples]),
        "masks": [],
        "referred": torch.tensor([s["referred"] for s in samples]),
        "visible": [s["visible"] for s in samples],
        "num_targets": float(sum(s["masks"].shape[0] * s["masks"].shape[1] for s in samples)),
        "size": [tuple(s["video"].shape[-2:]) for s in samples],
        "original_size": [(2 * s["video"].shape[-2] + 3, s["video"].shape[-1] // 2) for s in samples],
    }
    for index, s in enumerate(samples):
        h, w = s["video"].shape[-2:]
        batch["video"][index, :, :, :h, :w] = s["video"]
        batch["padding"][index, :h, :w] = False
        batch["text"][index, : len(s["text"])] = s["text"]
        batch["text_padding"][index, : len(s["text"])] = False
        batch["masks"].append(F.pad(s["masks"], (0, width - w, 0, height - h)))
    return batch


def alike(number: int) -> list[dict]:
    return [sample(48, 64, 4, [0, 1, 3], objects=1 + seed % 3, words=5, seed=seed) for seed in range(number)]


def unlike() -> list[dict]:
    return [
        sample(48, 64, 4, [0, 1, 3], objects=3, words=9, seed=0),
        sample(64, 40, 4, [2], objects=1, words=2, seed=1),
        sample(36, 33, 4, [0, 1, 2, 3], objects=12, words=5, seed=2),  # more than there are queries
    ]


def gradient(model: Segmenter, batch: dict[str, Any], share: float = 1.0) -> Tensor:
    (sum(model.losses(model(batch), batch).values()) * share).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("annotated", [[[0, 1, 3]] * 4, [[0], [1, 2, 3], [3], [0, 2]]])
def test_a_step_of_four_is_two_of_two(annotated: list[list[int]]) -> None:
    """Also with unequal numbers of annotated frames."""
    model = build(small_config()).train()
    samples = [sample(48, 64, 4, a, objects=1 + i % 3, words=5, seed=i) for i, a in enumerate(annotated)]
    batch = batch_of(*samples)
    whole = gradient(model, batch).clone()
    model.zero_grad()
    for pair in (samples[:2], samples[2:]):
        halves = gradient(model, {**batch_of(*pair), "num_targets": batch["num_targets"] / 2}, 0.5)
    assert (whole - halves).norm() <= SPLIT_TOLERANCE * whole.norm()


@torch.no_grad()
def test_two_samples_alone_are_two_in_a_batch_where_nothing_is_padded() -> None:
    model = build(small_config()).eval()
    samples = alike(2)
    together = model(batch_of(*samples))
    for key in ("logits", "masks"):
        alone = torch.cat([model(batch_of(one))[key] for one in samples], dim=1)
        torch.testing.assert_close(together[key], alone, rtol=ROUNDING, atol=ROUNDING)


@torch.no_grad()
def test_frames_without_annotation_do_not_reach_the_head_and_order_is_sample_then_time() -> None:
    model = build(small_config()).eval()
    one, two = alike(2)
    batch = batch_of(one, two)
    batch["annotated"] = torch.tensor([[False, True, False, True], [True, False, False, False]])
    frames = Frames.of(batch)
    assert frames.place.tolist() == [1, 3, 4] and frames.sample.tolist() == [0, 0, 1] and frames.counts == [2, 1]
    few = model(batch)
    batch["annotated"] = torch.ones(2, 4, dtype=torch.bool)
    every = model(batch)
    assert few["masks"].shape == (2, 3, 10, 12, 16) and few["logits"].shape == (2, 3, 10, 2)
    torch.testing.assert_close(few["masks"], every["masks"][:, [1, 3, 4]], rtol=ROUNDING, atol=ROUNDING)


def test_unequal_sizes_frames_objects_and_sentences_train_in_one_batch() -> None:
    model = build(small_config()).train()
    batch = batch_of(*unlike())
    losses = model.losses(model(batch), batch)
    assert list(losses) == ["mask_dice", "mask_focal", "referred", "auxiliary"]
    assert all(loss.dtype == torch.float32 and loss.shape == () and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    # distributed training forgives no parameter without a gradient
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_padded_words_have_no_part_in_the_masks() -> None:
    model = build(small_config()).eval()
    batch = batch_of(*unlike())
    outputs = model(batch)
    batch["text"] = batch["text"].masked_fill(batch["text_padding"], 77)
    torch.testing.assert_close(model(batch)["masks"], outputs["masks"])


@pytest.mark.parametrize("method", METHODS)
def test_reversible_gradients_of_the_backbone_are_those_of_stored_activations(method: str) -> None:
    config = small_config(method)
    model = build(config)
    apply_method(model, config.finetuning)
    set_mode(model, config.finetuning)
    set_coefficients(model, config.finetuning, 0.0)
    batch = batch_of(*unlike())
    if method in ("reversible", "dr2net", "dr2net_dynamic"):
        found = dr2net.gradient_error(
            model, batch, lambda model, batch: sum(model.losses(model(batch), batch).values())
        )
        # chunks sum in another order than the whole
        assert found.overall <= (0.0 if config.finetuning.options.chunk_mib is None else SPLIT_TOLERANCE)
        names = [name for name, module in model.named_modules() if isinstance(module, dr2net.ReversibleSequence)]
        assert names == ["backbone.features.0", "backbone.features.2", "backbone.features.4"]
    else:
        sum(model.losses(model(batch), batch).values()).backward()
        still = {name for name, p in model.named_parameters() if p.grad is None}
        assert all(name.startswith("backbone.") for name in still) and bool(still) == (method == "frozen")


def test_losses_are_float32_under_autocast_and_numbers_of_words_need_no_encoder() -> None:
    model = build(small_config()).train()
    batch = batch_of(*alike(2))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
    losses = model.losses(outputs, batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values()) and torch.isfinite(sum(losses.values()))


def test_features_of_an_encoder_go_in_as_they_are() -> None:
    config = ROWS["referring_small_conventional"]()
    config = replace(config, model=replace(config.model, weights=None))
    model, batch = build(config), batch_of(*unlike())
    assert not hasattr(model.head, "word_table")
    batch["text"] = torch.randn(3, 9, config.model.text_width)
    assert torch.isfinite(model(batch)["masks"]).all()


def test_masks_come_back_in_pixels_of_the_original_without_the_padding() -> None:
    model = build(small_config())
    batch = batch_of(*unlike())
    torch.manual_seed(3)
    outputs = {"logits": torch.randn(2, 8, 10, 2), "masks": torch.randn(2, 8, 10, 16, 16)}
    found = model.head.segment(outputs, batch)
    first = 0
    for index, (size, original) in enumerate(zip(batch["size"], batch["original_size"], strict=True)):
        count = [3, 1, 4][index]
        own = slice(first, first + count)
        first += count
        assert found[index].masks.shape == (count, 10, *original) and found[index].masks.dtype == torch.bool
        torch.testing.assert_close(found[index].scores, outputs["logits"][-1, own].softmax(-1)[..., 0])
        large = F.interpolate(outputs["masks"][-1, own], size=(64, 64), mode="bilinear", align_corners=False)
        for y, x in ((0, 0), (original[0] - 1, original[1] - 1), (original[0] // 2, original[1] // 3)):
            source = large[..., y * size[0] // original[0], x * size[1] // original[1]]
            assert torch.equal(found[index].masks[..., y, x], source.sigmoid() > 0.5)


def test_some_queries_frame_by_frame_are_those_of_all() -> None:
    model, batch = build(small_config()), batch_of(*unlike())
    outputs = {"logits": torch.randn(2, 8, 10, 2), "masks": torch.randn(2, 8, 10, 16, 16)}
    every = model.head.segment(outputs, batch)
    few = list(model.head.segment_frames(outputs, batch, 2, torch.tensor([7, 1])))
    assert torch.equal(torch.stack(few), every[2].masks[:, [7, 1]])


@pytest.mark.slow
@pytest.mark.parametrize("row, most_gib", [("a2d_swint_dr2net", 2.58), ("refytvos_swint_dr2net", 1.6)])
def test_the_predicted_peak_of_the_paper_rows_stays_where_it_is_promised(row: str, most_gib: float) -> None:
    """A tenth of what A2D takes conventionally; Ref-YouTube-VOS, whose head sees twelve frames."""
    config = ROWS[row]()
    record = plan_row(config, build_model(config, pretrained=False), lambda: example_batch(config))
    assert record.memory["peak"] <= most_gib * 2**30


def test_examples_have_the_largest_shapes_and_a2d_s_windows_one_annotated_frame() -> None:
    a2d, youtube = (example_batch(ROWS[f"{row}_dr2net"]()) for row in ("a2d_swint", "refytvos_swint"))
    assert a2d["video"].shape == (3, 3, 10, 320, 576) and a2d["annotated"].sum(dim=1).tolist() == [1, 1, 1]
    assert youtube["video"].shape == (1, 3, 12, 360, 640) and youtube["masks"][0].shape == (3, 12, 360, 640)
    assert a2d["num_targets"] == 9.0 and youtube["num_targets"] == 36.0
    tiny = example_batch(ROWS["referring_tiny_dr2net"]())
    assert tiny["annotated"].all() and tiny["text"].dtype == torch.int64
