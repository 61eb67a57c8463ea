"""What every row of every task has in its configuration: frozen dataclasses, nothing else.

A task's `configs.py` extends `Data` and `Config` by what it needs (`data`, `model`, ...). A table row is a function
that returns a Config (`rows.py`). None is off everywhere; ranges stand in the annotations (`settings.py`).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from dr2net import Options, Schedule
from dr2net.memory import parse_bytes
from engine.settings import Count, NotNegative, Positive, Range, Settings, Share

Method = Literal[
    "conventional", "frozen", "checkpointed", "checkpointed_chunks", "reversible", "dr2net_dynamic", "dr2net"
]
METHODS: tuple[Method, ...] = get_args(Method)
# alpha and beta of the methods that have them, unless a row says otherwise
SCHEDULES: dict[Method, Schedule] = {
    "reversible": Schedule.constant(0.0, 1.0),
    # the values in the authors' code: in turn, then at rest
    "dr2net_dynamic": Schedule(start=(1.0, 0.1), end=(0.4, 0.7), until=0.6, path="alternating"),
    "dr2net": Schedule.constant(7 / 8, 1 / 8),
}
Precision = Literal["fp32", "bf16", "fp16"]
Preset = Literal["tiny", "laptop", "paper"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
Split = Literal["train", "val", "test"]  # test: the validation samples, with all that the final evaluation asks for


@dataclass(frozen=True, kw_only=True)
class Data(Settings):
    """Where the samples come from. A task adds its fields and names its kinds."""

    kind: str  # the layout on disk
    root: Path  # the data set's folder
    num_classes: Count
    on_broken: Literal["raise", "skip"] = "raise"  # an unreadable file: stop, or name it and take another


@dataclass(frozen=True, kw_only=True)
class Finetuning(Settings):
    """How the pretrained backbone is finetuned. The schedule, the options and the gradient check concern the methods
    that invert: reversible, dr2net_dynamic and dr2net; of the options checkpointed_chunks has the chunks.
    """

    method: Method = "dr2net"
    schedule: Schedule | None = None  # alpha and beta over the training; None: those of the method, if it has any
    options: Options = Options(tolerance=1e-2)  # how activations are rebuilt, in chunks or whole
    # "20GiB" of the device, within which chunks and `keep` of the options are chosen before the training, for speed
    budget: str | None = None  # None: as the options say
    also: tuple[str, ...] = ()  # other parts of the model that the method acts on, such as ("encoder",); not frozen
    check_every_epochs: Count | None = 1  # measure the true gradient error on one batch; None: never
    stop_above_tolerance: bool = False  # True: an error above options.tolerance stops the run instead of warning

    def __post_init__(self) -> None:
        super().__post_init__()
        own = SCHEDULES.get(self.method)
        if self.schedule is None and own is not None:
            object.__setattr__(self, "schedule", own)  # so that a config says what it does
        if own is None and self.schedule is not None:
            raise ValueError(f"--finetuning.schedule: the method {self.method} has no coefficients to move")
        if self.budget is not None:
            if own is None:
                raise ValueError(f"--finetuning.budget: the method {self.method} has nothing to choose within one")
            parse_bytes(self.budget)
        if self.method == "checkpointed_chunks" and self.options.chunk_mib is None:
            raise ValueError("--finetuning.options.chunk-mib: the method checkpointed_chunks needs a size, such as 64")
        if self.method == "reversible" and self.schedule != own:
            raise ValueError("--finetuning.schedule: the method reversible stays at (0, 1); choose dr2net for others")


@dataclass(frozen=True, kw_only=True)
class Optimization(Settings):
    """The recipe. Progress-based: neither batch split nor device count changes it."""

    epochs: Positive = 40
    warmup_epochs: NotNegative = 5  # linear from 0; raise it when the first losses jump
    global_batch: Count = 384  # samples per optimizer step, over all devices; accumulation is derived
    learning_rate: Positive = 1e-3  # of the head and the last layer, at `global_batch`, not scaled by anything
    decay: Literal["cosine", "steps"] = "cosine"  # to `min_learning_rate`; or at each of `drops` by `drop_factor`
    min_learning_rate: NotNegative = 1e-6  # end of the cosine
    drops: tuple[Share, ...] = ()  # steps: shares of the training at which the rate drops, as (11 / 12,)
    drop_factor: Annotated[float, Range(above=0, high=1)] = 0.1
    layer_decay: Annotated[float, Range(above=0, high=1)] = 1.0  # the rate of layer l is
    # learning_rate * layer_decay ** (num_layers - l); needs a model that knows its layers
    multipliers: dict[str, NotNegative] = field(default_factory=dict)  # name prefix -> factor of the rate, as
    # {"backbone.": 0.1}; the longest prefix of a parameter's name counts
    weight_decay: NotNegative = 0.05  # of matrices
    decay_vectors: bool = False  # also of biases, norms and other vectors, where a recipe says so
    betas: tuple[Annotated[float, Range(low=0, below=1)], Annotated[float, Range(low=0, below=1)]] = (0.9, 0.999)
    clip_norm: Positive | None = None  # of the whole gradient
    ema_decay: Annotated[float, Range(above=0, below=1)] | None = None  # evaluation then uses the averaged weights
    precision: Precision = "bf16"
    in_backward: bool = False  # step each parameter inside backward and free its gradient; no clipping, no accumulation


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """Where and how a run happens; changing these must not change its numbers, but for the seed. With dropout or drop
    path, `micro_batch` and the number of devices choose the masks, as a seed does: other digits, the same distribution.
    """

    seed: Annotated[int, Range(low=0)] = 0
    output: Path = Path("runs")  # run folder is output / task / row / seed<seed>
    micro_batch: Count = 8  # samples per device and forward; lower it when memory is short
    evaluation_batch: Count | None = None  # samples per forward in evaluation; None: micro_batch
    num_workers: Annotated[int, Range(low=0)] = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"  # choose one GPU of several with CUDA_VISIBLE_DEVICES
    evaluate_every_epochs: Count | None = 1  # None: only at the end
    save_every_steps: Count | None = None  # None: at each epoch's end
    log_every_steps: Count = 10
    tracker: Tracker = "tensorboard"  # where the curves go; the package of another one must be installed
    resume: bool = True  # continue from the run folder's checkpoint if there is one
    max_steps: Count | None = None  # stop after so many steps (tests, dry runs)


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Everything that determines a run; a task adds `data`, `model` and what else it needs."""

    row: str = ""  # the name of the table row, set by `rows.rows_of`
    preset: Preset
    optimization: Optimization = field(default_factory=Optimization)
    finetuning: Finetuning = field(default_factory=Finetuning)
    run: Run = field(default_factory=Run)
