"""The five ways to finetune, as the engine applies them to `model.backbone`; and the guard of the reversible ones.

    conventional    nothing is changed
    frozen          the backbone does not train; batch norm and dropout rest, no graph is kept for it
    checkpointed    torch.utils.checkpoint around each block
    reversible      alpha 0, beta 1 from the start ("hard" reversible finetuning)
    dr2net          alpha and beta follow `dr2net.Schedule`

Not here: the mathematics (`dr2net`), the loop (`engine.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dr2net
from engine.config import Finetuning, Precision
from engine.training import checkpoint
from engine.training.log import Log

REVERSIBLE = ("reversible", "dr2net")  # the methods with coefficients, and with a gradient error to guard


def apply_method(backbone: nn.Module, finetuning: Finetuning) -> None:
    """Prepare the pretrained backbone for the way it is finetuned, in place; parameter names do not change."""
    match finetuning.method:
        case "conventional":
            pass
        case "frozen":
            backbone.requires_grad_(False)
        case "checkpointed":
            dr2net.checkpoint_blocks(backbone)
        case "reversible" | "dr2net":
            dr2net.convert(
                backbone,
                inversion=finetuning.inversion,
                tolerance=finetuning.tolerance,
                chunk_mib=finetuning.chunk_mib or None,
                recompute_rest=finetuning.recompute_rest,
            )
            dr2net.set_coefficients(backbone, *coefficients(finetuning, 0.0))
        case unknown:
            raise ValueError(f"unknown method {unknown!r}; see engine.config.METHODS")


def coefficients(finetuning: Finetuning, progress: float) -> tuple[float | None, float | None]:
    """(alpha, beta) at `progress` in [0, 1]; (None, None) for a method without them."""
    f = finetuning
    if f.method == "reversible":
        return 0.0, 1.0
    if f.method != "dr2net":
        return None, None
    if f.path == "constant":
        return f.start
    return dr2net.Schedule(start=f.start, end=f.end, until=f.until, path=f.path).at(progress)


def set_coefficients(model: nn.Module, finetuning: Finetuning, state: dict[str, Any], total_steps: int) -> None:
    """Alpha and beta of the step that begins."""
    state["alpha"], state["beta"] = coefficients(finetuning, state["step"] / total_steps)
    if state["alpha"] is not None:
        dr2net.set_coefficients(model.backbone, state["alpha"], state["beta"])


def set_mode(model: nn.Module, finetuning: Finetuning) -> None:
    """Training mode; a frozen backbone stays in eval mode, so that its batch norm and dropout rest as well."""
    model.train()
    if finetuning.method == "frozen":
        model.backbone.eval()


def autocast(precision: Precision, device: torch.device | str) -> torch.autocast:
    """The context in which a row of this precision computes; for fp32 it does nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype, enabled=precision != "fp32")


def check_gradient(
    model: nn.Module,
    criterion: Callable[[Any, Any], dict[str, Tensor]],
    batch: dict[str, Any],
    finetuning: Finetuning,
    epoch: int,
    state: dict[str, Any],
    log: Log,
) -> dict[str, float]:
    """The guard: relative error of the reversible gradient on one batch, in training mode.

    Dropout and drop path draw the same for both gradients; buffers and random generators stay as they were.
    Above `finetuning.tolerance` it warns, or raises FloatingPointError if `stop_above_tolerance`.
    """
    set_mode(model, finetuning)
    error = dr2net.gradient_error(model, batch, lambda m, b: sum(criterion(m(b), b).values())).overall
    where = f"epoch {epoch}, alpha {state['alpha']:g}, beta {state['beta']:g}"
    log.scalar("guard/gradient_error", error, state["step"])
    log.note(f"guard: {where}: relative gradient error {error:.1e}")
    if not error <= finetuning.tolerance:  # also for NaN
        text = (
            f"gradient error {error:.1e} is above the tolerance {finetuning.tolerance:g} ({where}): the backbone "
            "trains on noise. Use finetuning.inversion exact or anchored, or coefficients nearer to (0, 1)"
        )
        if finetuning.stop_above_tolerance:
            raise FloatingPointError(text)
        log.note(f"warning: {text}")
    return {"epoch": epoch, "alpha": state["alpha"], "beta": state["beta"], "error": error}


def load_trained(model: nn.Module, finetuning: Finetuning, folder: Path) -> dict[str, Any]:
    """Turn a freshly built model into the one a checkpoint holds, ready to predict: method, weights (averaged if there
    are averages), coefficients, eval mode. Returns the checkpoint's state (step, config, curve, ...).

    Raises ValueError when the file is damaged or made by another model (class count included).
    """
    apply_method(model.backbone, finetuning)
    checkpoint.load_weights(model, folder)
    state = checkpoint.read_state(folder)
    if state["alpha"] is not None and finetuning.method in REVERSIBLE:
        dr2net.set_coefficients(model.backbone, state["alpha"], state["beta"])
    model.eval()
    return state
