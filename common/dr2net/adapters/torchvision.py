"""The branches of torchvision's blocks: Swin (2-D, 3-D, v2), ResNet."""

from dr2net.adapters.parts import attention_mlp, of_resnet
from dr2net.branches import Branch, branches_of, forward_was_replaced


def register() -> None:
    """Once, see `dr2net.adapters.register`."""
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
        return attention_mlp(
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
        return attention_mlp(
            lambda x: b.norm1(b.attn(x)),
            lambda x: b.norm2(b.mlp(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.stochastic_depth, b.stochastic_depth),
        )

    for kind in (BasicBlock, Bottleneck):
        branches_of.register(kind, of_resnet)
