"""How little a reversible network needs beside per-block checkpointing, predicted at sizes that a test can afford.

The sizes of the tables in README.md are other arguments of the same code.
"""

import warnings

import pytest
import torch
from torch import nn

import dr2net
from dr2net import exact
from dr2net.memory import Memory, measure, predict

pytest.importorskip("timm"), pytest.importorskip("torchvision")

HARD, AUTHORS = (0.0, 1.0), (0.9, 0.1)


def video_swin() -> nn.Module:
    """The first two stages of Video Swin-T, which are most of its activations."""
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    with torch.device("meta"):
        return SwinTransformer3d([2, 4, 4], 96, [2, 2], [3, 6], [8, 7, 7], num_classes=10)


def vit(depth: int, size: tuple[int, int]) -> nn.Module:
    import timm

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialisers find nothing to initialise
        return timm.create_model("vit_base_patch16_224", depth=depth, img_size=size, num_classes=0)


def peak(model: nn.Module, shape: tuple[int, ...], coefficients=None, chunk_mib=None, how=predict) -> Memory:
    """Of forward and backward; per-block checkpointing without coefficients, else exact inversion."""
    if coefficients is None:
        dr2net.checkpoint_blocks(model)
    else:
        dr2net.convert(model, chunk_mib=chunk_mib, recompute_rest=chunk_mib is not None)
        dr2net.set_coefficients(model, *coefficients)
    return how(lambda: model(torch.randn(shape)).mean().backward(), model)


def test_video_swin_needs_a_quarter_of_what_checkpointing_needs_at_all_coefficients() -> None:
    clip = (1, 3, 32, 224, 224)
    checkpointed = peak(video_swin(), clip).activations
    hard, authors = (peak(video_swin(), clip, coefficients, 32).activations for coefficients in (HARD, AUTHORS))
    assert max(hard, authors) < checkpointed / 4
    # of 16 x 56 x 56 tokens of width 96, then a quarter as many twice as wide; a stage's first branch has none
    remainders = 16 * 56 * 56 * 96 * (3 + 3 / 2) * exact.remainder_bits(exact.rational(AUTHORS[1])) / 8
    assert authors < hard + remainders + 4 * exact.SLAB  # in which they are unpacked


def test_a_deep_vit_needs_two_fifths_of_what_checkpointing_needs() -> None:
    size = (448, 896)  # 1568 patches
    checkpointed, ours = (peak(vit(24, size), (16, 3, *size), *how) for how in ((), (AUTHORS, 128)))
    assert ours.activations < 0.4 * checkpointed.activations


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("chunk_mib", [None, 64])
def test_a_shallow_vit_needs_no_more_than_checkpointing(batch: int, chunk_mib: float | None) -> None:
    shape = (batch, 3, 224, 224)
    checkpointed = peak(vit(2, shape[2:]), shape).peak
    # at batch 1 nearly all is parameters, and the gradient of the second stream is on top
    assert peak(vit(2, shape[2:]), shape, AUTHORS, chunk_mib).peak < (1.01 if batch == 1 else 1.0) * checkpointed


@pytest.mark.parametrize("chunk_mib", [1, 4])
def test_the_predicted_peak_in_chunks_is_the_measured_one(chunk_mib: float) -> None:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    def build() -> nn.Module:
        return SwinTransformer3d([2, 4, 4], 24, [2, 2], [2, 4], [4, 7, 7], num_classes=10)

    clip = (2, 3, 16, 56, 56)
    predicted, measured = (peak(build(), clip, AUTHORS, chunk_mib, how) for how in (predict, measure))
    assert predicted.peak == pytest.approx(measured.peak, rel=0.02)  # the promise of the planner
