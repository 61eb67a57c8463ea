"""transformers' VideoMAE encoder as a backbone: clip in, patch tokens out, blocks in one `blocks` container.

    backbone = build_videomae("MCG-NJU/videomae-base", weights="hub", num_frames=16, image_size=224, drop_path=0.1)
    tokens = backbone(clip)                                        # (B, 3, 16, 224, 224) -> (B, 1568, 768)

`name` is a public checkpoint of pretraining or finetuning (its decoder or classifier is left out by name), or a local
folder in transformers' form. With `weights=None` only the architecture is built, from the sizes below, at random:
enough to plan memory without a hub. Not here: masking, the decoder, the encoder's final norm (finetuning with mean
pooling replaces it by the head's own norm).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.weights import read_state_dict, refuse_other_kinds

try:
    from timm.layers import DropPath
    from transformers import VideoMAEConfig, VideoMAEModel
except ImportError as error:
    raise ImportError("VideoMAE needs transformers and timm: pip install 'dr2net[engine]'") from error

# Architectures of the public checkpoints, by the word in their name: (width, depth, heads).
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
# What a checkpoint legitimately holds beyond the encoder: pretraining decoder, classifier, norms the head replaces.
IGNORED = ("decoder.", "encoder_to_decoder.", "mask_token", "classifier.", "fc_norm.", "layernorm.")


class VideoMAE(nn.Module):
    """(B, 3, T, H, W) -> tokens (B, T/2 * H/16 * W/16, D), time slowest, before any final norm."""

    def __init__(self, model: VideoMAEModel, *, drop_path: float = 0.0) -> None:
        super().__init__()
        size = model.config.image_size
        self.num_frames, self.width = model.config.num_frames, model.config.hidden_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.num_tokens = model.embeddings.position_embeddings.shape[1]  # handed out per clip
        self.patch_embed = model.embeddings.patch_embeddings.projection
        # transformers keeps the fixed sine table as a plain attribute, which neither .to() nor fake tensors reach
        self.register_buffer("position_embed", model.embeddings.position_embeddings.clone(), persistent=False)
        self.blocks = nn.Sequential(*model.encoder.layer)
        for index, block in enumerate(self.blocks):  # the recipe's stochastic depth, in the place of an unused dropout
            rate = drop_path * index / max(len(self.blocks) - 1, 1)
            if rate > 0:
                attention, mlp = block.get_submodule("attention.output"), block.get_submodule("output")
                attention.dropout = mlp.dropout = DropPath(rate)

    def forward(self, video: Tensor) -> Tensor:
        expected = (3, self.num_frames, *self.image_size)
        if tuple(video.shape[1:]) != expected:
            raise ValueError(f"a clip of {tuple(video.shape[1:])} reached a model built for {expected} (C, T, H, W)")
        x = self.patch_embed(video).flatten(2).transpose(1, 2)
        return self.blocks(x + self.position_embed.to(x.dtype))

    @property
    def num_layers(self) -> int:
        return len(self.blocks) + 1

    def layer_of(self, name: str) -> int:
        """0 for the patch embedding, 1 + i for block i."""
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0


def build_videomae(
    name: str,
    *,
    weights: str | None,
    num_frames: int,
    image_size: int,
    depth: int | None = None,
    drop_path: float = 0.0,
) -> VideoMAE:
    """Build the encoder of `name`; ValueError if weights are unreachable or leave a key unfilled or unused.

    weights: None (random, `name` contains "small", "base" or "large"), "hub" (`name`, from the hub or its cache) or a
    folder in transformers' form. num_frames and image_size may differ from the checkpoint's: positions are sines.
    """
    if weights is None:
        return VideoMAE(VideoMAEModel(_config(name, num_frames, image_size, depth)), drop_path=drop_path)
    if depth is not None:
        raise ValueError(f"depth {depth} with pretrained weights is not supported here: leave it None")
    source = name if weights == "hub" else weights
    if weights != "hub" and not Path(weights).is_dir():  # transformers would ask the hub for a repository of that name
        raise ValueError(f"no folder {weights!r}: give --model.weights FOLDER in transformers' form, or hub")
    try:
        loaded: Any = VideoMAEModel.from_pretrained(
            source,
            num_frames=num_frames,
            image_size=image_size,
            use_mean_pooling=True,  # no final norm in the encoder
            attn_implementation="sdpa",
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"no VideoMAE weights from {source!r} ({type(error).__name__}: {str(error).splitlines()[0]}). Is there a "
            "network? Otherwise fetch the checkpoint's folder elsewhere and give --model.weights FOLDER"
        ) from error
    model, info = loaded
    unused = [key for key in info["unexpected_keys"] if not key.removeprefix("videomae.").startswith(IGNORED)]
    problems = [*info["missing_keys"], *unused, *info["mismatched_keys"]]
    if problems:
        raise ValueError(f"{source!r} does not fill VideoMAE: {len(problems)} keys missing or unused: {problems[:6]}")
    if weights != "hub":
        for file in sorted([*Path(weights).glob("*.safetensors"), *Path(weights).glob("*.bin")]):
            state = {key.removeprefix("videomae."): value for key, value in read_state_dict(file).items()}
            refuse_other_kinds(model.state_dict(), state, str(file))
    return VideoMAE(model, drop_path=drop_path)


def _config(name: str, num_frames: int, image_size: int, depth: int | None) -> VideoMAEConfig:
    size = next((size for size in SIZES if size in name), None)
    if size is None:
        raise ValueError(f"cannot tell the size of {name!r}: its name should contain one of {', '.join(SIZES)}")
    width, full_depth, heads = SIZES[size]
    build: Any = VideoMAEConfig  # its signature lacks what all configurations of transformers take
    return build(
        image_size=image_size,
        num_frames=num_frames,
        hidden_size=width,
        num_hidden_layers=full_depth if depth is None else depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        use_mean_pooling=True,
        attn_implementation="sdpa",
    )
