"""Tiny models of every family that `dr2net.convert` knows, with random weights, and an input for each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

NUM_CLASSES = 5


def _image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _video(frames: int, size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


def _timm_vit(name: str, size: int, **options: float) -> tuple[nn.Module, Tensor]:
    import timm

    model = timm.create_model(
        name, img_size=size, depth=3, embed_dim=24, num_heads=2, num_classes=NUM_CLASSES, **options
    )
    # fresh class and register tokens are a millionth of the patches, unlike trained ones, and below the grid
    for token in (model.cls_token, model.pos_embed, getattr(model, "reg_token", None)):
        if token is not None:
            nn.init.normal_(token, std=0.5)
    return model, _image(size)


def vit() -> tuple[nn.Module, Tensor]:
    return _timm_vit("vit_tiny_patch16_224", 32)


def vit_with_layer_scale_and_drop_path() -> tuple[nn.Module, Tensor]:
    return _timm_vit("vit_tiny_patch16_224", 32, init_values=0.1, drop_path_rate=0.3)


def vit_with_registers() -> tuple[nn.Module, Tensor]:
    return _timm_vit("vit_small_patch14_reg4_dinov2", 28, init_values=0.1)


def timm_swin() -> tuple[nn.Module, Tensor]:
    from timm.models.swin_transformer import SwinTransformer

    small = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "num_classes": NUM_CLASSES}
    return SwinTransformer(img_size=64, **small), _image(64)


def timm_resnet() -> tuple[nn.Module, Tensor]:
    import timm

    return timm.create_model("resnet10t", num_classes=NUM_CLASSES, layers=(2, 2, 1, 1)), _image(32)


def _swin(**options: object) -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=NUM_CLASSES, **options)


def swin() -> tuple[nn.Module, Tensor]:
    return _swin(stochastic_depth_prob=0.3), _image(64)


def swin_v2() -> tuple[nn.Module, Tensor]:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    return _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), _image(64)


def swin3d() -> tuple[nn.Module, Tensor]:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 12, [2, 2], [2, 2], [2, 4, 4], num_classes=NUM_CLASSES), _video(4, 32)


def resnet() -> tuple[nn.Module, Tensor]:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [2, 2, 1, 1], num_classes=NUM_CLASSES), _image(32)


def resnet_with_bottlenecks() -> tuple[nn.Module, Tensor]:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [2, 2, 1, 1], num_classes=NUM_CLASSES), _image(32)


SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 16,
    "num_labels": NUM_CLASSES,
    "hidden_dropout_prob": 0.1,
}


def huggingface_vit() -> tuple[nn.Module, Tensor]:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SMALL)), _image(32)


def videomae() -> tuple[nn.Module, Tensor]:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    model = VideoMAEForVideoClassification(VideoMAEConfig(**SMALL, num_frames=4))
    return model, _video(4, 32).transpose(1, 2)


def slowfast() -> tuple[nn.Module, Tensor]:
    from pytorchvideo.models.slowfast import create_slowfast

    model = create_slowfast(
        model_depth=50,
        model_num_class=NUM_CLASSES,
        stem_dim_outs=(32, 4),
        head_pool_kernel_sizes=((2, 1, 1), (8, 1, 1)),
    )
    return model, _video(8, 32)


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    build.__name__: build
    for build in (
        *(vit, vit_with_layer_scale_and_drop_path, vit_with_registers, timm_swin, timm_resnet, swin, swin_v2, swin3d),
        *(resnet, resnet_with_bottlenecks, huggingface_vit, videomae, slowfast),
    )
}


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of any of them."""
    inputs = [x[:, :, ::4], x] if type(model).__module__.startswith("pytorchvideo") else x  # slow and fast pathway
    outputs = model(inputs)
    return outputs if isinstance(outputs, Tensor) else outputs.logits
