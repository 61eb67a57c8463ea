"""What the residual branches of a block are: one small function per block type, found by `functools.singledispatch`.

A pre-norm transformer block x + attention(norm1(x)), then x + mlp(norm2(x)), is two branches. A block whose activation
comes after the sum, relu(x + f(x)) (ResNet, SlowFast), is one: what it adds to x, max(f(x), -x). A block without
residual connection can be one whose alpha is fixed at 0, as the paper remarks (`residual=False`). A block that changes
the shape has none and runs as it is.

To teach it your own block:

    @dr2net.branches_of.register(MyBlock)
    def _(block):
        return (
            dr2net.Branch("attention", lambda x: block.attn(block.norm1(x)), (block.norm1, block.attn)),
            dr2net.Branch("mlp", lambda x: block.mlp(block.norm2(x)), (block.norm2, block.mlp), independent="tokens"),
        )

`independent` says that the branch may be run in chunks, and along what (`chunks.py`).

Known: timm ViT and Swin blocks, torchvision Swin (2-D, 3-D, v2) and ResNet blocks, transformers ViT and VideoMAE
layers, pytorchvideo ResNet/SlowFast blocks. The libraries are imported only when a block of theirs is met.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dr2net.chunks import Chunks, Groups


@dataclass(frozen=True)
class Branch:
    """One residual branch F of a block.

    function: F(x, *arguments of the block after x) -> tensor of x's shape, the residual connection left out.
    modules: all modules whose parameters and buffers F uses.
    residual: False if the block has no clean residual connection: F is the whole block and alpha is 0.
    drop_path: multiplies `function`'s result by a random factor per sample; the last part of F, and not in `function`.
    independent: F treats each token (all dimensions but the last) or each sample by itself; or a function that makes
        the groups of an input x. None: unknown.
    """

    name: str
    function: Callable[..., Tensor]
    modules: tuple[nn.Module, ...]
    residual: bool = True
    drop_path: nn.Module | None = None
    independent: Literal["tokens", "samples"] | Callable[[Tensor], Groups] | None = None

    def __call__(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        """F(x), drop path included."""
        f = self.function(x, *args, **named)
        return f if self.drop_path is None else self.drop_path(f)

    def chunks(self, x: Tensor, args: Sequence[Any], named: dict[str, Any], mib: float | None) -> Chunks | None:
        """How F(x, *args, **named) is run in chunks of about `mib` MiB; None if it has to run on x as a whole."""
        if mib is None or self.independent is None:
            return None
        if any(isinstance(value, Tensor) for value in tree_leaves((args, named))):
            return None  # a tensor beside x belongs to all groups, or to some of them: nobody knows
        norms = [m for part in self.modules for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if any(norm.training or norm.running_mean is None for norm in norms):
            return None  # its statistics are over all groups

        def function(chunk: Tensor) -> Tensor:
            return self.function(chunk, *args, **named)

        if self.independent == "tokens":
            groups = Groups(function, x.shape, x.dim() - 1)
        elif self.independent == "samples":
            groups = Groups(function, x.shape, 1)
        else:
            groups = self.independent(x)
        chunks = Chunks(groups, self.modules, self.drop_path, mib * 2**20)
        # all in one: the branch as it is, which needs no buffers to collect the results in
        return None if chunks.size == groups.count and isinstance(self.independent, str) else chunks

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once."""
        found = {id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}
        return list(found.values())


@functools.singledispatch
def branches_of(block: nn.Module) -> tuple[Branch, ...]:
    """The branches of `block` in the order they run; empty if it has to run as it is. Extend with `.register`."""
    return ()


def find_branches(block: nn.Module) -> tuple[tuple[Branch, ...], str]:
    """Branches and, where there are none, the reason in words.

    A subclass that overrides `forward` computes something else than the block it inherits from, so it is not converted
    unless it is registered itself.
    """
    for cls in type(block).__mro__:
        adapter = _ADAPTERS.get(cls.__module__.split(".")[0])
        if adapter is not None:
            adapter()
    known = next((cls for cls in type(block).__mro__ if cls in branches_of.registry and cls is not object), None)
    if known is None:
        return (), f"no branches are known for blocks of type {type(block).__name__}"
    if inspect.unwrap(type(block).forward) is not inspect.unwrap(known.forward):
        return (), f"{type(block).__name__} overrides the forward of {known.__name__}; register it with branches_of"
    branches = branches_of(block)
    return branches, "" if branches else "it changes the shape of its input"


