"""The fastest way to train within a budget of memory: which branches keep their insides, chunks, or no Dr2Net at all.

    options = dr2net.plan_budget(model, torch.randn(16, 3, 224, 224), "20GiB")     # a GPU is not needed
    dr2net.convert(model, options)

For each method the dial (`Options.keep`) is turned as far as the predicted peak allows, and the predicted time of the
step decides between them (`work.py`). Not here: what a method is (`planner.py`).
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dr2net import planner, work
from dr2net.branches import find_branches
from dr2net.inputs import MadeBatch
from dr2net.memory import Memory, format_bytes, largest, parse_bytes
from dr2net.options import Options
from dr2net.planner import Setting

METHODS = ("conventional", "checkpointed", "checkpointed, chunks", "dr2net", "dr2net, chunks")


@dataclass(frozen=True)
class Choice:
    """A method with the largest `keep` that fits, its predicted peak, its step's time over the conventional one's."""

    method: str
    options: Options  # for dr2net.convert, or what of it dr2net.checkpoint_blocks takes
    memory: Memory
    time: float

    def __str__(self) -> str:
        kept = f", the last {self.options.keep} branches kept" if self.options.keep else ""
        return f"{self.method}{kept}"

    @property
    def call(self) -> str:
        """The line of code that does it."""
        o, chunks = self.options, self.method.endswith(", chunks")
        given = [f"keep={o.keep}"] * bool(o.keep)
        given += [f"chunk_mib={o.chunk_mib:g}", f"recompute_rest={o.recompute_rest}"] if chunks else []
        if self.method == "conventional":
            return "nothing to do"
        name = "checkpoint_blocks" if self.method.startswith("checkpointed") else "convert"
        return f"dr2net.{name}({', '.join(['model', *given])})"


def choices(
    model: nn.Module,
    batches: Any,
    budget: int,
    setting: Setting,
    *,
    device: str = "cuda",
    rate: float | None = None,
    methods: Sequence[str] = METHODS,
) -> Iterator[Choice]:
    """For each of `methods` the fastest setting within `budget` bytes, if there is one; seconds to minutes each.

    model: unconverted, in training mode; it may live on the "meta" device. batches: as `planner.predictor` takes them.
    rate: FLOPs per byte (`work.flops_per_byte`); None: what is usual on `device`.
    """
    rate = work.RATES[device] if rate is None else rate
    plain = _work(model, "conventional", setting, batches).time(rate)
    total = sum(len(find_branches(block)[0]) for block in model.modules())
    for method in methods:
        try:
            fits = _dial(model, method, setting, batches)
            keep = largest(functools.partial(_peak_after, fits), budget, limit=total + 1) - 1
        except ValueError:  # no block of it can be converted
            continue
        if keep < 0:
            continue
        keep = 0 if method == "conventional" else keep
        options = replace(setting.options, keep=keep)
        if not method.endswith(", chunks"):
            options = replace(options, chunk_mib=None, recompute_rest=False)
        own = replace(setting, options=options)
        yield Choice(method, options, fits(keep), _work(model, method, own, batches).time(rate) / plain)


def fastest(found: list[Choice]) -> Choice:
    """The one with the shortest step; of equals the one with the smallest peak."""
    return min(found, key=lambda choice: (round(choice.time, 3), choice.memory.peak))


def lines(found: Sequence[Choice], budget: str) -> list[str]:
    """What `dr2net plan` prints of them."""
    if not found:
        return [f"no setting trains within {budget}"]
    best = fastest(list(found))
    width = max(len(str(choice)) for choice in found)
    return [
        f"within {budget}, predicted; the time is a step's over the conventional one's, good to a tenth:",
        *(f"  {c!s:{width}}  {format_bytes(c.memory.peak):>10}  {c.time:.2f} x" for c in found),
        f"fastest: {best}: {best.call}",
    ]


def plan_budget(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    example: Any,
    budget: str | int,
    *,
    setting: Setting | None = None,
    device: str = "cuda",
) -> Options:
    """The Options of the fastest Dr2Net training whose predicted peak is within `budget`.

    model_or_factory: unconverted; a factory is called on the "meta" device, so that nothing large is made. example: a
    batch, as the model takes it (a tensor, a tuple, a dictionary). budget: "20GiB", "24GB", or bytes. setting:
    precision, optimizer, coefficients. ValueError if nothing fits, naming the smallest peak.
    Whether plain checkpointing or the conventional step would be faster within the budget: `dr2net plan --budget`.
    """
    setting = setting or Setting()
    bytes_allowed = parse_bytes(budget) if isinstance(budget, str) else budget
    if isinstance(model_or_factory, nn.Module):
        model = model_or_factory
    else:
        with torch.device("meta"):
            model = model_or_factory()
    was_training = model.training
    batches = MadeBatch(lambda: example, "the example", grows=False)
    methods = [method for method in METHODS if method.startswith("dr2net")]
    try:
        with planner.known_blocks(model.train(), batches):
            found = list(choices(model, batches, bytes_allowed, setting, device=device, methods=methods))
            least = 0 if found else min(_dial(model, method, setting, batches)(0).peak for method in methods)
        if not found:
            raise ValueError(
                f"no setting of Dr2Net trains {type(model).__name__} on this batch within "
                f"{format_bytes(bytes_allowed)}; the leanest needs {format_bytes(least)}: take a smaller batch or "
                "input, or another optimizer"
            )
    finally:
        model.train(was_training)
    return fastest(found).options


def _peak_after(memory: Callable[[int], Memory], n: int) -> int:
    return memory(n - 1).peak


def _work(model: nn.Module, method: str, setting: Setting, batches: Any) -> work.Work:
    """Of a step; in chunks it is what it is in whole branches, and fake chunks are not run to the end."""
    model = copy.deepcopy(model)
    planner.apply(model, method, replace(setting, options=replace(setting.options, chunk_mib=None)))
    optimizer = planner.build_optimizer(model, setting)
    return work.count(planner.training_step(model, optimizer, batches, setting.precision, "cpu"), model, optimizer)


def _dial(model: nn.Module, method: str, setting: Setting, batches: Any) -> Callable[[int], Memory]:
    """The memory with so many branches kept; conventional keeps all and has no dial."""
    known: dict[int, Memory] = {}

    def at(keep: int) -> Memory:
        keep = 0 if method == "conventional" else keep
        if keep not in known:
            own = replace(setting, options=replace(setting.options, keep=keep))
            known[keep] = planner.predictor(model, method, own)(batches)
        return known[keep]

    return at
