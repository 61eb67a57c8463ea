"""The schedule ablation of action recognition: accuracy against what the exact inversion stores.

    bash scripts/table_schedule.sh             # trains the rows, publishes them, then runs
    python -m action_recognition.table_schedule           # results/action_recognition/schedule.{md,png} of the Records
    python -m action_recognition.table_schedule --train [--seeds 0 1 2]         # trains what is not finished first

Stored bits are counted per element of the stream and per branch, at the moment of the schedule that stores most.
"""

import argparse
import itertools
import shlex
import subprocess
import sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

from action_recognition.configs import ROWS, SETTINGS
from dr2net.exact import rational, remainder_bits
from engine.config import Finetuning
from engine.files import appearing, write_text
from engine.records.record import Record, read_records
from engine.records.tables import DASH, Line, markdown_table, mebibytes, summarise
from engine.rows import find_row, run_rows
from engine.training.finetuning import coefficients, inverts
from engine.visual import OKABE_ITO

FAMILY = "motion_vits"
REFERENCES = ("conventional", "reversible")  # trained with the same seeds
NAMES = (*REFERENCES, "dr2net", "dr2net_float", *(f"dr2net_{setting}" for setting in SETTINGS))
SETTING_ROWS = [f"{FAMILY}_{name}" for name in NAMES]
SHOWN = [*SETTING_ROWS, f"{FAMILY}_checkpointed"]  # the last if reproduce.sh has trained it
CHECKPOINTING_BITS = 32 / 2  # a float32 block input for two branches
GROUPS = (  # legend, setting, color of Okabe and Ito, marker, filled
    (
        "constant (1 - beta, beta), named by beta;\nbold: the row motion_vits_dr2net",
        None,
        OKABE_ITO["green"],
        "o",
        True,
    ),
    ("convex, (.9, .1) to (.3, .7)", "convex_moving", OKABE_ITO["blue"], "s", True),
    ("authors, to (.4, .7), together", "authors_together_04_07", OKABE_ITO["orange"], "^", True),
    ("authors, to (.4, .7), alternating", "authors_alternating_04_07", OKABE_ITO["orange"], "^", False),
    ("authors, to (0, 1), together", "authors_together_0_1", OKABE_ITO["purple"], "D", True),
    ("authors, to (0, 1), alternating", "authors_alternating_0_1", OKABE_ITO["purple"], "D", False),
    ("float inverse, to (.4, .7)", "float", OKABE_ITO["sky"], "X", True),
)
REFERENCE_COLORS = {"conventional": OKABE_ITO["black"], "reversible": OKABE_ITO["vermilion"]}
SPACING = 0.13  # between settings that store the same number of bits


def stored_bits(finetuning: Finetuning) -> float | None:
    """Bits per element and branch, the most over the schedule; None for a method that keeps all activations."""
    if finetuning.method == "checkpointed":
        return CHECKPOINTING_BITS
    if not inverts(finetuning):
        return None
    if finetuning.options.inversion == "float":
        return 0
    return max(remainder_bits(_beta(finetuning, k / 100)) for k in range(101))


def _beta(finetuning: Finetuning, progress: float) -> Fraction:
    beta = coefficients(finetuning, progress)[1]
    assert beta is not None, "of a method that inverts"
    return rational(beta)


def _mean(line: Line) -> float:
    assert line.mean is not None, "of a trained row"
    return line.mean


def describe(finetuning: Finetuning) -> str:
    """The coefficients in words."""
    schedule = finetuning.schedule
    if schedule is None:
        return DASH
    start, end = (f"({alpha:.4g}, {beta:.4g})" for alpha, beta in (schedule.start, schedule.end))
    return start if start == end else f"{start} to {end} at {schedule.until:g}, {schedule.path}"


def is_constant(finetuning: Finetuning) -> bool:
    """Whether the coefficients rest throughout."""
    return finetuning.schedule is not None and finetuning.schedule.start == finetuning.schedule.end


