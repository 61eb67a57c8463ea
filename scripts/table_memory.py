"""What the planner predicts where nothing can be run here, and how near it is where something can.

    python -m scripts.table_memory [--parts vit frames] [--force] [--dry-run]

    vit        forward and backward of video ViTs, 1568 tokens, batch 16, against per-block checkpointing; no optimizer
    paper      the setting of the paper's Fig. 1 as near as we know it, beside its 44.7 and 24.1 GB
    rivals     Video Swin-T, Swin-L and ViT-L in bfloat16, also offloaded to the host, and with an 8-bit optimizer
    seconds    30 seconds of video through Video Swin-L, and 512 frames through Video Swin-T
    frames     peak against frames, Video Swin-T and Swin-L
    depth      peak against depth, a ViT of width 768
    measured   Video Swin-T, 16 frames: predicted, and counted while it really trains on the CPU (minutes)

Each part writes results/memory_<part>.json and is skipped when that is there, unless --force. From all of them, and
from the memory in the Records of every task, results/memory.md is written, with memory_frames.png and memory_depth.png.
The models are built on torch's "meta" device. All but `measured` is predicted.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dr2net
from dr2net import planner
from dr2net.console import print_table
from dr2net.memory import Memory, format_bytes, predict
from dr2net.planner import BUDGETS_GB, CHUNKED, METHODS, RIVALS, Setting
from engine.files import read_json, write_text
from engine.records.provenance import commit, versions
from engine.records.record import read_records
from engine.records.tables import markdown_table

Rows = list[dict[str, Any]]
SWIN = {  # width, blocks per stage, heads
    "Video Swin-T": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "Video Swin-L": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}
FRAMES = {"Video Swin-T": (32, 128, 512, 900), "Video Swin-L": (32, 128, 512, 900)}
DEPTHS = (6, 12, 24, 48)
FULL = [method for method in METHODS if method != "lora"]  # which trains something else
VIT_CASES = (  # name, inversion, alpha, beta, MiB of a chunk
    ("conventional", None, 1, 0, None),
    ("checkpointed", None, 1, 0, None),
    ("checkpointed, chunks", None, 1, 0, 128),
    ("reversible, float", "float", 0, 1, None),
    ("reversible, exact", "exact", 0, 1, None),
    ("reversible, exact, chunks", "exact", 0, 1, 128),
    ("dr2net, exact, beta 1/2", "exact", 1 / 2, Fraction(1, 2), None),
    ("dr2net, exact, beta 1/8", "exact", 7 / 8, Fraction(1, 8), None),
    ("dr2net, exact, beta 1/8, chunks", "exact", 7 / 8, Fraction(1, 8), 128),
    ("dr2net, exact, beta 0.1, chunks", "exact", 0.9, 0.1, 128),
    ("dr2net, exact, beta 1/64", "exact", 63 / 64, Fraction(1, 64), None),
    ("dr2net, anchored, (1, 0.1)", "anchored", 1, 0.1, None),
)


def build_vit(width: int, blocks: int) -> nn.Module:
    """VideoMAE's ViT for 16 frames of 224 x 224 in tubelets of 2 x 16 x 16: 8 x 14 x 14 tokens."""
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    with torch.device("meta"):
        return VideoMAEModel(config).train()


def build_swin(name: str, device: str = "meta") -> nn.Module:
    """torchvision's Video Swin with its classification head, of a size in SWIN; drop path 0.1."""
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    width, depths, heads = SWIN[name]
    with torch.device(device):
        return SwinTransformer3d([2, 4, 4], width, depths, heads, [8, 7, 7], stochastic_depth_prob=0.1).train()


def vit() -> Rows:
    rows = []
    for width, blocks in ((384, 12), (768, 24)):
        for name, inversion, alpha, beta, chunk_mib in VIT_CASES:
            model = build_vit(width, blocks)
            if inversion is not None:
                dr2net.convert(model, inversion=inversion, chunk_mib=chunk_mib)
                dr2net.set_coefficients(model, alpha, beta)
            elif name.startswith("checkpointed"):
                dr2net.checkpoint_blocks(model, chunk_mib=chunk_mib)

            def step(model: nn.Module = model) -> None:
                planner.loss_of(model, torch.randn(16, 16, 3, 224, 224), "fp32").backward()

            rows.append(row(f"ViT, width {width}, {blocks} blocks", name, predict(step, model)))
    return rows


def swin(name: str, frames: int, methods: list[str], setting: Setting) -> Rows:
    """One clip of 224 x 224."""
    model = build_swin(name)
    title = f"{name}, {frames} frames, {setting.precision}"
    return [
        row(title, method, planner.predictor(model, method, setting)((1, 3, frames, 224, 224)), frames=frames)
        for method in methods
    ]


def paper() -> Rows:
    settings = [Setting(precision=precision) for precision in ("fp32", "bf16")]
    return [r for frames in (512, 768) for setting in settings for r in swin("Video Swin-T", frames, FULL, setting)]


