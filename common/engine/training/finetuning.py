"""The ways to finetune, as the engine applies them to `model.backbone`; and the gradient check of those that invert.

    conventional         nothing is changed
    frozen               the backbone does not train; batch norm and dropout rest, no graph is kept for it
    checkpointed         torch.utils.checkpoint around each block
    checkpointed_chunks  the input of each branch is kept, and it is recomputed in chunks: the strongest rival
    reversible           alpha 0, beta 1 from the start ("hard" reversible finetuning)
    dr2net_dynamic       alpha and beta move, as in the paper, from near the pretrained network to easy inversion
    dr2net               alpha and beta stay near the pretrained network, which only exact inversion can do

All but frozen also act on the parts of the model that `finetuning.also` names: on their blocks, or, of a part that says
how by itself (`engine.task.Recomputed`), by recomputing it wherever blocks are recomputed. Not here: the mathematics
(`dr2net`), the loop (`fit.py`).
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import dr2net
from engine.config import SCHEDULES, Finetuning, Precision
from engine.task import Batch, Model, Recomputed
from engine.training import checkpoint
from engine.training.log import Log


def inverts(finetuning: Finetuning) -> bool:
    """Whether the method rebuilds activations: it has coefficients, and a gradient error to check."""
    return finetuning.method in SCHEDULES


def apply_method(model: Model, finetuning: Finetuning) -> None:
    """Prepare a model with its pretrained weights for the way it is finetuned, in place; names do not change.

    ValueError if `finetuning.also` names no part of the model, or a part has no block to convert.
    """
    if finetuning.method == "frozen":
        model.backbone.requires_grad_(False)
        return
    for part in parts_of(model, finetuning):
        if isinstance(part, Recomputed):
            if finetuning.method != "conventional":
                part.recompute(finetuning.options.chunk_mib)
        elif finetuning.method == "checkpointed":
            dr2net.checkpoint_blocks(part)
        elif finetuning.method == "checkpointed_chunks":
            chunks = finetuning.options.chunk_mib
            dr2net.checkpoint_blocks(part, chunk_mib=chunks, recompute_rest=finetuning.options.recompute_rest)
        elif inverts(finetuning):
            try:
                dr2net.convert(part, finetuning.options)
            except ValueError as error:
                if part is model.backbone:
                    raise
                raise ValueError(f"--finetuning.also: {error}") from error
    set_coefficients(model, finetuning, 0.0)


def parts_of(model: Model, finetuning: Finetuning) -> list[nn.Module]:
    """The backbone, and what else the method acts on."""
    parts = [model.backbone]
    for name in finetuning.also:
        try:
            part = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"--finetuning.also: the model has no part {name!r}") from error
        if any(part in set(other.modules()) or other in set(part.modules()) for other in parts):
            raise ValueError(f"--finetuning.also: {name!r} holds, or is in, what the method acts on already")
        parts.append(part)
    return parts


def _set_all(model: Model, finetuning: Finetuning, alpha: float, beta: float) -> None:
    for part in parts_of(model, finetuning):
        if not isinstance(part, Recomputed):
            dr2net.set_coefficients(part, alpha, beta)


def coefficients(finetuning: Finetuning, progress: float) -> tuple[float | None, float | None]:
    """(alpha, beta) at `progress` in [0, 1]; (None, None) for a method without them."""
    return (None, None) if finetuning.schedule is None else finetuning.schedule.at(progress)


def set_coefficients(model: Model, finetuning: Finetuning, progress: float) -> tuple[float | None, float | None]:
    """Give the model alpha and beta of the step that begins at `progress`; returns them."""
    alpha, beta = coefficients(finetuning, progress)
    if alpha is not None and beta is not None:
        _set_all(model, finetuning, alpha, beta)
    return alpha, beta


def set_mode(model: Model, finetuning: Finetuning) -> None:
    """Training mode; a frozen backbone stays in eval mode, so that its batch norm and dropout rest as well."""
    model.train()
    if finetuning.method == "frozen":
        model.backbone.eval()


def autocast(precision: Precision, device: torch.device | str) -> torch.autocast:
    """The context in which a row of this precision computes; for fp32 it does nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype, enabled=precision != "fp32")


def check_gradient(
    model: Model, batch: Batch, finetuning: Finetuning, epoch: int, state: Any, log: Log
) -> dict[str, float]:
    """Relative error of the reversible gradient on one batch, in training mode, against stored activations.

    Dropout and drop path draw the same for both gradients; buffers and random generators stay as they were.
    Above `finetuning.options.tolerance` it warns, or raises FloatingPointError if `stop_above_tolerance`.
    """
    set_mode(model, finetuning)
    if "num_targets" in batch:  # a step divides by at least 1, too: these samples may have none
        batch = {**batch, "num_targets": max(batch["num_targets"], 1.0)}
    found = dr2net.gradient_error(model, batch, _loss)
    error, grid = found.overall, "" if found.grid is None else f", cost of the grid {found.grid:.1e}"
    where = f"epoch {epoch}, alpha {state.alpha:g}, beta {state.beta:g}"
    tolerance = finetuning.options.tolerance
    log.draw({"check/gradient_error": error}, state.step)
    log.note(f"gradient check: {where}: relative error {error:.1e}{grid}")
    if not error <= tolerance:  # also for NaN
        text = (
            f"gradient error {error:.1e} is above the tolerance {tolerance:g} ({where}): the backbone trains on noise. "
            "Use --finetuning.options.inversion exact, or coefficients nearer to (0, 1)"
        )
        if finetuning.stop_above_tolerance:
            raise FloatingPointError(text)
        log.note(f"warning: {text}")
    return {"epoch": epoch, "alpha": state.alpha, "beta": state.beta, "error": error}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    losses = cast(Model, model).losses(model(batch), batch)
    return cast(Tensor, sum(losses.values()))


def load_trained(model: Model, finetuning: Finetuning, folder: Path) -> dict[str, Any]:
    """Turn a freshly built model into the one a checkpoint holds, ready to predict: method, weights (averaged if there
    are averages), coefficients, eval mode. Returns the checkpoint's state (step, config, curve, ...).

    Raises ValueError when the file is damaged or made by another model (class count included).
    """
    apply_method(model, finetuning)
    checkpoint.load_weights(model, folder)
    state = checkpoint.read_state(folder)
    if state["alpha"] is not None and inverts(finetuning):
        _set_all(model, finetuning, state["alpha"], state["beta"])
    model.eval()
    return state
