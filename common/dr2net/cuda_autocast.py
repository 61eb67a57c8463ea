"""Autocast on a CPU with the lists of CUDA's autocast: which operators run in float32.

    with cuda_autocast(), torch.autocast("cpu", torch.bfloat16):
        model(batch)        # dtypes as on a card

On a CPU layer norm, softmax and others stay in bfloat16; on CUDA they are float32, and so are, after the first norm,
the residual streams of many networks. A prediction of memory for a card has to follow the card's lists. They are those
of torch's `autocast_mode.h` (2.14; older ones lack rms_norm); an operator that this torch does not have is left out.

Not here: what runs in low precision (matrix products and convolutions), which both lists share.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils._pytree import tree_map_only

FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh"),
    *("tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm"),
    *("rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity"),
    *("norm.Scalar", "norm.ScalarOpt_dim", "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d"),
    *("hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss"),
    *("multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss"),
    *("binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp"),
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d")),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
    *("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
FLOAT32_RESULT = (  # unless the caller asks for a dtype
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm"),
    *("linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList"),
)
WIDEST = (
    *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot"),
    "scatter_add",
)
# In float32 on a CPU; a card computes them in the dtype that they get.
AS_IT_COMES = (
    *("avg_pool3d", "adaptive_avg_pool3d", "max_pool3d", "binary_cross_entropy", "polar", "quantile", "nanquantile"),
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
)
KEY = "AutocastCPU"


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Inside, `torch.autocast("cpu", ...)` treats operators as `torch.autocast("cuda", ...)` would. May be nested."""
    if _active:
        yield
        return
    library = Library("aten", "IMPL")
    _active.append(library)
    try:
        for names, kernel in ((FLOAT32, _in_float32), (FLOAT32_RESULT, _to_float32), (WIDEST, _in_widest)):
            for operator in _operators(names):
                library.impl(operator, functools.partial(kernel, operator), KEY)
        for operator in _operators(AS_IT_COMES):
            library.impl(operator, fallthrough_kernel, KEY)
        yield
    finally:
        _active.clear()
        library._destroy()


_active: list[Library] = []


def _operators(names: tuple[str, ...]) -> list[Any]:
    """The overloads of these names, each once; a name without a dot is all of its overloads that make a new tensor."""
    found: dict[Any, None] = {}
    for name in names:
        packet = getattr(torch.ops.aten, name.split(".")[0], None)
        overloads = [] if packet is None else packet.overloads()
        for overload in overloads:
            makes_new = not getattr(packet, overload)._schema.is_mutable
            if makes_new and ("." not in name or name.split(".")[1] == overload):
                found[getattr(packet, overload)] = None
    return list(found)


def _in_float32(operator: Any, *args: Any, **named: Any) -> Any:
    return _beyond_autocast(operator, *_cast((args, named), torch.float32))


def _to_float32(operator: Any, *args: Any, **named: Any) -> Any:
    if named.get("dtype") is None and not any(isinstance(value, torch.dtype) for value in args):
        named = {**named, "dtype": torch.float32} if _is_low(args[0]) else named
    return _beyond_autocast(operator, args, named)


def _in_widest(operator: Any, *args: Any, **named: Any) -> Any:
    leaves: list[Tensor] = []
    tree_map_only(Tensor, leaves.append, (args, named))
    if all(_is_low(tensor) for tensor in leaves if tensor.is_floating_point()):
        return _beyond_autocast(operator, args, named)
    return _in_float32(operator, *args, **named)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if _is_low(tensor) else tensor, values)


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _beyond_autocast(operator: Any, args: Any, named: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return operator(*args, **named)
