"""The peak memory of a training step for each way to finetune, side by side; tables and pictures are made of it.

    peak = predictor(model, "dr2net, chunks", Setting())      # peak((1, 3, 900, 224, 224)).peak, without a GPU
    draw(path, [("frames", {"conventional": [(32, 2.1e9), (64, 4.2e9)], ...})])

    conventional         the model as it is
    checkpointed         torch.utils.checkpoint around each block
    lora                 rank 8 beside the linear layers of the blocks, all else frozen (peft)
    reversible, dr2net   converted; coefficients (0, 1), and those of the setting
    ..., chunks          the same with `chunk_mib` and `recompute_rest` (common/README.md, "Memory floor")
    ..., offloaded       what forward saves waits in the host's memory (`offload.py`)
    ..., adamw8bit       with the optimizer's state in 8 bits (`adamw8bit.py`), whatever the setting says

"checkpointed, chunks" is the strongest rival that changes no function: it, too, never holds a branch as a whole.

Nothing is computed but by `calibrate`. Not here: how bytes are counted (`memory.py`), the command line (`cli.py`).
"""

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dr2net import exact
from dr2net.adamw8bit import AdamW8bitState
from dr2net.branches import find_branches
from dr2net.convert import NoBlocksError, all_blocks, checkpoint_blocks, convert, probed, set_coefficients
from dr2net.error_law import anchor_spacing
from dr2net.inputs import Batches, Shape, call, first_tensor
from dr2net.memory import Memory, fake_tensors, measure, predict
from dr2net.offload import Offload
from dr2net.options import Options
from dr2net.schedule import Schedule
from dr2net.sharded_memory import predict_sharded
from dr2net.styles import STYLES

METHODS = (
    *("conventional", "checkpointed", "checkpointed, chunks", "lora"),
    *("reversible", "dr2net", "reversible, chunks", "dr2net, chunks"),
)
RIVALS = (  # beside METHODS, where somebody asks for them
    *("checkpointed, offloaded", "dr2net, offloaded"),
    *("checkpointed, chunks, offloaded", "dr2net, chunks, offloaded", "conventional, adamw8bit"),
)
IN_CHUNKS_TOO = ("checkpointed", "reversible", "dr2net")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-4),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "adamw8bit": AdamW8bitState,
}
LORA_RANK = 8
CHUNKED = Options(chunk_mib=256, recompute_rest=True)
BUDGETS_GB = (24, 48, 80)  # memory of common cards, 10^9 bytes

Sizes = Shape | Batches  # of one float tensor, or a whole batch (`inputs.py`)
Curve = Sequence[tuple[float, float]]  # (size, bytes)


@dataclass(frozen=True)
class Setting:
    """What all methods share, and what the converted ones need."""

    precision: str = "fp32"  # of the branches (autocast)
    optimizer: str = "adamw"
    coefficients: tuple[float, float] = (7 / 8, 1 / 8)  # alpha, beta of dr2net
    options: Options = CHUNKED  # the rows without chunks leave chunk_mib and recompute_rest out
    shards: int = 1  # processes that share parameters, gradients and optimizer state: FSDP2 on each block and the model

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise ValueError(f"{self.shards} shards: give the number of processes that share the model, 1 or more")


@dataclass(frozen=True)
class Phase:
    """A stretch of a schedule over which the memory does not change."""

    progress: float  # where it begins
    coefficients: tuple[float, float]
    kept: str  # what the inversion keeps for each branch


def apply(model: nn.Module, method: str, setting: Setting) -> None:
    """Make the model ready for one of METHODS or RIVALS, in place.

    ValueError if it has no block to convert or checkpoint; ImportError naming the extra without peft.
    """
    way, *variants = method.split(", ")
    own = setting.options if "chunks" in variants else replace(setting.options, chunk_mib=None, recompute_rest=False)
    if way == "checkpointed":
        checkpoint_blocks(model, keep=own.keep, chunk_mib=own.chunk_mib, recompute_rest=own.recompute_rest)
    elif way == "lora":
        _add_lora(model)
    elif way != "conventional":
        convert(model, own)
        set_coefficients(model, *(setting.coefficients if way == "dr2net" else (0, 1)))


