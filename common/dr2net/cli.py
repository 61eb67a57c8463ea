"""What needs no task: does a model fit in the memory, and is its reversible gradient right?

    dr2net plan --model vit_small_patch16_224 --input 16x3x224x224 --budget 24GiB --precision bf16
    dr2net plan --model torchvision:swin3d_t --input 1x3x32x224x224 --grow 2:32 --plot frames.png
    dr2net plan --model transformers:bert --input input_ids:8x128:int,attention_mask:8x128:int --grow 1:64
    dr2net check --model vit_tiny_patch16_224 --input 2x3x224x224 --start 1,0.1 --end 0.4,0.7
    dr2net check --model my_module:build --batch my_module:make_batch

A model is a timm name, `torchvision:swin3d_t`, `transformers:bert` (a type or class of models, or a local folder after
the colon), or `package.module:function`, a function of yours that returns the module (`model_names.py`). An input is a
float tensor, `16x3x224x224`, the batch first, or tensors by name, or what a function of yours makes (`inputs.py`).
`plan` computes nothing and needs no GPU (`planner.py`), but with --calibrate; `check` computes. Both take the
coefficients at one point, or along a schedule from --start to --end.
"""

import argparse
import functools
import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path as FilePath
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

import dr2net
from dr2net import budget as budgets
from dr2net import planner, schedule
from dr2net.convert import convert_or_probe
from dr2net.inputs import Batches, Grown, find_batches, parse_grow, size_at
from dr2net.memory import Memory, format_bytes, largest, parse_bytes
from dr2net.model_names import find_by_depth, find_model
from dr2net.node import RecomputationError
from dr2net.options import Inversion, Options
from dr2net.planner import Setting, loss_of

INVERSIONS = get_args(Inversion)
T = TypeVar("T")
PICTURES = (".png", ".pdf", ".svg")
DEPTHS = (6, 12, 24, 36, 48)  # of the plot


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on the standard error for what the user can mend."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        _say("")
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
    plan.set_defaults(run=_plan)

    check.add_argument("--pretrained", action="store_true", help="load the weights of the name, or in the folder")
    check.add_argument("--seed", type=int, default=0)
    check.set_defaults(run=_check)
    return parser


def _plan(options: argparse.Namespace) -> None:
    batches, budget = find_batches(options.input, options.batch), parse_bytes(options.budget)
    grown = parse_grow(options.grow, batches)
    if not 0 <= options.chunk_mib < math.inf:
        raise ValueError(f"--chunk-mib {options.chunk_mib:g} is no size; write a number of MiB, or 0 for no chunks")
    if options.plot and FilePath(options.plot).suffix not in PICTURES:
        raise ValueError(f"--plot {options.plot} is no picture; name a file that ends in {', '.join(PICTURES)}")
    if options.calibrate and not torch.cuda.is_available():
        raise ValueError("--calibrate trains on a GPU, and torch sees none here; leave it out to predict only")
    how = Options(
        inversion=options.inversion, chunk_mib=options.chunk_mib or None, recompute_rest=options.recompute_rest
    )
    setting = Setting(options.precision, options.optimizer, (0, 1), how, options.shards)
    phases = planner.phases(_schedule(options), setting)
    model = _on_paper(options).train()
    batches = batches.of_model(model)
    rows, moving, curves, calibrated = [], [], {}, []
    omitted: dict[str, list[str]] = {}
    limits: dict[int, str] = {}  # sizes that the model does not take, and what it says to the smallest
    for method in planner.METHODS:
        if method.endswith(", chunks") and not options.chunk_mib:
            continue
        _say(f"predicting: {method}")
        settings = [replace(setting, coefficients=phase.coefficients) for phase in phases]
        if not method.startswith("dr2net"):
            settings = settings[:1]
        try:
            predictors = [_explained(planner.predictor(model, method, s), options.model) for s in settings]
        except (ValueError, ImportError) as error:
            omitted.setdefault(str(error).splitlines()[0].rstrip(":"), []).append(method)
            continue
        memories = [predict_at(batches) for predict_at in predictors]
        worst = max(range(len(memories)), key=lambda k: memories[k].peak)  # the first of equals
        memory, predict_at = memories[worst], predictors[worst]
        if len(memories) > 1:
            moving.append((method, memories))
        most = largest(functools.partial(_peak_of, predict_at, batches, grown, limits), budget) if batches.grows else 0
        curves[method] = predict_at, most
        sizes = (memory.peak, memory.parameters, memory.gradients, memory.optimizer, memory.stored, memory.temporaries)
        fits = "yes" if memory.peak <= budget else "no"
        rows.append((method, *map(format_bytes, sizes), fits, str(most * grown[1]) if batches.grows else "-"))
        if options.live:
            print(f"{method}, largest at the peak", *memory.live[: options.live], "", sep="\n")
        if options.calibrate:
            calibrated.append(_calibrated(model, method, settings[worst], batches, options.model))
    _say("")
    each = f", each of {options.shards} processes" if options.shards > 1 else ""
    print(f"{options.model}, input {batches}{each}, {options.precision}, {options.optimizer}, {options.inversion}")
    split = ("peak", "parameters", "gradients", "optimizer", "stored", "temporaries")
    print_table(("method", *split, f"fits {options.budget}", f"largest {_axis(grown[0])}"), rows)
    for reason, methods in omitted.items():
        print(f"omitted: {', '.join(methods)} ({reason})")
    if limits:
        print(f"note: {limits[min(limits)]}")
    own = replace(setting, coefficients=phases[0].coefficients)
    print("", *_fastest(model, batches, budget, own, options.budget), sep="\n")
    if moving:
        _print_phases(phases, moving)
    if calibrated:
        print()
        print_table(("method", "predicted", "allocator", "allocator / predicted"), calibrated)
    if options.plot:
        _plot(options, model, batches, grown, curves, limits, settings[0])


