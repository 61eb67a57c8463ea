"""The branches of transformers' layers that no line of words describes: shifted windows (Swin, SAM), divided space and
time (TimeSformer), convolutions (ConvNeXt).

Each function takes a layer and returns its branches. Window attention is cut by samples: a layer knows its windows, but
not in a form that chunks could share. Not here: the table of classes (`transformers.py`).
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from dr2net.adapters.layer_words import Words, branches
from dr2net.branches import Branch

POST_NORM_SWIN = Words(mlp="intermediate output layernorm_after drop_path")
SWIN = Words(mlp="layernorm_after mlp dropout")
SWIN_OF_OLD = Words(mlp="layernorm_after intermediate output")


def of_swin(layer: Any) -> tuple[Branch, ...]:
    """Swin: norm, windows, drop path; the MLP has no drop path."""

    def attention(x: Tensor, size: tuple[int, int], always_partition: bool = False, **named: Any) -> Any:
        if not always_partition:
            layer.set_shift_and_window_size(size)
        returned, put_back = _in_windows(layer, layer.layernorm_before(x), size, **named)
        return put_back(layer.dropout(returned[0])), *returned[1:]

    parts = (layer.layernorm_before, layer.attention, layer.dropout)
    return _swin(layer, attention, parts, SWIN)


def of_old_swin(layer: Any) -> tuple[Branch, ...]:
    """Swin as in Donut and CLAP, whose attention has an argument for its weights."""

    def attention(
        x: Tensor, size: tuple[int, int], output_attentions: bool = False, always_partition: bool = False
    ) -> Any:
        if not always_partition:
            layer.set_shift_and_window_size(size)
        normed = layer.layernorm_before(x)
        returned, put_back = _in_windows(layer, normed, size, output_attentions=output_attentions)
        return put_back(returned[0]), *returned[1:]

    return _swin(layer, attention, (layer.layernorm_before, layer.attention), SWIN_OF_OLD)


def of_swin_v2(layer: Any) -> tuple[Branch, ...]:
    """Swin v2: windows, norm, drop path, twice."""

    def attention(x: Tensor, size: tuple[int, int], output_attentions: bool = False) -> Any:
        returned, put_back = _in_windows(layer, x, size, output_attentions=output_attentions)
        return layer.layernorm_before(put_back(returned[0])), *returned[1:]

    return _swin(layer, attention, (layer.layernorm_before, layer.attention), POST_NORM_SWIN)


def _swin(layer: Any, attention: Any, parts: tuple[nn.Module, ...], words: Words) -> tuple[Branch, ...]:
    drop_path = None if isinstance(layer.drop_path, nn.Identity) else layer.drop_path
    first = Branch("attention", attention, parts, drop_path=drop_path, independent="samples", hands_out=True)
    return (first, *branches(layer, words))


def _in_windows(layer: Any, x: Tensor, size: tuple[int, int], **named: Any) -> tuple[tuple[Any, ...], Any]:
    """What attention returns for the shifted windows of x, (B, H W, C), and a function that puts windows back."""
    library = sys.modules[type(layer.attention).__module__]  # its own functions for windows
    (height, width), (batch, _, channels) = size, x.shape
    window, shift = layer.window_size, layer.shift_size
    x, _ = layer.maybe_pad(x.view(batch, height, width, channels), height, width)
    _, padded_height, padded_width, _ = x.shape
    if shift > 0:
        x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
    windows = library.window_partition(x, window).view(-1, window * window, channels)
    mask = layer.get_attn_mask(padded_height, padded_width, dtype=x.dtype, device=x.device)

    def put_back(found: Tensor) -> Tensor:
        found = library.window_reverse(found.view(-1, window, window, channels), window, padded_height, padded_width)
        if shift > 0:
            found = torch.roll(found, shifts=(shift, shift), dims=(1, 2))
        return found[:, :height, :width, :].reshape(batch, height * width, channels)

    return layer.attention(windows, mask, **named), put_back


def of_sam(layer: Any) -> tuple[Branch, ...]:
    """SAM's image encoder: windows without shift, or all of the image. x: (B, H, W, C)."""

    def attention(x: Tensor) -> Tensor:
        h = layer.layer_norm1(x)
        if layer.window_size > 0:
            h, padded = layer.window_partition(h, layer.window_size)
            return layer.window_unpartition(layer.attn(hidden_states=h)[0], layer.window_size, padded, x.shape[1:3])
        return layer.attn(hidden_states=h)[0]

    first = Branch("attention", attention, (layer.layer_norm1, layer.attn), independent="samples")
    return (first, *branches(layer, Words(mlp="layer_norm2 mlp")))