def _attention_mlp(
    attention: Callable[..., Tensor],
    mlp: Callable[..., Tensor],
    parts: tuple[nn.Module, ...],
    rest: tuple[nn.Module, ...],
    drop_paths: tuple[nn.Module | None, nn.Module | None] = (None, None),
    windows: Callable[[Tensor], Groups] | None = None,
) -> tuple[Branch, ...]:
    """A transformer block's two: global attention sees a sample, window attention a window, the MLP a token."""
    return (
        Branch("attention", attention, parts, drop_path=drop_paths[0], independent=windows or "samples"),
        Branch("mlp", mlp, rest, drop_path=drop_paths[1], independent="tokens"),
    )


def _added(block: nn.Module) -> tuple[Branch, ...]:
    """What a block whose activation comes after the sum adds to its input.

    The whole block as a branch without residual connection (alpha 0) would be nearer to the paper's remark, but then
    the streams of 23 blocks of SlowFast grew a hundredfold at (.9, .1) and a millionfold at (0, 1).
    """
    forward = type(block).forward
    return (Branch("block", lambda x: forward(block, x) - x, (block,), independent="samples"),)


def _of_resnet(block: nn.Module) -> tuple[Branch, ...]:
    """timm's and torchvision's residual blocks."""
    return _added(block) if block.downsample is None and block.stride == 1 else ()


@functools.cache
def _timm() -> None:
    from timm.models.resnet import BasicBlock, Bottleneck
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.vision_transformer import Block, ResPostBlock

    @branches_of.register
    def _(block: Block):
        b = block
        return _attention_mlp(
            lambda x, *args, **named: b.ls1(b.attn(b.norm1(x), *args, **named)),
            lambda x, *args, **named: b.ls2(b.mlp(b.norm2(x))),
            (b.norm1, b.attn, b.ls1),
            (b.norm2, b.mlp, b.ls2),
            (b.drop_path1, b.drop_path2),
        )

    @branches_of.register
    def _(block: ResPostBlock):
        b = block
        return _attention_mlp(
            lambda x, *args, **named: b.norm1(b.attn(x, *args, **named)),
            lambda x, *args, **named: b.norm2(b.mlp(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.drop_path1, b.drop_path2),
        )

    @branches_of.register
    def _(block: SwinTransformerBlock):
        b = block
        return _attention_mlp(
            lambda x: b._attn(b.norm1(x)),
            lambda x: b.mlp(b.norm2(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.drop_path1, b.drop_path2),
        )

    for kind in (BasicBlock, Bottleneck):
        branches_of.register(kind, _of_resnet)


@functools.cache
def _torchvision() -> None:
    from torchvision.models.resnet import BasicBlock, Bottleneck
    from torchvision.models.swin_transformer import (
        ShiftedWindowAttention,
        SwinTransformerBlock,
        SwinTransformerBlockV2,
    )
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    from dr2net.window_attention import Windows

    @branches_of.register
    def _(block: SwinTransformerBlock):
        b = block
        known = type(b.attn) in (ShiftedWindowAttention, ShiftedWindowAttention3d)
        return _attention_mlp(
            lambda x: b.attn(b.norm1(x)),
            lambda x: b.mlp(b.norm2(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.stochastic_depth, b.stochastic_depth),
            (lambda x: Windows(b.norm1, b.attn, x)) if known else None,
        )

    @branches_of.register
    def _(block: SwinTransformerBlockV2):
        b = block
        return _attention_mlp(
            lambda x: b.norm1(b.attn(x)),
            lambda x: b.norm2(b.mlp(x)),
            (b.norm1, b.attn),
            (b.norm2, b.mlp),
            (b.stochastic_depth, b.stochastic_depth),
        )

    for kind in (BasicBlock, Bottleneck):
        branches_of.register(kind, _of_resnet)


@functools.cache
def _transformers() -> None:
    from transformers.models.videomae.modeling_videomae import VideoMAELayer
    from transformers.models.vit.modeling_vit import ViTLayer

    @branches_of.register
    def _(block: VideoMAELayer):
        b = block
        return _attention_mlp(
            lambda x, *args, **named: b.attention(b.layernorm_before(x), *args, **named),
            # `output` would add its second argument, so its two parts are called instead
            lambda x, *args, **named: b.output.dropout(b.output.dense(b.intermediate(b.layernorm_after(x)))),
            (b.layernorm_before, b.attention),
            (b.layernorm_after, b.intermediate, b.output),
        )

    @branches_of.register
    def _(block: ViTLayer):
        b = block
        return _attention_mlp(
            lambda x, mask=None, **named: b.dropout(b.attention(b.layernorm_before(x), mask, **named)[0]),
            lambda x, *args, **named: b.dropout(b.mlp(b.layernorm_after(x))),
            (b.layernorm_before, b.attention),
            (b.layernorm_after, b.mlp),
        )


@functools.cache
def _pytorchvideo() -> None:
    from pytorchvideo.models.resnet import ResBlock

    branches_of.register(ResBlock, lambda block: _added(block) if block.branch1_conv is None else ())


_ADAPTERS = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "pytorchvideo": _pytorchvideo,
}
