"""What blocks of several libraries have in common: the two branches of a transformer block, and blocks whose activation
comes after the sum. Not here: which block of which library has them (the other files of this folder).
"""

from collections.abc import Callable

from torch import Tensor, nn

from dr2net.branches import Branch
from dr2net.chunks import Groups


def attention_mlp(
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


def added(block: nn.Module) -> tuple[Branch, ...]:
    """What a block whose activation comes after the sum adds to its input.

    The whole block as a branch without residual connection (alpha 0) would be nearer to the paper's remark, but then
    the streams of 23 blocks of SlowFast grew a hundredfold at (.9, .1) and a millionfold at (0, 1).
    """
    forward = type(block).forward
    return (Branch("block", lambda x: forward(block, x) - x, (block,), independent="samples"),)


def of_resnet(block: nn.Module) -> tuple[Branch, ...]:
    """timm's and torchvision's residual blocks."""
    return added(block) if block.downsample is None and block.stride == 1 else ()
