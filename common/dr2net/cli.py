"""What needs no task: does a model fit in the memory, and is its reversible gradient right?

    dr2net plan --model vit_small_patch16_224 --input 16x3x224x224 --budget 24GiB --precision bf16
    dr2net check --model vit_tiny_patch16_224 --input 2x3x224x224

A model is a timm name, `torchvision:swin3d_t`, `transformers:VideoMAEConfig` (or a local folder after the colon), or
`package.module:function`, a function of yours without arguments that returns the module. An input is one float tensor,
`16x3x224x224`, the batch first. `plan` computes nothing and needs no GPU (dr2net.memory.predict); `check` computes.
"""

import argparse
import contextlib
import functools
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import get_args

import torch
from torch import Tensor, nn

import dr2net
from dr2net import schedule
from dr2net.memory import Memory, format_bytes, largest, predict

METHODS = ("conventional", "checkpointed", "reversible", "dr2net")
INVERSIONS = ("exact", "anchored", "float")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-4),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
}
UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on the standard error for what the user can mend."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"dr2net {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The two commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="dr2net", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="peak memory of a training step per method, and the largest that fits")
    check = commands.add_parser("check", help="gradient error of the converted model over the schedule")
    for command in (plan, check):
        command.add_argument(
            "--model", required=True, help="timm name, torchvision:..., transformers:..., module:function"
        )
        command.add_argument("--input", required=True, help="shape of the input tensor, batch first: 16x3x224x224")
        command.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the branches (autocast)")

    plan.add_argument("--budget", default="24GiB", help="memory of the device, e.g. 24GiB or 80GB")
    plan.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    plan.add_argument("--beta", default="1/8", help="of dr2net, with alpha = 1 - beta; smaller needs more bits")
    plan.add_argument("--inversion", choices=INVERSIONS, default="exact", help="of reversible and dr2net")
    plan.add_argument(
        "--grow",
        default="0",
        help="dimension that grows until the budget is full, 0: the batch; 2:32 is the third by 32s",
    )
    plan.add_argument("--live", type=int, default=0, metavar="N", help="also list the N largest tensors at each peak")
    plan.set_defaults(run=_plan)

    check.add_argument("--start", default="7/8,1/8", help="alpha,beta at the first step")
    check.add_argument("--end", default="7/8,1/8", help="alpha,beta at the end of the path")
    check.add_argument("--path", choices=get_args(schedule.Path), default="together", help="from start to end")
    check.add_argument("--pretrained", action="store_true", help="load the weights that timm or torchvision name")
    check.add_argument("--seed", type=int, default=0)
    check.set_defaults(run=_check)
    return parser


def _plan(options: argparse.Namespace) -> None:
    shape, budget = parse_shape(options.input), parse_bytes(options.budget)
    dimension, multiple = _parse_grow(options.grow, shape)
    beta = _fraction(options.beta, "--beta")
    build = find_model(options.model)
    rows = []
    for method in METHODS:
        predict_at = _planner(build, options, beta, method)
        memory = predict_at(shape)

        def peak(n: int, predict_at: Callable[[tuple[int, ...]], Memory] = predict_at) -> int:
            return predict_at((*shape[:dimension], n * multiple, *shape[dimension + 1 :])).peak

        sizes = (memory.peak, memory.parameters, memory.gradients, memory.optimizer, memory.activations)
        fits = "yes" if memory.peak <= budget else "no"
        rows.append((method, *map(format_bytes, sizes), fits, str(multiple * largest(peak, budget))))
        if options.live:
            print(f"{method}, largest at the peak", *memory.live[: options.live], "", sep="\n")
    what = "batch" if dimension == 0 else f"size of dimension {dimension}"
    print(f"{options.model}, input {options.input}, {options.precision}, {options.optimizer}, beta {options.beta}")
    split = ("peak", "parameters", "gradients", "optimizer", "activations")
    print_table(("method", *split, f"fits {options.budget}", f"largest {what}"), rows)


def _planner(
    build: Callable[[], nn.Module], options: argparse.Namespace, beta: Fraction, method: str
) -> Callable[[tuple[int, ...]], Memory]:
    """The model made ready for `method`, as a function: input shape -> predicted memory of a training step."""
    model = build().train()
    if method == "checkpointed":
        dr2net.checkpoint_blocks(model)
    elif method in ("reversible", "dr2net"):
        dr2net.convert(model, inversion=options.inversion)
        dr2net.set_coefficients(model, *((0, 1) if method == "reversible" else (float(1 - beta), beta)))
    optimizer = OPTIMIZERS[options.optimizer](model.parameters())

    @functools.cache
    def predict_at(shape: tuple[int, ...]) -> Memory:
        def step() -> None:
            loss_of(model, torch.randn(shape), options.precision).backward()
            optimizer.step()
            optimizer.zero_grad()

        with _explained(options.model, shape), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the precision of the inverse: that is the subject of `check`
            return predict(step, model, optimizer)

    return predict_at


