"""`dr2net plan`: the table of peaks, what fits, the fastest within the budget, the phases of a schedule, the picture.

    plan(options, schedule)        # the words of the command line, see `cli.py`

Not here: what is predicted (`planner.py`), the choice within a budget (`budget.py`).
"""

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import torch
from torch import nn

from dr2net import budget as budgets
from dr2net import planner
from dr2net.console import explained, print_table, say
from dr2net.inputs import Batches, Grown, find_batches, parse_grow, size_at
from dr2net.memory import Memory, format_bytes, largest, parse_bytes
from dr2net.model_names import find_by_depth, find_model
from dr2net.options import Options
from dr2net.planner import Setting
from dr2net.schedule import Schedule

PICTURES = (".png", ".pdf", ".svg")
DEPTHS = (6, 12, 24, 36, 48)  # of the plot
SPLIT = ("peak", "parameters", "gradients", "optimizer", "stored", "temporaries")
RIVALS = """\
offloaded: the column "host" leaves the device in forward and comes back in backward, in every step; PCIe 4.0 x16 takes
  about a second for 25 GB each way. It wins where the host has the room and the step lasts longer than its copies.
adamw8bit: wins where the optimizer is much of the peak; activations stay. It goes with every other row (--optimizer).
lora: wins where parameters, gradients and optimizer are most of the peak and few trained parameters will do; its
  activations stay. It goes with reversible blocks too (docs/lora.md)."""


@dataclass(frozen=True)
class Asked:
    """What is planned."""

    name: str
    model: nn.Module
    batches: Batches
    grown: Grown
    budget: int
    settings: list[Setting]  # one for each phase of the schedule
    limits: dict[int, str]  # sizes that the model does not take, and what it says to the smallest


@dataclass(frozen=True)
class Planned:
    """One method: its memory in each phase, what predicts it in the worst, and the largest input that fits then."""

    memories: list[Memory]
    worst: int  # phase
    predict_at: Callable[[Batches], Memory]
    most: int

    @property
    def memory(self) -> Memory:
        """Of the worst phase."""
        return self.memories[self.worst]


def plan(options: argparse.Namespace, schedule: Schedule) -> None:
    """Predict and print. ValueError for what the user can mend."""
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
    phases = planner.phases(schedule, setting)
    model = _on_paper(options).train()
    settings = [replace(setting, coefficients=phase.coefficients) for phase in phases]
    asked = Asked(options.model, model, batches.of_model(model), grown, budget, settings, {})
    with _known_blocks(asked) as notes:
        _plan(options, asked, phases, notes)


@contextlib.contextmanager
def _known_blocks(asked: Asked) -> Iterator[list[str]]:
    """Inside, blocks that nobody registered are known, if a probe finds some; what it says."""
    with contextlib.ExitStack() as stack:
        enter = functools.partial(planner.known_blocks, asked.model)
        try:
            found = explained(lambda batches: stack.enter_context(enter(batches)), asked.name)(asked.batches)
        except ValueError as error:
            found = f"the model was not probed for blocks: {error}"
        yield [found] if found else []


def _plan(options: argparse.Namespace, asked: Asked, phases: Sequence[planner.Phase], notes: list[str]) -> None:
    methods = [*planner.METHODS, *(planner.RIVALS if options.rivals else ())]
    found: dict[str, Planned] = {}
    omitted: dict[str, list[str]] = {}
    for method in methods:
        if "chunks" in method and not options.chunk_mib:
            continue
        try:
            found[method] = _planned(asked, method)
        except (_Omitted, ImportError) as error:
            omitted.setdefault(str(error).splitlines()[0].rstrip(":"), []).append(method)
            continue
        if options.live:
            live = found[method].memory.live[: options.live]
            print(f"{method}, largest at the peak", *live, "", sep="\n")
    calibrated = [_calibrated(asked, method, planned) for method, planned in found.items()] if options.calibrate else []
    say("")
    each = f", each of {options.shards} processes" if options.shards > 1 else ""
    print(f"{asked.name}, input {asked.batches}{each}, {options.precision}, {options.optimizer}, {options.inversion}")
    _print_methods(asked, found, options)
    for reason, names in omitted.items():
        print(f"omitted: {', '.join(names)} ({reason})")
    notes = [*notes, *([asked.limits[min(asked.limits)]] if asked.limits else [])]
    print(*(f"note: {note}" for note in notes), sep="\n", end="\n" if notes else "")
    print("", *_fastest(asked, options.budget), sep="\n")
    if any(len(planned.memories) > 1 for planned in found.values()):
        _print_phases(phases, found)
    if calibrated:
        print()
        print_table(("method", "predicted", "allocator", "allocator / predicted"), calibrated)
    if options.rivals:
        print("", RIVALS, sep="\n")
    if options.plot:
        _plot(options, asked, {method: found[method] for method in found if method in planner.METHODS})


class _Omitted(Exception):
    """A method that this model does not allow."""


