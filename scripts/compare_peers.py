"""Memory and time of one training step: ours beside everything else that saves activations, in one process.

    pip install --no-deps memcnn==1.5.2 revtorch==0.2.4    # once; rows whose package is missing are named as left out
    nice -n 5 python -m scripts.compare_peers [--nets vit_s swin3d_t] [--rounds 5]

Forward, backward and AdamW on a random batch, float32, one CPU thread. The peers take turns, in another order in each
round; a ratio is of processor seconds to plain finetuning in the same round. Memory is what torch's CPU allocator had
handed out at the most, by its profiler (`dr2net.memory` counts the same, but does not see memcnn empty a storage).
`torch.autograd.graph.save_on_cpu` would move nothing on a CPU: its hooks here copy to memory outside torch and back.
Writes results/peers.json, and from it alone results/peers.md. Not here: GPUs (`check_gpu.py`), accuracy.
"""

import argparse
import copy
import functools
import importlib
import importlib.metadata
import itertools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import dr2net
from dr2net import planner
from dr2net.branches import Branch, find_branches
from engine.files import read_json, write_text
from engine.records.provenance import commit, device_name, versions
from engine.records.tables import markdown_table

PACKAGES = {"memcnn": "1.5.2", "revtorch": "0.2.4"}  # made for their interfaces
CHUNK_MIB = 8  # small, as the inputs are
CHUNKS = {"chunk_mib": CHUNK_MIB, "recompute_rest": True}
OURS = (7 / 8, 1 / 8)
Net = tuple[str, nn.Module, planner.Shape]  # title, model, input
Step = Callable[[], object]
Stack = Callable[[list[tuple["Residual", "Residual"]]], nn.Module]


@dataclass(frozen=True)
class Peer:
    name: str
    prepare: Callable[[nn.Module], object]  # in place
    trains: str  # which network
    limits: str
    offloads: bool = False


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """`save_on_cpu` with numpy in the part of the host: everything that autograd saves is copied out and back."""

    def __init__(self) -> None:
        self.bytes = 0  # copied out so far; all of it is there when backward begins
        super().__init__(self._pack, lambda host: torch.from_numpy(host).clone())

    def _pack(self, tensor: Tensor) -> np.ndarray:
        host = tensor.detach().numpy().copy("K")
        self.bytes += host.nbytes
        return host


