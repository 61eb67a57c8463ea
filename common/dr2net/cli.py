"""What needs no task: does a model fit in the memory, and is its reversible gradient right?

    dr2net plan --model vit_small_patch16_224 --input 16x3x224x224 --budget 24GiB --precision bf16
    dr2net plan --model torchvision:swin3d_t --input 1x3x32x224x224 --grow 2:32 --plot frames.png
    dr2net plan --model transformers:bert --input input_ids:8x128:int,attention_mask:8x128:int --grow 1:64
    dr2net check --model vit_tiny_patch16_224 --input 2x3x224x224 --start 1,0.1 --end 0.4,0.7
    dr2net check --model my_module:build --batch my_module:make_batch

A model is a timm name, `torchvision:swin3d_t`, `transformers:bert` (a type or class of models, or a local folder after
the colon), or `package.module:function`, a function of yours that returns the module (`model_names.py`). An input is a
float tensor, `16x3x224x224`, the batch first, or tensors by name, or what a function of yours makes (`inputs.py`).
`plan` computes nothing and needs no GPU (`planner.py`), but with --calibrate, and but for a forward pass of two samples
where it takes a probe to find the blocks (`probe.py`); `check` computes. Both take the coefficients at one point, or
along a schedule from --start to --end.
"""

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

import dr2net
from dr2net import plan_command, planner, schedule
from dr2net.console import explained, print_table, say
from dr2net.convert import convert_or_probe
from dr2net.inputs import find_batches
from dr2net.model_names import find_model
from dr2net.node import RecomputationError
from dr2net.options import Inversion
from dr2net.planner import loss_of

INVERSIONS = get_args(Inversion)
T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on the standard error for what the user can mend."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        say("")
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
        command.add_argument(
            "--input",
            action="append",
            metavar="[NAME:]SHAPE[:KIND]",
            help="16x3x224x224, or by name, input_ids:4x128:int; several by comma or by repeating",
        )
        command.add_argument("--batch", metavar="MODULE:FUNCTION", help="in place of --input, returns the batch")
        command.add_argument(
            "--precision", choices=planner.PRECISIONS, default="fp32", help="of the branches (autocast)"
        )
        command.add_argument("--start", default="7/8,1/8", help="alpha,beta at the first step")
        command.add_argument("--end", help="alpha,beta at the end of the path; as --start if left out")
        command.add_argument("--path", choices=get_args(schedule.Path), default="together", help="from start to end")

    plan.add_argument("--budget", default="24GiB", help="memory of the device, e.g. 24GiB or 80GB")
    plan.add_argument("--optimizer", choices=planner.OPTIMIZERS, default="adamw")
    plan.add_argument("--inversion", choices=INVERSIONS, default="exact", help="of reversible and dr2net")
    plan.add_argument("--chunk-mib", type=float, default=256, help="of the rows in chunks; 0: no such rows")
    plan.add_argument(
        "--recompute-rest",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in the rows in chunks, checkpoint what stands outside the reversible sequences",
    )
    plan.add_argument(
        "--grow",
        default="0",
        help="dimensions that grow until the budget is full, 0: the batch; 2:32 is the third by 32s; 3,4:32 are two",
    )
    plan.add_argument("--live", type=int, default=0, metavar="N", help="also list the N largest tensors at each peak")
    plan.add_argument("--plot", metavar="FILE", help="picture: peak against what grows, and against depth")
    plan.add_argument("--shards", type=int, default=1, metavar="N", help="of N processes, fully_shard on each block")
    plan.add_argument("--calibrate", action="store_true", help="train two steps on the GPU, compare its allocator")
    plan.add_argument("--rivals", action="store_true", help="also rows offloaded to the host, and an 8-bit optimizer")
    plan.set_defaults(run=lambda options: plan_command.plan(options, _schedule(options)))

    check.add_argument("--pretrained", action="store_true", help="load the weights of the name, or in the folder")
    check.add_argument("--seed", type=int, default=0)
    check.set_defaults(run=_check)
    return parser


def _check(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    batches, coefficients = find_batches(options.input, options.batch), _schedule(options)
    progresses = (0.0, 0.25, 0.5, 0.75, 1.0) if coefficients.start != coefficients.end else (0.0,)
    model = find_model(options.model, pretrained=options.pretrained)()
    batches = batches.of_model(model)
    batch = batches.make()
    loss = functools.partial(loss_of, precision=options.precision)
    probe = functools.partial(loss, batch=batch)  # for a model without known blocks
    say("verifying")
    explained(lambda _: convert_or_probe(model, probe), options.model)(batches)
    coefficients.apply(model, 0.0)
    verification = explained(lambda _: _quietly(dr2net.verify, model, batch, loss), options.model)(batches)
    dr2net.set_coefficients(model, 1, 0)
    dr2net.deconvert(model)
    columns: dict[str, list[str]] = {}
    of_grid: list[str] = []
    for inversion in INVERSIONS:
        say(f"computing: {inversion}")
        report = convert_or_probe(model, probe, inversion=inversion)
        for progress in progresses:
            coefficients.apply(model, progress)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error itself is printed
                error, grid = explained(lambda _: _error_of(model, batch, loss), options.model)(batches)
                columns.setdefault(inversion, []).append(error)
                if inversion == "exact":
                    of_grid.append(grid)
        dr2net.set_coefficients(model, 1, 0)
        dr2net.deconvert(model)
    say("")
    print(f"{options.model}, input {batches}, branches in {options.precision}")
    print(report)
    print("relative error of the gradient against stored activations; grid: of the exact one against stored floats")
    rows = []
    for index, progress in enumerate(progresses):
        alpha, beta = coefficients.at(progress)
        errors = [columns[name][index] for name in INVERSIONS]
        rows.append((f"{progress:.2f}", f"{alpha:.4g}", f"{beta:.4g}", *errors, of_grid[index]))
    print_table(("progress", "alpha", "beta", *INVERSIONS, "grid"), rows)
    print("verified at the first of them:", verification, sep="\n")


def _quietly(function: Callable[..., T], *arguments: Any) -> T:
    """Without warnings, where what they would say is printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def _error_of(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> tuple[str, str]:
    """The two gradient errors as text, or a word where the exact inversion refuses these coefficients."""
    try:
        error = dr2net.gradient_error(model, batch, loss)
    except OverflowError:
        return "overflow", "overflow"
    except FloatingPointError:
        return "not finite", "not finite"
    except RecomputationError:  # of streams that grow: more than a few percent
        return "too large", "-"
    return f"{error.overall:.1e}", "-" if error.grid is None else f"{error.grid:.1e}"


def _schedule(options: argparse.Namespace) -> schedule.Schedule:
    start = _parse_pair(options.start, "--start")
    end = start if options.end is None else _parse_pair(options.end, "--end")
    return schedule.Schedule(start=start, end=end, until=1.0, path=options.path)


def _fraction(text: str, flag: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{flag} {text!r} is not a number; write 1/64 or 0.1") from error


def _parse_pair(text: str, flag: str) -> tuple[float, float]:
    numbers = text.split(",")
    if len(numbers) != 2:
        raise ValueError(f"{flag} {text!r} is not alpha,beta; write for example 1,0.1")
    alpha, beta = (float(_fraction(number.strip(), flag)) for number in numbers)
    return alpha, beta


if __name__ == "__main__":
    sys.exit(main())
