"""The branches of timm's transformer blocks. Not here: its convolutional blocks (`timm_convolutions.py`).

What two branches are is read in the block's forward; the names are those of timm 1.0.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dr2net.adapters import timm_convolutions
from dr2net.adapters.parts import (
    Branches,
    added,
    attention_mlp,
    by_rank,
    classes_of,
    forms,
    held_by,
    less,
    only_if,
    register_table,
    samples,
    tokens,
)
from dr2net.beside import Beside
from dr2net.branches import CONTAINERS, RETURN_MORE, Branch

MASK: Beside = {"attn_mask": by_rank}
ROPE: Beside = {"rope": by_rank, "attn_mask": by_rank}


def register() -> None:
    """Once, see `dr2net.adapters.register`."""
    register_table("timm.models", TABLE)
    register_table("timm.models", timm_convolutions.TABLE)
    CONTAINERS.update(classes_of("timm.models", "regnet.RegStage"))
    RETURN_MORE.update(classes_of("timm.models", "mvitv2.MultiScaleBlock"))


def _pre_norm(scale: str = "", drop_paths: str = "drop_path1 drop_path2", beside: Beside | None = None) -> Branches:
    """x + scale * attention(norm(x)), then x + scale * mlp(norm(x)).

    scale: names of the two layer scales, if any; beside: what the attention gets beside x.
    """
    first, second = scale.split() if scale else ("", "")
    paths = drop_paths.split()
    return forms(samples(f"norm1 attn* {first}", paths[0], beside=beside), tokens(f"norm2 mlp {second}", paths[-1]))


def _post_norm(beside: Beside) -> Branches:
    """x + norm(attention(x)), then x + norm(mlp(x))."""
    return forms(samples("attn* norm1", "drop_path1", beside=beside), tokens("mlp norm2", "drop_path2"))


def _parallel_things(block: Any) -> tuple[Branch, ...]:
    """Several attentions side by side, then several MLPs; each with its own drop path, so nothing is cut by tokens."""

    def one(part: Any, x: Tensor, *args: Any, **named: Any) -> Tensor:
        if not (args or named):
            return part(x)
        return part.drop_path(part.ls(part.attn(part.norm(x), *args, **named)))

    def attention(x: Tensor, *args: Any, **named: Any) -> Tensor:
        return torch.stack([one(part, x, *args, **named) for part in block.attns]).sum(dim=0)

    def mlp(x: Tensor, *args: Any, **named: Any) -> Tensor:
        return torch.stack([part(x) for part in block.ffns]).sum(dim=0)

    return (
        Branch("attention", attention, (block.attns,), independent="samples", beside=MASK),
        Branch("mlp", mlp, (block.ffns,), independent="samples", beside="unused"),
    )


def _swin(block: Any) -> tuple[Branch, ...]:
    b = block
    return attention_mlp(
        lambda x: b._attn(b.norm1(x)),
        lambda x: b.mlp(b.norm2(x)),
        (b.norm1, b.attn),
        (b.norm2, b.mlp),
        (b.drop_path1, b.drop_path2),
    )


def _swin_v2(block: Any) -> tuple[Branch, ...]:
    b = block
    return attention_mlp(
        lambda x: b.norm1(b._attn(x)),
        lambda x: b.norm2(b.mlp(x)),
        (b.norm1, b.attn),
        (b.norm2, b.mlp),
        (b.drop_path1, b.drop_path2),
    )


def _swin_v2_cr(block: Any) -> tuple[Branch, ...]:
    """Some blocks have a third norm, after the sum: their second branch is what that adds to x."""
    b = block
    attention = Branch(
        "attention",
        lambda x: b.norm1(b._shifted_window_attn(x)),
        (b.norm1, b.attn),
        drop_path=b.drop_path1,
        independent="samples",
    )
    if isinstance(b.norm3, nn.Identity):
        return (attention, *forms(tokens("mlp norm2", "drop_path2"))(b))
    mlp = Branch(
        "mlp",
        lambda x: b.norm3(x + b.drop_path2(b.norm2(b.mlp(x)))) - x,
        (b.norm2, b.mlp, b.norm3),
        independent="tokens" if isinstance(b.drop_path2, nn.Identity) else "samples",
    )
    return (attention, mlp)


def _sam(block: Any) -> tuple[Branch, ...]:
    """Segment Anything's ViT: attention in windows, padded, in all blocks but a few."""
    from timm.models.vision_transformer_sam import window_partition, window_unpartition

    b = block

    def attention(x: Tensor) -> Tensor:
        h, size = b.norm1(x), None
        if b.window_size > 0:
            h, size = window_partition(h, b.window_size)
        h = b.ls1(b.attn(h))
        return window_unpartition(h, b.window_size, (x.shape[1], x.shape[2]), size) if b.window_size > 0 else h

    return (
        Branch("attention", attention, (b.norm1, b.attn, b.ls1), drop_path=b.drop_path1, independent="samples"),
        *forms(tokens("norm2 mlp ls2", "drop_path2"))(b),
    )


