"""Time against memory of a ViT-S: what the dial `keep` of Dr2Net and of checkpointing buys, predicted and measured.

    python -m scripts.table_dial [--batch 8] [--rounds 5] [--threads 1]

For each method and number of kept branches: the predicted peak, the predicted time of a step over the conventional one
(`dr2net.work`, its rate calibrated on one measured pair: conventional, and Dr2Net with nothing kept), and the measured
time, forward, backward and optimizer, methods taking turns. Writes results/dial.json, dial.md and dial.png.
"""

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dr2net import planner, work
from dr2net.planner import Setting
from dr2net.styles import STYLES
from engine.files import appearing, write_text
from engine.records.provenance import commit, device_name, versions
from engine.records.tables import markdown_table

BRANCHES = 24  # of a ViT-S
CASES = [
    ("conventional", 0),
    *(("checkpointed", keep) for keep in (0, 8, 16)),
    *(("dr2net", keep) for keep in (0, 6, 12, 18, BRANCHES)),
]


def build() -> nn.Module:
    """A ViT-S in training mode, random weights."""
    import timm

    return timm.create_model("vit_small_patch16_224").train()


def setting_of(keep: int) -> Setting:
    """Whole branches, float32, AdamW, (7/8, 1/8)."""
    return Setting(options=replace(planner.CHUNKED, keep=keep, chunk_mib=None, recompute_rest=False))


def steps(plain: nn.Module, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """For each case its name, model, step, and what is predicted of it."""
    found = []
    for method, keep in CASES:
        setting, model = setting_of(keep), copy.deepcopy(plain)
        planner.apply(model, method, setting)
        optimizer = planner.build_optimizer(model, setting)
        step = planner.training_step(model, optimizer, shape, "fp32", "cpu")
        peak = planner.predictor(plain, method, setting, like="cpu")(shape).peak
        own = work.count(step, model, optimizer)
        found.append({"method": method, "keep": keep, "step": step, "peak": peak, "work": own})
    return found


def measure(found: list[dict[str, Any]], rounds: int) -> None:
    """Adds `ratio`, the median over the rounds of a step's time over the conventional one's in the same round."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: list[list[float]] = [[] for _ in found]
    for turn in range(rounds + 1):
        for case, times in zip(found, seconds, strict=True):
            started = now()
            case["step"]()
            if turn:  # the first round warms up
                times.append(now() - started)
        print(f"round {turn} of {rounds}", flush=True)
    for case, times in zip(found, seconds, strict=True):
        case["seconds"] = times
        case["ratio"] = statistics.median(a / b for a, b in zip(times, seconds[0], strict=True))


def predict_times(found: list[dict[str, Any]]) -> float:
    """Adds `predicted`; returns the rate, from the conventional step and Dr2Net's with nothing kept."""
    plain, ours = (
        next(c for c in found if (c["method"], c["keep"]) == (name, 0)) for name in ("conventional", "dr2net")
    )
    medians = [statistics.median(case["seconds"]) for case in (plain, ours)]
    rate = work.flops_per_byte(plain["work"], medians[0], ours["work"], medians[0] * ours["ratio"])
    for case in found:
        case["predicted"] = case["work"].time(rate) / plain["work"].time(rate)
    return rate


def draw(path: Path, found: list[dict[str, Any]]) -> None:
    """Time against memory; the line joins what no other setting beats in both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    points = sorted((case["peak"] / 2**20, case["ratio"]) for case in found)
    best = [p for k, p in enumerate(points) if all(p[1] < q[1] for q in points[:k])]
    axes.plot(*zip(*best, strict=True), color="#bbbbbb", linewidth=4, zorder=0, label="nothing is better in both")
    for method in dict.fromkeys(case["method"] for case in found):
        own = sorted((case for case in found if case["method"] == method), key=lambda case: case["keep"])
        style = STYLES[method]
        sizes, ratios = [case["peak"] / 2**20 for case in own], [case["ratio"] for case in own]
        axes.plot(sizes, ratios, "-", marker=style.marker, color=style.color, label=method, linewidth=1.2)
        for case, x, y in zip(own, sizes, ratios, strict=True):
            if len(own) > 1:
                axes.annotate(f"{case['keep']}", (x, y), (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="predicted peak of a step, MiB", ylabel="time of a step / conventional")
    axes.set_title("ViT-S: numbers are the branches that keep their insides", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with appearing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def table(found: list[dict[str, Any]]) -> str:
    """As Markdown."""
    rows = [
        (c["method"], str(c["keep"]), f"{c['peak'] / 2**20:.0f}", f"{c['predicted']:.2f}", f"{c['ratio']:.2f}")
        for c in found
    ]
    return markdown_table(("method", "branches kept", "peak, MiB", "time, predicted", "time, measured"), rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = (options.batch, 3, 224, 224)
    found = steps(build(), shape)
    measure(found, options.rounds)
    rate = predict_times(found)
    text = table(found)
    print(text)
    facts = {"device": device_name(torch.device("cpu")), "versions": versions(), "commit": commit()}
    cases = [{key: value for key, value in case.items() if key not in ("step", "work")} for case in found]
    for case, own in zip(cases, found, strict=True):
        case |= {"flops": own["work"].flops, "bytes": own["work"].bytes}
    record = {**facts, "model": "vit_small_patch16_224", "input": shape, "flops_per_byte": rate, "cases": cases}
    write_text(options.output / "dial.json", json.dumps(record, indent=1) + "\n")
    intro = (
        f"# The dial between memory and time\n\nA ViT-S, batch {options.batch}, float32, AdamW, one CPU thread; a row "
        "per method and number of branches (of 24) that keep their insides. Made by `python -m scripts.table_dial`; "
        f"the rate of the prediction, {rate:.1f} FLOPs per byte, is from the first row and Dr2Net's first.\n\n"
    )
    write_text(options.output / "dial.md", f"{intro}{text}\n\n![time against memory](dial.png)\n")
    draw(options.output / "dial.png", found)


if __name__ == "__main__":
    main()