def _fastest(model: nn.Module, batches: Batches, budget: int, setting: Setting, text: str) -> list[str]:
    _say("predicting: the fastest")
    found = budgets.choices(model, batches, budget, setting)
    first = next(found, None)
    if first is not None and first.method == "conventional":
        _say("")
        return [f"fastest within {text}: conventional, which fits"]
    every = [*([] if first is None else [first]), *found]
    _say("")
    return budgets.lines(every, text)


def _print_phases(phases: Sequence[planner.Phase], moving: Sequence[tuple[str, list[Memory]]]) -> None:
    print("\npeak along the schedule (above: the largest)")
    rows = []
    for index, phase in enumerate(phases):
        alpha, beta = phase.coefficients
        peaks = [format_bytes(memories[index].peak) for _, memories in moving]
        rows.append((f"{phase.progress:.2f}", f"{alpha:.4g}", f"{beta:.4g}", phase.kept, *peaks))
    print_table(("from", "alpha", "beta", "kept per branch", *(method for method, _ in moving)), rows)


def _calibrated(model: nn.Module, method: str, setting: Setting, batches: Batches, name: str) -> tuple[str, ...]:
    try:
        predicted, measured = planner.calibrate(model, method, setting, batches, "cuda")
    except torch.cuda.OutOfMemoryError:
        return method, "-", "out of memory", "-"
    except RuntimeError as error:
        raise ValueError(f"{name} does not train on this GPU: {str(error).splitlines()[0]}") from error
    assert measured.device is not None, "it was measured on a GPU"
    sizes = predicted.peak, measured.device
    return method, *map(format_bytes, sizes), f"{measured.device / predicted.peak:.3f}"


