"""Where a process computes, and what it shares with the others: accelerate's view of it, seeds, means over devices."""

import random

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

MAX_SEED = 1 << 63  # a torch generator takes no larger one


def set_seed(seed: int, step: int = 0, rank: int = 0) -> None:
    """Seed python, numpy and torch (all devices) for what follows; `train.py` calls it before it builds the model.

    ValueError for a seed that the loaders' generators would not take.
    """
    if seed >= MAX_SEED:
        raise ValueError(f"--run.seed {str(seed)[:40]}: must be below {MAX_SEED}")
    words = np.random.SeedSequence([seed, step, rank]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 31 | int(words[3]) >> 1)


def build_accelerator(device: str, precision: str) -> Accelerator:
    """Accelerate's view of this process: device, DDP if torchrun started us, autocast. ValueError for what is not
    there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"run.device is {device!r}; use auto, cpu or cuda (choose a GPU with CUDA_VISIBLE_DEVICES)")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but torch sees no GPU; use auto or cpu")
    if precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        raise ValueError("optimization.precision fp16 needs a GPU; use bf16 or fp32")
    # Accelerate keeps its precision in a process-wide singleton and refuses a second one (1.15): each fit starts clean.
    AcceleratorState._reset_state()
    # Without a GPU, "auto" has to say cpu: else accelerate counts one process under torchrun, each training everything.
    cpu = device == "cpu" or not torch.cuda.is_available()
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu)


def mean_over_devices(
    losses: dict[str, float], received: list[int], accelerator: Accelerator
) -> tuple[dict[str, float], int]:
    """Losses averaged over devices, and the signal that any of them received (0: none), the same on all."""
    stop = received[0] if received else 0
    if accelerator.num_processes == 1:
        return losses, stop
    numbers = torch.tensor([float(stop), *losses.values()], dtype=torch.float64, device=accelerator.device)
    stops, *sums = accelerator.gather(numbers[None]).unbind(1)
    return {name: float(value.mean()) for name, value in zip(losses, sums, strict=True)}, int(stops.max())