def _add_lora(model: nn.Module) -> None:
    """Modules that read the weight of a linear layer instead of calling it (torchvision's window attention) pass by
    what stands beside it: there it costs its parameters and nothing else.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("peft is not installed: pip install 'dr2net[lora]'") from error

    inside = {
        m for b in model.modules() for branch in find_branches(b)[0] for part in branch.modules for m in part.modules()
    }
    names = [name for name, module in model.named_modules() if module in inside and type(module) is nn.Linear]
    if not names:
        raise ValueError(f"no linear layer in a known block of {type(model).__name__}")
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, target_modules=names), model)  # freezes all other parameters


@contextmanager
def known_blocks(model: nn.Module, batches: Batches) -> Iterator[str]:
    """Inside, the blocks of a model none of whose types is registered are known if a probe finds them, as
    `convert(probe=)` does; what it found, in words. Copies of the model know them too, also afterwards.

    The probe is a forward pass of two samples, on paper for a model on the "meta" device: there nobody can see which
    blocks treat each sample by itself, and rows in chunks have them whole. Errors as the forward's, and as `convert`.
    """
    try:
        all_blocks(model)
        yield ""
        return
    except NoBlocksError:
        pass
    few = batches.grow(((0,), 1), 2) if batches.grows else batches
    with ExitStack() as stack:
        with ExitStack() as paper:
            on_meta = any(parameter.is_meta for parameter in model.parameters())
            if on_meta:
                paper.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                paper.enter_context(fake_tensors(model, None))
            found = stack.enter_context(probed(model, lambda model: call(model, few.make()), CHUNKED))
        assert found is not None, "there was a probe"
        runs = [f"{len(run.blocks)} in {name or 'the model'}" for name, runs in found.runs.items() for run in runs]
        whole = ", whose chunks were not tried without values" * on_meta
        yield f"blocks found by a probe: {', '.join(runs)}{whole}" if runs else ""


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sizes: Sizes,
    precision: str,
    device: str,
    saving: AbstractContextManager[Any] | None = None,
) -> Callable[[], None]:
    """Forward, inside of `saving`, backward and optimizer step on a random batch of these sizes."""

    def step() -> None:
        batch = torch.randn(sizes, device=device) if isinstance(sizes, tuple) else sizes.make(device)
        with saving or nullcontext():
            loss = loss_of(model, batch, precision)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def predictor(
    model: nn.Module, method: str, setting: Setting, *, like: Literal["cuda", "cpu"] = "cuda"
) -> Callable[[Sizes], Memory]:
    """A function of the input's sizes: the predicted Memory of a training step. Errors as `apply`. like: see `predict`.

    model: unconverted, in training mode; it is copied. It may live on the "meta" device.
    """
    plain, model = model, copy.deepcopy(model)
    apply(model, method, setting)
    setting, saving = _varied(method, setting)
    optimizer = build_optimizer(model, setting)

    known: dict[Sizes, Memory] = {}

    def predict_at(sizes: Sizes) -> Memory:
        if sizes not in known:
            known[sizes] = compute(sizes)
        return known[sizes]

    def compute(sizes: Sizes) -> Memory:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the precision of the inverse: that is the subject of `dr2net check`
            if setting.shards > 1:
                memory = _predict_sharded(copy.deepcopy(plain), method, setting, sizes, like, saving)
            else:
                step = training_step(model, optimizer, sizes, setting.precision, "cpu", saving)
                memory = predict(step, model, optimizer, like=like)
            return replace(memory, host=saving.bytes if saving else None)

    return predict_at


def _varied(method: str, setting: Setting) -> tuple[Setting, Offload | None]:
    """The setting of this method, and where it saves what forward saves; None: on the device."""
    _, *variants = method.split(", ")
    own = replace(setting, optimizer="adamw8bit") if "adamw8bit" in variants else setting
    return own, Offload() if "offloaded" in variants else None


def _predict_sharded(
    model: nn.Module,
    method: str,
    setting: Setting,
    sizes: Sizes,
    like: Literal["cuda", "cpu"],
    saving: Offload | None,
) -> Memory:
    def make_step(model: nn.Module) -> tuple[Callable[[], None], torch.optim.Optimizer]:
        optimizer = build_optimizer(model, setting)
        return training_step(model, optimizer, sizes, setting.precision, "cpu", saving), optimizer

    blocks = all_blocks(model)
    apply(model, method, setting)
    return predict_sharded(make_step, model, blocks, setting.shards, like=like)


def calibrate(model: nn.Module, method: str, setting: Setting, sizes: Sizes, device: str) -> tuple[Memory, Memory]:
    """(predicted, measured): the second step of a training on `device`, for real. Errors as `apply`; ValueError for
    shards, which need their processes, and for adamw8bit, which trains nothing here.
    """
    own, saving = _varied(method, setting)
    if setting.shards > 1:
        raise ValueError(f"{setting.shards} shards are not measured by one process; predict with `predictor`")
    if own.optimizer == "adamw8bit":
        raise ValueError("adamw8bit is only predicted; to train with it take bitsandbytes or torchao")
    like: Literal["cuda", "cpu"] = "cpu" if torch.device(device).type == "cpu" else "cuda"
    predicted = predictor(model, method, setting, like=like)(sizes)
    model = copy.deepcopy(model)
    apply(model, method, setting)
    model.to(device)
    optimizer = build_optimizer(model, own)
    step = training_step(model, optimizer, sizes, own.precision, device, saving)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step()  # the first loads kernels, and makes the optimizer's state
        measured = measure(step, model, optimizer)
    return predicted, replace(measured, host=saving.bytes if saving else None)


def build_optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """The setting's, over the parameters that train."""
    return OPTIMIZERS[setting.optimizer]([parameter for parameter in model.parameters() if parameter.requires_grad])


