"""The state of an AdamW in 8 bits, for predictions of memory. It trains nothing: take bitsandbytes' or torchao's.

    2 (n + 4 ceil(n / 256)) bytes      for a parameter of n >= 4096 numbers
    8 n                                for a smaller one

Two averages, of one byte per number with a float32 scale for each block of 256 (Dettmers et al., arXiv 2110.02861);
small parameters keep both in float32. So bitsandbytes 0.50 has it; torchao 0.18 also keeps those in float32 whose size
256 does not divide. Their tables of 256 numbers do not count, and a fused step has no temporaries.
"""

from typing import Any

import torch

SMALLEST, BLOCK = 4096, 256


class AdamW8bitState(torch.optim.Optimizer):
    """Makes the state at the first step, as an optimizer does, and changes no parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Of each parameter that has a gradient."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state, local = self.state[parameter], getattr(parameter, "_local_tensor", parameter)  # of a DTensor
            for name in () if state else ("average", "average of squares"):
                if local.numel() < SMALLEST:
                    state[name] = torch.zeros_like(local, dtype=torch.float32)
                else:
                    state[name] = torch.zeros_like(local, dtype=torch.uint8)
                    state[f"{name}, scales"] = local.new_zeros(-(-local.numel() // BLOCK), dtype=torch.float32)
