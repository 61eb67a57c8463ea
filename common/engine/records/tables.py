"""Tables and figures from Records; every number shown comes from a file in `results/`, an empty cell is a dash.

    python -m engine.records.tables publish action_recognition    # runs/ -> results/, then as the next
    python -m engine.records.tables show action_recognition       # print the table; results/README.md, the figures

A group is the rows that differ only in how they are finetuned: `motion_vits_conventional`, `motion_vits_dr2net`, ...,
and behind them variants of a method, `motion_vits_dr2net_constant_1_4`, which the figure leaves out. Metrics are mean
and standard deviation over seeds (n - 1 below the root); of all but the first metric the mean alone.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from dr2net.styles import STYLES
from engine.command_line import parse, run_command
from engine.config import METHODS
from engine.files import appearing, read_json, write_text
from engine.records.record import Record, publish, read_records, read_runs
from engine.settings import Settings

DASH = "-"
MIB = 2**20
COLUMNS = ("row", "method", "{metric}", "peak MiB", "activations MiB", "s/step", "gradient error", "seeds", "status")


@dataclass(frozen=True)
class Line:
    """One row of a table: the runs of one row of the task, summarised over seeds. None: not measured."""

    row: str
    group: str  # the row's name before _<method>
    setting: str  # the row's name behind it; "" for the method's own row
    method: str
    status: str
    num_seeds: int
    metric: str | None  # name of the first metric
    mean: float | None
    std: float | None  # None with one seed
    further: dict[str, float]  # means of the other metrics
    peak: float | None  # bytes, largest over seeds
    activations: float | None
    predicted: bool  # memory from the planner, not from a run
    step_seconds: float | None
    gradient_error: float | None  # largest that was measured


def summarise(runs: list[Record]) -> Line:
    """The Line of the runs of one row."""
    first = runs[0]
    group, _, setting = first.row.partition(f"_{first.method}")
    metric = next(iter(first.metrics), None)
    values = [run.metrics[metric] for run in runs] if metric is not None else []
    peaks = [run.memory for run in runs if run.memory]
    heaviest = max(peaks, key=lambda memory: memory["peak"]) if peaks else None
    steps = [run.seconds["step"] for run in runs if "step" in run.seconds]
    errors = [entry["error"] for run in runs for entry in run.gradient_checks]
    return Line(
        row=first.row,
        group=group,
        setting=setting.removeprefix("_"),
        method=first.method,
        status=first.status,
        num_seeds=len(values),
        metric=metric,
        mean=statistics.fmean(values) if values else None,
        std=statistics.stdev(values) if len(values) > 1 else None,
        further={
            name: statistics.fmean(run.metrics[name] for run in runs)
            for name in list(first.metrics)[1:]
            if all(name in run.metrics for run in runs)
        },
        peak=heaviest["peak"] if heaviest else None,
        activations=heaviest["activations"] if heaviest else None,
        predicted=heaviest is not None and heaviest["source"] == "predicted",
        step_seconds=statistics.median(steps) if steps else None,
        gradient_error=max(errors) if errors else None,
    )


def group_lines(records: list[Record]) -> dict[str, list[Line]]:
    """Lines by group, those that ran before those that did not: the methods in their usual order, then the variants."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record.row, []).append(record)
    groups: dict[str, list[Line]] = {}
    for runs in rows.values():
        line = summarise(runs)
        groups.setdefault(line.group, []).append(line)
    for lines in groups.values():
        lines.sort(key=lambda line: (bool(line.setting), METHODS.index(line.method)))
    ran = {group: any(line.mean is not None for line in lines) for group, lines in groups.items()}
    return dict(sorted(groups.items(), key=lambda item: (not ran[item[0]], item[0])))


def further_metrics(lines: list[Line]) -> list[str]:
    """Names of the metrics behind the first, in the order in which they come."""
    return list(dict.fromkeys(name for line in lines for name in line.further))


def cells(line: Line, further: Sequence[str] = ()) -> list[str]:
    """The texts of a line, in the order of COLUMNS; those of further metrics behind the first."""
    mark = " (predicted)" if line.predicted else ""
    metric = DASH
    if line.mean is not None:
        metric = f"{line.mean:.1f}" + (f" ± {line.std:.1f}" if line.std is not None else "")
    return [
        line.row,
        STYLES[line.method].title if not line.setting else line.row.removeprefix(f"{line.group}_"),
        metric,
        *(f"{line.further[name]:.1f}" if name in line.further else DASH for name in further),
        DASH if line.peak is None else mebibytes(line.peak) + mark,
        DASH if line.activations is None else mebibytes(line.activations) + mark,
        DASH if line.step_seconds is None else f"{line.step_seconds:.3g}",
        DASH if line.gradient_error is None else f"{line.gradient_error:.1e}",
        str(line.num_seeds) if line.num_seeds else DASH,
        line.status,
    ]


def mebibytes(size: float) -> str:
    """Bytes in MiB with at least three digits."""
    return f"{size / MIB:,.0f}" if size >= 100 * MIB else f"{size / MIB:.3g}"


