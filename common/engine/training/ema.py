"""The exponential moving average of the weights (EMA), with which a run is evaluated if its recipe asks for it."""

import torch
from torch import Tensor, nn

from engine.weights import fitted


class EMA:
    """Exponential moving average of the parameters that train: e <- d e + (1 - d) p after each step.

    The decay d grows to `decay` as (1 + n) / (10 + n) over the first updates n, so that a short run is not dominated by
    its start. `tensors` is what a checkpoint stores.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(list(self.tensors.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and weights in place, bitwise; call twice around an evaluation."""
        for name, parameter in self.parameters.items():
            current = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(current)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], source: str) -> None:
        """Take averages from a checkpoint; ValueError where they are not those of this model, or not finite."""
        for name, value in fitted(self.tensors, tensors, f"{source}, the averages").items():
            self.tensors[name].copy_(value)
