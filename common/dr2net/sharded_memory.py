"""Peak memory of a process of N whose model is sharded by FSDP2, each block and then the rest; nothing is computed.

    predict_sharded(make_step, model, blocks, shards=8).peak

PyTorch's own fully_shard runs on fake tensors in a process group that pretends to have N processes: what is gathered
when, what FSDP prefetches, its buffers and the padding of shards are its own and not modelled here. Gathered parameters
and buffers count as activations, shards as parameters; what a communication library allocates by itself is not seen,
as in every number of `memory.py`. Batch and activations are those of one process.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from dr2net.cuda_autocast import cuda_autocast
from dr2net.memory import Memory, Step, fake_tensors, run_and_count


def predict_sharded(
    make_step: Callable[[nn.Module], tuple[Step, Optimizer]],
    model: nn.Module,
    blocks: Iterable[nn.Module],
    shards: int,
    *,
    like: Literal["cuda", "cpu"] = "cuda",
) -> Memory:
    """The Memory of the second step on the first of `shards` processes. like: see `memory.predict`.

    make_step: the training step of the sharded model, and its optimizer. model: with its `blocks`, is used up: it stays
    sharded. ValueError for fewer than two shards, and where a process group exists already.
    """
    from torch.distributed.fsdp import fully_shard

    lists = cuda_autocast() if like == "cuda" else contextlib.nullcontext()
    with _pretended(shards) as mesh, FakeTensorMode(allow_non_fake_inputs=True), fake_tensors(model, None), lists:
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        step, optimizer = make_step(model)
        step()  # makes the optimizer's state
        return run_and_count(step, model, optimizer, "cpu")


@contextlib.contextmanager
def _pretended(shards: int) -> Iterator[Any]:
    """The mesh of `shards` processes, of which this is the first and the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if shards < 2:
        raise ValueError(f"{shards} processes share nothing; give 2 or more")
    if dist.is_initialized():
        raise ValueError("a plan for several processes is made by one process alone, outside of torchrun")
    dist.init_process_group("fake", rank=0, world_size=shards, store=FakeStore())
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (shards,))
    finally:
        dist.destroy_process_group()