def collect(records: Iterable[Record]) -> list[tuple[Line, Finetuning]]:
    """The trained rows in the order of SHOWN, summarised over seeds."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        if record.metrics:
            runs.setdefault(record.row, []).append(record)
    return [(summarise(runs[name]), find_row(ROWS, name).finetuning) for name in SHOWN if name in runs]


def markdown(found: list[tuple[Line, Finetuning]]) -> str:
    """The text of schedule.md."""
    titles = ["row", "(alpha, beta)", "inversion", found[0][0].metric or "metric", "seeds", "gradient error"]
    titles += ["stored bits", "peak MiB", "s/step"]
    rows = []
    for line, finetuning in found:
        bits = stored_bits(finetuning)
        rows.append(
            [
                line.row.removeprefix(f"{FAMILY}_"),
                describe(finetuning),
                finetuning.options.inversion if inverts(finetuning) else DASH,
                f"{line.mean:.1f}" + (f" ± {line.std:.1f}" if line.std is not None else ""),
                str(line.num_seeds),
                DASH if line.gradient_error is None else f"{line.gradient_error:.1e}",
                DASH if bits is None else f"{bits:g}",
                DASH if line.peak is None else mebibytes(line.peak),
                DASH if line.step_seconds is None else f"{line.step_seconds:.3g}",
            ]
        )
    return "\n\n".join(
        [
            f"# Schedule ablation, {FAMILY}",
            "Generated by `bash scripts/table_schedule.sh` from the Records in this folder; do not edit. Metric: mean "
            "± standard deviation over seeds. Gradient error: the largest that was measured, against stored "
            "activations. Stored bits: per element of the stream and branch, at the moment of the schedule that stores "
            f"most; for comparison, checkpointing each block in float32 stores 32 bits for two branches, "
            f"{CHECKPOINTING_BITS:g} per branch. Peak: live tensor bytes of the heaviest step measured.",
            markdown_table(titles, rows),
            "![accuracy against stored bits](schedule.png)\n",
        ]
    )


def draw(found: list[tuple[Line, Finetuning]], path: Path) -> None:
    """Accuracy against stored bits as a PNG; settings that store the same stand side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    lines = {line.row.removeprefix(f"{FAMILY}_").removeprefix("dr2net_"): (line, f) for line, f in found}
    for name in REFERENCES:
        if name in lines:
            line, mean, color = lines[name][0], _mean(lines[name][0]), REFERENCE_COLORS[name]
            label = f"{name}, (0, 1)" if name == "reversible" else name
            axes.axhline(mean, color=color, linewidth=1.2, label=f"{label}  {mean:.1f}")
            if line.std:
                axes.axhspan(mean - line.std, mean + line.std, color=color, alpha=0.1, linewidth=0)

    names = [name for name in ("dr2net", *SETTINGS, "float") if name in lines]
    constant = [name for name in names if is_constant(lines[name][1])]
    names = [*constant, *(name for name in names if name not in constant)]
    places = places_of([(name, stored_bits(lines[name][1]) or 0) for name in names])  # all of them invert
    for label, setting, color, marker, filled in GROUPS:
        names = sorted(constant, key=lambda name: places[name]) if setting is None else [setting]
        names = [name for name in names if name in places]
        if not names:
            continue
        means = [_mean(lines[name][0]) for name in names]
        axes.errorbar(
            [places[name] for name in names],
            means,
            yerr=[lines[name][0].std or 0 for name in names],
            color=color,
            marker=marker,
            markersize=7,
            markerfacecolor=color if filled else "white",
            linestyle="-" if setting is None else "none",
            linewidth=0.8,
            capsize=2.5,
            elinewidth=1,
            label=label if setting is None else f"{label}  {means[0]:.1f}",
        )
        if setting is None:
            for index, (name, mean) in enumerate(zip(names, means, strict=True)):
                side = 1 if index % 2 == 0 else -1  # above to the right, below to the left: neighbors would overlap
                axes.annotate(
                    "/".join(name.split("_")[1:]) or str(_beta(lines[name][1], 0.0)),
                    (places[name], mean + side * (lines[name][0].std or 0)),
                    (-6 * side, 9 * side),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="center",
                    fontsize=8,
                    fontweight="bold" if name == "dr2net" else "normal",
                    color=color,
                )
    ticks = sorted({round(place) for place in places.values()})
    for left, right in itertools.pairwise(ticks):
        axes.axvline((left + right) / 2, color="#000000", alpha=0.06, linewidth=0.8)
    axes.set_xticks(ticks)
    seeds = sorted({line.num_seeds for line, _ in lines.values()})
    count = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
    spread = "one seed" if seeds == [1] else f"mean and standard deviation of {count} seeds"
    axes.set_title(f"coefficients of {FAMILY}_dr2net, {spread}", fontsize=9, loc="left")
    axes.set_xlabel(
        "stored bits per element and branch, the most over the schedule\n"
        f"(float32 checkpointing of each block: {CHECKPOINTING_BITS:g})"
    )
    axes.set_ylabel(found[0][0].metric or DASH)
    axes.margins(x=0.05, y=0.1)
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, numpoints=1)
    with appearing(path) as temporary:
        figure.savefig(temporary)


def places_of(bits: list[tuple[str, float]]) -> dict[str, float]:
    """The x of each setting: its bits, moved aside where several settings store the same number."""
    together: dict[float, list[str]] = {}
    for name, number in bits:
        together.setdefault(number, []).append(name)
    return {
        name: number + SPACING * (index - (len(names) - 1) / 2)
        for number, names in together.items()
        for index, name in enumerate(names)
    }


def train_rows(seeds: list[int], dry_run: bool, results: Path) -> None:
    """Train what is not finished, and publish it."""
    prepare = [sys.executable, "-m", "action_recognition.prepare", "--preset", "laptop"]
    print("+", shlex.join(["python", *prepare[1:]]), flush=True)
    if not dry_run:
        subprocess.run(prepare, check=True, stdin=subprocess.DEVNULL)
    configs = [find_row(ROWS, name) for name in SETTING_ROWS]
    run_rows("action_recognition", configs, seeds=seeds, dry_run=dry_run, results=results)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train the rows that are not finished first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dry-run", action="store_true", help="with --train: print the commands only")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    if options.train:
        train_rows(options.seeds, options.dry_run, options.results)
        if options.dry_run:
            return
    found = collect(read_records("action_recognition", options.results))
    if not found:
        parser.error(f"no Record of {FAMILY} in {options.results}; run bash scripts/table_schedule.sh")
    folder = options.results / "action_recognition"
    write_text(folder / "schedule.md", markdown(found))
    draw(found, folder / "schedule.png")
    print(markdown(found))


if __name__ == "__main__":
    main()
