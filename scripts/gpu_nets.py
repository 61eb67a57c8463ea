"""The networks of `check_gpu.py`: a ViT, a Swin and a Video Swin as one would finetune them, and tiny ones of each.

All with random weights, on the CPU, in training mode. `dropout` puts dropout and drop path into them.
"""

from torch import nn

from scripts.gpu_card import Net

KINDS = ("ViT", "Swin", "Video Swin")


def build(kind: str, *, small: bool, dropout: bool = False) -> Net:
    """The network and an input of a size that a card of 8 GB trains conventionally; small: in a second on a CPU."""
    if kind == "ViT":
        return _vit(small, dropout)
    return _swin(small, dropout) if kind == "Swin" else _video_swin(small, dropout)


def _vit(small: bool, dropout: bool) -> Net:
    import timm

    drops = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.2} if dropout else {}
    size = {"depth": 2, "img_size": 64, "embed_dim": 48, "num_classes": 10} if small else {}
    model = timm.create_model("vit_small_patch16_224", **size, **drops)
    return model.train(), (8, 3, 64, 64) if small else (32, 3, 224, 224)


def _swin(small: bool, dropout: bool) -> Net:
    from torchvision.models.swin_transformer import SwinTransformer

    width, depths, heads = (24, [2, 2], [2, 4]) if small else (96, [2, 2, 6, 2], [3, 6, 12, 24])
    model = SwinTransformer([4, 4], width, depths, heads, [7, 7], num_classes=10, **_drops(dropout))
    return model.train(), (2, 3, 56, 56) if small else (32, 3, 224, 224)


def _video_swin(small: bool, dropout: bool) -> Net:
    model = video_swin("tiny" if small else "T", dropout=dropout)
    return model, (2, 3, 8, 56, 56) if small else (1, 3, 32, 224, 224)


def video_swin(size: str, *, dropout: bool = False) -> nn.Module:
    """torchvision's Swin3d with ten classes, size T or B; "tiny" is none of theirs."""
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    width, depths, heads = {
        "tiny": (24, [2, 2], [2, 4]),
        "T": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
        "B": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    }[size]
    window = [4, 7, 7] if size == "tiny" else [8, 7, 7]
    model = SwinTransformer3d([2, 4, 4], width, depths, heads, window, num_classes=10, **_drops(dropout))
    return model.train()


def _drops(dropout: bool) -> dict[str, float]:
    if not dropout:
        return {"stochastic_depth_prob": 0.0}
    return {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth_prob": 0.2}
