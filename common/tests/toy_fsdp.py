"""What each of two gloo processes does in test_fsdp.py: one case after the other, trained sharded and not sharded.

Each case leaves what rank 0 found: the largest relative difference of gradients and of weights after three steps
against one process, and the most blocks that were gathered at a time; or the error.
"""

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.nn import functional as F
from toy_sharding import fully_shard

import dr2net

WIDTH, DEPTH, STEPS = 8, 4, 3
COEFFICIENTS = (0.5, 0.5)


class FsdpBlock(nn.Module):
    """x + gamma * mix(x) + shift, then x + mlp(x). x: (B, N, WIDTH); gamma is the block's own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.value = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.7))
        self.dropout = nn.Dropout(0.0)

    def mix(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        h = self.gamma * (torch.softmax(h @ h.transpose(1, 2), -1) @ self.value(h))
        return self.dropout(h if shift is None else h + shift)

    def mlp(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        for branch in (self.mix, self.mlp):
            x = x + branch(x, shift)
        return x


@dr2net.branches_of.register
def _(block: FsdpBlock):
    return (
        dr2net.Branch("mix", block.mix, (block.norm1, block.value, block.gamma), independent="samples"),
        dr2net.Branch("mlp", block.mlp, (block.norm2, block.up, block.down), independent="tokens"),
    )


class FsdpNet(nn.Module):
    """stem, blocks, head; (B, N, WIDTH) -> (B, 3). The blocks are iterated, or called as an nn.Sequential."""

    def __init__(self, called: bool, beside: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        blocks = [FsdpBlock() for _ in range(DEPTH)]
        self.blocks = nn.Sequential(*blocks) if called else nn.ModuleList(blocks)
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.1)) if beside else None
        self.inner: torch.dtype | None = None  # of what the blocks are given

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x if self.inner is None else x.to(self.inner)
        if isinstance(self.blocks, nn.Sequential):
            return self.head(self.blocks(x).mean(1))
        for block in self.blocks:
            x = block(x) if self.shift is None else block(x, self.shift)
        return self.head((x if self.inner is None else x.float()).mean(1))


def each_block(net: FsdpNet, **how: Any) -> None:
    for block in net.blocks:
        fully_shard(block, **how)
    fully_shard(net, **{name: value for name, value in how.items() if name != "reshard_after_forward"})


def only_blocks_by_policy(net: FsdpNet) -> None:
    """Casts at each block's entrance and exit, to bfloat16 and back."""
    for block in net.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32))
    fully_shard(net)


