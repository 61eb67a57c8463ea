"""The branches of timm's blocks: ViT (also with norms behind the layers), Swin, ResNet."""

from dr2net.adapters.parts import attention_mlp, of_resnet
from dr2net.branches import Branch, branches_of


def register() -> None:
    """Once, see `dr2net.adapters.register`."""
    from timm.models.resnet import BasicBlock, Bottleneck
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.vision_transformer import Block, ResPostBlock

    @branches_of.register
    def _(block: Block) -> tuple[Branch, ...]:
        b = block
        return attention_mlp(
            lambda x, *args, **named: b.ls1(b.attn(b.norm1(x), *args, **named)),
            lambda x, *args, **named: b.ls2(b.mlp(b.norm2(x))),
            (b.norm1, b.attn, b.ls1),
            (b.norm2, b.mlp, b.ls2),
            (b.drop_path1, b.drop_path2),
        )

    @branches_of.register
    def _(block: ResPostBlock) -> tuple[Branch, ...]:
        b = block
        return attention_mlp(
            lambda x, *args, **named: b.norm1(b.attn(x, *args, **named)),
            lambda x, *args, **named: b.norm2(b.mlp(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.drop_path1, b.drop_path2),
        )

    @branches_of.register
    def _(block: SwinTransformerBlock) -> tuple[Branch, ...]:
        b = block
        return attention_mlp(
            lambda x: b._attn(b.norm1(x)),
            lambda x: b.mlp(b.norm2(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.drop_path1, b.drop_path2),
        )

    for kind in (BasicBlock, Bottleneck):
        branches_of.register(kind, of_resnet)
