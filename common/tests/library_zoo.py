"""A tiny model of each family of timm and torchvision that has an adapter, with an input; random weights.

A line is the name of a model of the library (or of its class, with a dot), the size of its input, and the options that
make it tiny. Not here: the models whose numbers are pinned in several tests (`model_zoo.py`).
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NUM_CLASSES = 5
Built = tuple[nn.Module, Tensor]

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
ROPE = {"embed_dim": 32, "depth": 2, "num_heads": 2}
DROP = {"drop_path_rate": 0.2}
STAGES = {"depths": (2, 2), **DROP}
FOUR = {"embed_dims": (12, 16, 24, 24), "num_heads": (1, 1, 2, 2)}
MVIT = {"embed_dim": 16, "num_heads": 1, "depths": (2, 2)}
GCVIT = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}
MAXVIT = {"embed_dim": (32, 64), "depths": (2, 2), "stem_width": 8}
VOLO = {"downsamples": (True, False), "outlook_attention": (True, False)}
MIXER = {"embed_dim": 24, "num_blocks": 2}
GATING = {"block_layer": "SpatialGatingBlock", "mlp_layer": "GatedMlp", "mlp_ratio": 4}
META = {"depths": (2, 2, 1, 1), "dims": (8, 16, 16, 24)}
HIERA = {"embed_dim": 16, "num_heads": 1, "stages": (2, 2, 1, 1)}
WINDOWS = {"embed_dim": 12, "num_heads": (2, 2), "window_size": 4}
TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ViT, parallel scaling": ("test_vit4", 32, {}),
    "ViT, differential": ("vit_dpwee_patch16_reg1_gap_256", 32, VIT),
    "ViT, parallel things": ("vit_small_patch16_18x2_224", 32, {**VIT, **DROP}),
    "ViT, norms behind": ("vit_small_patch16_224", 32, VIT),
    "ViT, relative positions": ("vit_relpos_small_patch16_224", 32, {**VIT, **DROP}),
    "ViT, relative positions, norms behind": ("vit_srelpos_small_patch16_224", 32, VIT),
    "ViT, hybrid": ("vit_tiny_r_s16_p8_224", 64, VIT),
    "EVA-02": ("eva02_tiny_patch14_224", 28, {**VIT, **DROP}),
    "EVA, norms behind": ("eva02_tiny_patch14_224", 28, {**VIT, "use_post_norm": True}),
    "DINOv3": ("vit_small_patch16_dinov3", 32, {**ROPE, **DROP}),
    "RoPE-ViT, mixed": ("vit_small_patch16_rope_mixed_224", 32, ROPE),
    "BEiT": ("beit_base_patch16_224", 32, {**VIT, **DROP}),
    "BEiT v2": ("beitv2_base_patch16_224", 32, {**VIT, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}),
    "DeiT-3": ("deit3_small_patch16_224", 32, VIT),
    "FlexiViT": ("flexivit_small", 32, VIT),
    "CaiT": ("cait_xxs24_224", 32, {**VIT, **DROP}),
    "ConViT": ("convit_tiny", 32, {**VIT, "depth": 3, "local_up_to_layer": 2}),
    "CrossViT": ("crossvit_tiny_240", 48, {"img_scale": (1.0, 1.0), "patch_size": (12, 16), "embed_dim": (24, 24)}),
    "DeepSeek ViT": ("deepseek_vit.DeepseekVitClassifier", 84, ROPE),
    "Gemma 4 ViT": ("gemma4_vit.Gemma4VitClassifier", 48, {**ROPE, "head_dim": 16, "intermediate_size": 48}),
    "Qwen 3 ViT": ("qwen3_vit.Qwen3VitClassifier", 64, {**ROPE, "mlp_ratio": 2.0}),
    "NaFlexViT": ("naflexvit.NaFlexVit", 32, {"cfg": ("NaFlexVitCfg", {**ROPE, "rope_type": "mixed"}), **DROP}),
    "XCiT": ("xcit_nano_12_p16_224", 32, {**VIT, **DROP}),
    "PiT": ("pit_ti_224", 64, {"base_dims": (12, 12, 12), "depth": (2, 1, 1), "heads": (1, 2, 2)}),
    "Hiera": ("hiera_tiny_224", 64, HIERA),
    "SAM": ("samvit_base_patch16_224", 80, {**VIT, "global_attn_indexes": (1,), "window_size": 3}),
    "SAM 2": ("sam2_hiera_tiny", 64, {**HIERA, "window_spec": (4, 4, 2, 2), "global_att_blocks": (3,)}),
    "MViTv2": ("mvitv2.MultiScaleVit", 64, {"cfg": ("MultiScaleVitCfg", MVIT), **DROP}),
    "Swin v2": ("swinv2_tiny_window8_256", 64, {**WINDOWS, **STAGES}),
    "Swin v2 CR": ("swinv2_cr_tiny_ns_224", 64, {**WINDOWS, **STAGES}),
    "DaViT": ("davit_tiny", 64, {**FOUR, "depths": (1, 1, 1, 1), "window_size": 3, **DROP}),
    "GCViT": ("gcvit.GlobalContextVit", 64, {**GCVIT, **DROP}),
    "MaxViT": ("maxxvit.MaxxVit", 64, {"cfg": ("MaxxVitCfg", {**MAXVIT, "block_type": ("M", "M")}), **DROP}),
    "CoAtNet": ("maxxvit.MaxxVit", 64, {"cfg": ("MaxxVitCfg", {**MAXVIT, "block_type": ("C", "T")}), **DROP}),
    "VOLO": ("volo.VOLO", 32, {"embed_dims": (24, 32), "num_heads": (2, 2), "layers": (2, 2), **VOLO}),
    "NesT": ("nest.Nest", 32, {"embed_dims": (12, 16, 24), "num_heads": (1, 2, 2), "depths": (2, 1, 2), **DROP}),
    "PVTv2": ("pvt_v2_b0", 64, {**FOUR, "depths": (2, 1, 1, 1), **DROP}),
    "LeViT": ("levit_128s", 64, {"embed_dim": (16, 24), "key_dim": 8, "num_heads": (2, 2), "depth": (2, 2), **DROP}),
    "Visformer": ("visformer_tiny", 64, {"embed_dim": 48, "depth": (2, 1, 1), "num_heads": 2, **DROP}),
    "MobileViT": ("mobilevit_xxs", 64, {}),
    "MobileViT v2": ("mobilevitv2_050", 64, {}),
    "Sequencer": (
        "sequencer2d_s",
        28,
        {"embed_dims": (12, 16, 16, 16), "hidden_sizes": (4, 4, 4, 4), "layers": (2, 1, 1, 1)},
    ),
    "MLP-Mixer": ("mlp_mixer.MlpMixer", 32, {**MIXER, **DROP}),
    "ResMLP": ("mlp_mixer.MlpMixer", 32, {**MIXER, "block_layer": "ResBlock", "norm_layer": "Affine", "mlp_ratio": 4}),
    "gMLP": ("mlp_mixer.MlpMixer", 32, {**MIXER, **GATING}),
    "FocalNet": ("focalnet.FocalNet", 64, {"embed_dim": 12, "depths": (2, 2, 1, 1), **DROP}),
    "TinyViT": ("tiny_vit_5m_224", 64, {**FOUR, "depths": (2, 2, 1, 1), "window_sizes": (4, 3, 4, 4), **DROP}),
    "CSATv2": ("csatv2", 64, {"dims": (32, 16, 16, 24), "depths": (2, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}),
    "ConvNeXt": ("test_convnext", 32, DROP),
    "ConvNeXt v2": ("test_convnext2", 32, {}),
    "InceptionNeXt": ("inception_next_atto", 32, {"dims": (16, 16, 24, 24), "depths": (2, 2, 1, 1), **DROP}),
    "PoolFormer": ("metaformer.MetaFormer", 32, {**META, **DROP}),
    "CAFormer": ("metaformer.MetaFormer", 32, {**META, "res_scale_init_values": (None, 1.0, 1.0, 1.0), **DROP}),
    "FasterNet": ("fasternet_t0", 32, DROP),
    "StarNet": ("starnet_s050", 32, DROP),
    "MambaOut": ("test_mambaout", 32, DROP),
    "EdgeNeXt": ("edgenext_xx_small", 64, DROP),
    "CoaT": ("coat_lite_tiny", 32, {}),
    "RepViT": ("repvit_m0_9", 32, {"embed_dim": (8, 16, 16, 24), "depth": (2, 2, 1, 1)}),
    "NextViT": ("nextvit_small", 32, {}),
    "FastViT": ("fastvit_t8", 32, {"embed_dims": (16, 16, 32, 32), **DROP}),
    "FastViT with attention": ("fastvit_sa12", 32, {"embed_dims": (8, 16, 16, 32), **DROP}),
    "EfficientFormer": ("efficientformer_l1", 224, {"embed_dims": (8, 8, 16, 24), "depths": (2, 1, 1, 2), **DROP}),
    "EfficientFormer v2": ("efficientformerv2_s0", 64, {}),
    "SwiftFormer": ("swiftformer_xs", 32, DROP),
    "EfficientViT (MIT)": ("efficientvit_b0", 32, {}),
    "EfficientViT (MSRA)": ("efficientvit_m0", 64, {}),
    "LowFormer": ("lowformer_b0", 64, DROP),
    "CPUBone": ("cpubone_nano", 64, DROP),
    "SHViT": ("shvit_s1", 64, {}),
    "iFormer": ("iformer_t", 64, {"dims": (8, 16, 16, 16), "depths": (2, 2, 4, 3), "attn_groups": (0, 0, 1, 1)}),
    "Res2Net": ("res2net50_14w_8s", 32, {"layers": (2, 1, 1, 1)}),
    "ResNeSt": ("resnest14d", 32, {"layers": (2, 1, 1, 1)}),
    "SKNet": ("skresnet18", 32, {}),
    "SENet": ("legacy_seresnet18", 32, {}),
    "TResNet": ("tresnet.TResNet", 32, {"layers": (2, 2, 1, 1), "width_factor": 0.25}),
    "ResNet v2": ("resnetv2_50", 32, {"layers": (2, 1, 1, 1), "channels": (16, 16, 16, 16), "stem_chs": 8, **DROP}),
    "NFNet": ("nfnet_f0", 32, {}),
    "RegNet": ("regnety_002", 32, DROP),
    "RegNet, norms before": ("regnetz_005", 32, {}),
    "ByobNet": ("gernet_s", 32, {}),
    "HaloNet": ("halonet26t", 256, {}),
    "RepVGG": ("repvgg_a0", 128, {}),
    "MobileOne": ("mobileone_s0", 128, {}),
    "CSPNet": ("cspdarknet53", 32, {}),
    "CSPNeXt": ("cspnext_tiny", 32, {}),
    "Inception-ResNet v2": ("inception_resnet_v2", 96, {}),
    "HGNet v2": ("hgnetv2_b0", 64, {}),
    "VoVNet": ("ese_vovnet57b", 32, {}),
    "Xception": ("xception41", 32, {}),
    "MobileNetV2": ("mobilenetv2_035", 32, DROP),
    "MobileNetV3": ("mobilenetv3_small_050", 32, {}),
    "MobileNetV4": ("mobilenetv4_conv_small_035", 32, DROP),
    "MobileNetV4 with attention": ("mobilenetv4_hybrid_medium", 64, {}),
    "EfficientNet": ("efficientnet_lite0", 32, DROP),
    "CondConv": ("tf_efficientnet_cc_b0_4e", 32, {}),
    "EfficientNet, fused": ("efficientnet_es", 32, {}),
    "GhostNet": ("ghostnet_050", 32, {}),
    "GhostNet v3": ("ghostnetv3_050", 64, {}),
    "RepGhost": ("repghostnet_050", 32, {}),
    "LCNet v2": ("lcnetv2_small", 32, {}),
    "ViTamin": ("vitamin_small_224", 64, {"depth": 1}),
    "HardCoRe-NAS": ("hardcorenas_a", 32, {}),
    "HRNet": ("hrnet_w18_small", 32, {}),
}


def timm_model(name: str, size: int, options: dict[str, Any]) -> Built:
    import timm

    module, _, kind = name.rpartition(".")
    make: Callable[..., nn.Module] = functools.partial(timm.create_model, name)
    if module:
        place = importlib.import_module(f"timm.models.{module}")
        make = getattr(place, kind)
        options = {key: getattr(place, v) if hasattr(place, str(v)) else v for key, v in options.items()}
        if "cfg" in options:
            config, values = options["cfg"]
            options["cfg"] = getattr(place, config)(**values)
    try:
        model = make(img_size=size, num_classes=NUM_CLASSES, **options)
    except TypeError:  # a convolutional network takes any size
        model = make(num_classes=NUM_CLASSES, **options)
    return model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _of_torchvision(name: str, shape: tuple[int, ...], **options: Any) -> Built:
    """A model by the name of its builder, of little width."""
    from torchvision import models

    make: Callable[..., nn.Module] = getattr(models, name, None) or getattr(models.video, name)
    model = make(num_classes=NUM_CLASSES, **options)
    return model, torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))


def _torchvision_convnext() -> Built:
    from torchvision.models.convnext import CNBlockConfig

    setting = [CNBlockConfig(12, 24, 2), CNBlockConfig(24, None, 2)]
    return _of_torchvision("ConvNeXt", (32, 32), block_setting=setting, stochastic_depth_prob=0.2)


def _torchvision_mvit() -> Built:
    from torchvision.models.video.mvit import MSBlockConfig

    same = {"num_heads": 1, "kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3], "stride_kv": [1, 2, 2]}
    setting = [
        MSBlockConfig(input_channels=a, output_channels=b, stride_q=[1, stride, stride], **same)
        for a, b, stride in ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1))
    ]
    sizes = {"spatial_size": (32, 32), "temporal_size": 4, "block_setting": setting}
    return _of_torchvision(
        "MViT",
        (4, 32, 32),
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        stochastic_depth_prob=0.2,
        **sizes,
    )


def _torchvision_maxvit() -> Built:
    sizes = {"input_size": (32, 32), "stem_channels": 8, "partition_size": 2, "block_channels": [16, 32]}
    return _of_torchvision("MaxVit", (32, 32), block_layers=[2, 2], head_dim=8, stochastic_depth_prob=0.2, **sizes)


def _torchvision_regnet() -> Built:
    from torchvision.models.regnet import BlockParams

    params = BlockParams([2, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return _of_torchvision("RegNet", (32, 32), block_params=params, stem_width=8)


def _torchvision_vit() -> Built:
    sizes = {"image_size": 32, "patch_size": 16, "hidden_dim": 24, "mlp_dim": 48}
    return _of_torchvision("VisionTransformer", (32, 32), num_layers=3, num_heads=2, dropout=0.1, **sizes)


TORCHVISION: dict[str, Callable[[], Built]] = {
    "ViT": _torchvision_vit,
    "MaxViT": _torchvision_maxvit,
    "MViT": _torchvision_mvit,
    "ConvNeXt": _torchvision_convnext,
    "RegNet": _torchvision_regnet,
    "EfficientNet": lambda: _of_torchvision("efficientnet_b0", (32, 32)),
    "EfficientNet v2": lambda: _of_torchvision("efficientnet_v2_s", (32, 32)),
    "MobileNet v2": lambda: _of_torchvision("mobilenet_v2", (32, 32), width_mult=0.35),
    "MobileNet v3": lambda: _of_torchvision("mobilenet_v3_small", (32, 32)),
    "MNASNet": lambda: _of_torchvision("mnasnet0_5", (32, 32)),
    "ResNet 3-D": lambda: _of_torchvision("mc3_18", (4, 16, 16)),
}
FAMILIES: dict[str, Callable[[], Built]] = {
    **{f"timm {name}": functools.partial(timm_model, *line) for name, line in TIMM.items()},
    **{f"torchvision {name}": build for name, build in TORCHVISION.items()},
}
SLOW = {  # two seconds and more, so that the others together take a minute
    *("timm MViTv2", "timm GCViT", "timm MobileViT", "timm CoaT", "timm NextViT", "timm FastViT"),
    *("timm EfficientFormer v2", "timm EfficientViT (MSRA)", "timm LowFormer", "timm SHViT", "timm NFNet"),
    *("timm MobileOne", "timm RegNet, norms before", "timm RepVGG", "timm CSPNet", "timm Inception-ResNet v2"),
    *("timm VoVNet", "timm Xception", "timm MobileNetV4 with attention", "timm CondConv", "timm GhostNet v3"),
    *("timm HRNet", "timm HaloNet", "torchvision MViT", "torchvision EfficientNet v2"),
}
