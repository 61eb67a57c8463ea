"""Swin's features against a plain loop and against timm's network; files in the names of others."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformerBlock

from engine.backbones.swin import SIZES, Size, Swin, build_swin, load_backbone, torchvision_names

TINY = Size(24, (2, 2, 2), (2, 2, 4), window=4)


def randomized(backbone: Swin) -> Swin:
    torch.manual_seed(0)
    for name, parameter in backbone.named_parameters():
        nn.init.normal_(parameter, std=0.2 if "bias_table" in name else 0.05)
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.1)
    return backbone.eval()


def attention_by_a_loop(block: SwinTransformerBlock, x: Tensor, window: int, shift: int) -> Tensor:
    """Pad, then roll, then attend window by window and head by head; what was rolled over an edge is not seen."""
    attention = block.attn
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    full_height, full_width = x.shape[1:3]
    region = torch.zeros(full_height, full_width)
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
        rows, columns = torch.arange(full_height), torch.arange(full_width)

        def parts(index: Tensor, size: int) -> Tensor:
            return (index >= size - window).long() + (index >= size - shift).long()

        region = 3 * parts(rows, full_height)[:, None] + parts(columns, full_width)[None]
    out = torch.zeros_like(x)
    place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"), -1).view(-1, 2)
    relative = place[:, None] - place[None] + window - 1
    bias = attention.relative_position_bias_table[relative[..., 0] * (2 * window - 1) + relative[..., 1]]
    each = channels // attention.num_heads
    for top in range(0, full_height, window):
        for left in range(0, full_width, window):
            tokens = x[:, top : top + window, left : left + window].reshape(batch, -1, channels)
            own = region[top : top + window, left : left + window].reshape(-1)
            hidden = (own[:, None] != own[None]).float() * -100.0
            q, k, v = attention.qkv(tokens).split(channels, dim=-1)
            heads = []
            for h in range(attention.num_heads):
                part = slice(h * each, (h + 1) * each)
                scores = q[..., part] @ k[..., part].transpose(1, 2) * each**-0.5 + bias[..., h] + hidden
                heads.append(scores.softmax(-1) @ v[..., part])
            found = attention.proj(torch.cat(heads, -1)).view(batch, window, window, channels)
            out[:, top : top + window, left : left + window] = found
    if shift:
        out = torch.roll(out, (shift, shift), (1, 2))
    return out[:, :height, :width]


def features_by_a_loop(backbone: Swin, image: Tensor, size: Size) -> list[Tensor]:
    height, width = image.shape[2:]
    x = F.pad(image, (0, -width % 4, 0, -height % 4))
    convolution, _, norm = backbone.features[0]
    x = norm(convolution(x).permute(0, 2, 3, 1))
    outputs = []
    for stage in range(len(size.depths)):
        for index, block in enumerate(backbone.features[2 * stage + 1]):
            shift = size.window // 2 if index % 2 else 0
            x = x + attention_by_a_loop(block, block.norm1(x), size.window, shift)
            x = x + block.mlp(block.norm2(x))
        if stage:
            outputs.append(backbone.get_submodule(f"norm{stage}")(x).permute(0, 3, 1, 2))
        if stage + 1 < len(size.depths):
            merge = backbone.features[2 * stage + 2]
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            four = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            x = merge.reduction(merge.norm(torch.cat(four, dim=-1)))
    return outputs


@pytest.mark.parametrize("size", [(96, 96), (98, 131), (121, 90)])
@torch.no_grad()
def test_features_are_those_of_a_plain_loop_that_pads_then_rolls(size: tuple[int, int]) -> None:
    backbone = randomized(Swin(TINY))
    image = torch.randn(2, 3, *size)
    for own, wanted in zip(backbone(image), features_by_a_loop(backbone, image, TINY), strict=True):
        torch.testing.assert_close(own, wanted, atol=2e-5, rtol=2e-5)  # float32, six blocks


@torch.no_grad()
def test_timm_weights_give_timm_features_where_nothing_is_padded() -> None:
    theirs = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False).eval()
    backbone = build_swin("swin_t").eval()
    fresh = load_backbone(backbone, theirs.state_dict(), "timm's")
    assert fresh == [f"norm{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    image = torch.randn(1, 3, 224, 224)
    wanted = theirs.forward_intermediates(image, intermediates_only=True)
    for own, one in zip(backbone(image), wanted[1:], strict=True):
        one = F.layer_norm(one.permute(0, 2, 3, 1), one.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(own, one, atol=1e-4, rtol=1e-4)  # twelve blocks in float32


def microsoft(backbone: Swin) -> dict[str, Tensor]:
    """A file as Microsoft's, from our tensors: merging at the end of a stage, tables that the window determines."""
    state: dict[str, Tensor] = {"norm.weight": torch.ones(1), "norm.bias": torch.ones(1), "head.weight": torch.ones(1)}
    for key, value in backbone.state_dict().items():
        if key.startswith("norm"):
            continue
        _, part, rest = key.split(".", 2)
        stage = (int(part) - 1) // 2
        if part == "0":
            key = f"patch_embed.{'proj' if rest.startswith('0') else 'norm'}.{rest.split('.')[1]}"
        elif int(part) % 2:
            key = f"layers.{stage}.blocks.{rest}".replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            state[f"layers.{stage}.blocks.{rest.split('.')[0]}.attn.relative_position_index"] = torch.zeros(3).long()
        else:
            key = f"layers.{int(part) // 2 - 1}.downsample.{rest}"
        state[key] = value.clone()
    return state


