"""What a step keeps and computes: bytes by saved_tensors_hooks, FLOPs by FlopCounterMode."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_blocks import WIDTH, build_input, build_net, converted, stored

import dr2net

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

SHAPE = (16, 256, WIDTH)  # 4096 tokens, so that a checksum of one word per channel is under 1 % of the remainders


def saved_bytes(net: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of all distinct tensors autograd keeps for the blocks' backward."""
    kept = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = net.blocks(x)
    outputs.sum().backward()
    return sum(kept.values())


def test_saved_bytes_of_float_inversion_are_two_streams_at_any_depth() -> None:
    x = build_input(*SHAPE, dtype=torch.float32)
    found = {
        depth: saved_bytes(converted(build_net(depth, dtype=torch.float32), 0.2, 0.8, inversion="float"), x)
        for depth in (1, 2, 5, 8)
    }
    # and of each of the two branches of a block a sketch of F, with which the recomputation is compared
    assert found == {depth: 2 * x.numel() * 4 + 4 * WIDTH * 2 * depth for depth in found}


def test_saved_bytes_of_anchors_are_two_streams_each() -> None:
    x = build_input(*SHAPE, dtype=torch.float32)
    net = converted(build_net(6, dtype=torch.float32), 0.2, 0.8, inversion="anchored", anchor_every=4)
    assert saved_bytes(net, x) == 3 * 2 * x.numel() * 4 + 4 * WIDTH * 12


@pytest.mark.parametrize(
    ("beta", "bits"), [(1, 0), (0.75, 1), (0.5, 1), (0.25, 2), (0.1, 4), (1 / 64, 6), (1 / 1024, 10)]
)
def test_remainders_take_ceil_log2_bits_per_element_and_branch_and_one_percent(beta: float, bits: int) -> None:
    x = build_input(*SHAPE, dtype=torch.float32)
    shallow, deep = (saved_bytes(converted(build_net(d, dtype=torch.float32), 1 - beta, beta), x) for d in (2, 12))
    per_branch = (deep - shallow) / 20
    exactly = bits * x.numel() / 8
    assert exactly <= per_branch <= exactly * 1.01 + (bits == 0) * 4 * WIDTH  # at beta = 1 the checksum alone


@pytest.mark.parametrize("inversion", ["float", "exact"])
def test_without_gradients_nothing_is_kept(inversion: str) -> None:
    kept = []
    net = converted(build_net(3), 0.5, 0.5, inversion=inversion)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), torch.no_grad():
        net(build_input())
    assert not kept


def test_everything_kept_may_be_offloaded() -> None:
    net, x = build_net(3), build_input()
    ours, twin = converted(net, 0.5, 0.5), converted(net, 0.5, 0.5)
    with torch.autograd.graph.save_on_cpu():
        loss = ours(x).square().sum()
    loss.backward()
    twin(x).square().sum().backward()
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("inversion", ["float", "anchored", "exact"])
def test_a_step_costs_one_more_forward_of_the_blocks(inversion: str) -> None:
    net, x = build_net(4, dtype=torch.float32), build_input(*SHAPE, dtype=torch.float32)

    def flops(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    plain = flops(lambda: stored(net, x, 0.5, 0.5).sum().backward())
    blocks = flops(lambda: [block(x) for block in net.blocks])
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    # each branch that keeps floats is also compared with itself: a sum over its rows, in forward and in backward
    compared = 0 if inversion == "exact" else 2 * 8 * 2 * x.numel()
    assert flops(lambda: ours(x).sum().backward()) == plain + blocks + compared


def test_checkpointing_costs_the_same_recomputation_and_keeps_a_stream_per_block() -> None:
    net, x = build_net(4, dtype=torch.float32), build_input(*SHAPE, dtype=torch.float32)
    dr2net.checkpoint_blocks(net)

    def forward() -> int:
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.data_ptr(): t.numel() * 4}) or t, lambda t: t
        ):
            h = x.clone().requires_grad_()
            for block in net.blocks:
                h = block(h)
        h.sum().backward()
        return sum(kept.values())

    assert forward() <= 4 * x.numel() * 4
