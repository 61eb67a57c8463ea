"""What each of two gloo processes does in test_sharded_memory.py: train two sharded steps and count the second."""

import os
import warnings
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from toy_sharding import fully_shard

from dr2net.convert import all_blocks
from dr2net.memory import measure
from dr2net.options import Options
from dr2net.planner import OPTIMIZERS, Setting, apply, training_step

CHUNKS = Options(chunk_mib=0.25, recompute_rest=True)
CASES = {
    "conventional": Setting(options=CHUNKS, shards=2),
    "checkpointed": Setting(options=CHUNKS, shards=2),
    "dr2net": Setting("bf16", "sgd", options=CHUNKS, shards=2),
    "dr2net, chunks": Setting(options=CHUNKS, shards=2),
}


def large_blocks() -> tuple[nn.Module, tuple[int, ...]]:
    """A ViT whose parameters weigh as much as its activations."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=5, img_size=96, embed_dim=96, num_classes=10)
    return model.train(), (4, 3, 96, 96)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # on the precision of the inverse
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for method, setting in CASES.items():
        model, shape = large_blocks()
        blocks = all_blocks(model)
        apply(model, method, setting)
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
        optimizer = OPTIMIZERS[setting.optimizer](model.parameters())
        step = training_step(model, optimizer, shape, setting.precision, "cpu")
        step()
        memory = asdict(measure(step, model, optimizer))
        if rank == 0:
            kept = {name: value for name, value in memory.items() if isinstance(value, int)}
            torch.save(kept, f"{folder}/{method}.pt")
    dist.barrier()
    dist.destroy_process_group()
