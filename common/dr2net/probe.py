"""What a model does with the blocks in its containers, seen by running it once: `dr2net.convert(model, probe=...)`.

    found = probe_blocks(model, lambda model: model(batch), chunks=False)

The children of each nn.Sequential, nn.ModuleList and nn.ModuleDict are watched while the model runs, without gradients.
A *run* is a series of children, as they stand in the container, each of which gets the very tensor that the one before
it returned and returns one of the same shape. Blocks of a run become reversible: registered ones by their branches,
the others as one branch each (`whole.py`), if they add to what they get (`residual_flow.py`). Everything else runs as
it is, with a reason.

Of containers inside each other the inner one is taken, unless its runs are short and the outer one's is not.
Not here: what is put on the model then (`convert.py`), the arithmetic (`reversible.py`).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from dr2net import rng
from dr2net.beside import Word
from dr2net.branches import blocks_of, find_branches, is_container
from dr2net.entry import first_argument
from dr2net.node import version_of
from dr2net.options import Options
from dr2net.residual_flow import ResidualFlow
from dr2net.returns import Returned, form_of, kind_of, others_of
from dr2net.whole import Found, output_of, samples_apart

LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "layer_drop")  # names in transformers, fairseq
BITS = 3  # per element and branch, at beta = 1/8
LONG, SHORT = 3, 4  # a run of LONG blocks is taken rather than runs of less than SHORT blocks inside them

Probe = Callable[[nn.Module], Any]


@dataclass
class Call:
    """One call of a block in the probe."""

    reason: str = ""  # why a block that is called like this cannot be reversible
    before: nn.Module | None = None  # the block that returned the tensor it got
    copies: bool = False  # it changed its input in place
    kind: str = ""  # of its arguments, and what form its answer had
    form: Returned | None = None
    apart: dict[str, Word] | None = None  # see `samples_apart`
    size: int = 0  # elements of x
    samples: int = 0  # in x


@dataclass
class Run:
    """A series of blocks in a container, each fed by the one before it."""

    blocks: list[nn.Module]
    registered: bool  # one of them is
    size: int  # elements of x
    samples: int  # in x
    branches: int = 0  # of all of them


@dataclass
class Probed:
    """What was found out: about each block of a container, and about containers that are no chain of blocks."""

    found: dict[nn.Module, Found] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # container, why nothing in it is reversible
    runs: dict[str, list[Run]] = field(default_factory=dict)  # by container, those that are taken


def probe_blocks(model: nn.Module, probe: Probe, *, chunks: bool) -> Probed:
    """Run `probe(model)` once without gradients and say what to do with each block.

    chunks: also try which blocks treat each sample by itself, by running one of each type on two samples alone.
    Buffers and random generators are put back. ValueError for weights on the meta device, whose values nobody knows.
    """
    tensor = next(model.parameters(), None)
    if tensor is None or tensor.is_meta:
        raise ValueError(
            f"probe= runs the model, and the parameters of this {type(model).__name__} are "
            f"{'missing' if tensor is None else 'on the meta device, without values'}; load them first"
        )
    _refuse_skipping(model)
    watched = dict.fromkeys(b for c in model.modules() if is_container(c) for b in _candidates(c))
    calls: dict[nn.Module, list[Call]] = {block: [] for block in watched}
    buffers, states = [(buffer, buffer.clone()) for buffer in model.buffers()], rng.record(tensor)
    try:
        with torch.no_grad(), _watching(calls, chunks):
            probe(model)
    finally:
        rng.restore(states)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return _judge(model, calls)


def _refuse_skipping(model: nn.Module) -> None:
    """ValueError for a model that leaves out blocks at random in training, each time others."""
    for module_name, module in model.named_modules():
        for place in (module, getattr(module, "config", None)):
            for attribute in LAYERDROP:
                value = getattr(place, attribute, 0)
                if isinstance(value, float | int) and value > 0:
                    raise ValueError(
                        f"{module_name or type(model).__name__} leaves out blocks at random in training "
                        f"({attribute}={value}), and a run of reversible blocks cannot be interrupted; set it to 0 "
                        "before the conversion (drop path inside the blocks does the same and is replayed)"
                    )


def _candidates(container: nn.Module) -> list[nn.Module]:
    """The children that may be blocks: they have parameters, and are no layer of torch.nn."""
    return [
        block
        for block in blocks_of(container).values()
        if next(block.parameters(), None) is not None
        and not isinstance(block, (nn.ModuleList, nn.ModuleDict))
        and (next(block.children(), None) is not None or not type(block).__module__.startswith("torch.nn."))
    ]


@contextmanager
def _watching(calls: dict[nn.Module, list[Call]], chunks: bool) -> Iterator[None]:
    """Inside, each call of one of the blocks is noted."""
    made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> the block that returned it, its version then
    beside: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # what was returned behind an output -> the calls
    tried: dict[Any, dict[str, Word] | None] = {}  # by type of block and shape of x
    trying: list[nn.Module] = []  # runs that are not the model's
    replaced = [(block, block.__dict__.get("forward")) for block in calls]

    def watch(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def watched(*args: Any, **named: Any) -> Any:
            if trying:
                return forward(*args, **named)
            try:
                x, rest, rest_named = first_argument(block, args, named)
            except (TypeError, ValueError):
                x, rest, rest_named = None, (), {}
            call = Call()
            calls[block].append(call)
            if not isinstance(x, Tensor):
                call.reason = f"its first argument is a {type(x).__name__}, not a tensor"
                return forward(*args, **named)
            for leaf in tree_leaves((rest, rest_named)):
                for returned in beside.get(leaf, ()) if isinstance(leaf, Tensor) else ():
                    returned.reason = "a later block uses what it returns beside its output"
            before = made.get(x)
            call.before = before[0] if before is not None and before[1] == version_of(x) else None
            version, entered = version_of(x), x.clone() if x.is_floating_point() else x
            kind = kind_of(rest, rest_named)
            flow.enter(x)
            try:
                result = forward(*args, **named)
            except BaseException:
                flow.leave(None)
                raise
            added = flow.leave(next((t for t in tree_leaves(result) if isinstance(t, Tensor)), None))
            call.copies, call.kind = version_of(x) != version, kind
            call.size, call.samples = x.numel(), len(x) if x.dim() else 0
            _look(call, block, entered, result, rest, rest_named, x, added)
            if call.reason:
                return result
            for other in others_of(result, rest, rest_named) if call.form is not None else ():
                beside.setdefault(other, []).append(call)  # a block inside another returns it too
            if chunks and not call.copies and not (call.form is not None and call.form.more):
                key = (type(block), x.shape, kind)
                if key not in tried:
                    trying.append(block)
                    tried[key] = samples_apart(block, entered, rest, rest_named)
                    trying.pop()
                call.apart = tried[key]
            output = output_of(result)
            made[output] = (block, version_of(output))
            return result

        return watched

    flow = ResidualFlow()
    try:
        for block in calls:
            block.__dict__["forward"] = watch(block, block.forward)
        with flow:
            yield
    finally:
        for block, forward in replaced:
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward


def _look(
    call: Call, block: nn.Module, x: Tensor, result: Any, args: tuple, named: dict[str, Any], own: Tensor, added: bool
) -> None:
    """Note what came out of a call with a copy `x` of the input `own`, or why it cannot be a reversible block's."""
    try:
        call.form = form_of(result, own, args, named, block, more=True)
        y = output_of(result)
    except (ValueError, StopIteration) as error:
        call.reason = str(error).partition(", and a reversible")[0] or f"it returns a {type(result).__name__}"
        return
    if not x.is_floating_point() or x.dim() < 2:
        call.reason = f"its input is of {x.dtype} and has {x.dim()} dimensions"
    elif y.shape != x.shape:
        call.reason = "it changes the shape of its input"
    elif y.dtype != x.dtype:
        call.reason = f"it turns {x.dtype} into {y.dtype}"
    elif y is own:
        call.reason = "it returns its input itself"
    elif not added:
        call.reason = "it does not add to its input, so it has no residual connection"


