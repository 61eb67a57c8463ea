"""Two cards give the gradients of one, with DistributedDataParallel and FSDP2: a part of `check_gpu.py`.

Two processes, each with half of a batch; the mean over both must be the gradient of the whole batch on one card with
stored activations. On a CPU the two processes talk over gloo. Not here: more cards, or several machines.
"""

import datetime
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dr2net
from dr2net.convert import sequences
from engine.files import read_json, write_text
from scripts.gpu_card import Card, Row, attempt, gradients, number, reason_of, relative
from scripts.gpu_nets import build

WORLD = 2
BOUND = 1e-4  # float32: halves of a batch are summed in another order, and kernels for half a batch are others
PATIENCE_SECONDS = 120  # for the other process
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


def converted(small: bool, device: torch.device, store: bool) -> nn.Module:
    """The same weights in each process."""
    torch.manual_seed(0)
    model, _ = build("ViT", small=small)
    dr2net.convert(model, store=store)
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    return model.to(device)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def ddp(model: nn.Module, half: Tensor, device: torch.device) -> list[Tensor | None]:
    parallel = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    return gradients(parallel, lambda: loss_of(parallel, half))


def fsdp2_of_blocks(model: nn.Module, half: Tensor, device: torch.device) -> list[Tensor | None]:
    mesh = init_device_mesh(device.type, (WORLD,))
    for block in [block for sequence in sequences(model) for block in sequence.children()]:
        fully_shard(block, mesh=mesh)
    return fsdp2(model, half, device)


def fsdp2(model: nn.Module, half: Tensor, device: torch.device) -> list[Tensor | None]:
    fully_shard(model, mesh=init_device_mesh(device.type, (WORLD,)))
    loss_of(model, half).backward()
    return [None if p.grad is None else p.grad.full_tensor().float().cpu() for p in model.parameters()]


WAYS: dict[str, Callable[[nn.Module, Tensor, torch.device], list[Tensor | None]]] = {
    "DDP": ddp,
    "FSDP2": fsdp2,
    "FSDP2 of each block": fsdp2_of_blocks,
}


def work(rank: int, folder: str, device_type: str, small: bool) -> None:
    """One of the processes; the first writes what was found."""
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    torch.get_device_module(device_type).set_device(device)
    if device_type == "cpu":
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        BACKENDS[device_type],
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=PATIENCE_SECONDS),
    )
    _, shape = build("ViT", small=small)
    batch = torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(1)).to(device)
    whole = converted(small, device, store=True)
    expected = gradients(whole, lambda: loss_of(whole, batch))
    for name, way in WAYS.items():
        try:
            error = relative(way(converted(small, device, store=False), batch.chunk(WORLD)[rank], device), expected)
            found = {"ok": error <= BOUND, "found": f"{error:.1e} off one device", "error": number(error)}
        except (RuntimeError, ValueError) as failure:
            found = {"ok": False, "problem": reason_of(failure)}
        if rank == 0:
            write_text(Path(folder) / f"{name}.json", json.dumps(found))
    dist.destroy_process_group()


def run(card: Card) -> list[Row]:
    """One row per way; none where there is one card."""
    if card.device == "cuda" and torch.cuda.device_count() < WORLD:
        return []
    with tempfile.TemporaryDirectory() as folder:
        started = attempt(card, {}, lambda: _spawn(folder, card))
        files = {name: Path(folder) / f"{name}.json" for name in WAYS}
        return [{"way": name, **(read_json(f, "run it again") if f.exists() else started)} for name, f in files.items()]


def _spawn(folder: str, card: Card) -> Row:
    mp.spawn(work, (folder, card.device, card.small), nprocs=WORLD)
    return {"ok": False, "problem": "the processes ended without a result"}