TIMESFORMER = Words(
    "layernorm_before attention* drop_path", "layernorm_after intermediate output drop_path", hands_out=True
)


def of_timesformer(layer: Any) -> tuple[Branch, ...]:
    """TimeSformer: attention over time, over space, MLP. x: (B, 1 + places * T, C), a place's frames side by side; the
    class token takes no part in time, and is averaged over the frames in space."""
    if layer.attention_type != "divided_space_time":
        return branches(layer, TIMESFORMER)

    def over_time(x: Tensor, *args: Any, **named: Any) -> Tensor:
        batch, _, channels = x.shape
        frames = layer.config.num_frames
        h = layer.temporal_layernorm(x[:, 1:].reshape(-1, frames, channels))
        h = layer.drop_path(layer.temporal_attention(h)[0]).reshape(batch, -1, channels)
        return torch.cat((torch.zeros_like(x[:, :1]), layer.temporal_dense(h)), 1)

    def over_space(x: Tensor, output_attentions: bool = False) -> Any:
        batch, _, channels = x.shape
        frames = layer.config.num_frames
        token = x[:, :1].repeat(1, frames, 1).reshape(-1, 1, channels)
        places = x[:, 1:].reshape(batch, -1, frames, channels).transpose(1, 2).flatten(0, 1)
        h = layer.layernorm_before(torch.cat((token, places), 1))
        found, *rest = layer.attention(h, output_attentions=output_attentions)
        found = layer.drop_path(found).unflatten(0, (batch, frames))
        token, places = found[:, :, 0].mean(1, keepdim=True), found[:, :, 1:].transpose(1, 2)
        return torch.cat((token, places.reshape(batch, -1, channels)), 1), *rest

    temporal = (layer.temporal_layernorm, layer.temporal_attention, layer.temporal_dense, layer.drop_path)
    spatial = (layer.layernorm_before, layer.attention, layer.drop_path)
    return (
        Branch("temporal_attention", over_time, temporal, independent="samples"),
        Branch("attention", over_space, spatial, independent="samples", hands_out=True),
        *branches(layer, Words(mlp=TIMESFORMER.mlp)),
    )


def of_convnext(layer: Any) -> tuple[Branch, ...]:
    """ConvNeXt, v2 and DINOv3's: what is called and multiplied stands in the order of the layer's parts. x: channels
    first."""
    names: tuple[str, ...] = ("dwconv", "layernorm", "pwconv1", "act", "grn", "pwconv2", "layer_scale_parameter")
    if hasattr(layer, "depthwise_conv"):
        names = ("depthwise_conv", "layer_norm", "pointwise_conv1", "activation_fn", "pointwise_conv2", "gamma")
    convolution, *rest = [part for name in names if (part := getattr(layer, name, None)) is not None]

    def function(x: Tensor) -> Tensor:
        h = convolution(x).permute(0, 2, 3, 1)
        for part in rest:
            h = h * part if isinstance(part, Tensor) else part(h)
        return h.permute(0, 3, 1, 2)

    own = tuple(part for part in (convolution, *rest) if isinstance(part, (nn.Module, nn.Parameter)))
    drop_path = None if isinstance(layer.drop_path, nn.Identity) else layer.drop_path
    return (Branch("block", function, own, drop_path=drop_path, independent="samples"),)


def of_resnet(layer: Any) -> tuple[Branch, ...]:
    """ResNet and RegNet, whose activation comes after the sum."""
    from dr2net.adapters.parts import added

    return added(layer) if isinstance(layer.shortcut, nn.Identity) else ()
