"""The branches of timm's convolutional blocks, and of hybrids whose x is (B, C, H, W). Not here: transformer blocks
(`timm.py`).

Batch norms that train see all samples, so these run as a whole while they do; frozen, and with other norms, by samples.
"""

from typing import Any

from torch import Tensor, nn

from dr2net.adapters.parts import Branches, added, forms, held_by, less, of_resnet, only_if, samples, tokens
from dr2net.branches import Branch


def _chain(parts: str, drop_path: str | None = "drop_path") -> Branches:
    return forms(samples(parts, drop_path, "block"))


def _has_skip(parts: str) -> Branches:
    """EfficientNet's blocks: with a skip connection where stride and channels allow it."""
    return only_if(lambda block: block.has_skip, _chain(parts))


def _is_identity(name: str) -> Any:
    return lambda block: isinstance(getattr(block, name), nn.Identity)


def _is_none(name: str) -> Any:
    return lambda block: getattr(block, name) is None


def _is_true(name: str) -> Any:
    return lambda block: bool(getattr(block, name))


def _is_empty(name: str) -> Any:
    return lambda block: not list(getattr(block, name).children())


def _reparametrized_later(block: Any) -> bool:
    """RepVGG's and MobileOne's blocks: x itself is added, through a batch norm, until they are made one convolution."""
    return block.reparam_conv is None and block.identity is not None


def _scaled(block: Any, scale: str, function: Any, *parts: str) -> tuple[Branch, ...]:
    """A layer scale per channel of (B, C, H, W), or none, and then drop path."""

    def scaled(x: Tensor) -> Tensor:
        x, gamma = function(x), getattr(block, scale)
        return x if gamma is None else x.mul(gamma.reshape(1, -1, 1, 1))

    held = held_by(block, *parts, scale)
    return (Branch("block", scaled, held, drop_path=block.drop_path, independent="samples"),)