def headers(lines: list[Line]) -> list[str]:
    """Column titles; a metric's column has its name."""
    metric = next((line.metric for line in lines if line.metric), "metric")
    row, method, first, *rest = [column.format(metric=metric) for column in COLUMNS]
    return [row, method, first, *further_metrics(lines), *rest]


def print_table(records: list[Record], console: Console | None = None) -> None:
    """The tables of a task on the terminal, one per group."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=160))
    if not records:
        console.print("no Records yet: train the rows, then publish them")
    for group, lines in group_lines(records).items():
        table = Table(title=group, box=box.SIMPLE_HEAD)
        for title in headers(lines)[1:]:
            table.add_column(title, justify="left" if title == "method" else "right")
        for line in lines:
            table.add_row(*cells(line, further_metrics(lines))[1:])
        console.print(table)


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def readme(results: Path) -> str:
    """The text of results/README.md."""
    published = read_json(results / "published.json", "take it from the repository again")
    folders = {path.name for path in results.iterdir() if path.is_dir()}
    parts = [
        "# Results",
        "Generated by `python -m engine.records.tables show <task>` from the Records in this folder; do not edit.",
        "Metrics: mean over seeds, of the first also the standard deviation. Memory: peak bytes of live tensors in one "
        "optimizer step at the row's micro batch (examples: of 128 samples), on the device of the Record; "
        '"predicted" is counted with fake tensors, without a run. Gradient error: largest relative error of the '
        "reversible gradient against stored activations that was measured; a dash for methods that do not invert. "
        "Status: `tiny` and `partial` rows "
        "are not comparable with published numbers; `not run` rows were only planned.",
    ]
    for task in [*published["tasks"], *sorted(folders - published["tasks"].keys())]:
        parts.append(f"## {task}")
        groups = group_lines(read_records(task, results))
        if not groups:
            parts.append("No Records yet.")
        for group, lines in groups.items():
            parts.append(f"### {group}")
            parts.append(markdown_table(headers(lines), [cells(line, further_metrics(lines)) for line in lines]))
            if has_figure(lines):
                parts.append(f"![{group}: metric against peak memory]({task}/{group}.png)")
        if task in published["tasks"]:
            parts += ["### Published by others", published_table(published["tasks"][task])]
    return "\n\n".join(parts) + "\n"


def published_table(entries: list[dict[str, Any]]) -> str:
    """The quotable numbers of others; a dash where none is available."""
    titles = ["data", "model", "metric", "value", "memory", "source"]
    return markdown_table(titles, [[entry[title] or DASH for title in titles] for entry in entries])


def trained(lines: list[Line]) -> list[Line]:
    """The methods of a group that were trained, variants aside."""
    return [line for line in lines if not line.setting and line.mean is not None and line.peak is not None]


def has_figure(lines: list[Line]) -> bool:
    """Whether at least two methods of a group were trained."""
    return len(trained(lines)) > 1


def draw(group: str, lines: list[Line], path: Path) -> None:
    """Metric against peak memory of the trained rows of a group, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    shown = trained(lines)
    for line in shown:
        title, color, marker = STYLES[line.method]
        assert line.peak is not None and line.mean is not None, "of a trained row"
        axes.errorbar(
            line.peak / MIB,
            line.mean,
            yerr=line.std,
            color=color,
            marker=marker,
            markersize=11 if marker == "*" else 7,
            capsize=3,
            linestyle="none",
            label=f"{title}  {line.mean:.1f}, {mebibytes(line.peak)} MiB",
        )
    counts = sorted({line.num_seeds for line in shown})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    spread = f", mean and standard deviation of {seeds} seeds" if counts[-1] > 1 else ", one seed"
    axes.set_title(f"{group}{spread}", fontsize=10, loc="left")
    axes.set_xlabel("peak memory of a training step (MiB)")
    axes.set_ylabel(headers(shown)[2])
    axes.set_xlim(left=0)
    axes.margins(x=0.08, y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, numpoints=1)
    with appearing(path) as temporary:
        figure.savefig(temporary)


def write_all(results: Path) -> list[Path]:
    """Draw every group that was trained and regenerate README.md; returns the files written."""
    written = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        for group, lines in group_lines(read_records(folder.name, results)).items():
            if has_figure(lines):
                written.append(folder / f"{group}.png")
                draw(group, lines, written[-1])
    written.append(results / "README.md")
    write_text(written[-1], readme(results))
    return written


@dataclass(frozen=True)
class Arguments(Settings):
    """Print the table of a task, write the figures and results/README.md anew."""

    do: tyro.conf.Positional[Literal["show", "publish"]]  # publish: copy the finished runs into results/ first
    task: tyro.conf.Positional[str]
    runs: Path = Path("runs")
    results: Path = Path("results")


def main(words: list[str]) -> None:
    """The command line of this module."""
    arguments = parse(Arguments, words)
    if arguments.do == "publish":
        publish(read_runs(arguments.task, arguments.runs), arguments.results)
    print_table(read_records(arguments.task, arguments.results))
    for path in write_all(arguments.results):
        print(path)


if __name__ == "__main__":
    run_command(main)