def test_microsofts_names_load_strictly(tmp_path: Path) -> None:
    source = randomized(build_swin("small"))
    torch.save({"model": microsoft(source)}, tmp_path / "swin.pth")
    found = build_swin("small", weights=str(tmp_path / "swin.pth"))
    for key, value in source.state_dict().items():
        if not key.startswith("norm"):
            assert torch.equal(found.state_dict()[key], value), key
    state = microsoft(source)
    del state["layers.1.blocks.0.attn.qkv.weight"]
    with pytest.raises(ValueError, match="1 missing: features.3.0.attn.qkv.weight"):
        load_backbone(build_swin("small"), state, "a file")


def test_mmdetections_merging_stands_in_another_order() -> None:
    source = randomized(build_swin("small"))
    state = {}
    for key, value in microsoft(source).items():
        if "downsample" in key:  # Swin's (token, channel) -> unfold's (channel, row, column)
            flat = value[None] if value.dim() == 1 else value
            # tokens (0, 0), (1, 0), (0, 1), (1, 1) -> rows and columns in reading order
            grid = flat.view(len(flat), 2, 2, -1).transpose(1, 2)  # (o, row, column, c)
            moved = grid.permute(0, 3, 1, 2).reshape(len(flat), -1)
            value = moved[0] if value.dim() == 1 else moved
        key = key.replace("layers.", "stages.").replace("patch_embed.proj.", "patch_embed.projection.")
        key = key.replace(".attn.", ".attn.w_msa.") if ".blocks." in key else key
        key = key.replace("mlp.fc1.", "ffn.layers.0.0.").replace("mlp.fc2.", "ffn.layers.1.")
        state[key] = value
    renamed = torchvision_names(state)
    for key, value in source.state_dict().items():
        if not key.startswith("norm"):
            assert torch.equal(renamed[key], value), key


def test_layers_rise_with_depth() -> None:
    backbone = build_swin("small")
    layers = [backbone.layer_of(name) for name, _ in backbone.named_parameters() if name.startswith("features")]
    assert layers == sorted(layers) and layers[0] == 0 and layers[-1] == 8 and backbone.num_layers == 9
    assert backbone.layer_of("norm1.weight") == 4 and backbone.layer_of("norm2.weight") == 8
    assert {name for name, size in SIZES.items() if size.window == 12} == {"swin_l"}


def test_weights_that_are_nowhere_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="no ImageNet weights of small: give a file"):
        build_swin("small", weights="imagenet")
    with pytest.raises(FileNotFoundError, match="--model.weights FILE"):
        build_swin("small", weights="nowhere.pth")
    with pytest.raises(ValueError, match="choose one of small, swin_t"):
        build_swin("swin_x")
    with pytest.raises(ValueError, match=r"images of \(1, 1, 8, 8\)"):
        build_swin("small")(torch.zeros(1, 1, 8, 8))