def by_policy(net: FsdpNet) -> None:
    each_block(net, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def keep_gathered(net: FsdpNet) -> None:
    each_block(net, reshard_after_forward=False)


def with_prefetch(net: FsdpNet) -> None:
    """Both by hand, as torchtitan does where blocks are small."""
    each_block(net)
    for one, other in zip(net.blocks, list(net.blocks)[1:], strict=False):
        one.set_modules_to_forward_prefetch([other])
        other.set_modules_to_backward_prefetch([one])


def offloaded(net: FsdpNet) -> None:
    each_block(net, offload_policy=CPUOffloadPolicy(pin_memory=False))


def in_pairs(net: FsdpNet) -> None:
    for first in range(0, DEPTH, 2):
        fully_shard([net.blocks[first], net.blocks[first + 1]])
    fully_shard(net)


def hybrid(net: FsdpNet) -> None:
    each_block(net, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def child(net: FsdpNet) -> None:
    for block in net.blocks:
        fully_shard(block.up)
        fully_shard(block)
    fully_shard(net)


def tensor_parallel(net: FsdpNet) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    for block in net.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def freeze_stem(net: FsdpNet) -> None:
    net.stem.requires_grad_(False)


def freeze_parts(net: FsdpNet) -> None:
    """As finetuning by adapters does: the first block as a whole, and the large matrices of the others."""
    net.stem.requires_grad_(False)
    net.blocks[0].requires_grad_(False)
    for block in net.blocks:
        block.up.requires_grad_(False)


@dataclass(frozen=True)
class Case:
    shard: Callable[..., None] = each_block
    convert: dict[str, Any] = field(default_factory=dict)  # options of dr2net.convert
    coefficients: tuple[float, float] = COEFFICIENTS
    called: bool = False  # the blocks are in an nn.Sequential that is called
    beside: bool = False  # a tensor that trains goes into each block beside x
    prepare: Callable[[FsdpNet], None] = lambda net: None
    convert_first: bool = True
    dropout: float = 0.0
    micro_batches: int = 1
    sync_each: bool = True  # gradients of each of them are reduced, not only of their sum
    two_forwards: bool = False  # before the backward of their sum
    clip: float | None = None
    autocast: bool = False


CASES = {
    "root only": Case(fully_shard),
    "each block": Case(),
    "each block, called": Case(called=True),
    "each block, sharded before conversion": Case(convert_first=False),
    "each block, called, sharded before conversion": Case(convert_first=False, called=True),
    "kept gathered": Case(keep_gathered),
    "pairs of blocks": Case(in_pairs),
    "prefetched": Case(with_prefetch),
    "offloaded": Case(offloaded),
    "hybrid": Case(hybrid),
    "beside": Case(beside=True),
    "anchored": Case(convert={"inversion": "anchored", "anchor_every": 3}),
    "float": Case(convert={"inversion": "float"}, coefficients=(0.1, 0.9)),
    "at (1, 0)": Case(coefficients=(1, 0)),
    "stored": Case(convert={"store": True}),
    "chunks": Case(convert={"chunk_mib": 0.002, "recompute_rest": True}),
    "frozen stem": Case(prepare=freeze_stem),
    "frozen parts": Case(prepare=freeze_parts),
    "two forwards": Case(two_forwards=True),
    "dropout": Case(dropout=0.3),
    "dropout in chunks": Case(dropout=0.3, convert={"chunk_mib": 0.002}),
    "accumulation": Case(micro_batches=2),
    "accumulation without sync": Case(micro_batches=2, sync_each=False),
    "clipping": Case(clip=0.05),
    "autocast": Case(autocast=True),
    "bf16 policy": Case(by_policy),
    "bf16 policy, float": Case(by_policy, convert={"inversion": "float"}, coefficients=(0.1, 0.9)),
    "bf16 policy of the blocks": Case(only_blocks_by_policy),
    "bf16 policy of the blocks, anchored": Case(only_blocks_by_policy, convert={"inversion": "anchored"}),
    "child": Case(child),
    "tensor parallel": Case(tensor_parallel),
}


def build(case: Case) -> FsdpNet:
    torch.manual_seed(0)
    net = FsdpNet(case.called, case.beside)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = case.dropout
    case.prepare(net)
    return net


def convert(net: FsdpNet, case: Case) -> None:
    dr2net.convert(net, **case.convert)
    dr2net.set_coefficients(net, *case.coefficients)


def batches() -> list[Tensor]:
    return list(torch.randn(STEPS, 8, 5, WIDTH, generator=torch.Generator().manual_seed(1)))


def backward(net: nn.Module, x: Tensor, case: Case, share: int) -> None:
    """Of the mean over the batch, of which `x` is a part of 1 / share."""
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        loss = net(x).float().square().mean()
        if case.two_forwards:
            loss = loss + net(x.flip(1) * 2).float().square().mean()
    (loss / share).backward()


def step_too_early() -> None:
    """The optimizer's step between forward and backward."""
    net = build(CASES["each block"])
    convert(net, CASES["each block"])
    each_block(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(batches()[0]).sum().backward()
    loss = net(batches()[0]).sum()
    optimizer.step()
    loss.backward()


def train(net: FsdpNet, case: Case, parts: int, rank: int) -> tuple[list[Tensor | None], list[Tensor]]:
    """The gradients of the first step and the weights after three, whole; on this rank's part of each batch."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    torch.manual_seed(rank)
    gradients: list[Tensor | None] = []
    for x in batches():
        micro = x.chunk(parts)[rank].chunk(case.micro_batches)
        for number, part in enumerate(micro):
            if isinstance(net, FSDPModule) and not case.sync_each:
                net.set_requires_gradient_sync(number == len(micro) - 1)
            backward(net, part, case, len(micro))
        if parts == 2 and not isinstance(net, FSDPModule):  # sharded by hand: each process has all, and a part of x
            for p in net.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad.div_(2))
        gradients = gradients or [None if p.grad is None else full(p.grad).clone() for p in net.parameters()]
        if case.clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
    return gradients, [full(p.detach()) for p in net.parameters()]


def train_in_bf16(net: FsdpNet, case: Case, rank: int) -> tuple[list[Tensor | None], list[Tensor]]:
    """As `train` by hand, with a copy of what the policy casts in bfloat16; gradients are summed in float32."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    gradients: list[Tensor | None] = []
    for x in batches():
        low = copy.deepcopy(net)
        if case.shard is by_policy:
            low.bfloat16()
            x = x.bfloat16()
        else:
            low.blocks.bfloat16()
            low.inner = torch.bfloat16
        backward(low, x.chunk(2)[rank], case, 1)
        for p, q in zip(net.parameters(), low.parameters(), strict=True):
            p.grad = q.grad.float().div_(2)
            dist.all_reduce(p.grad)
        gradients = gradients or [p.grad.clone() for p in net.parameters()]
        optimizer.step()
    return gradients, [p.detach() for p in net.parameters()]


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def relative(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    assert [t is None for t in found] == [t is None for t in expected], "not the same parameters have gradients"
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-3)) for a, b in pairs)


def count_gathered(net: FsdpNet) -> list[int]:
    """How many blocks hold whole parameters whenever a branch begins, forward or recomputed; grows as it trains."""
    counts: list[int] = []

    def count(*_: object) -> None:
        counts.append(sum(not hasattr(block.value.weight, "_local_tensor") for block in net.blocks))

    for block in net.blocks:
        block.norm1.register_forward_pre_hook(count)
        block.norm2.register_forward_pre_hook(count)
    return counts


def run_case(case: Case, rank: int) -> dict[str, Any]:
    net = build(case)
    twin = copy.deepcopy(net)
    convert(twin, case)
    if case.convert_first:
        convert(net, case)
    case.shard(net)
    if not case.convert_first:
        convert(net, case)
    counts = [] if "chunk_mib" in case.convert else count_gathered(net)
    found = train(net, case, 2, rank)
    if case.shard in (by_policy, only_blocks_by_policy):
        expected = train_in_bf16(twin, case, rank)
    elif not case.dropout and not case.autocast:
        expected = train(twin, case, 1, 0)  # one process, the whole batch
    else:
        expected = train(twin, case, 2, rank)
    net.eval(), twin.eval()
    with torch.no_grad():
        outputs = [model(batches()[-1]) for model in (net, twin)]
    by_hand = case.shard in (by_policy, only_blocks_by_policy)  # the twin has no policy
    return {
        "outputs": 0.0 if by_hand else relative([outputs[0]], [outputs[1]]),
        "gradients": relative(found[0], expected[0]),
        "weights": relative(found[1], expected[1]),
        "gathered": max(counts, default=0),
        "calls": len(counts),
    }


def save_whole(folder: str, rank: int) -> None:
    """Two steps, then whole weights and the optimizer's state, and the outputs that go with them."""
    case = CASES["each block"]
    net = build(case)
    convert(net, case)
    each_block(net)
    train(net, case, 2, rank)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    backward(net, batches()[0].chunk(2)[rank], case, 1)
    optimizer.step()
    optimizer.zero_grad()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(net, optimizer, options=options)
    net.eval()
    with torch.no_grad():
        outputs = net(batches()[0])
    if rank == 0:
        torch.save({"weights": dict(weights), "optimizer": state, "outputs": outputs}, f"{folder}/whole.pt")


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    jobs = {name: functools.partial(run_case, case, rank) for name, case in CASES.items()}
    for name, job in {**jobs, "step too early": step_too_early}.items():
        try:
            result = job()
        except (RuntimeError, ValueError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        if rank == 0:
            torch.save(result, Path(folder) / f"{name}.pt")
        dist.barrier()
    save_whole(folder, rank)
    dist.destroy_process_group()