def loss_of(model: nn.Module, batch: Any, precision: str) -> Tensor:
    """A scalar on which all the model's floating-point outputs depend; branches run under autocast in bf16.

    batch: a tensor, a tuple of them, or a dictionary by the names of forward's arguments.
    """
    tensor = first_tensor(batch)
    assert tensor is not None, "a batch has tensors"
    with torch.autocast(tensor.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        output = call(model, batch)
    values = [value.float().square().mean() for value in _tensors(output) if value.is_floating_point()]
    if not values:
        raise ValueError(f"the model returned no floating-point tensor but a {type(output).__name__}")
    return torch.stack(values).sum()


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def phases(schedule: Schedule, setting: Setting, samples: int = 200) -> list[Phase]:
    """The schedule's stretches of equal memory, found at `samples` + 1 points of the progress; one of each kind.

    Besides what is kept, it matters whether alpha is 0, and to exact inversion whether beta is 1 over an integer.
    """
    found: dict[tuple[bool, bool, str], Phase] = {}
    for index in range(samples + 1):
        alpha, beta = schedule.at(index / samples)
        kept = _kept(alpha, beta, setting)
        simple = setting.options.inversion == "exact" and exact.rational(beta).numerator == 1
        found.setdefault((alpha == 0, simple, kept), Phase(index / samples, (alpha, beta), kept))
    return list(found.values())


def _kept(alpha: float, beta: float, setting: Setting) -> str:
    """What is kept besides the last two streams. ValueError for a beta that exact inversion cannot do."""
    rational = exact.rational(beta) if setting.options.inversion == "exact" else beta
    if rational == 0:
        return "its input"
    if setting.options.inversion == "exact":
        bits = exact.remainder_bits(exact.rational(beta))
        return "nothing" if bits == 0 else f"{bits} bit{'s' * (bits > 1)}"
    spacing = None
    if setting.options.inversion == "anchored":
        spacing = anchor_spacing(alpha, beta, PRECISIONS[setting.precision])
    return f"2 streams / {spacing}" if spacing else "nothing"


def draw(path: Path, panels: Sequence[tuple[str, Mapping[str, Curve]]], title: str = "") -> None:
    """Peak against a size, one panel each (its x label, its curve per method), with lines at BUDGETS_GB.

    ImportError naming the extra without matplotlib, ValueError for a kind of file that it cannot write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'dr2net[plots]'") from error

    figure = Figure(figsize=(2.2 + 4.8 * len(panels), 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    budgets, entries = [gb * 10**9 / 2**30 for gb in BUDGETS_GB], {}
    for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        top = max(num_bytes for curve in curves.values() for _, num_bytes in curve) / 2**30
        shown = [budget for budget in budgets if budget <= 1.3 * max(top, budgets[0])]
        top = min(1.08 * max(top, *shown), 1.25 * budgets[-1])  # what leaves the picture fits on no card
        right = max(size for curve in curves.values() for size, _ in curve)
        for gb, budget in zip(BUDGETS_GB, shown, strict=False):
            axes.axhline(budget, color="#888888", linewidth=0.8, linestyle=":")
            label_at = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
            axes.annotate(f"{gb} GB", (1, budget), (2, 0), **label_at, va="center", fontsize=8, color="#666666")
        for method, curve in curves.items():
            name, chunks = method.removesuffix(", chunks"), method.endswith(", chunks")
            style, line = STYLES[name], "--" if name in IN_CHUNKS_TOO and not chunks else "-"
            sizes, peaks = zip(*((size, num_bytes / 2**30) for size, num_bytes in curve), strict=True)
            size = 6 if method.startswith("reversible") else 4  # dr2net often lies on it
            entries[method] = axes.plot(
                sizes, peaks, line, marker=style.marker, color=style.color, markersize=size, linewidth=1.5
            )[0]
        axes.set(xlabel=label, ylabel="peak of a training step, GiB", ylim=(0, top), xlim=(0, 1.03 * right))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=9, loc="outside right center")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)  # whole, or not there
    finally:
        temporary.unlink(missing_ok=True)
