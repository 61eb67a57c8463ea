"""FSDP2 on each block and then on the model, on two gloo processes, gives what one process gives; or it is refused.

The cases are in toy_fsdp.py. What is compared with one process differs by the order of sums only; where a case draws
at random or computes in bfloat16, the reference is the same two parts of the batch with gradients summed by hand.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from toy_fsdp import CASES, DEPTH, WIDTH, FsdpNet, batches, build, convert, each_block, full, work
from toy_sharding import fully_shard

import dr2net
from dr2net.sharding import door_of

BOUND = 1e-5  # float32, gradients of the first step and weights after three
REFUSED = {
    "child": "RuntimeError: FSDPLinear inside branch 0.mlp is sharded by itself.*call fully_shard on the block itself",
    "tensor parallel": "RuntimeError: parameters of branch 0.mlp are sharded.*Tensor parallelism .* is not supported",
    "step too early": "RuntimeError: a parameter of branch 3.mlp, .* was changed in place.*step the optimizer after",
}
GATHERED = {"root only": DEPTH, "kept gathered": DEPTH, "pairs of blocks": 2}  # blocks at a time; else one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes left; started once for all cases, since starting takes most of the time."""
    folder = tmp_path_factory.mktemp("fsdp")
    mp.spawn(work, (str(folder),), nprocs=2)
    return folder


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only: everything is gathered and let go of as with more."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def found(folder: Path, case: str) -> dict[str, Any]:
    return torch.load(folder / f"{case}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES.keys() - REFUSED.keys()))
def test_gradients_and_weights_are_those_of_one_process(folder: Path, case: str) -> None:
    result = found(folder, case)
    assert "error" not in result, result
    assert max(result["gradients"], result["weights"], result["outputs"]) < BOUND, result


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES.keys() - REFUSED.keys()))
def test_one_block_is_gathered_at_a_time_in_recomputation_too(folder: Path, case: str) -> None:
    result = found(folder, case)
    assert result["gathered"] <= GATHERED.get(case, 1)
    chunked, kept = "chunk_mib" in CASES[case].convert, CASES[case].convert.get("store", False)
    if not chunked and not kept and case != "frozen parts":
        branches = 2 * DEPTH * 3 * CASES[case].micro_batches * (1 + CASES[case].two_forwards)
        assert result["calls"] == 2 * branches + 2 * DEPTH, "forward, recomputation, and one evaluation"


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_gradients_is_refused_with_the_remedy(folder: Path, case: str) -> None:
    with pytest.raises(RuntimeError, match=REFUSED[case]):
        raise RuntimeError(found(folder, case)["error"])


@pytest.mark.slow
def test_what_two_processes_save_whole_one_process_loads(folder: Path) -> None:
    saved = torch.load(folder / "whole.pt", weights_only=True)
    net = build(CASES["each block"])
    convert(net, CASES["each block"])
    net.load_state_dict(saved["weights"])
    with torch.no_grad():
        outputs = net.eval()(batches()[0])
    assert torch.equal(outputs, saved["outputs"])
    slots = saved["optimizer"]["state"]
    assert {name: slots[name]["momentum_buffer"].shape for name in slots} == {
        name: p.shape for name, p in net.named_parameters()
    }


def sharded(net: FsdpNet | None = None) -> FsdpNet:
    net = build(CASES["each block"]) if net is None else net
    convert(net, CASES["each block"])
    each_block(net)
    return net


def test_deconverting_leaves_the_sharded_model_as_it_was(alone: None) -> None:
    plain, net = build(CASES["each block"]), sharded()
    x = batches()[0]
    net(x).sum().backward()
    hooks = [(len(block._forward_hooks), len(block._forward_pre_hooks)) for block in net.blocks]
    assert all(door_of(block) for block in net.blocks) and hooks == [(2, 2)] * DEPTH
    dr2net.set_coefficients(net, 1, 0)
    dr2net.deconvert(net)
    assert not any(door_of(block) for block in net.blocks)
    assert torch.allclose(net(x), plain(x), atol=1e-6)
    dr2net.convert(net)
    assert torch.allclose(net(x), plain(x), atol=1e-4)  # on the grid


