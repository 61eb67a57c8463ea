"""The recipe as functions: learning rate of progress, parameter groups, optimizer in backward. No state.

    learning rate(p) = base * p / w                                               p < w, warm-up
                     = min + (base - min) (1 + cos(pi (p - w) / (1 - w))) / 2     after it, cosine
                     = base * drop_factor ** (number of drops <= p)               after it, steps

with progress p in [0, 1] and w the warm-up's share of the training. Not here: averaged weights (`ema.py`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Optimization
from engine.task import Model
from engine.weights import fitted


def learning_rate(progress: float, recipe: Optimization) -> float:
    """Learning rate of the head and last layer at `progress` in [0, 1], before layer decay and multipliers."""
    warmup = min(recipe.warmup_epochs / recipe.epochs, 1.0)
    if progress < warmup:
        return recipe.learning_rate * progress / warmup
    if recipe.decay == "steps":
        return recipe.learning_rate * recipe.drop_factor ** sum(progress >= drop for drop in recipe.drops)
    share = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    floor = min(recipe.min_learning_rate, recipe.learning_rate)
    return floor + (recipe.learning_rate - floor) * (1 + math.cos(math.pi * share)) / 2


def parameter_groups(model: Model, recipe: Optimization) -> list[dict]:
    """Groups for AdamW by (learning rate scale, weight decay), of the parameters that train.

    `scale` of a parameter in layer l is layer_decay ** (num_layers - l), times the multiplier of the longest prefix in
    `multipliers` that its name begins with. Vectors and scalars (biases, norms, layer scale) get no weight decay unless
    `decay_vectors`. Raises ValueError when nothing trains, or a prefix fits no parameter.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    names = [name for name, _ in model.named_parameters()]
    unused = [prefix for prefix in recipe.multipliers if not any(name.startswith(prefix) for name in names)]
    if unused:
        raise ValueError(f"--optimization.multipliers: no parameter's name begins with {', '.join(unused)}")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = recipe.layer_decay ** (model.num_layers - model.layer_of(name)) if recipe.layer_decay != 1 else 1.0
        prefix = max((p for p in recipe.multipliers if name.startswith(p)), key=len, default=None)
        if prefix is not None:
            scale *= recipe.multipliers[prefix]
        decay = recipe.weight_decay if parameter.ndim > 1 or recipe.decay_vectors else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient; there is nothing to train")
    return [{"params": params, "scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()]


def build_optimizer(model: Model, recipe: Optimization) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; `set_learning_rate` gives it its rate before each step."""
    return torch.optim.AdamW(parameter_groups(model, recipe), lr=0.0, betas=recipe.betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group `rate` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def refuse_in_backward(recipe: Optimization, accumulation: int, world: int) -> None:
    """ValueError where a step needs all gradients before it changes the first parameter."""
    obstacles = {
        f"optimization.clip_norm {recipe.clip_norm} needs the norm of all gradients": recipe.clip_norm is not None,
        "optimization.precision fp16 looks for overflows in all gradients": recipe.precision == "fp16",
        f"{accumulation} accumulated forward passes add up their gradients": accumulation > 1,
        f"{world} processes average their gradients": world > 1,
    }
    found = [reason for reason, present in obstacles.items() if present]
    if found:
        raise ValueError(f"optimization.in_backward cannot be on: {'; '.join(found)}. Turn one of them off")


@contextmanager
def step_in_backward(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A backward in here steps each parameter when its gradient is complete and frees that gradient: they are never all
    alive at once, and nothing is left to do for `optimizer.step()`. Numbers and state are those of the ordinary step.

    The gradient of a parameter is complete when all that reads the parameter has been differentiated, so the step comes
    too late to disturb anything. A backward that fails leaves some parameters stepped.
    """
    groups = optimizer.param_groups

    def step(parameter: Tensor, group: dict) -> None:
        optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p, group=group: step(p, group))
        for group in groups
        for parameter in group["params"]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: str
) -> None:
    """Inverse of `state.full_tensors`; ValueError when a parameter is not one that trains here, has not AdamW's slots,
    or these have another shape, another kind of numbers or values that are not finite.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # AdamW keeps its step counter on the CPU unless it is capturable or fused. A parameter without gradients has none.
    kept = [name for name in parameters if any(key.startswith(f"{name}/") for key in tensors)]
    own = {f"{name}/{slot}": parameters[name].detach() for name in kept for slot in ("exp_avg", "exp_avg_sq")}
    own |= {f"{name}/step": torch.zeros(()) for name in kept}
    for key, value in fitted(own, tensors, f"{source}, the optimizer").items():
        name, slot = key.rsplit("/", 1)
        optimizer.state[parameters[name]][slot] = value.to(own[key].device)


def restore_scaler(scaler: torch.amp.GradScaler, state: Any, source: str) -> None:
    """Give the scaler of fp16 gradients its saved state. ValueError, naming `source`, for what is none, for a scale
    that is no positive number of float32, and for other constants than this training's.
    """
    own = scaler.state_dict()
    if not isinstance(state, dict) or state.keys() != own.keys():
        raise ValueError(f"{source}: the state of the gradient scaler is {str(state)[:80]}, want {', '.join(own)}")
    for name, value in state.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "scale":
            fine = number and 1e-37 < value < 1e38
        elif name == "_growth_tracker":
            fine = number and isinstance(value, int) and 0 <= value <= own["growth_interval"]
        else:
            fine = number and value == own[name]
        if not fine:
            raise ValueError(f"{source}: {name} of the gradient scaler is {str(value)[:80]}; train anew")
    scaler.load_state_dict(state)
