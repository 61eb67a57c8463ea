"""Deformable attention against transformers' and against a loop in float64; chunks against the whole."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrEncoderLayer,
    DeformableDetrMultiscaleDeformableAttention,
)

from detection.attention import DeformableAttention, Shapes, in_chunks
from detection.transformer import EncoderLayer

SHAPES: Shapes = [(7, 9), (4, 5), (2, 3)]
NUM_TOKENS = sum(height * width for height, width in SHAPES)
WIDTH, HEADS, POINTS = 32, 4, 4
# sums over 48 samples in float32 in another order
SAME = 1e-6


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Offsets that leave the maps here and there, weights that are not all equal."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def inputs(num_queries: int, numbers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, value = torch.randn(2, num_queries, WIDTH), torch.randn(2, NUM_TOKENS, WIDTH)
    reference = torch.rand(2, num_queries, len(SHAPES), numbers)
    padding = torch.rand(2, NUM_TOKENS) < 0.2
    return query, reference, value, padding


def theirs(own: DeformableAttention) -> torch.nn.Module:
    config = DeformableDetrConfig(d_model=WIDTH, encoder_attention_heads=HEADS, num_feature_levels=len(SHAPES))
    module = DeformableDetrMultiscaleDeformableAttention(config, HEADS, POINTS)
    module.load_state_dict(own.state_dict())
    return module


def levels() -> dict[str, Any]:
    sizes = torch.tensor(SHAPES)
    start = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    return {"spatial_shapes": sizes, "spatial_shapes_list": SHAPES, "level_start_index": start}


@pytest.mark.parametrize("numbers", [2, 4])
def test_deformable_attention_is_that_of_transformers(numbers: int) -> None:
    own = randomized(DeformableAttention(WIDTH, HEADS, len(SHAPES), POINTS))
    query, reference, value, padding = inputs(11, numbers)
    found = own(query, reference, value, SHAPES, padding)
    wanted, _ = theirs(own)(query, ~padding, encoder_hidden_states=value, reference_points=reference, **levels())
    torch.testing.assert_close(found, wanted, atol=SAME, rtol=SAME)


def test_initial_values_are_those_of_deformable_detr() -> None:
    config = DeformableDetrConfig(d_model=WIDTH, encoder_attention_heads=HEADS, num_feature_levels=len(SHAPES))
    module = DeformableDetrEncoderLayer(config).self_attn
    own = DeformableAttention(WIDTH, HEADS, len(SHAPES), POINTS)
    # head k looks in direction 2 pi k / heads; the four points of a head lie at distance 1 to 4 along it
    bias = own.sampling_offsets.bias.view(HEADS, len(SHAPES), POINTS, 2)
    torch.testing.assert_close(bias[1, 0, 2], torch.tensor([0.0, 3.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(bias[2, 1, 0], torch.tensor([-1.0, 0.0]), atol=1e-6, rtol=0)
    assert not own.sampling_offsets.weight.any() and not own.attention_weights.weight.any()
    assert own.sampling_offsets.weight.shape == module.sampling_offsets.weight.shape


def test_a_loop_over_heads_levels_and_points_in_float64_gives_the_same() -> None:
    own = randomized(DeformableAttention(WIDTH, HEADS, len(SHAPES), POINTS)).double()
    query, reference, value, padding = inputs(5, 4)
    query, reference, value = query.double(), reference.double(), value.double()
    own.requires_grad_(False)
    projected = own.value_proj(value).masked_fill(padding[..., None], 0)
    offsets = own.sampling_offsets(query).view(2, 5, HEADS, len(SHAPES), POINTS, 2)
    weights = own.attention_weights(query).view(2, 5, HEADS, -1).softmax(-1).view(2, 5, HEADS, len(SHAPES), POINTS)
    each, found = WIDTH // HEADS, torch.zeros(2, 5, WIDTH, dtype=torch.float64)
    for b in range(2):
        for q in range(5):
            for h in range(HEADS):
                start = 0
                for level, (height, width) in enumerate(SHAPES):
                    grid = projected[b, start : start + height * width, h * each : (h + 1) * each]
                    grid, start = grid.view(height, width, each), start + height * width
                    for p in range(POINTS):
                        place = (
                            reference[b, q, level, :2]
                            + offsets[b, q, h, level, p] / POINTS * 0.5 * (reference[b, q, level, 2:])
                        )
                        x, y = float(place[0]) * width - 0.5, float(place[1]) * height - 0.5
                        for row in (int(y // 1), int(y // 1) + 1):
                            for column in (int(x // 1), int(x // 1) + 1):
                                if 0 <= row < height and 0 <= column < width:
                                    share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, q, h, level, p]
                                    found[b, q, h * each : (h + 1) * each] += share * grid[row, column]
    wanted = own.output_proj(found)
    # the module computes places in float32, whatever comes in
    torch.testing.assert_close(
        own.float()(query.float(), reference.float(), value.float(), SHAPES, padding).double(),
        wanted,
        atol=2e-6,
        rtol=2e-6,
    )


def test_queries_in_chunks_give_the_same_output_and_gradients() -> None:
    whole = randomized(DeformableAttention(WIDTH, HEADS, len(SHAPES), POINTS))
    cut = DeformableAttention(WIDTH, HEADS, len(SHAPES), POINTS, query_chunk=4)
    cut.load_state_dict(whole.state_dict())
    query, reference, value, padding = inputs(11, 2)
    results = []
    for module in (whole, cut):
        leaves = [query.clone().requires_grad_(), reference.clone().requires_grad_(), value.clone().requires_grad_()]
        output = module(*leaves, SHAPES, padding)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()  # gradients are sums over chunks
    with torch.no_grad():
        a, b = (module(query, reference, value, SHAPES, padding) for module in (whole, cut))
        assert torch.equal(a, b)


def test_chunks_store_a_fraction_of_what_the_whole_stores() -> None:
    query, reference, value, padding = inputs(512, 2)

    def stored(chunk: int | None) -> int:
        module = randomized(DeformableAttention(WIDTH, HEADS, len(SHAPES), POINTS, query_chunk=chunk))
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = module(query.clone().requires_grad_(), reference, value, SHAPES, padding)
        assert output.requires_grad
        return sum(kept.values())

    assert stored(64) < 0.35 * stored(None)


def test_the_encoder_layer_is_that_of_transformers() -> None:
    config = DeformableDetrConfig(
        d_model=WIDTH,
        encoder_attention_heads=HEADS,
        num_feature_levels=len(SHAPES),
        encoder_ffn_dim=64,
        dropout=0.0,
        activation_dropout=0.0,
    )
    own = randomized(EncoderLayer(WIDTH, HEADS, len(SHAPES), POINTS, 64, None))
    layer = DeformableDetrEncoderLayer(config)
    names = {"norm1.": "self_attn_layer_norm.", "norm2.": "final_layer_norm.", "linear1.": "mlp.fc1."}
    names["linear2."] = "mlp.fc2."
    state = {}
    for key, tensor in own.state_dict().items():
        for ours, other in names.items():
            key = key.replace(ours, other)
        state[key] = tensor
    layer.load_state_dict(state)
    x, reference, position, padding = inputs(NUM_TOKENS, 2)
    found = own(x, position, reference, SHAPES, padding)
    wanted = layer(x, ~padding, spatial_position_embeddings=position, reference_points=reference, **levels())
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)


def test_places_are_computed_in_float32_under_autocast() -> None:
    own = randomized(DeformableAttention(WIDTH, HEADS, len(SHAPES), POINTS))
    query, reference, value, padding = inputs(64, 4)
    wanted = own(query, reference, value, SHAPES, padding)
    with torch.autocast("cpu", torch.bfloat16):
        found = own(query, reference, value, SHAPES, padding)
    # values and projections are bfloat16 (2^-8); places in bfloat16 would be off by far more
    assert (found.float() - wanted).norm() < 0.01 * wanted.norm()


def test_chunks_of_no_queries_and_widths_that_do_not_split() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(in_chunks(lambda x: 2 * x, 3, x), 2 * x)
    with pytest.raises(ValueError, match="30 does not split into 4 heads"):
        DeformableAttention(30, 4, 1, 1)