def _sam2(block: Any) -> tuple[Branch, ...]:
    """Segment Anything 2's Hiera: attention in windows, without pooling of queries."""
    from timm.models.hieradet_sam2 import window_partition, window_unpartition

    b = block

    def attention(x: Tensor) -> Tensor:
        h, (height, width) = b.norm1(x), x.shape[1:3]
        if not b.is_windowed:
            return b.ls1(b.attn(h))
        down, right = (-n % w for n, w in zip((height, width), b.window_size, strict=True))
        h = window_partition(nn.functional.pad(h, (0, 0, 0, right, 0, down)), b.window_size)
        h = window_unpartition(b.attn(h), b.window_size, (height + down, width + right))
        return b.ls1(h[:, :height, :width])

    return (
        Branch("attention", attention, (b.norm1, b.attn, b.ls1), drop_path=b.drop_path1, independent="samples"),
        *forms(tokens("norm2 mlp ls2", "drop_path2"))(b),
    )


def _global_context(block: Any) -> tuple[Branch, ...]:
    """GCViT: attention in windows; every other block takes its queries from what is beside x."""
    b = block
    return (
        Branch(
            "attention",
            lambda x, *args, **named: b.ls1(b._window_attn(b.norm1(x), *args, **named)),
            held_by(b, "norm1", "attn", "ls1"),
            drop_path=b.drop_path1,
            independent="samples",
            beside="samples",
        ),
        *forms(tokens("norm2 mlp ls2", "drop_path2"))(b),
    )


def _mixer(block: Any) -> tuple[Branch, ...]:
    b = block
    return (
        Branch(
            "tokens",
            lambda x: b.mlp_tokens(b.norm1(x).transpose(1, 2)).transpose(1, 2),
            (b.norm1, b.mlp_tokens),
            drop_path=b.drop_path,
            independent="samples",
        ),
        *forms(tokens("norm2 mlp_channels", "drop_path", "channels"))(b),
    )


def _res_mlp(block: Any) -> tuple[Branch, ...]:
    """ResMLP; its affine norm has three dimensions, so the second branch too is cut by samples."""
    b = block
    return (
        Branch(
            "tokens",
            lambda x: b.ls1 * b.linear_tokens(b.norm1(x).transpose(1, 2)).transpose(1, 2),
            held_by(b, "norm1", "linear_tokens", "ls1"),
            drop_path=b.drop_path,
            independent="samples",
        ),
        *forms(samples("norm2 mlp_channels ls2", "drop_path", "channels"))(b),
    )


