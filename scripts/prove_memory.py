"""A finetuning step that plain training cannot do in the memory there is, and the reversible one can. For real.

    python -m scripts.prove_memory [--gib 3 1.5] [--frames 40] [--methods conventional "dr2net, chunks"]

Each method trains in a process of its own, whose address space the operating system limits (RLIMIT_AS) to what the
process has mapped before it builds the model (interpreter, torch and its libraries, thread stacks) plus --gib. The
model is VideoMAE's ViT-B, random weights, 224 x 224 in tubelets of 2 x 16 x 16: 98 tokens per frame, one clip, float32.
The optimizer's state is there before the step, as in all steps of a training but the first; the step is forward,
backward and AdamW. One that ran out of memory is reported with the error it died of, one that came through with its
loss. The planner's prediction stands beside; what is mapped is more, by the inside of kernels and the allocator's
stock. Linux only. Writes results/proof_memory.json and .md.
"""

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.files import write_text
from scripts.check_memory import RETURN_FREED_MEMORY

METHODS = (
    *("conventional", "checkpointed", "checkpointed, chunks", "reversible"),
    *("reversible, chunks", "dr2net, chunks"),
)
DEFAULT = ("conventional", "checkpointed", "dr2net, chunks")
CHUNK_MIB = 32
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", **RETURN_FREED_MEMORY}


def mapped(field: str) -> int:
    """Bytes of address space: VmSize is what is mapped now, VmPeak the most there was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def run_step(method: str, frames: int, gib: float) -> dict[str, Any]:
    """What happened; to be called in a fresh process, which is limited from here on."""
    import torch
    from transformers import VideoMAEConfig, VideoMAEModel

    from dr2net import planner

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    setting = planner.Setting(options=replace(planner.CHUNKED, chunk_mib=CHUNK_MIB))
    config = VideoMAEConfig(num_frames=frames)
    shape = (1, frames, 3, 224, 224)
    with torch.device("meta"):
        on_paper = VideoMAEModel(config).train()
    facts = {"method": method, "frames": frames, "predicted": planner.predictor(on_paper, method, setting)(shape).peak}
    torch.randn(2, 1, 64, 64).requires_grad_().matmul(torch.randn(64, 64)).sum().backward()  # loads the kernels
    base = mapped("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (base + int(gib * 2**30),) * 2)
    started = time.perf_counter()
    try:
        model = VideoMAEModel(config).train()
        planner.apply(model, method, setting)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        loss = planner.loss_of(model, torch.randn(shape), "fp32")
        value = loss.item()
        loss.backward()
        gradients = all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        error = None
    except (MemoryError, RuntimeError) as failure:
        text = str(failure).splitlines()
        value, gradients, error = None, False, next((line for line in text if "memory" in line), (text or [""])[0])
        error = f"{type(failure).__name__}: {error}"
    done = error is None and math.isfinite(value) and gradients
    seconds = time.perf_counter() - started
    return {**facts, "done": done, "loss": value, "error": error, "mapped": mapped("VmPeak") - base, "seconds": seconds}


def run_limited(method: str, frames: int, gib: float) -> dict[str, Any]:
    """`run_step` in a process of its own; a crash there is a result too."""
    command = [sys.executable, "-m", "scripts.prove_memory", "--gib", str(gib), "--frames", str(frames)]
    process = subprocess.run(
        [*command, "--child", method], env={**os.environ, **ONE_THREAD}, capture_output=True, text=True
    )
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    last = (process.stderr.strip().splitlines() or [""])[-1]
    return {"method": method, "frames": frames, "done": False, "error": f"exit code {process.returncode}: {last}"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gib", type=float, nargs="+", default=[3.0, 1.5], help="address space on top of the libraries'"
    )
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT)
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_step(options.child, options.frames, options.gib[0])))
        return
    from engine.records.provenance import commit, versions

    runs = []
    for gib in options.gib:
        for method in options.methods:
            runs.append({"limit_gib": gib, **run_limited(method, options.frames, gib)})
            print(line_of(runs[-1]), flush=True)
    record = {
        "model": "VideoMAE ViT-B, one clip of 224 x 224, float32, AdamW",
        "chunk_mib": CHUNK_MIB,
        "commit": commit(),
        "versions": versions(),
        "runs": runs,
    }
    write_text(options.output / "proof_memory.json", json.dumps(record, indent=1) + "\n")
    write_text(options.output / "proof_memory.md", page(record))
    print(options.output / "proof_memory.md")


def line_of(run: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{run['limit_gib']:g}", str(run["frames"]), run["method"]]
    cells += [f"{run[k] / 2**30:.2f}" if run.get(k) else "-" for k in ("predicted", "mapped")]
    error = re.sub(r"\[enforce fail [^]]*\] \S+ == \S+ ", "", run["error"] or "")  # where in torch's source
    outcome = f"finished, loss {run['loss']:.4f}" if run["done"] else f"died: {error}"
    return "| " + " | ".join([*cells, f"{run['seconds']:.0f}" if "seconds" in run else "-", outcome]) + " |"


def page(record: dict[str, Any]) -> str:
    """results/proof_memory.md."""
    rows = "\n".join(line_of(run) for run in record["runs"])
    return f"""# One real training step under a hard limit of memory

{record["model"]}; dr2net exact at (7/8, 1/8) in
chunks of {record["chunk_mib"]} MiB. Limit: address space besides that of the libraries. Made by
`python -m scripts.prove_memory` (commit {record["commit"]}), whose docstring says how. Predicted: live tensor bytes at
the peak (the planner). Mapped: the most address space that the process had on top of the libraries'.

| limit GiB | frames | method | predicted GiB | mapped GiB | seconds | |
|---|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