def rivals() -> Rows:
    import timm

    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch16_224").train()
    setting, methods = Setting(precision="bf16"), [*METHODS, *RIVALS]
    rows = swin("Video Swin-T", 768, methods, setting) + swin("Video Swin-L", 900, methods, setting)
    for method in methods:
        rows.append(row("ViT-L, 128 images, bf16", method, planner.predictor(vit, method, setting)((128, 3, 224, 224))))
    return rows


def seconds() -> Rows:
    rows = []
    for name, frames in (("Video Swin-L", 900), ("Video Swin-T", 512)):
        rows += swin(name, frames, FULL, Setting())
        tenth = swin(name, frames, ["dr2net, chunks"], Setting(coefficients=(0.9, 0.1)))
        rows += [{**r, "method": "dr2net, chunks, beta 0.1"} for r in tenth]
    return rows


def frames() -> Rows:
    return [
        {**r, "setting": name, "size": r["frames"]}
        for name, counts in FRAMES.items()
        for count in counts
        for r in swin(name, count, list(METHODS), Setting())
    ]


def depth() -> Rows:
    rows = []
    for blocks in DEPTHS:
        model = build_vit(768, blocks)
        for method in METHODS:
            memory = planner.predictor(model, method, Setting(options=replace(CHUNKED, chunk_mib=128)))(
                (16, 16, 3, 224, 224)
            )
            rows.append(row("ViT, width 768", method, memory, size=blocks))
    return rows


def measured() -> Rows:
    model, setting = build_swin("Video Swin-T", "cpu"), Setting(options=replace(CHUNKED, chunk_mib=32))
    rows = []
    for method in METHODS:
        predicted, counted = planner.calibrate(model, method, setting, (1, 3, 16, 224, 224), "cpu")
        rows.append(row("Video Swin-T, 16 frames, chunks of 32 MiB", method, predicted, measured=counted.peak))
        print(f"{method}: {counted.peak / predicted.peak:.4f}", flush=True)
    return rows


PARTS: dict[str, Callable[[], Rows]] = {
    part.__name__: part for part in (vit, paper, seconds, rivals, frames, depth, measured)
}


def row(setting: str, method: str, memory: Memory, **more: Any) -> dict[str, Any]:
    sizes = {key: value for key, value in asdict(memory).items() if key != "live" and value is not None}
    return {"setting": setting, "method": method, **sizes, **more}