def _plot(
    options: argparse.Namespace,
    model: nn.Module,
    batches: Batches,
    grown: Grown,
    curves: dict[str, tuple[Callable[[Batches], Memory], int]],
    limits: dict[int, str],
    setting: Setting,
) -> None:
    dimensions, multiple = grown
    most = max(4, *(most for _, most in curves.values())) * 5 // 4
    counts = sorted({max(1, round(most * part / 8)) for part in (0.25, 0.5, 1, 2, 3, 4, 6, 8)})
    counts = [n for n in counts if n < min(limits, default=n + 1)]
    panels: list[tuple[str, dict[str, planner.Curve]]] = [
        (
            _axis(dimensions),
            {
                method: [(n * multiple, predict_at(batches.grow(grown, n)).peak) for n in counts]
                for method, (predict_at, _) in curves.items()
            },
        )
    ]
    build = find_by_depth(options.model)
    if build is None:
        print(f"{options.model} takes no depth: no second panel")
    else:
        depths: dict[str, list[tuple[float, float]]] = {method: [] for method in curves}
        for depth in DEPTHS:
            _say(f"predicting: {depth} blocks")
            deep = build(depth).train()
            for method, curve in depths.items():
                curve.append((depth, _explained(planner.predictor(deep, method, setting), options.model)(batches).peak))
        _say("")
        panels.append((f"blocks, input {batches}", dict(depths)))
    try:
        planner.draw(FilePath(options.plot), panels, f"{options.model}, {options.precision}, {options.optimizer}")
    except (OSError, ImportError) as error:
        raise ValueError(f"--plot {options.plot}: {error}") from error
    print(options.plot)


def _axis(dimensions: tuple[int, ...]) -> str:
    return "batch" if dimensions == (0,) else f"size of dimension {' and '.join(map(str, dimensions))}"


def _peak_of(
    predict_at: Callable[[Batches], Memory], batches: Batches, grown: Grown, limits: dict[int, str], n: int
) -> int:
    """The peak at the n-th size. One above the present that the model does not take counts as one that does not fit."""
    try:
        return predict_at(batches.grow(grown, n)).peak
    except ValueError as error:
        if n * grown[1] <= size_at(batches, grown):
            raise
        limits[n] = str(error)
        return sys.maxsize


def _on_paper(options: argparse.Namespace) -> nn.Module:
    """The model; a configuration of transformers may be of a size that no memory holds, and needs none for a plan."""
    build = find_model(options.model)
    if not options.model.startswith("transformers:") or options.calibrate:
        return build()
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError):  # it reads numbers of its tensors when it is made
        return build()


def _check(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    batches, coefficients = find_batches(options.input, options.batch), _schedule(options)
    progresses = (0.0, 0.25, 0.5, 0.75, 1.0) if coefficients.start != coefficients.end else (0.0,)
    model = find_model(options.model, pretrained=options.pretrained)()
    batches = batches.of_model(model)
    batch = batches.make()
    loss = functools.partial(loss_of, precision=options.precision)
    probe = functools.partial(loss, batch=batch)  # for a model without known blocks
    _say("verifying")
    _explained(lambda _: convert_or_probe(model, probe), options.model)(batches)
    coefficients.apply(model, 0.0)
    verification = _explained(lambda _: _quietly(dr2net.verify, model, batch, loss), options.model)(batches)
    dr2net.set_coefficients(model, 1, 0)
    dr2net.deconvert(model)
    columns: dict[str, list[str]] = {}
    of_grid: list[str] = []
    for inversion in INVERSIONS:
        _say(f"computing: {inversion}")
        report = convert_or_probe(model, probe, inversion=inversion)
        for progress in progresses:
            coefficients.apply(model, progress)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error itself is printed
                error, grid = _explained(lambda _: _error_of(model, batch, loss), options.model)(batches)
                columns.setdefault(inversion, []).append(error)
                if inversion == "exact":
                    of_grid.append(grid)
        dr2net.set_coefficients(model, 1, 0)
        dr2net.deconvert(model)
    _say("")
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


def _explained(function: Callable[[Batches], T], name: str) -> Callable[[Batches], T]:
    """Turns torch's complaint about a shape that does not suit the model into a ValueError that names both."""

    def call(batches: Batches) -> T:
        log = logging.getLogger("torch._subclasses.fake_tensor")  # it would say the same at length
        before, log.disabled = log.disabled, True
        try:
            return function(batches)
        except (RuntimeError, AssertionError, IndexError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name} does not run on an input of {batches}: {reason}") from error
        finally:
            log.disabled = before

    return call


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


def _say(text: str) -> None:
    """What is being done, on one line of a terminal that the next call overwrites."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of plain text; the first is flush left, the others flush right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *cells)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