class Residual(nn.Module):
    """F of one branch, without its residual connection, as a module."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch, self.parts = branch, nn.ModuleList(branch.modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)


class Coupled(nn.Module):
    """Blocks of two branches as hard reversible couplings, y1 = x1 + F(x2), y2 = x2 + G(y1), of x1 = x2 = x.

    Both streams have the pretrained width and lie one after the other in the batch. It is `dr2net` at (0, 1).
    """

    def __init__(self, stack: Stack, blocks: nn.Module) -> None:
        super().__init__()
        branches = [find_branches(block)[0] for block in blocks.children()]
        self.stack = stack([(Residual(f), Residual(g)) for f, g in branches])

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(torch.cat([x, x])).chunk(2)[1]


def memcnn_stack(pairs: list[tuple[Residual, Residual]]) -> nn.Module:
    memcnn = imported("memcnn")
    couplings = [memcnn.AdditiveCoupling(f, g, split_dim=0) for f, g in pairs]
    return nn.Sequential(*(memcnn.InvertibleModuleWrapper(coupling) for coupling in couplings))


def revtorch_stack(pairs: list[tuple[Residual, Residual]]) -> nn.Module:
    revtorch = imported("revtorch")
    blocks = [revtorch.ReversibleBlock(f, g, split_along_dim=0) for f, g in pairs]
    return revtorch.ReversibleSequence(nn.ModuleList(blocks))


def imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install --no-deps {name}=={PACKAGES[name]}") from error


def containers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, container) of every container of known blocks."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            blocks = list(child.children())
            if isinstance(child, nn.Sequential) and blocks and all(find_branches(block)[0] for block in blocks):
                yield parent, name, child


def couple(model: nn.Module, stack: Stack) -> None:
    for parent, name, container in containers(model):
        setattr(parent, name, Coupled(stack, container))


def checkpoint_every(model: nn.Module, every: int) -> None:
    """torch.utils.checkpoint around the first of `every` blocks; the others keep their activations."""
    blocks = [block for _, _, container in containers(model) for block in container.children()]
    for block in blocks[::every]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def ours(model: nn.Module, **how: Any) -> None:
    dr2net.convert(model, **how)
    dr2net.set_coefficients(model, *OURS)


SAME, AT, HARD = (
    "the pretrained network",
    "the same at (7/8, 1/8)",
    "a hard reversible network, far from the pretrained",
)
FLOAT = "float inverse, unchecked; blocks of exactly two branches"
RESEEDS = "dropout replayed only by reseeding the global generator; gradients as a side effect"
BUS = "needs the host's memory; here the copies are a CPU's, on a GPU they go through its bus"
LORA = "low-rank additions to linear layers", "activations stay; beside torchvision's window attention it does nothing"
EACH = "stores each branch's input; no plain checkpointing: our chunks without reversibility"
EVERY_FEW = "as whole branches; gradient to a tolerance; both streams stored every few branches"
PEERS = (
    Peer("plain", nn.Module.train, SAME, "stores everything"),
    Peer("checkpoint, every block", lambda m: checkpoint_every(m, 1), SAME, "stores each block's input"),
    Peer("checkpoint, every second block", lambda m: checkpoint_every(m, 2), SAME, "half is stored"),
    Peer(f"checkpoint, chunks of {CHUNK_MIB} MiB", lambda m: dr2net.checkpoint_blocks(m, **CHUNKS), SAME, EACH),
    Peer("save_on_cpu", nn.Module.train, SAME, BUS, offloads=True),
    Peer("memcnn", lambda m: couple(m, memcnn_stack), HARD, f"{FLOAT}; empties its input; no torch.autograd.grad"),
    Peer("RevTorch", lambda m: couple(m, revtorch_stack), HARD, f"{FLOAT}; {RESEEDS}"),
    Peer("LoRA (peft, rank 8)", lambda m: planner.apply(m, "lora", planner.Setting()), *LORA),
    Peer("ours, whole branches", ours, AT, "changes the network a little; stores three bits per element and branch"),
    Peer(f"ours, chunks of {CHUNK_MIB} MiB", lambda m: ours(m, **CHUNKS), AT, "as whole branches, to rounding"),
    Peer("ours, anchored", lambda m: ours(m, inversion="anchored"), AT, EVERY_FEW),
)


def vit_s() -> Net:
    import timm

    return "ViT-S (timm), 12 blocks", timm.create_model("vit_small_patch16_224"), (8, 3, 224, 224)


def swin3d_t() -> Net:
    from torchvision.models.video import swin3d_t as build

    model = build()
    for module in (m for m in model.modules() if type(m).__name__ == "StochasticDepth"):
        module.p = 0.0  # RevTorch would draw anew
    return "Video Swin-T (torchvision), 16 frames, no drop path", model, (2, 3, 16, 112, 112)


NETS: dict[str, Callable[[], Net]] = {"vit_s": vit_s, "swin3d_t": swin3d_t}


def allocator_peak(step: Step) -> int:
    """The most bytes that torch's CPU allocator had handed out at once during `step`, beyond those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def compare(net: str, peers: Iterable[Peer], rounds: int) -> dict[str, Any]:
    """The peers on one net: one row each, and what was left out with the reason."""
    torch.manual_seed(0)
    title, plain, shape = NETS[net]()
    steps: dict[str, Step] = {}
    rows, omitted = {}, {}
    for peer in peers:
        model = copy.deepcopy(plain).train()
        try:
            peer.prepare(model)
        except ImportError as error:
            omitted[peer.name] = str(error)
            continue
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        step = planner.training_step(model, optimizer, shape, "fp32", "cpu")

        def turn(step: Step = step, context: Any = Offload if peer.offloads else nullcontext) -> int:
            with (around := context()):
                step()
            return getattr(around, "bytes", 0)

        host = turn()  # makes the optimizer's state, too
        tensors = [*model.parameters(), *model.buffers(), *(t for s in optimizer.state.values() for t in s.values())]
        standing = sum(t.numel() * t.element_size() for t in tensors)
        peak, steps[peer.name] = standing + allocator_peak(turn), turn
        rows[peer.name] = {"peak": peak, "standing": standing, "host": host, "seconds": []}
        print(f"{net}: {peer.name}: {peak / 2**20:.1f} MiB", flush=True)
    for index in range(rounds):
        for name in [*steps][index % len(steps) :] + [*steps][: index % len(steps)]:
            started = time.process_time()
            steps[name]()
            rows[name]["seconds"].append(time.process_time() - started)
    return {"net": net, "title": title, "input": list(shape), "rows": rows, "omitted": omitted}