def _convnext(block: Any) -> tuple[Branch, ...]:
    b = block

    def function(x: Tensor) -> Tensor:
        if b.use_conv_mlp:
            return b.mlp(b.norm(b.conv_dw(x)))
        return b.mlp(b.norm(b.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    return _scaled(b, "gamma", function, "conv_dw", "norm", "mlp")


def _metanext(block: Any) -> tuple[Branch, ...]:
    b = block
    return _scaled(b, "gamma", lambda x: b.mlp(b.norm(b.token_mixer(x))), "token_mixer", "norm", "mlp")


def _fasternet(block: Any) -> tuple[Branch, ...]:
    b = block
    return _scaled(b, "layer_scale", lambda x: b.mlp(b.spatial_mixing(x)), "spatial_mixing", "mlp")


def _edgenext(block: Any) -> tuple[Branch, ...]:
    b = block

    def function(x: Tensor) -> Tensor:
        return b.mlp(b.norm(b.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    return _scaled(b, "gamma", function, "conv_dw", "norm", "mlp")


def _metaformer(block: Any) -> tuple[Branch, ...]:
    """PoolFormer, ConvFormer, CAFormer: drop path stands before the layer scale, with which it commutes. In the later
    stages x itself is scaled too: there the branch is all that is added to x.
    """

    def half(layer: str, number: str) -> Branch:
        norm, drop_path, scale, shortcut = (
            f"{part}{number}" for part in ("norm", "drop_path", "layer_scale", "res_scale")
        )
        if isinstance(getattr(block, shortcut), nn.Identity):
            found = samples(f"{norm} {layer} {scale}", drop_path, layer)(block)
            assert found is not None
            return found

        def function(x: Tensor) -> Tensor:
            h = x
            for part in (norm, layer, drop_path, scale):
                h = getattr(block, part)(h)
            return getattr(block, shortcut)(x) + h - x

        return Branch(layer, function, held_by(block, norm, layer, drop_path, scale, shortcut), independent="samples")

    return (half("token_mixer", "1"), half("mlp", "2"))


def _coat(block: Any) -> tuple[Branch, ...]:
    """CoaT's serial blocks: positions that a stage shares, attention, MLP."""
    b = block
    return (
        Branch("cpe", lambda x, *args, **named: b.cpe(x, *args, **named) - x, (b.cpe,), independent="samples"),
        *forms(samples("norm1 factoratt_crpe*", "drop_path"), tokens("norm2 mlp", "drop_path"))(b),
    )


def _repvit(block: Any) -> tuple[Branch, ...]:
    b = block
    return (
        Branch("token_mixer", lambda x: b.se(b.token_mixer(x)) - x, (b.token_mixer, b.se), independent="samples"),
        *forms(samples("channel_mixer", None, "channel_mixer"))(b),
    )


def _nextvit(block: Any) -> tuple[Branch, ...]:
    if not isinstance(block.patch_embed.conv, nn.Identity):
        return ()
    return forms(samples("mhca", "attn_drop_path"), samples("norm mlp", "mlp_drop_path", "mlp"))(block)


MIX = forms(samples("token_mixer* ls1", "drop_path1", "token_mixer"), samples("mlp ls2", "drop_path2", "mlp"))
CONVOLUTIONS = only_if(_is_none("downsample"), added)
BYOB = only_if(_is_identity("shortcut"), added)
TABLE: dict[str, Branches] = {
    # ResNets and their kin, whose activation comes after the sum
    "resnet.BasicBlock": of_resnet,
    "resnet.Bottleneck": of_resnet,
    "res2net.Bottle2neck": CONVOLUTIONS,
    "resnest.ResNestBottleneck": CONVOLUTIONS,
    "sknet.SelectiveKernelBasic": CONVOLUTIONS,
    "sknet.SelectiveKernelBottleneck": CONVOLUTIONS,
    "senet.SEBottleneck": CONVOLUTIONS,
    "senet.SEResNetBottleneck": CONVOLUTIONS,
    "senet.SEResNeXtBottleneck": CONVOLUTIONS,
    "senet.SEResNetBlock": CONVOLUTIONS,
    "tresnet.BasicBlock": CONVOLUTIONS,
    "tresnet.Bottleneck": CONVOLUTIONS,
    "resnetv2.Bottleneck": CONVOLUTIONS,
    "resnetv2.PreActBasic": only_if(_is_none("downsample"), _chain("norm1 conv1 norm2 conv2")),
    "resnetv2.PreActBottleneck": only_if(_is_none("downsample"), _chain("norm1 conv1 norm2 conv2 norm3 conv3")),
    "nfnet.NormFreeBlock": CONVOLUTIONS,
    "regnet.Bottleneck": only_if(_is_identity("downsample"), added),
    "regnet.PreBottleneck": only_if(_is_identity("downsample"), added),
    "byobnet.BasicBlock": BYOB,
    "byobnet.BottleneckBlock": BYOB,
    "byobnet.DarkBlock": BYOB,
    "byobnet.EdgeBlock": BYOB,
    "byobnet.SelfAttnBlock": BYOB,
    "byobnet.RepVggBlock": only_if(_reparametrized_later, added),
    "byobnet.MobileOneBlock": only_if(_reparametrized_later, added),
    "cspnet.BottleneckBlock": added,
    "cspnet.DarkBlock": _chain("conv1 attn conv2"),
    "cspnet.EdgeBlock": _chain("conv1 attn conv2"),
    "cspnext.CspNextBlock": only_if(_is_true("add_identity"), _chain("conv1 conv2")),
    "inception_resnet_v2.Block35": added,
    "inception_resnet_v2.Block17": added,
    "inception_resnet_v2.Block8": added,
    "hgnet.HighPerfGpuBlock": only_if(_is_true("residual"), added),
    "vovnet.OsaBlock": only_if(_is_true("residual"), added),
    "xception.Block": only_if(_is_none("skip"), added),
    "xception_aligned.XceptionModule": only_if(lambda b: b.shortcut is None and not b.no_skip, added),
    "xception_aligned.PreXceptionModule": only_if(
        lambda b: isinstance(b.shortcut, nn.Identity) and not b.no_skip, added
    ),
    # MobileNet, EfficientNet and other inverted residuals
    "_efficientnet_blocks.ConvBnAct": _has_skip("conv bn1 aa"),
    "_efficientnet_blocks.DepthwiseSeparableConv": _has_skip("conv_s2d bn_s2d conv_dw bn1 aa se conv_pw bn2"),
    "_efficientnet_blocks.InvertedResidual": _has_skip("conv_s2d bn_s2d conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3"),
    "_efficientnet_blocks.CondConvResidual": only_if(_is_true("has_skip"), added),
    "_efficientnet_blocks.EdgeResidual": _has_skip("conv_exp bn1 aa se conv_pwl bn2"),
    "_efficientnet_blocks.UniversalInvertedResidual": _has_skip("dw_start pw_exp dw_mid se pw_proj dw_end layer_scale"),
    "_efficientnet_blocks.MobileAttention": only_if(_is_true("has_skip"), added),
    "ghostnet.GhostBottleneck": only_if(_is_empty("shortcut"), added),
    "ghostnet.GhostBottleneckV3": only_if(_is_empty("shortcut"), added),
    "repghost.RepGhostBottleneck": only_if(_is_empty("shortcut"), added),
    "lcnetv2.RepDepthwiseSeparable": only_if(_is_true("use_shortcut"), added),
    "gcvit.MbConvBlock": _chain("conv_dw act se conv_pw", None),
    "vitamin.MbConvLNBlock": only_if(
        _is_identity("shortcut"), _chain("pre_norm down conv1_1x1 act1 conv2_kxk act2 conv3_1x1")
    ),
    "maxxvit.MbConvBlock": only_if(_is_identity("shortcut"), added),
    "maxxvit.ConvNeXtBlock": only_if(_is_identity("shortcut"), added),
    "tiny_vit.MBConv": added,
    # convolutional mixers of positions, with an MLP per position
    "convnext.ConvNeXtBlock": only_if(_is_identity("shortcut"), _convnext),
    "inception_next.MetaNeXtBlock": _metanext,
    "metaformer.MetaFormerBlock": _metaformer,
    "fasternet.MLPBlock": _fasternet,
    "starnet.Block": added,
    "mambaout.GatedConvBlock": added,
    "edgenext.ConvBlock": only_if(lambda b: not b.shortcut_after_dw, _edgenext),
    "edgenext.SplitTransposeBlock": added,
    "csatv2.Block": added,
    "coat.SerialBlock": _coat,
    "repvit.RepViTBlock": _repvit,
    "nextvit.NextConvBlock": _nextvit,
    "fastvit.RepMixerBlock": forms(less("token_mixer"), samples("mlp layer_scale", "drop_path", "mlp")),
    "fastvit.AttentionBlock": forms(
        samples("norm token_mixer layer_scale_1", "drop_path1"), samples("mlp layer_scale_2", "drop_path2", "mlp")
    ),
    "efficientformer.MetaBlock1d": forms(
        samples("norm1 token_mixer ls1", "drop_path1"), tokens("norm2 mlp ls2", "drop_path2")
    ),
    "efficientformer.MetaBlock2d": MIX,
    "efficientformer_v2.EfficientFormerV2Block": MIX,
    "swiftformer.ConvEncoder": _chain("dwconv norm pwconv1 act pwconv2 layer_scale"),
    "swiftformer.Block": forms(
        less("local_representation"),
        samples("attn layer_scale_1", "drop_path"),
        samples("linear layer_scale_2", "drop_path", "mlp"),
    ),
    "efficientvit_mit.EfficientVitBlock": forms(less("context_module"), less("local_module")),
    "efficientvit_mit.ResidualBlock": only_if(_is_identity("shortcut"), _chain("pre_norm main", None)),
    "efficientvit_msra.EfficientVitBlock": forms(*map(less, ("dw0", "ffn0", "mixer", "dw1", "ffn1"))),
    "efficientvit_msra.ResidualDrop": added,
    "lowformer.LowFormerBlock": forms(less("attn"), less("mlp"), less("local")),
    "lowformer.ResidualBlock": only_if(_is_identity("shortcut"), _chain("main")),
    "cpubone.CPUBoneBlock": added,
    "cpubone.ResidualBlock": only_if(_is_identity("shortcut"), _chain("main")),
    "shvit.BasicBlock": forms(less("conv"), less("mixer"), less("ffn")),
    "shvit.Residual": added,
    "iformer.ConvBlock": added,
    "iformer.SHMABlock": added,
    "iformer.RepCPE": added,
    "iformer.FFN": added,
}
