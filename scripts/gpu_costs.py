"""Peak memory against the plan, step time, and the longest clip that trains, on a card: a part of `check_gpu.py`.

The peak is the allocator's during the second step of a training, without what was allocated before it was built; the
plan counts live tensors (`dr2net.memory`), so the ratio says what kernels and the allocator's rounding add. Times: the
methods take turns, the ratio is the median over the rounds of that to conventional finetuning in the same round. The
longest clip is planned with `dr2net.memory.largest` for all that was free on the card, then found by trying.
"""

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

from dr2net import memory, planner
from dr2net.options import Options
from scripts.gpu_card import Card, Row, attempt, empty, reason_of
from scripts.gpu_nets import KINDS, build, video_swin

METHODS = ("conventional", "checkpointed", "checkpointed, chunks", "dr2net", "dr2net, chunks")
CLIPS = ("dr2net, chunks", "checkpointed, chunks", "checkpointed", "conventional")  # the time may be up
ROUNDS = 5
CLIP_SECONDS = 75  # for the tries of one clip
RESOLUTION = 50  # the longest clip is found to one part in so many
FRAMES = 16  # clips grow by so many


def setting_of(card: Card, precision: str) -> planner.Setting:
    """Small networks are cut into chunks too."""
    return planner.Setting(precision, options=Options(chunk_mib=0.25 if card.small else 256, recompute_rest=True))


def peaks(card: Card) -> list[Row]:
    """One row per network, precision and method: bytes planned and measured."""
    rows = []
    for kind in KINDS:
        model, shape = build(kind, small=card.small)
        for precision in planner.PRECISIONS:
            for method in METHODS:
                names = {"net": kind, "input": list(shape), "precision": precision, "method": method}

                def check(model=model, shape=shape, precision=precision, method=method) -> Row:
                    return peak(card, model, method, precision, shape)

                rows.append(attempt(card, names, check))
    return rows


def peak(card: Card, model: nn.Module, method: str, precision: str, shape: tuple[int, ...]) -> Row:
    empty()
    before = torch.cuda.memory_allocated()
    predicted, measured = planner.calibrate(model, method, setting_of(card, precision), shape, card.device)
    found = measured.peak if measured.device is None else measured.device - before
    return {
        "ok": True,
        "planned": predicted.peak,
        "measured": found,
        "counted": measured.peak,
        "reserved": torch.cuda.max_memory_reserved(),
    }


def times(card: Card) -> list[Row]:
    """One row per network, precision and method: seconds of each round."""
    rows = []
    for kind in KINDS:
        for precision in planner.PRECISIONS:
            rows += turns(card, kind, precision)
            empty()
    return rows


def turns(card: Card, kind: str, precision: str) -> list[Row]:
    plain, shape = build(kind, small=card.small)
    steps: dict[str, Callable[[], None]] = {}
    rows = {}
    for method in METHODS:
        names = {"net": kind, "input": list(shape), "precision": precision, "method": method, "seconds": []}

        def check(method=method) -> Row:
            step = steps[method] = step_of(card, plain, method, precision, shape)[1]
            seconds_of(card, step)  # warms up
            return {"ok": True}

        rows[method] = attempt(card, names, check)
    running = [method for method, row in rows.items() if row["ok"]]
    for turn in range(ROUNDS if running and not card.late() else 0):
        for method in running[turn % len(running) :] + running[: turn % len(running)]:
            rows[method]["seconds"].append(seconds_of(card, steps[method]))
    base = rows["conventional"]["seconds"]
    for row in rows.values():
        ratios = [a / b for a, b in zip(row["seconds"], base, strict=False)]
        row["ratio"] = statistics.median(ratios) if ratios else None
    return list(rows.values())


