"""Selection, refinement and reversible encoder layers of DINO's transformer."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrModel

import dr2net
from detection.attention import Shapes
from detection.transformer import (
    MLP,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Transformer,
    centers,
    proposals,
    refine,
)
from engine.detr.padding import pad_images, resize_padding, valid_shares
from engine.detr.positions import sine_of_boxes, sine_of_cells

SHAPES: Shapes = [(8, 8), (4, 4)]
WIDTH, HEADS, POINTS = 32, 4, 2


def paddings() -> list[Tensor]:
    _, padding = pad_images([torch.zeros(3, 64, 64), torch.zeros(3, 40, 48)])
    return [resize_padding(padding, shape) for shape in SHAPES]


def test_proposals_are_those_of_transformers() -> None:
    padding = torch.cat([one.flatten(1) for one in paddings()], dim=1)
    boxes, usable = proposals(SHAPES, padding)
    stand_in = SimpleNamespace(enc_output=nn.Identity(), enc_output_norm=nn.Identity())
    memory = torch.randn(2, padding.shape[1], WIDTH)
    kept, wanted = DeformableDetrModel.gen_encoder_output_proposals(stand_in, memory, padding, SHAPES)
    torch.testing.assert_close(boxes, wanted)
    torch.testing.assert_close(memory.masked_fill(~usable[..., None], 0), kept)
    assert usable.any() and not usable.all()


def test_positions_of_cells_by_a_loop() -> None:
    (padding, _) = paddings()
    found = sine_of_cells(padding, 8, 20.0)
    rows, columns = 5, 6  # real ones of the second picture
    for row, column, k in ((0, 0, 0), (3, 2, 1), (4, 5, 3)):
        y = (row + 1) / (rows + 1e-6) * 2 * torch.pi
        x = (column + 1) / (columns + 1e-6) * 2 * torch.pi
        function = torch.sin if k % 2 == 0 else torch.cos
        scale = 20.0 ** (2 * (k // 2) / 4)
        torch.testing.assert_close(found[1, row, column, k], function(torch.tensor(y / scale)), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            found[1, row, column, 4 + k], function(torch.tensor(x / scale)), atol=1e-6, rtol=1e-5
        )


def test_positions_of_boxes_stand_in_the_order_y_x_w_h() -> None:
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = sine_of_boxes(box, 4).view(4, 4)
    for row, value in enumerate((0.2, 0.1, 0.3, 0.4)):
        angle = torch.tensor(value * 2 * torch.pi)
        wanted = torch.stack([angle.sin(), angle.cos(), (angle / 100).sin(), (angle / 100).cos()])
        torch.testing.assert_close(found[row], wanted)


def test_reference_points_are_centers_of_tokens_in_each_padded_map() -> None:
    shares = torch.stack([valid_shares(one) for one in paddings()], dim=1)  # (B, L, 2)
    points = centers(SHAPES, shares)
    # picture 1 is real in 6 of 8 columns and 5 of 8 rows; token (row 2, column 3) of level 0 seen in level 0
    torch.testing.assert_close(points[1, 2 * 8 + 3, 0], torch.tensor([3.5 / 8, 2.5 / 8]))
    x, y = 3.5 / 6, 2.5 / 5  # in the picture without its padding
    torch.testing.assert_close(points[1, 2 * 8 + 3, 1], torch.tensor([x, y]) * shares[1, 1])


def build(num_layers: int = 3) -> Transformer:
    torch.manual_seed(0)
    encoder = Encoder([EncoderLayer(WIDTH, HEADS, 2, POINTS, 64, None) for _ in range(2)])
    decoder = Decoder([DecoderLayer(WIDTH, HEADS, 2, POINTS, 64, False) for _ in range(num_layers)], WIDTH)
    return Transformer(encoder, decoder, WIDTH, 2, 20, nn.Linear(WIDTH, 3), MLP(WIDTH, WIDTH, 4))


def encoded(transformer: Transformer) -> tuple:
    torch.manual_seed(1)
    maps = [torch.randn(2, WIDTH, *shape) for shape in SHAPES]
    return transformer.encode(maps, paddings(), [sine_of_cells(one, WIDTH, 20.0) for one in paddings()])


def test_boxes_look_forward_twice_and_queries_are_detached() -> None:
    transformer = build()
    heads = [MLP(WIDTH, WIDTH, 4) for _ in range(3)]
    state = encoded(transformer)
    selected = transformer.select(*state)
    contents, references = transformer.decode(selected, None, None, state, heads)
    assert not references[0].requires_grad and references[1].requires_grad
    box = refine(heads[1], contents[1], references[1])
    box.sum().backward()
    # a box of layer 1 trains layer 0's refinement through its undetached reference ...
    assert heads[0].layers[-1].weight.grad.abs().sum() > 0
    # ... and layer 2 has no part in it
    assert all(parameter.grad is None for parameter in transformer.decoder.layers[2].parameters())
    assert all(parameter.grad is None for parameter in transformer.enc_out_bbox_embed.parameters())


def test_the_best_tokens_are_selected_and_fewer_tokens_than_queries_are_all() -> None:
    transformer = build()
    state = encoded(transformer)
    selected = transformer.select(*state)
    assert selected.logits.shape == (2, 20, 3) and selected.boxes.shape == (2, 20, 4)
    best = selected.logits.amax(-1)
    assert (best[:, :-1] >= best[:, 1:]).all()
    memory, _, shares, padding = state
    few = transformer.select(memory[:, :16], [(4, 4)], shares[:, :1], padding[:, :16])
    assert few.logits.shape == (2, 16, 3)
    assert torch.isfinite(few.boxes).all()


def test_padding_does_not_change_what_the_encoder_makes_of_a_picture() -> None:
    transformer = build().eval()
    torch.manual_seed(2)
    small = [torch.randn(1, WIDTH, 4, 6), torch.randn(1, WIDTH, 2, 3)]

    def run(pad: int) -> list[Tensor]:
        maps, masks = [], []
        for level, one in enumerate(small):
            extra = pad // 2**level
            maps.append(nn.functional.pad(one, (0, extra, 0, extra)))
            mask = torch.ones(1, *maps[-1].shape[-2:], dtype=torch.bool)
            mask[:, : one.shape[2], : one.shape[3]] = False
            masks.append(mask)
        tokens, shapes, _, _ = transformer.encode(maps, masks, [sine_of_cells(m, WIDTH, 20.0) for m in masks])
        out, start = [], 0
        for (height, width), one in zip(shapes, small, strict=True):
            level_tokens = tokens[:, start : start + height * width].view(1, height, width, WIDTH)
            out.append(level_tokens[:, : one.shape[2], : one.shape[3]])
            start += height * width
        return out

    for a, b in zip(run(0), run(4), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# of the form norm(x + f) - x only where it is bounded; rows that go elsewhere use the other
@pytest.mark.parametrize(
    "residual, alpha, beta", [(True, 7 / 8, 1 / 8), (True, 1.0, 0.1), (False, 7 / 8, 1 / 8), (False, 0.0, 1.0)]
)
def test_a_reversible_encoder_has_the_gradient_of_stored_activations(residual: bool, alpha: float, beta: float) -> None:
    results = []
    for store in (True, False):
        transformer = build()
        for layer in transformer.encoder.layers:
            layer.residual = residual
        dr2net.convert(transformer.encoder, store=store)
        dr2net.set_coefficients(transformer.encoder, alpha, beta)
        memory = encoded(transformer)[0]
        memory.square().mean().backward()
        results.append([memory.detach(), *(p.grad for p in transformer.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 30
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_reversible_encoder_at_rest_is_the_plain_one() -> None:
    plain, converted = build(), build()
    dr2net.convert(converted.encoder)
    a, b = encoded(plain)[0], encoded(converted)[0]
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)  # x + (norm(x + f) - x) rounds, the grid too