def _dual_attention(block: Any) -> tuple[Branch, ...]:
    """DaViT: positions, attention over windows or channels, positions, MLP; x is (B, C, H, W)."""
    b = block

    def last(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)

    def over_channels(x: Tensor) -> Tensor:
        return b.attn(b.norm1(x.flatten(2).transpose(1, 2))).transpose(1, 2).view_as(x)

    def over_windows(x: Tensor) -> Tensor:
        from timm.models.davit import window_partition, window_reverse

        (height, width), (tall, wide) = x.shape[2:], b.window_size
        down, right = -height % tall, -width % wide
        h = nn.functional.pad(b.norm1(last(x)), (0, 0, 0, right, 0, down))
        windows = window_partition(h, b.window_size)
        h = b.attn(windows.view(len(windows), -1, windows.shape[-1])).view_as(windows)
        h = window_reverse(h, b.window_size, height + down, width + right)
        return h[:, :height, :width].permute(0, 3, 1, 2).contiguous()

    def mlp(x: Tensor) -> Tensor:
        return b.mlp(b.norm2(last(x).flatten(1, 2))).transpose(1, 2).view_as(x)

    attention = over_windows if hasattr(b, "window_size") else over_channels
    first = Branch("attention", attention, (b.norm1, b.attn), drop_path=b.drop_path1, independent="samples")
    found = (*forms(less("cpe1"))(b), first, *forms(less("cpe2"))(b))
    if b.mlp is None:
        return found
    return (*found, Branch("mlp", mlp, (b.norm2, b.mlp), drop_path=b.drop_path2, independent="samples"))


def _maxvit(block: Any) -> tuple[Branch, ...]:
    """A convolution, attention in windows and on a grid, each of these two with its MLP; x is (B, C, H, W)."""
    parts = [b for b in (block.attn_block, block.attn_grid) if b is not None]
    channels_last = not block.nchw_attn
    return (*_convolution(block.conv), *(branch for part in parts for branch in _partitioned(part, channels_last)))


def _parallel_maxvit(block: Any) -> tuple[Branch, ...]:
    convolutions = block.conv if isinstance(block.conv, nn.Sequential) else [block.conv]
    return (*(branch for conv in convolutions for branch in _convolution(conv)), *_partitioned(block.attn, True))


def _convolution(conv: Any) -> tuple[Branch, ...]:
    """MaxViT's convolution as a part of its block, called as a whole so that hooks on it fire."""
    return (Branch("conv", lambda x: conv(x) - x, (conv,), independent="samples"),)


def _partitioned(part: Any, channels_last: bool) -> tuple[Branch, ...]:
    def placed(function: Any) -> Any:
        if not channels_last:
            return function
        return lambda x: function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return (
        Branch(
            "attention",
            placed(lambda x: part.ls1(part._partition_attn(part.norm1(x)))),
            tuple(m for name, m in part.named_children() if name.startswith(("norm1", "attn", "ls1"))),
            drop_path=part.drop_path1,
            independent="samples",
        ),
        Branch(
            "mlp",
            placed(lambda x: part.ls2(part.mlp(part.norm2(x)))),
            (part.norm2, part.mlp, part.ls2),
            drop_path=part.drop_path2,
            independent="samples",
        ),
    )


def _mvit(block: Any) -> tuple[Branch, ...]:
    """x is (B, N, C); feat_size beside it are numbers, which a block that keeps the shape hands on."""
    b = block
    return attention_mlp(
        lambda x, feat_size: b.attn(b.norm1(x), feat_size)[0],
        lambda x, feat_size: b.mlp(b.norm2(x)),
        (b.norm1, b.attn),
        (b.norm2, b.mlp),
        (b.drop_path1, b.drop_path2),
    )


def _mvit_keeps_shape(block: Any) -> bool:
    return block.shortcut_pool_attn is None and block.dim == block.dim_out


def _keeps_shape(block: Any) -> bool:
    """MaxViT's, CoAtNet's and ViTamin's blocks: the shortcut does nothing."""
    convolution = getattr(block, "conv", block)
    first = convolution[0] if isinstance(convolution, nn.Sequential) else convolution
    return isinstance(first.shortcut, nn.Identity)