def _judge(model: nn.Module, calls: dict[nn.Module, list[Call]]) -> Probed:
    probed = Probed()
    containers: dict[str, nn.Module] = {n: c for n, c in model.named_modules() if is_container(c)}
    homes: dict[nn.Module, list[str]] = {}
    for name, container in containers.items():
        for block in dict.fromkeys(blocks_of(container).values()):
            homes.setdefault(block, []).append(name)
    for block, names in homes.items():
        if len(names) > 1 and block in calls and not find_branches(block)[0]:
            calls[block].append(Call(reason=f"it stands in {' and in '.join(names)}"))
    for name in reversed(containers):  # the inner ones first
        container = containers[name]
        runs = _runs_of(container, calls, probed.found)
        for run in runs:
            inside = {m for block in run.blocks for m in block.modules()}
            inner = {n: probed.runs[n] for n in probed.runs if containers[n] in inside}
            if not inner:
                continue
            short = sum(len(r.blocks) for rs in inner.values() for r in rs) < SHORT * sum(map(len, inner.values()))
            registered = any(r.registered for rs in inner.values() for r in rs)
            if run.registered or (short and not registered and len(run.blocks) >= LONG):
                for other in inner:
                    del probed.runs[other]
            else:
                _leave(probed, run.blocks, "the blocks inside it are reversible")
                run.blocks = []
        if runs := [run for run in runs if run.blocks]:
            probed.runs[name] = runs
    _finish(probed, containers, calls)
    return probed


