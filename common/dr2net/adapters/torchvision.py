"""The branches of torchvision's blocks: ViT, Swin (2-D, 3-D, v2), MaxViT, MViT, ConvNeXt, EfficientNet, MobileNet,
MNASNet, RegNet, ResNet (2-D, 3-D).
"""

from typing import Any

from torch import Tensor, nn

from dr2net.adapters.parts import (
    Branches,
    added,
    attention_mlp,
    classes_of,
    forms,
    of_resnet,
    only_if,
    register_table,
    samples,
    tokens,
)
from dr2net.branches import RETURN_MORE, Branch, forward_was_replaced


def register() -> None:
    """Once, see `dr2net.adapters.register`."""
    register_table("torchvision.models", TABLE)
    RETURN_MORE.update(classes_of("torchvision.models", "video.mvit.MultiscaleBlock"))


def _swin(block: Any) -> tuple[Branch, ...]:
    """In chunks, attention runs window by window (`window_attention.py`) where it is torchvision's own."""
    from torchvision.models.swin_transformer import ShiftedWindowAttention
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    from dr2net.window_attention import Windows

    b = block
    known = type(b.attn) in (ShiftedWindowAttention, ShiftedWindowAttention3d)
    known = known and not forward_was_replaced(type(b.attn))
    return attention_mlp(
        lambda x: b.attn(b.norm1(x)),
        lambda x: b.mlp(b.norm2(x)),
        (b.norm1, b.attn),
        (b.norm2, b.mlp),
        (b.stochastic_depth, b.stochastic_depth),
        (lambda x: Windows(b.norm1, b.attn, x)) if known else None,
    )


def _vit(block: Any) -> tuple[Branch, ...]:
    b = block

    def attention(x: Tensor) -> Tensor:
        h = b.ln_1(x)
        return b.dropout(b.self_attention(h, h, h, need_weights=False)[0])

    return attention_mlp(attention, lambda x: b.mlp(b.ln_2(x)), (b.ln_1, b.self_attention, b.dropout), (b.ln_2, b.mlp))


def _maxvit(block: Any) -> tuple[Branch, ...]:
    """Attention in windows or on a grid, and its MLP; x is (B, C, H, W). Both treat each partition by itself, so drop
    path, per sample, may come after the partitions are put together again.
    """
    b = block

    def placed(function: nn.Module, x: Tensor) -> Tensor:
        high, wide = b.grid_size[0] // b.p, b.grid_size[1] // b.p
        h = function(b.partition_swap(b.partition_op(x, b.p)))
        return b.departition_op(b.departition_swap(h), b.p, high, wide)

    around = (b.partition_op, b.partition_swap, b.departition_op, b.departition_swap)
    return (
        Branch(
            "attention",
            lambda x: placed(b.attn_layer, x),
            (b.attn_layer, *around),
            drop_path=b.stochastic_dropout,
            independent="samples",
        ),
        Branch(
            "mlp",
            lambda x: placed(b.mlp_layer, x),
            (b.mlp_layer, *around),
            drop_path=b.stochastic_dropout,
            independent="samples",
        ),
    )


def _mvit(block: Any) -> tuple[Branch, ...]:
    """x is (B, 1 + T H W, C); `thw` beside it are numbers, which a block that keeps the shape hands on."""
    b = block

    def normed(norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.transpose(1, 2)).transpose(1, 2) if b.needs_transposal else norm(x)

    return attention_mlp(
        lambda x, thw: b.attn(normed(b.norm1, x), thw)[0],
        lambda x, thw: b.mlp(normed(b.norm2, x)),
        (b.norm1, b.attn),
        (b.norm2, b.mlp),
        (b.stochastic_depth, b.stochastic_depth),
    )


def _skips(layers: str, drop_path: str | None, condition: str) -> Branches:
    """An inverted residual block: with a skip connection where stride and channels allow it."""
    return only_if(lambda block: bool(getattr(block, condition)), forms(samples(layers, drop_path, "block")))


TABLE: dict[str, Branches] = {
    "vision_transformer.EncoderBlock": _vit,
    "swin_transformer.SwinTransformerBlock": _swin,
    "swin_transformer.SwinTransformerBlockV2": forms(
        samples("attn norm1", "stochastic_depth"), tokens("mlp norm2", "stochastic_depth")
    ),
    "maxvit.PartitionAttentionLayer": _maxvit,
    "maxvit.MBConv": only_if(
        lambda block: isinstance(block.proj, nn.Identity), forms(samples("layers", "stochastic_depth", "block"))
    ),
    "video.mvit.MultiscaleBlock": only_if(lambda block: block.pool_skip is None and block.project is None, _mvit),
    "convnext.CNBlock": forms(samples("block layer_scale", "stochastic_depth", "block")),
    "efficientnet.MBConv": _skips("block", "stochastic_depth", "use_res_connect"),
    "efficientnet.FusedMBConv": _skips("block", "stochastic_depth", "use_res_connect"),
    "mobilenetv2.InvertedResidual": _skips("conv", None, "use_res_connect"),
    "mobilenetv3.InvertedResidual": _skips("block", None, "use_res_connect"),
    "mnasnet._InvertedResidual": _skips("layers", None, "apply_residual"),
    "regnet.ResBottleneckBlock": only_if(lambda block: block.proj is None, added),
    "resnet.BasicBlock": of_resnet,
    "resnet.Bottleneck": of_resnet,
    "video.resnet.BasicBlock": of_resnet,
    "video.resnet.Bottleneck": of_resnet,
}
