"""What every row of every task has in its configuration: frozen dataclasses, nothing else.

A task's `configs.py` composes these with its own `Data` and `Model` dataclasses into a `Config` with the fields
`row`, `preset`, `data`, `model`, `optimization`, `finetuning`, `run`. A table row is a function that returns a Config.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Method = Literal["conventional", "frozen", "checkpointed", "reversible", "dr2net"]
METHODS: tuple[Method, ...] = get_args(Method)
CoefficientPath = Literal["constant", "together", "alternating", "alpha_first", "beta_first"]
Precision = Literal["fp32", "bf16", "fp16"]
Preset = Literal["tiny", "laptop", "paper"]


@dataclass(frozen=True)
class Finetuning:
    """How the pretrained backbone is finetuned. `inversion` and the guard concern `reversible` and `dr2net`; the path
    of the coefficients concerns `dr2net` only."""

    method: Method = "dr2net"
    inversion: Literal["exact", "anchored", "float"] = "exact"  # how reversible and dr2net rebuild activations
    path: CoefficientPath = "constant"
    start: tuple[float, float] = (7 / 8, 1 / 8)  # (alpha, beta) at the first step
    end: tuple[float, float] = (7 / 8, 1 / 8)  # (alpha, beta) from progress `until` on; unused if constant
    until: float = 0.6  # share of the training after which the coefficients rest
    guard_every_epochs: int = 1  # measure the true gradient error on one batch; 0: never
    tolerance: float = 1e-2  # relative gradient error allowed: anchors keep it, float and the guard warn above it
    stop_above_tolerance: bool = False  # True: the guard stops the run instead of warning
    chunk_mib: float = 0  # reversible and dr2net: branches in chunks of so many MiB (`dr2net.convert`); 0: whole
    recompute_rest: bool = False  # reversible and dr2net: recompute patch embedding, merging and norms as well


@dataclass(frozen=True)
class Optimization:
    """The recipe. Progress-based: neither batch split nor device count changes it."""

    epochs: float = 40
    warmup_epochs: float = 5  # linear from 0; raise it when the first losses jump
    global_batch: int = 384  # samples per optimizer step, over all devices; accumulation is derived
    learning_rate: float = 1e-3  # of the head and the last layer, at `global_batch`, not scaled by anything
    layer_decay: float = 1.0  # learning rate of layer l is learning_rate * layer_decay ** (num_layers - l)
    backbone_multiplier: float = 1.0  # extra factor for everything in `model.backbone`
    min_learning_rate: float = 1e-6  # end of the cosine
    weight_decay: float = 0.05  # not on biases, norms and other vectors
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 0.0  # 0: off
    ema_decay: float = 0.0  # 0: off; else evaluation uses the averaged weights
    precision: Precision = "bf16"
    in_backward: bool = False  # step each parameter inside backward and free its gradient; no clipping, no accumulation


@dataclass(frozen=True)
class Run:
    """Where and how a run happens; changing these must not change its numbers (seed excepted)."""

    seed: int = 0
    output: Path = Path("runs")  # run folder is output / task / row / seed<seed>
    micro_batch: int = 8  # samples per device and forward; lower it when memory is short
    num_workers: int = 2
    device: str = "auto"  # "auto", "cpu", "cuda", ...
    evaluate_every_epochs: int = 1
    save_every_steps: int = 0  # 0: at each epoch's end
    log_every_steps: int = 10
    resume: bool = True  # continue from the run folder's checkpoint if there is one
    max_steps: int = 0  # 0: all; else stop after so many steps (tests, dry runs)
