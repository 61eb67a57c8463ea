"""The branches of transformers' layers: ViT, VideoMAE."""

from typing import Any

from torch import Tensor

from dr2net.adapters.parts import attention_mlp
from dr2net.branches import Branch, branches_of, forward_was_replaced
from dr2net.patches import is_plain


def register() -> None:
    """Once, see `dr2net.adapters.register`."""
    from transformers.models.videomae.modeling_videomae import VideoMAELayer, VideoMAEOutput
    from transformers.models.vit.modeling_vit import ViTLayer

    @branches_of.register
    def _(block: VideoMAELayer) -> tuple[Branch, ...]:
        b = block

        def mlp(x: Tensor, *args: Any, **named: Any) -> Tensor:
            h = b.intermediate(b.layernorm_after(x))
            if is_plain(b.output) and type(b.output) is VideoMAEOutput and not forward_was_replaced(VideoMAEOutput):
                return b.output.dropout(b.output.dense(h))  # `output` adds x, so its two parts are called instead
            return b.output(h, x) - x

        return attention_mlp(
            lambda x, *args, **named: b.attention(b.layernorm_before(x), *args, **named),
            mlp,
            (b.layernorm_before, b.attention),
            (b.layernorm_after, b.intermediate, b.output),
        )

    @branches_of.register
    def _(block: ViTLayer) -> tuple[Branch, ...]:
        b = block
        return attention_mlp(
            lambda x, mask=None, **named: b.dropout(b.attention(b.layernorm_before(x), mask, **named)[0]),
            lambda x, *args, **named: b.dropout(b.mlp(b.layernorm_after(x))),
            (b.layernorm_before, b.attention),
            (b.layernorm_after, b.mlp),
        )