def _check(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    shape = parse_shape(options.input)
    start, end = _parse_pair(options.start, "--start"), _parse_pair(options.end, "--end")
    coefficients = schedule.Schedule(start=start, end=end, until=1.0, path=options.path)
    progresses = (0.0, 0.25, 0.5, 0.75, 1.0) if start != end else (0.0,)
    batch = torch.randn(shape)
    model = find_model(options.model, pretrained=options.pretrained)()
    columns: dict[str, list[str]] = {}
    for inversion in INVERSIONS:
        report = dr2net.convert(model, inversion=inversion)
        for progress in progresses:
            coefficients.apply(model, progress)
            with _explained(options.model, shape), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error itself is printed
                loss = functools.partial(loss_of, precision=options.precision)
                columns.setdefault(inversion, []).append(_error_of(model, batch, loss))
        dr2net.deconvert(model)
    print(f"{options.model}, input {options.input}, branches in {options.precision}")
    print(report)
    print("relative error of the gradient against stored activations:")
    rows = []
    for index, progress in enumerate(progresses):
        alpha, beta = coefficients.at(progress)
        rows.append((f"{progress:.2f}", f"{alpha:.4g}", f"{beta:.4g}", *(columns[name][index] for name in INVERSIONS)))
    print_table(("progress", "alpha", "beta", *INVERSIONS), rows)


def _error_of(model: nn.Module, batch: Tensor, loss: Callable[[nn.Module, Tensor], Tensor]) -> str:
    """The gradient error as text, or a word where the exact inversion refuses these coefficients."""
    try:
        return f"{dr2net.gradient_error(model, batch, loss).overall:.1e}"
    except OverflowError:
        return "overflow"
    except FloatingPointError:
        return "not finite"


def find_model(name: str, *, pretrained: bool = False) -> Callable[[], nn.Module]:
    """A function that builds the named model; see the top of this file for names. Raises ValueError for an unknown one.

    pretrained: for timm and torchvision, load the weights of that name (from the cache or the hub).
    """
    source, colon, rest = name.partition(":")
    if not colon:
        timm = _import("timm", "a model without a colon is a timm name")
        if name not in timm.list_models():
            close = ", ".join(timm.list_models(f"*{name[:8]}*")[:5]) or "see timm.list_models()"
            raise ValueError(f"timm has no model {name!r}; similar: {close}")
        return functools.partial(timm.create_model, name, pretrained=pretrained)
    if source == "torchvision":
        models = _import("torchvision", "the model is torchvision's").models
        if rest not in models.list_models():
            raise ValueError(f"torchvision has no model {rest!r}; see torchvision.models.list_models()")
        return functools.partial(models.get_model, rest, weights="DEFAULT" if pretrained else None)
    if pretrained:
        raise ValueError(f"--pretrained works for timm and torchvision, not for {name!r}: load them in your function")
    if source == "transformers":
        return _transformers_model(rest)
    try:
        function = getattr(importlib.import_module(source), rest)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {rest!r} from {source!r}: {error}") from error

    def build() -> nn.Module:
        model = function()
        if not isinstance(model, nn.Module):
            raise ValueError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module")
        return model

    return build


def _transformers_model(name: str) -> Callable[[], nn.Module]:
    transformers = _import("transformers", "the model is transformers'")
    config_class = getattr(transformers, name, None)
    try:
        config = (
            config_class() if config_class else transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        )
    except (OSError, TypeError) as error:
        raise ValueError(f"{name!r} is neither a config class of transformers nor a local model folder") from error
    return functools.partial(transformers.AutoModel.from_config, config)


def _import(package: str, why: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not installed ({why}): pip install 'dr2net[backbones]'") from error


def loss_of(model: nn.Module, batch: Tensor, precision: str) -> Tensor:
    """A scalar on which all the model's floating-point outputs depend; branches run under autocast in bf16."""
    with torch.autocast(batch.device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        output = model(batch)
    values = [value.float().square().mean() for value in _tensors(output) if value.is_floating_point()]
    if not values:
        raise ValueError(f"the model returned no floating-point tensor but a {type(output).__name__}")
    return torch.stack(values).sum()


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]


@contextlib.contextmanager
def _explained(name: str, shape: tuple[int, ...]) -> Iterator[None]:
    """Turns torch's complaint about a shape that does not suit the model into a ValueError that names both."""
    try:
        yield
    except (RuntimeError, AssertionError, IndexError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} does not run on an input of {'x'.join(map(str, shape))}: {reason}") from error


def parse_shape(text: str) -> tuple[int, ...]:
    """`16x3x224x224` -> (16, 3, 224, 224)."""
    sizes = text.lower().split("x")
    if len(sizes) < 2 or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"--input {text!r} is not a shape; write the sizes with x between, batch first: 16x3x224x224")
    return tuple(int(size) for size in sizes)


def parse_bytes(text: str) -> int:
    """`24GiB` -> 25769803776."""
    digits = text.rstrip("BbIiKkMmGg ")
    unit = text[len(digits) :].strip().upper()
    try:
        size = float(digits)
    except ValueError:
        size = math.nan
    if unit not in UNITS or not 0 < size < math.inf:
        raise ValueError(f"--budget {text!r} is not a size; write a number and a unit, as 24GiB, 512MiB or 80GB")
    return int(size * UNITS[unit])


def _fraction(text: str, flag: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{flag} {text!r} is not a number; write 1/64 or 0.1") from error
    if flag == "--beta" and not 0 <= value <= 1:
        raise ValueError(f"{flag} {text} is outside 0 <= beta <= 1")
    return value


def _parse_pair(text: str, flag: str) -> tuple[float, float]:
    numbers = text.split(",")
    if len(numbers) != 2:
        raise ValueError(f"{flag} {text!r} is not alpha,beta; write for example 1,0.1")
    alpha, beta = (float(_fraction(number.strip(), flag)) for number in numbers)
    return alpha, beta


def _parse_grow(text: str, shape: tuple[int, ...]) -> tuple[int, int]:
    dimension, _, multiple = text.partition(":")
    numbers = (dimension, multiple or "1")
    if not all(number.isascii() and number.isdigit() for number in numbers) or int(numbers[1]) == 0:
        raise ValueError(f"--grow {text!r} is not a dimension; write 0 for the batch, or 2:32 for the third by 32s")
    if int(dimension) >= len(shape):
        raise ValueError(f"--grow {text!r}: the input has only the dimensions 0 to {len(shape) - 1}")
    return int(numbers[0]), int(numbers[1])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of plain text; the first is flush left, the others flush right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *cells)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