COLUMNS = (
    *("", "peak MiB", "of it the step's", "peak / plain", "GiB on the host"),
    *("time / plain", "range", "trains", "limits"),
)


def cells_of(name: str, row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    peer = next(peer for peer in PEERS if peer.name == name)
    ratios = [a / b for a, b in zip(row["seconds"], plain["seconds"], strict=True)]
    cells = [name, f"{row['peak'] / 2**20:.0f}", f"{(row['peak'] - row['standing']) / 2**20:.0f}"]
    cells += [f"{row['peak'] / plain['peak']:.2f}", f"{row['host'] / 2**30:.2f}" if row["host"] else "-"]
    return [
        *cells,
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        peer.trains,
        peer.limits,
    ]


def page(record: dict[str, Any]) -> str:
    """results/peers.md, of what results/peers.json holds."""
    parts = []
    for net in record["nets"]:
        plain = net["rows"]["plain"]
        rows = markdown_table(COLUMNS, [cells_of(name, row, plain) for name, row in net["rows"].items()])
        reasons = {peer.name: "not in this run" for peer in PEERS if peer.name not in net["rows"]} | net["omitted"]
        left_out = "".join(f"\nLeft out: {name} ({reason}).\n" for name, reason in reasons.items())
        parts.append(f"""## {net["title"]}

Input {"x".join(map(str, net["input"]))}; plain takes {statistics.median(plain["seconds"]):.2f} s, the median of
{len(plain["seconds"])} rounds.{net.get("run", "")}

{rows}
{left_out}""")
    packages = ", ".join(f"{name} {version}" for name, version in record["peers"].items())
    return f"""# Ours beside other ways to save activations

One training step, float32, AdamW, random weights. Made by `python -m scripts.compare_peers`, whose docstring says how;
{record["device"]}. The times are processor seconds of one thread, taken in turns in one process beside other work and
given as ratios to plain finetuning in the same round. Of it the step's: without weights and optimizer state.
{run_of(record)}
Torch {record["versions"]["torch"]}; {packages}.

{chr(10).join(parts)}"""


def run_of(record: dict[str, Any]) -> str:
    load = f"{record['load']:.1f} on {record['processors']} processors"
    return f"Commit {record['commit']}; the machine's load average was {load} at the start."


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS], help="beside plain; else all")
    parser.add_argument("--add", action="store_true", help="keep the runs that are there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    present = [name for name in (*PACKAGES, "peft") if list(importlib.metadata.distributions(name=name))]
    facts = {"commit": commit(), "processors": os.cpu_count(), "load": os.getloadavg()[0], "versions": versions()}
    facts |= {"device": device_name(torch.device("cpu")), "peers": {n: importlib.metadata.version(n) for n in present}}
    chosen = [peer for peer in PEERS if not options.peers or peer.name in ("plain", *options.peers)]
    nets = [compare(net, chosen, options.rounds) for net in options.nets]
    record: dict[str, Any] = {**facts, "nets": nets}
    if options.add:
        record = read_json(options.output / "peers.json", "leave out --add")
        record["nets"] += [{**net, "run": f" A run of its own. {run_of(facts)}"} for net in nets]
    write_text(options.output / "peers.json", json.dumps(record, indent=1) + "\n")
    write_text(options.output / "peers.md", page(record))
    print(options.output / "peers.md")


if __name__ == "__main__":
    main()