def step_of(
    card: Card, plain: nn.Module, method: str, precision: str, shape: tuple[int, ...]
) -> tuple[nn.Module, Callable[[], None], torch.optim.Optimizer]:
    """A copy of the model on the card, made ready for the method, its training step and its optimizer."""
    model = copy.deepcopy(plain)
    planner.apply(model, method, setting_of(card, precision))
    model.to(card.device)
    optimizer = planner.OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    return model, planner.training_step(model, optimizer, shape, precision, card.device), optimizer


def seconds_of(card: Card, step: Callable[[], None]) -> float:
    synchronize = torch.get_device_module(card.device).synchronize
    synchronize()
    started = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - started


def clips(card: Card) -> list[Row]:
    """One row per Video Swin and method: frames planned and frames that train, bfloat16."""
    rows = []
    for size in ("tiny",) if card.small else ("T", "B"):
        model = video_swin(size)
        for method in CLIPS:
            names = {"net": f"Video Swin-{size}", "precision": "bf16", "method": method}
            rows.append(attempt(card, names, lambda model=model, method=method: clip(card, model, method)))
    return rows


def clip(card: Card, plain: nn.Module, method: str) -> Row:
    side = 56 if card.small else 224
    setting = setting_of(card, "bf16")
    predict_at = planner.predictor(plain, method, setting)
    planned = memory.largest(lambda n: predict_at((1, 3, n * FRAMES, side, side)).peak, card.budget)
    model, _, optimizer = step_of(card, plain, method, "bf16", (1, 3, FRAMES, side, side))
    tries: list[tuple[int, str]] = []
    ends = min(card.ends, time.monotonic() + CLIP_SECONDS)

    def fits(n: int) -> bool:
        step = planner.training_step(model, optimizer, (1, 3, n * FRAMES, side, side), "bf16", card.device)
        refusal = ""
        try:
            counted = memory.measure(step, model, optimizer).peak
            if card.device == "cpu" and counted > card.budget:
                raise torch.OutOfMemoryError("more is counted than the budget of the CPU that plays a card")
        except torch.OutOfMemoryError:
            refusal = "out of memory"
        except RuntimeError as error:  # an operator that takes no tensor so large
            refusal = reason_of(error)
        optimizer.zero_grad()
        empty()  # outside except, where the error still holds what was on the card
        tries.append((n * FRAMES, refusal or "trains"))
        return not refusal

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not fits(1):  # makes the optimizer's state, too
            return {
                "ok": False,
                "problem": f"not even {FRAMES} frames train: {tries[0][1]}",
                "planned": planned * FRAMES,
            }
        low, high = longest(fits, max(1, planned), lambda: time.monotonic() > ends)
    return {
        "ok": True,
        "planned": planned * FRAMES,
        "trains": low * FRAMES,
        "refused": None if high is None else high * FRAMES,
        "why": next((why for frames, why in tries if high is not None and frames == high * FRAMES), None),
        "tries": tries,
    }


def longest(fits: Callable[[int], bool], start: int, late: Callable[[], bool]) -> tuple[int, int | None]:
    """(the largest n known to fit, the smallest known not to): one part in RESOLUTION apart, unless it gets late.

    1 fits. From start in growing steps until one is refused, then by halving.
    """
    low, high, n, stride = 1, None, start, max(1, start // 16)
    while not late() and (high is None or high - low > max(1, low // RESOLUTION)):
        if fits(n):
            low = max(low, n)
            n, stride = low + stride, 2 * stride
        else:
            high = n
        if high is not None:
            down = high - stride
            n = (low + high) // 2 if low > 1 or down <= low else down
            stride *= 2
    return low, high


def shown(row: Row) -> str:
    """What a row of `clips` found, in words."""
    if not row["ok"]:
        return row["problem"]
    if row["refused"] is None:
        return f"at least {row['trains']}: the time was up"
    exact = row["refused"] - row["trains"] <= max(FRAMES, math.ceil(row["trains"] / RESOLUTION))
    return f"{row['trains']}{'' if exact else ' (the time was up)'}; {row['refused']}: {row['why']}"