def _planned(asked: Asked, method: str) -> Planned:
    say(f"predicting: {method}")
    settings = asked.settings if method.startswith("dr2net") else asked.settings[:1]
    try:
        predictors = [explained(planner.predictor(asked.model, method, s), asked.name) for s in settings]
    except ValueError as error:
        raise _Omitted(str(error)) from error
    memories = [predict_at(asked.batches) for predict_at in predictors]
    worst = max(range(len(memories)), key=lambda k: memories[k].peak)  # the first of equals
    peak = functools.partial(_peak_of, predictors[worst], asked)
    most = largest(peak, asked.budget) if asked.batches.grows else 0
    return Planned(memories, worst, predictors[worst], most)


def _peak_of(predict_at: Callable[[Batches], Memory], asked: Asked, n: int) -> int:
    """The peak at the n-th size. One above the present that the model does not take counts as one that does not fit."""
    try:
        return predict_at(asked.batches.grow(asked.grown, n)).peak
    except ValueError as error:
        if n * asked.grown[1] <= size_at(asked.batches, asked.grown):
            raise
        asked.limits[n] = str(error)
        return sys.maxsize


def _print_methods(asked: Asked, found: dict[str, Planned], options: argparse.Namespace) -> None:
    rows = []
    for method, planned in found.items():
        m = planned.memory
        cells = [*map(format_bytes, (m.peak, m.parameters, m.gradients, m.optimizer, m.stored, m.temporaries))]
        cells += ["-" if m.host is None else format_bytes(m.host)] * options.rivals
        cells.append("yes" if m.peak <= asked.budget else "no")
        rows.append((method, *cells, str(planned.most * asked.grown[1]) if asked.batches.grows else "-"))
    host = ["host"] * options.rivals
    print_table(("method", *SPLIT, *host, f"fits {options.budget}", f"largest {_axis(asked.grown[0])}"), rows)


def _fastest(asked: Asked, text: str) -> list[str]:
    say("predicting: the fastest")
    found = budgets.choices(asked.model, asked.batches, asked.budget, asked.settings[0])
    first = next(found, None)
    if first is not None and first.method == "conventional":
        say("")
        return [f"fastest within {text}: conventional, which fits"]
    every = [*([] if first is None else [first]), *found]
    say("")
    return budgets.lines(every, text)


def _print_phases(phases: Sequence[planner.Phase], found: dict[str, Planned]) -> None:
    moving = {method: planned.memories for method, planned in found.items() if len(planned.memories) > 1}
    print("\npeak along the schedule (above: the largest)")
    rows = []
    for index, phase in enumerate(phases):
        alpha, beta = phase.coefficients
        peaks = [format_bytes(memories[index].peak) for memories in moving.values()]
        rows.append((f"{phase.progress:.2f}", f"{alpha:.4g}", f"{beta:.4g}", phase.kept, *peaks))
    print_table(("from", "alpha", "beta", "kept per branch", *moving), rows)


def _calibrated(asked: Asked, method: str, planned: Planned) -> tuple[str, ...]:
    say(f"training: {method}")
    if method.endswith("adamw8bit"):
        return method, format_bytes(planned.memory.peak), "-", "-"
    try:
        setting = asked.settings[planned.worst]
        predicted, measured = planner.calibrate(asked.model, method, setting, asked.batches, "cuda")
    except torch.cuda.OutOfMemoryError:
        return method, "-", "out of memory", "-"
    except RuntimeError as error:
        raise ValueError(f"{asked.name} does not train on this GPU: {str(error).splitlines()[0]}") from error
    assert measured.device is not None, "it was measured on a GPU"
    sizes = predicted.peak, measured.device
    return method, *map(format_bytes, sizes), f"{measured.device / predicted.peak:.3f}"


def _plot(options: argparse.Namespace, asked: Asked, found: dict[str, Planned]) -> None:
    dimensions, multiple = asked.grown
    most = max(4, *(planned.most for planned in found.values())) * 5 // 4
    counts = sorted({max(1, round(most * part / 8)) for part in (0.25, 0.5, 1, 2, 3, 4, 6, 8)})
    counts = [n for n in counts if n < min(asked.limits, default=n + 1)]
    curves = {
        method: [(n * multiple, planned.predict_at(asked.batches.grow(asked.grown, n)).peak) for n in counts]
        for method, planned in found.items()
    }
    panels: list[tuple[str, dict[str, planner.Curve]]] = [(_axis(dimensions), dict(curves))]
    build = find_by_depth(asked.name)
    if build is None:
        print(f"{asked.name} takes no depth: no second panel")
    else:
        depths: dict[str, list[tuple[float, float]]] = {method: [] for method in found}
        for depth in DEPTHS:
            say(f"predicting: {depth} blocks")
            deep = replace(asked, model=build(depth).train())
            with _known_blocks(deep):
                for method, curve in depths.items():
                    predict_at = explained(planner.predictor(deep.model, method, asked.settings[0]), asked.name)
                    curve.append((depth, predict_at(asked.batches).peak))
        say("")
        panels.append((f"blocks, input {asked.batches}", dict(depths)))
    try:
        planner.draw(FilePath(options.plot), panels, f"{asked.name}, {options.precision}, {options.optimizer}")
    except (OSError, ImportError) as error:
        raise ValueError(f"--plot {options.plot}: {error}") from error
    print(options.plot)


def _axis(dimensions: tuple[int, ...]) -> str:
    return "batch" if dimensions == (0,) else f"size of dimension {' and '.join(map(str, dimensions))}"


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
