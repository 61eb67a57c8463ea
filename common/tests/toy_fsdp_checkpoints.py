"""What each of two gloo processes does in test_fsdp_checkpoints.py: train sharded, save with the engine, resume."""

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from toy_fsdp import CASES, FsdpNet, backward, batches, build, convert, each_block, full
from toy_training import toy_config

from engine.records.origin import Origin
from engine.training import state
from engine.training.ema import EMA

CASE = CASES["each block"]
ORIGIN = Origin(sources="", commit="", versions={}, inputs={}, total_steps=3, micro_batch=4)


def start(*, sharded: bool) -> tuple[FsdpNet, torch.optim.Optimizer, EMA]:
    net = build(CASE)
    convert(net, CASE)
    if sharded:
        each_block(net)
    return net, torch.optim.AdamW(net.parameters(), lr=0.01), EMA(net, 0.9)


def step(net: FsdpNet, optimizer: torch.optim.Optimizer, ema: EMA, number: int, share: int, rank: int) -> None:
    backward(net, batches()[number].chunk(share)[rank], CASE, 1)
    optimizer.step()
    optimizer.zero_grad()
    ema.update(number)


def accelerator_of(rank: int) -> Any:
    """As much of accelerate's as saving needs."""
    wait = dist.barrier if dist.is_initialized() else lambda: None
    return SimpleNamespace(is_main_process=rank == 0, scaler=None, wait_for_everyone=wait)


def values(net: FsdpNet, ema: EMA) -> list[Tensor]:
    return [full(tensor.detach()).clone() for tensor in (*net.parameters(), *ema.tensors.values())]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    kept = Path(folder) / "checkpoint"
    net, optimizer, ema = start(sharded=True)
    for number in range(2):
        step(net, optimizer, ema, number, 2, rank)
    config = toy_config(Path(folder))
    state.save(kept, config, state.State(step=2), net, optimizer, ema, accelerator_of(rank), ORIGIN)
    step(net, optimizer, ema, 2, 2, rank)
    expected = values(net, ema)
    net, optimizer, ema = start(sharded=True)
    found = state.resume(kept, net, optimizer, ema, accelerator_of(rank))
    step(net, optimizer, ema, 2, 2, rank)
    resumed = values(net, ema)
    if rank == 0:
        torch.save({"step": found.step, "expected": expected, "resumed": resumed}, Path(folder) / "values.pt")
    dist.barrier()
    dist.destroy_process_group()
