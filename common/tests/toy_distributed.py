"""What each of two gloo processes does in test_distributed.py: one case after the other, gradients saved by rank 0."""

import os
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_blocks import WIDTH, ToyNet, build_input, build_net, converted
from toy_sharding import fully_shard

COEFFICIENTS = (0.5, 0.5)
CASES = {  # options of DistributedDataParallel
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "small_buckets": {"bucket_cap_mb": 1e-4},
    "as_bucket_view": {"gradient_as_bucket_view": True},
    "accumulation": {},
    "uneven": {},
    "batch_norm": {},
    "fsdp": {},
}


def model_of(case: str) -> ToyNet:
    net = build_net(3, batch_norm=case == "batch_norm")
    if case == "find_unused":
        net.blocks[1].value.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        net.blocks[2].mlp1.requires_grad_(False)
    return net


def batches() -> list[Tensor]:
    """Two steps of a global batch of 4."""
    return [build_input(4, 5, WIDTH, seed=seed) for seed in (1, 2)]


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean()


def run_case(case: str, inversion: str, rank: int) -> list[Tensor | None]:
    net = converted(model_of(case), *COEFFICIENTS, inversion=inversion)
    shares = [x.chunk(2)[rank] for x in batches()]
    if case == "fsdp":
        fully_shard(net)
        for x in shares:
            net.zero_grad()
            loss_of(net, x).backward()
        return [None if p.grad is None else p.grad.full_tensor() for p in net.parameters()]
    parallel = DistributedDataParallel(net, **CASES[case])
    if case == "accumulation":
        with parallel.no_sync():
            loss_of(parallel, shares[0]).backward()
        loss_of(parallel, shares[1]).backward()
    else:
        uneven = case == "uneven"
        with parallel.join() if uneven else nullcontext():
            for x in shares[: 1 if uneven and rank == 1 else 2]:
                net.zero_grad()
                loss_of(parallel, x).backward()
    return [p.grad for p in net.parameters()]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case in CASES:
        for inversion in ("float", "exact"):
            try:
                result = run_case(case, inversion, rank)
            except (RuntimeError, ValueError) as error:
                result = f"{type(error).__name__}: {error}"
            if rank == 0:
                torch.save(result, Path(folder) / f"{case}_{inversion}.pt")
            dist.barrier()
    dist.destroy_process_group()
