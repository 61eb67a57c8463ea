"""Layers against torch's own where those compute the same, maps and masks against plain loops."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vos.configs import ROWS
from vos.configs import Model as Settings
from vos.head import GROUPS, Frames, MTTRHead, SpatialDecoder
from vos.transformer import DecoderLayer, EncoderLayer, MultimodalTransformer, WordTable

ROUNDING = 1e-5
WIDTH, HEADS, HIDDEN = 32, 4, 48


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settings(**changes: Any) -> Settings:
    sizes = {"width": WIDTH, "heads": HEADS, "feedforward": HIDDEN, "text_width": 24, "queries": 5, "kernels": 4}
    row = ROWS["referring_tiny_dr2net"]().model
    return replace(row, **{**sizes, "mask_widths": (32, 24, 16, 8), "dropout": 0.0, **changes})


def randomized(module: nn.Module) -> Any:
    for index, parameter in enumerate(module.parameters()):
        parameter.data = 0.2 * noise(*parameter.shape, seed=index).to(parameter.dtype)
    return module.eval()


def some_padding(rows: int, length: int) -> Tensor:
    return torch.arange(length).expand(rows, -1) >= length - torch.arange(rows)[:, None]


def with_weights(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """The same attention by way of its probabilities, which ours never makes."""
    plain = attention.forward
    attention.forward = lambda *args, **named: plain(*args, **{**named, "need_weights": True})
    return attention


def test_an_encoder_layer_without_positions_is_torch_s() -> None:
    ours = randomized(EncoderLayer(WIDTH, HEADS, HIDDEN, 0.1))
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True).eval()
    theirs.load_state_dict(ours.state_dict())
    with_weights(theirs.self_attn)
    x, padding = noise(3, 11, WIDTH), some_padding(3, 11)
    expected = theirs(x, src_key_padding_mask=padding)
    found = ours(x, torch.zeros_like(x), padding)
    assert x.requires_grad is False and expected.requires_grad  # torch's own short cut is not taken
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


def test_a_decoder_layer_without_positions_is_torch_s() -> None:
    ours = randomized(DecoderLayer(WIDTH, HEADS, HIDDEN, 0.1))
    theirs = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True).eval()
    theirs.load_state_dict(ours.state_dict())
    with_weights(theirs.self_attn), with_weights(theirs.multihead_attn)
    x, memory, padding = noise(3, 5, WIDTH), noise(3, 11, WIDTH, seed=1), some_padding(3, 11)
    expected = theirs(x, memory, memory_key_padding_mask=padding)
    found = ours(x, torch.zeros_like(x), memory, torch.zeros_like(memory), padding)
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


def by_head(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
    """Attention of one query of one head at a time."""
    q_weight, k_weight, v_weight = attention.in_proj_weight.chunk(3)
    q_bias, k_bias, v_bias = attention.in_proj_bias.chunk(3)
    q, k, v = query @ q_weight.T + q_bias, key @ k_weight.T + k_bias, value @ v_weight.T + v_bias
    found, size = torch.zeros_like(q), WIDTH // HEADS
    for row in range(len(q)):
        real = ~padding[row]
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            for place in range(q.shape[1]):
                scores = k[row, real, part] @ q[row, place, part] / size**0.5
                found[row, place, part] = scores.softmax(0) @ v[row, real, part]
    return attention.out_proj(found)


@torch.no_grad()
def test_positions_are_added_to_queries_and_keys_but_not_to_values() -> None:
    encoder = randomized(EncoderLayer(WIDTH, HEADS, HIDDEN, 0.1))
    x, position, padding = noise(2, 7, WIDTH), noise(2, 7, WIDTH, seed=1), some_padding(2, 7)
    y = encoder.norm1(x + by_head(encoder.self_attn, x + position, x + position, x, padding))
    expected = encoder.norm2(y + encoder.linear2(encoder.linear1(y).relu()))
    torch.testing.assert_close(encoder(x, position, padding), expected, rtol=ROUNDING, atol=ROUNDING)
    decoder = randomized(DecoderLayer(WIDTH, HEADS, HIDDEN, 0.1))
    z, query = noise(2, 4, WIDTH, seed=2), noise(2, 4, WIDTH, seed=3)
    none = torch.zeros(2, 4, dtype=torch.bool)
    y = decoder.norm1(z + by_head(decoder.self_attn, z + query, z + query, z, none))
    y = decoder.norm2(y + by_head(decoder.multihead_attn, y + query, x + position, x, padding))
    expected = decoder.norm3(y + decoder.linear2(decoder.linear1(y).relu()))
    torch.testing.assert_close(decoder(z, query, x, position, padding), expected, rtol=ROUNDING, atol=ROUNDING)


def inputs(number: int = 3) -> dict[str, Tensor]:
    """Three frames of two samples."""
    padding = torch.zeros(number, 4, 5, dtype=torch.bool)
    padding[2:, :, 3:] = True
    return {
        "maps": noise(number, WIDTH, 4, 5),
        "padding": padding,
        "text": noise(2, 6, 24, seed=4),
        "text_padding": some_padding(2, 6),
        "sample": torch.tensor([0, 0, 1][:number]),
        "queries": noise(5, WIDTH, seed=5),
    }


@torch.no_grad()
def test_padded_cells_and_words_change_nothing_that_is_real() -> None:
    model, given = randomized(MultimodalTransformer(settings())), inputs()
    contents, maps = model(**given)
    changed = {**given, "maps": given["maps"].clone(), "text": given["text"].clone()}
    changed["maps"][2, :, :, 3:] = 9.0
    changed["text"][1, 5:] = 9.0
    found, seen = model(**changed)
    torch.testing.assert_close(found, contents)
    torch.testing.assert_close(seen[:2], maps[:2])
    torch.testing.assert_close(seen[2, :, :, :3], maps[2, :, :, :3])
    cut = {key: value[2:] for key, value in given.items() if key in ("maps", "padding")}
    cut = {**given, "maps": cut["maps"][..., :3], "padding": cut["padding"][..., :3], "sample": torch.tensor([1])}
    alone, seen = model(**cut)
    torch.testing.assert_close(alone[:, 0], contents[:, 2], rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(seen[0], maps[2, :, :, :3], rtol=ROUNDING, atol=ROUNDING)


@torch.no_grad()
def test_frames_do_not_see_each_other_and_each_has_its_sample_s_sentence() -> None:
    model, given = randomized(MultimodalTransformer(settings())), inputs()
    contents, _ = model(**given)
    changed = {**given, "text": given["text"].clone()}
    changed["text"][1] *= -5
    found, _ = model(**changed)
    torch.testing.assert_close(found[:, :2], contents[:, :2])
    assert (found[:, 2] - contents[:, 2]).abs().max() > 1e-4
    assert contents.shape == (2, 3, 5, WIDTH)


def test_layers_that_run_again_give_the_same_gradients() -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model, given = MultimodalTransformer(settings(dropout=0.3)).train(), inputs()
        if again:
            model.recompute(16.0)
        torch.manual_seed(1)
        contents, maps = model(**given)
        (contents.square().sum() + maps.square().sum()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def plain_conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    (height, width), around = x.shape[1:], layer.weight.shape[2] // 2
    found = torch.zeros(len(layer.weight), height, width, dtype=x.dtype)
    for channel in range(len(layer.weight)):
        for y in range(height):
            for column in range(width):
                total = float(layer.bias[channel])
                for dy in range(-around, around + 1):
                    for dx in range(-around, around + 1):
                        if 0 <= y + dy < height and 0 <= column + dx < width:
                            kernel = layer.weight[channel, :, around + dy, around + dx]
                            total += float(kernel @ x[:, y + dy, column + dx])
                found[channel, y, column] = total
    return found


def plain_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    parts = []
    for group in x.split(len(x) // GROUPS):
        parts.append((group - group.mean()) / (group.var(unbiased=False) + norm.eps).sqrt())
    return torch.cat(parts) * norm.weight[:, None, None] + norm.bias[:, None, None]


@torch.no_grad()
def test_the_decoder_of_masks_is_a_plain_loop() -> None:
    decoder = randomized(SpatialDecoder(8, [6, 7], [16, 16, 8, 8], kernels=4).double())
    x, middle, fine = (noise(*shape).double() for shape in ((2, 8, 2, 3), (2, 7, 3, 5), (2, 6, 6, 9)))
    found = decoder(x, [fine, middle])
    y = x[1]
    for layer in (1, 2):
        y = plain_norm(plain_conv(y, getattr(decoder, f"lay{layer}")), getattr(decoder, f"gn{layer}")).relu()
    for layer, adapter, finer in ((3, decoder.adapter1, middle[1]), (4, decoder.adapter2, fine[1])):
        joined = plain_conv(finer, adapter)
        for row in range(finer.shape[1]):
            for column in range(finer.shape[2]):
                source = row * y.shape[1] // finer.shape[1], column * y.shape[2] // finer.shape[2]
                joined[:, row, column] += y[:, source[0], source[1]]
        y = plain_norm(plain_conv(joined, getattr(decoder, f"lay{layer}")), getattr(decoder, f"gn{layer}")).relu()
    torch.testing.assert_close(found[1], plain_conv(y, decoder.out_lay), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_mask_is_the_product_of_a_query_s_kernel_and_the_shared_map() -> None:
    head = randomized(MTTRHead([6, 7, 8], settings(), None))
    given = {}
    head.instance_kernels_head.register_forward_hook(lambda *a: given.update(kernels=a[2]))
    head.spatial_decoder.register_forward_hook(lambda *a: given.update(shared=a[2]))
    batch = {"annotated": torch.tensor([[True, False], [True, True]]), "masks": []}
    features = [noise(2, 6, 2, 8, 8), noise(2, 7, 2, 4, 4), noise(2, 8, 2, 2, 2)]
    padding = torch.zeros(2, 32, 32, dtype=torch.bool)
    outputs = head(features, padding, noise(2, 6, 24), some_padding(2, 6), Frames.of(batch))
    masks, kernels, shared = outputs["masks"], given["kernels"], given["shared"]
    assert masks.shape == (2, 3, 5, 8, 8) and outputs["logits"].shape == (2, 3, 5, 2)
    for layer in range(2):
        for frame in range(3):
            for query in range(5):
                expected = sum(kernels[layer, frame, query, c] * shared[frame, c] for c in range(4))
                torch.testing.assert_close(masks[layer, frame, query], expected, rtol=ROUNDING, atol=ROUNDING)


def test_a_word_has_its_feature_and_that_of_its_place() -> None:
    table = WordTable(8, 6)
    found = table(torch.tensor([[5, 7, 0], [7, 5, 0]]))
    assert found.shape == (2, 3, 6)
    assert torch.equal(found[0, 0], table.words.weight[5] + table.places.weight[0])
    assert not torch.equal(found[0, 0], found[1, 1]), "left of and right of are two sentences"
