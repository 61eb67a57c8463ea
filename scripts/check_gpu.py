"""Everything about a GPU in one run: are the contracts kept there, is the plan right, how fast is it, what fits?

    bash scripts/check_gpu.sh                                       # on a machine with a card; ten minutes
    python -m scripts.check_gpu --device cpu --small --output DIR   # the same lines of code with tiny networks

    contracts   exact inversion, replayed draws, chunks, saved weights; fp32, bf16, fp16          (gpu_contracts.py)
    peaks       the plan against the allocator: ViT, Swin, Video Swin; plain, checkpointed, ours  (gpu_costs.py)
    times       a step of the same
    parallel    DDP and FSDP2, where there are two cards                                          (gpu_parallel.py)
    clips       the longest clip of Video Swin-T and -B that trains, against the plan             (gpu_costs.py)

Writes <output>/<card>.json after each part, and the page beside it from that alone. A check that fails is named and the
others go on; then the exit code is 1. After --minutes no check begins. Nobody has run it on a card yet.
"""

import argparse
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dr2net.memory import format_bytes
from engine.files import write_text
from engine.records.provenance import commit, versions
from engine.records.tables import markdown_table
from scripts import gpu_contracts, gpu_costs, gpu_parallel
from scripts.gpu_card import Card, Row, find_card

PARTS: dict[str, Callable[[Card], list[Row]]] = {
    "contracts": gpu_contracts.run,
    "peaks": gpu_costs.peaks,
    "times": gpu_costs.times,
    "parallel": gpu_parallel.run,
    "clips": gpu_costs.clips,
}
MINUTES = 8.5  # what has begun may take another one


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a check failed, 2 with one line for a device that is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no check begins later")
    parser.add_argument("--output", type=Path, default=Path("results/gpu"))
    options = parser.parse_args(arguments)
    try:
        card = find_card(options.device, options.small, options.minutes)
    except ValueError as error:
        print(f"check_gpu: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    name = re.sub(r"[^A-Za-z0-9]+", "-", card.name).strip("-")
    record: dict[str, Any] = {**facts_of(card), "parts": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about hooks inside branches and the precision of the inverse
        for part in options.parts:
            record["parts"][part] = PARTS[part](card)
            record["minutes"] = (time.monotonic() - started) / 60
            write_text(options.output / f"{name}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
            write_text(options.output / f"{name}.md", page(record))
            print(f"{part}: {summary(record['parts'][part])}", flush=True)
    for row in failures(record):
        print(f"failed: {words_of(row)}")
    print(options.output / f"{name}.md")
    return 1 if failures(record) else 0


def facts_of(card: Card) -> dict[str, Any]:
    """What it ran on."""
    cuda = card.device == "cuda"
    return {
        "card": card.name,
        "count": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "bytes": torch.cuda.get_device_properties(0).total_memory if cuda else card.budget,
        "budget": card.budget,
        "small": card.small,
        "peak_is": card.peak_is,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "versions": versions(),
    }


def failures(record: dict[str, Any]) -> list[Row]:
    return [row for rows in record["parts"].values() for row in rows if row["ok"] is False]


def words_of(row: Row) -> str:
    """Which check it was, and what was wrong."""
    names = [row[key] for key in ("net", "precision", "contract", "method", "way") if key in row]
    return f"{', '.join(names)}: {row.get('problem') or row.get('found')}"


def summary(rows: list[Row]) -> str:
    """How many of the checks passed."""
    passed, late = sum(row["ok"] is True for row in rows), sum(row["ok"] is None for row in rows)
    return f"{passed} of {len(rows)} passed" + (f", {late} not begun" if late else "")


def page(record: dict[str, Any]) -> str:
    """The Markdown page of a card, of what its JSON holds."""
    failed = "\n".join(f"- {words_of(row)}" for row in failures(record)) or "None."
    tables = "\n".join(f"## {TITLES[part]}\n\n{TABLES[part](rows)}" for part, rows in record["parts"].items() if rows)
    small = " Tiny networks: these numbers try the checks, not the device." if record["small"] else ""
    return f"""# {record["card"]}

Made by `bash scripts/check_gpu.sh` (commit {record["commit"]}, {record["minutes"]:.1f} minutes), whose Python part says
how. {format_bytes(record["bytes"])}, of which {format_bytes(record["budget"])} were free; torch
{record["versions"]["torch"]}, CUDA {record["cuda"]}. Peaks are {record["peak_is"]}.{small}

Failed:

{failed}

{tables}"""


TITLES = {
    "contracts": "Contracts of the core",
    "peaks": "Peak of a training step, planned and measured",
    "times": "Time of a training step",
    "parallel": "Two devices",
    "clips": "The longest clip that trains, in frames of a square, bfloat16, AdamW",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; a cell may hold anything that an error says."""
    return markdown_table(header, [[cell.replace("|", "/") for cell in cells] for cells in rows]) + "\n"


def of_contracts(rows: list[Row]) -> str:
    """One line per network and contract, one column per precision."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        words = row.get("found") or row["problem"]
        cells.setdefault((row["net"], row["contract"]), {})[row["precision"]] = (
            "" if row["ok"] else "FAILED: "
        ) + words
    columns = list(dict.fromkeys(row["precision"] for row in rows))
    return table(("", "contract", *columns), [(*key, *(c.get(p, "-") for p in columns)) for key, c in cells.items()])


def named(row: Row) -> list[str]:
    return [row["net"], "x".join(map(str, row["input"])), row["precision"], row["method"]]


def of_peaks(rows: list[Row]) -> str:
    header = ("", "input", "precision", "method", "planned", "measured", "measured / planned", "reserved")
    lines = []
    for row in rows:
        cells = [row.get("problem", ""), "-", "-", "-"]
        if row["ok"]:
            sizes = [format_bytes(row[key]) for key in ("planned", "measured", "reserved")]
            cells = [*sizes[:2], f"{row['measured'] / row['planned']:.3f}", sizes[2] if row["reserved"] else "-"]
        lines.append([*named(row), *cells])
    return table(header, lines)


def of_times(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        taken = row["seconds"]
        cells = [f"{1000 * statistics.median(taken):.1f}" if taken else row.get("problem", "not timed")]
        cells += [f"{row['ratio']:.2f}" if row["ratio"] else "-"]
        lines.append([*named(row), *cells])
    return table(("", "input", "precision", "method", "median ms", "/ conventional"), lines)


def of_parallel(rows: list[Row]) -> str:
    return table(("", "gradient"), [(row["way"], row.get("found") or row["problem"]) for row in rows])


def of_clips(rows: list[Row]) -> str:
    lines = [(row["net"], row["method"], str(row.get("planned", "-")), gpu_costs.shown(row)) for row in rows]
    return table(("", "method", "planned", "trains; the next that was tried, and why not"), lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "contracts": of_contracts,
    "peaks": of_peaks,
    "times": of_times,
    "parallel": of_parallel,
    "clips": of_clips,
}


if __name__ == "__main__":
    sys.exit(main())