class Telling(nn.Module):
    """x + f(x), and the mean of f(x), as attention hands out its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.f(x)
        return x + f, f.mean(1)


@dr2net.branches_of.register
def _(block: Telling):
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        f = block.f(x)
        return f, f.mean(1)

    return (dr2net.Branch("f", function, (block.f,), hands_out=True),)


@pytest.mark.parametrize("policy", [MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, None, torch.float32)])
def test_a_sharded_block_may_return_more_than_its_output(alone: None, policy: MixedPrecisionPolicy) -> None:
    torch.manual_seed(0)
    net, x = nn.ModuleList(Telling() for _ in range(3)), batches()[0]
    root = nn.Sequential(net)
    dr2net.convert(root)
    dr2net.set_coefficients(root, 0.5, 0.5)
    for block in net:
        fully_shard(block, mp_policy=policy)
    told = []
    for block in net:
        x, mean = block(x)
        told.append(mean)
    x.square().sum().backward()
    assert all(mean.shape == (8, WIDTH) and mean.dtype == torch.float32 for mean in told)
    assert all(p.grad.full_tensor().norm() > 0 for p in net.parameters())


def test_blocks_that_a_probe_found_are_sharded_too(alone: None) -> None:
    class Unknown(nn.Module):
        """x + gamma * f(x), of a type that nobody registered."""

        def __init__(self) -> None:
            super().__init__()
            self.f, self.gamma = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.f(x).relu()

    results = []
    for share in (False, True):
        torch.manual_seed(0)
        net, x = nn.Sequential(*(Unknown() for _ in range(3))), batches()[0]
        dr2net.convert(net, probe=lambda net, x=x: net(x), chunk_mib=0.001)
        dr2net.set_coefficients(net, 0.5, 0.5)
        for block in net if share else ():
            fully_shard(block)
        net(x).square().sum().backward()
        results.append([full(p.grad) for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_two_passes_side_by_side_are_told_apart(alone: None) -> None:
    net = sharded()
    plain = build(CASES["each block"])
    convert(plain, CASES["each block"])
    results = []
    for model in (net, plain):
        one, two = batches()[0], batches()[1]
        one.requires_grad_()
        for block in model.blocks:
            one, two = block(one), block(two)
        (one.sum() * 2 + two.square().sum()).backward()
        results.append([p.grad for p in model.blocks.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a.full_tensor(), b, rtol=1e-4, atol=1e-5)


def test_a_hook_that_changes_what_enters_a_sharded_block_is_refused(alone: None) -> None:
    net = sharded()
    net.blocks[2].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    with pytest.raises(ValueError, match="input of block 2 is not the output of the block before it"):
        net(batches()[0])


def test_hooks_that_look_see_each_sharded_block_once(alone: None) -> None:
    net, seen = sharded(), []
    for number, block in enumerate(net.blocks):
        block.register_forward_hook(lambda _, args, output, number=number: seen.append((number, output.dtype)))
    net(batches()[0]).sum().backward()
    assert seen == [(number, torch.float32) for number in range(DEPTH)]


def test_a_sharded_block_that_is_left_early_is_freed(alone: None) -> None:
    import gc
    import weakref

    net = sharded()
    with torch.no_grad():
        x = net.blocks[1](net.blocks[0](batches()[0]))
    stream = weakref.ref(x)
    del x
    gc.collect()
    assert stream() is None


def test_a_block_is_copied_before_it_is_sharded_not_after(alone: None) -> None:
    net = build(CASES["each block"])
    convert(net, CASES["each block"])
    twin = copy.deepcopy(net)
    each_block(net)
    assert torch.allclose(net(batches()[0]), twin(batches()[0]), atol=1e-6)
    with pytest.raises(AssertionError, match="FSDP does not support deepcopy"):
        copy.deepcopy(net)