def _runs_of(container: nn.Module, calls: dict[nn.Module, list[Call]], found: dict[nn.Module, Found]) -> list[Run]:
    """The runs of a container. Says of each child in `found` what it is, or why it is none."""
    children = list(blocks_of(container).values())
    runs: list[Run] = []
    before: nn.Module | None = None  # the child before, if it can be reversible
    for block in children:
        registered = bool(find_branches(block)[0])
        if block not in calls:
            before = None
            continue
        reason, continues = _place(block, before, children.count(block), calls[block])
        last = calls[block][-1] if calls[block] else Call()
        if reason and not registered:
            found[block] = Found(reason=reason)
            before = None
            continue
        found[block] = Found(
            registered=registered,
            begins=before is not None and not continues and not reason,
            copies=any(call.copies for call in calls[block]),
            samples=bool(calls[block]) and all(call.apart is not None for call in calls[block]),
            beside=last.apart or {},
            returns={} if registered else {call.kind: call.form for call in calls[block]},
        )
        if before is None or not continues:
            runs.append(Run([], registered=False, size=last.size, samples=last.samples))
        runs[-1].blocks.append(block)
        runs[-1].registered |= registered
        runs[-1].branches += max(1, len(find_branches(block)[0]))
        before = block
    return [run for run in runs if _is_taken(run, calls, found)]


def _place(block: nn.Module, before: nn.Module | None, times: int, calls: list[Call]) -> tuple[str, bool]:
    """Why a block cannot be reversible, or "", and whether it goes on with the child `before` it."""
    if not calls:
        return "the model did not call it in the probe", False
    if reason := next((call.reason for call in calls if call.reason), ""):
        return reason, False
    if times > 1:
        return f"it stands {times} times in its container", False
    if any(call.before is block for call in calls):
        return f"its own output enters it again ({len(calls)} calls share its weights)", False
    continues = {before is not None and call.before is before for call in calls}
    if len(continues) > 1:
        return "it is called after the block before it and also on its own", False
    return "", continues.pop()


def _is_taken(run: Run, calls: dict[nn.Module, list[Call]], found: dict[nn.Module, Found]) -> bool:
    """Whether a run becomes reversible; if not, says why of its blocks."""
    if run.registered:
        return True
    if len(run.blocks) > 1:
        return True
    reason = "it is alone: neither its input nor its output belongs to a block beside it, so nothing could be rebuilt"
    for block in run.blocks:
        found[block] = Found(reason=reason)
    return False


def _leave(probed: Probed, blocks: list[nn.Module], reason: str) -> None:
    for block in blocks:
        probed.found[block] = replace(Found(), reason=reason)


def _finish(probed: Probed, containers: dict[str, nn.Module], calls: dict[nn.Module, list[Call]]) -> None:
    """Leave what is inside a reversible block, and say in one line of each other container why it is no chain."""
    taken = {b for runs in probed.runs.values() for run in runs for b in run.blocks}
    inside = {m for block in taken for m in block.modules()} - taken
    for name, container in containers.items():
        children = [block for block in blocks_of(container).values() if block in calls]
        if container in inside or (name in probed.runs):
            continue
        holds = [b for b in children if any(m in taken for m in b.modules())]
        reasons = list(dict.fromkeys(probed.found[b].reason for b in children if b in probed.found and b not in holds))
        if children and reasons and not holds:
            probed.notes[name] = "; ".join(reasons[:3])
        for block in children:
            if block in probed.found and block not in taken:
                probed.found[block] = Found(reason=probed.found[block].reason or "it is inside a reversible block")


def advice_of(runs: dict[str, list[Run]], model: nn.Module, options: Options) -> tuple[str, ...]:
    """Where checkpointing each block would store less, and where one sample does not show that blocks may be cut."""
    own_bytes = next(model.parameters()).element_size()
    advice = []
    for name, of_container in runs.items():
        ours = sum(r.size * (2 * 4 + (r.branches - 1) * BITS / 8) for r in of_container)
        theirs = sum(r.size * len(r.blocks) * own_bytes for r in of_container)
        if ours > theirs:
            advice.append(
                f"{name or type(model).__name__} stores more than checkpointing of each block would (about "
                f"{ours / 2**20:.3g} and {theirs / 2**20:.3g} MiB on the probe's batch): see dr2net.checkpoint_blocks"
            )
        if options.chunk_mib is not None and any(r.samples == 1 and not r.registered for r in of_container):
            advice.append(
                f"{name or type(model).__name__} runs its blocks as a whole, as one sample in the probe's batch does "
                "not show whether samples are independent: give it two"
            )
    return tuple(advice)