TABLE: dict[str, Branches] = {
    "vision_transformer.Block": _pre_norm("ls1 ls2", beside=MASK),
    "vision_transformer.ResPostBlock": _post_norm(MASK),
    "vision_transformer.ParallelScalingBlock": added,  # attention and MLP side by side are one branch
    "vision_transformer.DiffParallelScalingBlock": added,
    "vision_transformer.ParallelThingsBlock": _parallel_things,
    "vision_transformer_relpos.RelPosBlock": _pre_norm("ls1 ls2", beside="shared"),
    "vision_transformer_relpos.ResPostRelPosBlock": _post_norm("shared"),
    "vision_transformer_sam.Block": _sam,
    "eva.EvaBlock": _pre_norm("gamma_1 gamma_2", beside=ROPE),
    "eva.EvaBlockPostNorm": _post_norm(ROPE),
    "beit.Block": _pre_norm("gamma_1 gamma_2", beside="shared"),
    "cait.LayerScaleBlock": _pre_norm("gamma_1 gamma_2", "drop_path drop_path"),
    # behind the blocks with local attention a class token is put before x, which interrupts a run
    "convit.Block": only_if(lambda b: b.use_gpsa, _pre_norm("", "drop_path drop_path")),
    "deepseek_vit.DeepseekVitBlock": _pre_norm(beside={"rope": by_rank}),
    "gemma4_vit.Gemma4Block": forms(
        samples("norm1 attn* norm2", "drop_path", beside="samples"), tokens("norm3 mlp norm4", "drop_path")
    ),
    "xcit.XCABlock": forms(
        samples("norm1 attn gamma1", "drop_path1"),
        samples("norm3 local_mp* gamma3", "drop_path3", "local"),
        tokens("norm2 mlp gamma2", "drop_path2"),
    ),
    "hiera.HieraBlock": only_if(lambda b: not b.do_expand and b.attn.q_stride == 1, _pre_norm("ls1 ls2")),
    "hieradet_sam2.MultiScaleBlock": only_if(lambda b: b.dim == b.dim_out and not b.q_stride, _sam2),
    "mvitv2.MultiScaleBlock": only_if(_mvit_keeps_shape, _mvit),
    "swin_transformer.SwinTransformerBlock": _swin,
    "swin_transformer_v2.SwinTransformerV2Block": _swin_v2,
    "swin_transformer_v2_cr.SwinTransformerV2CrBlock": _swin_v2_cr,
    "gcvit.GlobalContextVitBlock": _global_context,
    "davit.SpatialBlock": _dual_attention,
    "davit.ChannelBlock": _dual_attention,
    "maxxvit.MaxxVitBlock": only_if(_keeps_shape, _maxvit),
    "maxxvit.ParallelMaxxVitBlock": only_if(_keeps_shape, _parallel_maxvit),
    "maxxvit.TransformerBlock2d": only_if(
        _keeps_shape,
        forms(samples("norm1 attn* ls1", "drop_path1", beside="shared"), samples("norm2 mlp ls2", "drop_path2", "mlp")),
    ),
    "volo.Outlooker": _pre_norm(),
    "volo.Transformer": _pre_norm(),
    "nest.TransformerLayer": _pre_norm(),
    "pvt_v2.Block": forms(samples("norm1 attn*", "drop_path1"), samples("norm2 mlp*", "drop_path2", "mlp")),
    "levit.LevitBlock": forms(samples("attn", "drop_path1"), samples("mlp", "drop_path2", "mlp")),
    "visformer.Block": forms(samples("norm1 attn*", "drop_path"), samples("norm2 mlp", "drop_path", "mlp")),
    "mobilevit.LinearTransformerBlock": forms(
        samples("norm1 attn*", "drop_path1", beside="samples"), samples("norm2 mlp", "drop_path2", "mlp")
    ),
    "sequencer.Sequencer2dBlock": forms(
        samples("norm1 rnn_tokens", "drop_path", "tokens"), tokens("norm2 mlp_channels", "drop_path", "channels")
    ),
    "mlp_mixer.MixerBlock": _mixer,
    "mlp_mixer.ResBlock": _res_mlp,
    "mlp_mixer.SpatialGatingBlock": forms(samples("norm mlp_channels", "drop_path", "gating")),
    "focalnet.FocalNetBlock": forms(
        samples("norm1 modulation norm1_post ls1", "drop_path1"),
        samples("norm2 mlp norm2_post ls2", "drop_path2", "mlp"),
    ),
    "tiny_vit.TinyVitBlock": added,
    "csatv2.TransformerBlock": only_if(lambda b: not b.downsample, added),
}
