"""The branches of blocks of other libraries: one function per library, run when a block of it is first met.

Known: timm ViT and Swin blocks, torchvision Swin (2-D, 3-D, v2) and ResNet blocks, transformers ViT and VideoMAE
layers, pytorchvideo ResNet/SlowFast blocks. Not here: what a branch is, and how to register one's own (`branches.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dr2net.branches import Branch, branches_of, forward_was_replaced
from dr2net.chunks import Groups
from dr2net.patches import is_plain


def _attention_mlp(
    attention: Callable[..., Tensor],
    mlp: Callable[..., Tensor],
    parts: tuple[nn.Module, ...],
    rest: tuple[nn.Module, ...],
    drop_paths: tuple[nn.Module | None, nn.Module | None] = (None, None),
    windows: Callable[[Tensor], Groups] | None = None,
) -> tuple[Branch, ...]:
    """A transformer block's two: global attention sees a sample, window attention a window, the MLP a token."""
    return (
        Branch("attention", attention, parts, drop_path=drop_paths[0], independent=windows or "samples"),
        Branch("mlp", mlp, rest, drop_path=drop_paths[1], independent="tokens"),
    )


def _added(block: nn.Module) -> tuple[Branch, ...]:
    """What a block whose activation comes after the sum adds to its input.

    The whole block as a branch without residual connection (alpha 0) would be nearer to the paper's remark, but then
    the streams of 23 blocks of SlowFast grew a hundredfold at (.9, .1) and a millionfold at (0, 1).
    """
    forward = type(block).forward
    return (Branch("block", lambda x: forward(block, x) - x, (block,), independent="samples"),)


def _of_resnet(block: nn.Module) -> tuple[Branch, ...]:
    """timm's and torchvision's residual blocks."""
    return _added(block) if block.downsample is None and block.stride == 1 else ()


@functools.cache
def _timm() -> None:
    from timm.models.resnet import BasicBlock, Bottleneck
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.vision_transformer import Block, ResPostBlock

    @branches_of.register
    def _(block: Block) -> tuple[Branch, ...]:
        b = block
        return _attention_mlp(
            lambda x, *args, **named: b.ls1(b.attn(b.norm1(x), *args, **named)),
            lambda x, *args, **named: b.ls2(b.mlp(b.norm2(x))),
            (b.norm1, b.attn, b.ls1),
            (b.norm2, b.mlp, b.ls2),
            (b.drop_path1, b.drop_path2),
        )

    @branches_of.register
    def _(block: ResPostBlock) -> tuple[Branch, ...]:
        b = block
        return _attention_mlp(
            lambda x, *args, **named: b.norm1(b.attn(x, *args, **named)),
            lambda x, *args, **named: b.norm2(b.mlp(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.drop_path1, b.drop_path2),
        )

    @branches_of.register
    def _(block: SwinTransformerBlock) -> tuple[Branch, ...]:
        b = block
        return _attention_mlp(
            lambda x: b._attn(b.norm1(x)),
            lambda x: b.mlp(b.norm2(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.drop_path1, b.drop_path2),
        )

    for kind in (BasicBlock, Bottleneck):
        branches_of.register(kind, _of_resnet)


@functools.cache
def _torchvision() -> None:
    from torchvision.models.resnet import BasicBlock, Bottleneck
    from torchvision.models.swin_transformer import (
        ShiftedWindowAttention,
        SwinTransformerBlock,
        SwinTransformerBlockV2,
    )
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    from dr2net.window_attention import Windows

    @branches_of.register
    def _(block: SwinTransformerBlock) -> tuple[Branch, ...]:
        b = block
        known = type(b.attn) in (ShiftedWindowAttention, ShiftedWindowAttention3d)
        known = known and not forward_was_replaced(type(b.attn))
        return _attention_mlp(
            lambda x: b.attn(b.norm1(x)),
            lambda x: b.mlp(b.norm2(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.stochastic_depth, b.stochastic_depth),
            (lambda x: Windows(b.norm1, b.attn, x)) if known else None,
        )

    @branches_of.register
    def _(block: SwinTransformerBlockV2) -> tuple[Branch, ...]:
        b = block
        return _attention_mlp(
            lambda x: b.norm1(b.attn(x)),
            lambda x: b.norm2(b.mlp(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.stochastic_depth, b.stochastic_depth),
        )

    for kind in (BasicBlock, Bottleneck):
        branches_of.register(kind, _of_resnet)


@functools.cache
def _transformers() -> None:
    from transformers.models.videomae.modeling_videomae import VideoMAELayer, VideoMAEOutput
    from transformers.models.vit.modeling_vit import ViTLayer

    @branches_of.register
    def _(block: VideoMAELayer) -> tuple[Branch, ...]:
        b = block

        def mlp(x: Tensor, *args: Any, **named: Any) -> Tensor:
            h = b.intermediate(b.layernorm_after(x))
            if is_plain(b.output) and type(b.output) is VideoMAEOutput and not forward_was_replaced(VideoMAEOutput):
                return b.output.dropout(b.output.dense(h))  # `output` adds x, so its two parts are called instead
            return b.output(h, x) - x

        return _attention_mlp(
            lambda x, *args, **named: b.attention(b.layernorm_before(x), *args, **named),
            mlp,
            (b.layernorm_before, b.attention),
            (b.layernorm_after, b.intermediate, b.output),
        )

    @branches_of.register
    def _(block: ViTLayer) -> tuple[Branch, ...]:
        b = block
        return _attention_mlp(
            lambda x, mask=None, **named: b.dropout(b.attention(b.layernorm_before(x), mask, **named)[0]),
            lambda x, *args, **named: b.dropout(b.mlp(b.layernorm_after(x))),
            (b.layernorm_before, b.attention),
            (b.layernorm_after, b.mlp),
        )


@functools.cache
def _pytorchvideo() -> None:
    from pytorchvideo.models.resnet import ResBlock

    branches_of.register(ResBlock, lambda block: _added(block) if block.branch1_conv is None else ())


ADAPTERS = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "pytorchvideo": _pytorchvideo,
}
