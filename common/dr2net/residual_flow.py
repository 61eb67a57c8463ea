"""Whether a block adds to its input: the tensors are followed through the operators that a block runs.

    with ResidualFlow() as flow:
        flow.enter(x); y = block(x); added = flow.leave(y)

Followed are x itself, in any layout, scaled or normalized ("the input"), and what came out of adding a tensor of the
same size to it ("the sum"), also in any layout, scaled, normalized, or behind an activation. A block is residual if it
returns the sum: x + f(x), norm(x + f(x)), relu(x + f(x)), but neither f(x) nor x * f(x), nor a norm. Numbers do not
matter, so random and trained weights give the same answer.

Not here: which blocks run one after another (`probe.py`).
"""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

INPUT, SUM = 1, 2

# Operators whose result is as much the input, or the sum, as what they get; by name in torch.ops.aten.
LAYOUT = (
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "permute", "transpose", "t", "clone", "alias"),
    *("expand", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "squeeze", "unsqueeze", "detach"),
    *("roll", "constant_pad_nd", "_to_copy", "index", "index_select", "gather", "flip", "cat", "stack", "unfold"),
    *("pixel_shuffle", "pixel_unshuffle", "contiguous", "lift_fresh", "view_as_real", "view_as_complex", "where"),
)
SCALING = (
    *("mul", "mul_", "div", "div_", "neg", "native_layer_norm", "native_group_norm", "_fused_rms_norm", "rms_norm"),
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("_batch_norm_impl_index", "_batch_norm_with_update", "miopen_batch_norm", "native_dropout", "dropout"),
    *("bernoulli_", "masked_fill", "masked_fill_", "clamp", "clamp_", "nan_to_num", "sub", "sub_", "copy_"),
)
ACTIVATIONS = (  # of the sum only: of the input they are a part of f
    *("relu", "relu_", "gelu", "gelu_", "silu", "silu_", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "mish"),
    *("leaky_relu", "leaky_relu_", "elu", "elu_", "tanh", "sigmoid", "_prelu_kernel", "softplus", "hardsigmoid"),
)
ADDING = ("add", "add_", "sub", "sub_", "addcmul", "addcmul_", "lerp", "lerp_")
FUSED = ("_transformer_encoder_layer_fwd",)  # a residual block in one operator


class ResidualFlow(TorchDispatchMode):
    """Follows the inputs of all blocks that are being called, one inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[WeakTensorKeyDictionary] = []  # of each, what is followed: tensor -> INPUT or SUM

    def enter(self, x: Tensor) -> None:
        """A block is called with x."""
        followed = WeakTensorKeyDictionary()
        followed[x] = INPUT
        self.calls.append(followed)

    def leave(self, y: Tensor | None) -> bool:
        """The block that was called last returns y: whether that is the sum."""
        followed = self.calls.pop()
        return y is not None and followed.get(y) == SUM

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.calls:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            name = getattr(function, "overloadpacket", function).__name__
            for followed in self.calls:
                level = _level(name, given, followed)
                for tensor in made:
                    if level:
                        followed[tensor] = level
                    elif tensor in followed and name.endswith("_") and name not in ("bernoulli_", "copy_"):
                        del followed[tensor]
        return result


def _level(name: str, given: list[Tensor], followed: WeakTensorKeyDictionary) -> int:
    """What an operator of this name makes of these tensors: 0, INPUT or SUM."""
    levels = [followed.get(t, 0) for t in given]
    level = max(levels, default=0)
    if name in FUSED:
        return SUM if levels and levels[0] else 0
    if not level:
        return 0
    if name in ADDING:
        carrier = given[levels.index(level)]
        others = [t for t in given if t is not carrier and t.numel() == carrier.numel() and t.numel() > 1]
        if others:
            return SUM
        return level  # a number, a bias or the mean
    if name in LAYOUT or name in SCALING:
        return level
    return SUM if level == SUM and name in ACTIVATIONS else 0