def split_table(rows: Rows, extra: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """Peak and its split, one line per row of a part, then the columns of `extra`."""
    header = ("", "method", "peak", "parameters", "gradients", "optimizer", "stored", "temporaries", *extra)
    lines = []
    for r in rows:
        sizes = [r["peak"], r["parameters"], r["gradients"], r["optimizer"]]
        sizes += [r["activations"] - r["temporaries"], r["temporaries"]]
        cells = [column(r) for column in extra.values()]
        lines.append((r["setting"], r["method"], *map(format_bytes, sizes), *cells))
    return markdown_table(header, lines) + "\n"


def fits(peak: int) -> str:
    cards = [gb for gb in BUDGETS_GB if peak <= gb * 10**9]
    return f"{cards[0]} GB" if cards else "none"


def vit_table(rows: Rows) -> str:
    by = {(r["setting"], r["method"]): r["activations"] for r in rows}
    share = {
        f"activations / {base}": lambda r, base=base: f"{r['activations'] / by[r['setting'], base]:.3f}"
        for base in ("conventional", "checkpointed")
    }
    return split_table(rows, share)


def measured_table(rows: Rows) -> str:
    counted = {
        "measured": lambda r: format_bytes(r["measured"]),
        "measured / predicted": lambda r: f"{r['measured'] / r['peak']:.4f}",
    }
    return split_table(rows, counted)


def paper_table(rows: Rows) -> str:
    published = read_json(Path("results/published.json"), "take it from the repository again")["tasks"][
        "action_detection"
    ]
    theirs = [entry for entry in published if "Fig. 1" in entry["source"]]
    lines = [(entry["model"], entry["memory"], entry["source"]) for entry in theirs]
    ours = split_table(rows, {"peak in GB": lambda r: f"{r['peak'] / 1e9:.1f}"})
    return markdown_table(("published", "memory", "source"), lines) + "\n\n" + ours


def records_table() -> str:
    """Memory of each row of each task: one device, `run.micro_batch`; the largest of its runs."""
    lines = []
    for configs in sorted(Path().glob("*/configs.py")):
        if not (Path("results") / configs.parent).is_dir():
            continue
        records = [record for record in read_records(configs.parent.name) if record.memory]
        heaviest = {record.row: record for record in sorted(records, key=lambda record: record.memory["peak"])}
        for name in dict.fromkeys(record.row for record in records):
            m = heaviest[name].memory
            sizes = (m["peak"], m["parameters"], m["gradients"], m["optimizer"], m["activations"])
            lines.append((configs.parent.name, name, *map(format_bytes, sizes), m["source"]))
    titles = ("task", "row", "peak", "parameters", "gradients", "optimizer", "activations", "")
    return markdown_table(titles, lines) + "\n"


def page(parts: dict[str, dict[str, Any]]) -> str:
    """results/memory.md."""
    rows = {name: part["rows"] for name, part in parts.items()}
    commits = "commit " + ", ".join(sorted({part["commit"] for part in parts.values()}))
    return f"""# Memory of a training step

Made by `bash scripts/table_memory.sh` ({commits}). Live tensor bytes at the peak of forward, backward and, where not
said otherwise, AdamW. Predicted from fake tensors unless a column says measured; nothing here was run on a GPU. GB are
10^9 bytes, GiB 2^30. What the methods are: `common/dr2net/planner.py`; chunks are of 256 MiB unless a line says
otherwise. Stored: alive at the end of forward too; temporaries: not; together they are the activations.

## 30 seconds of video

Video Swin-L, 900 frames of 224 x 224, one clip, float32, AdamW: the setting of which the paper says that it is
impossible even on an A100 of 80 GB. And Video Swin-T with 512 frames. dr2net is exact inversion at (7/8, 1/8).

{split_table(rows["seconds"], {"smallest card": lambda r: fits(r["peak"])})}
![peak against frames](memory_frames.png)

## The setting of the paper's Fig. 1

Assumed, as the figure does not say it: Video Swin-T (torchvision's, its classification head instead of a detection
head), one clip of 224 x 224, 512 or 768 frames, AdamW, all weights trained; the precision is that of the branches.
Plain finetuning of 512 frames in float32 is nearest to the published 44.7 GB, which does not show that this was the
authors' setting.

{paper_table(rows["paper"])}
## Offloaded, and with an 8-bit optimizer

As `dr2net plan --rivals` predicts them. host: what forward leaves in the host's memory, by
`torch.autograd.graph.save_on_cpu`, and backward takes back, through the bus, in each step. adamw8bit: two averages of
one byte per number, with a float32 scale for each 256 (`common/dr2net/adamw8bit.py`).

{split_table(rows["rivals"], {"host": lambda r: format_bytes(r["host"]) if "host" in r else "-"})}
## Depth

A ViT of width 768, 1568 tokens, batch 16, float32, AdamW, chunks of 128 MiB.

![peak against depth](memory_depth.png)

## ViT: activations against checkpointing

1568 tokens, batch 16, float32, forward and backward; chunks of 128 MiB. Activations: stored and temporaries.

{vit_table(rows["vit"])}
## Predicted against measured

One step of a real training on the CPU, live tensor bytes counted while it runs.

{measured_table(rows["measured"])}
## Every row of every task

From the Records: one device, one forward of `run.micro_batch`. Predicted rows are not run.

{records_table()}"""


def curves(rows: Rows, setting: str) -> dict[str, list[tuple[float, float]]]:
    """Method -> [(size, peak)]."""
    chosen = [r for r in rows if r["setting"] == setting]
    return {m: [(r["size"], r["peak"]) for r in chosen if r["method"] == m] for m in METHODS}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--force", action="store_true", help="predict again what is there")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the precision of the inverse is not the subject here
    files = {name: options.output / f"memory_{name}.json" for name in PARTS}
    for name in options.parts:
        if files[name].exists() and not options.force:
            print(f"{name}: there already, skipped")
        elif options.dry_run:
            print(f"{name}: would write {files[name]}")
        else:
            rows = PARTS[name]()
            record = {"commit": commit(), "versions": versions(), "rows": rows}
            write_text(files[name], json.dumps(record, indent=1) + "\n")
            cells = [
                (f"{r['setting']}, {r['method']}", *map(format_bytes, (r["peak"], r["activations"]))) for r in rows
            ]
            print_table((name, "peak", "activations"), cells)
    missing = [name for name, file in files.items() if not file.exists()]
    if missing or options.dry_run:
        print(
            f"{options.output / 'memory.md'}: " + (f"waits for {', '.join(missing)}" if missing else "would be written")
        )
        return
    parts = {name: read_json(file, "measure it again") for name, file in files.items()}
    panels = [(f"frames, {name}", curves(parts["frames"]["rows"], name)) for name in SWIN]
    title = "one clip of 224 x 224, float32, AdamW, predicted"
    planner.draw(options.output / "memory_frames.png", panels, title)
    deep = curves(parts["depth"]["rows"], "ViT, width 768")
    lean = {method: curve for method, curve in deep.items() if method not in ("conventional", "lora")}
    panels = [("blocks", deep), ("blocks: the lean methods", lean)]
    title = "ViT of width 768, 1568 tokens, batch 16, float32, AdamW, predicted"
    planner.draw(options.output / "memory_depth.png", panels, title)
    write_text(options.output / "memory.md", page(parts))
    for name in ("memory.md", "memory_frames.png", "memory_depth.png"):
        print(options.output / name)


if __name__ == "__main__":
    main()
