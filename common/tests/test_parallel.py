"""Recomputing a branch while the one behind it is differentiated: the logic, which is the same on a CPU.

What no test here can see is the order of work on two CUDA streams.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import WIDTH, build_input, build_net

import dr2net

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

WAYS = ["float", "anchored", "exact"]


def both(net: nn.Module, inversion: str, alpha: float = 0.5, beta: float = 0.5) -> tuple[nn.Module, nn.Module]:
    """The network converted without and with `parallel`."""
    nets = copy.deepcopy(net), copy.deepcopy(net)
    for one, parallel in zip(nets, (False, True), strict=True):
        anchor_every = 3 if inversion == "anchored" else None
        dr2net.convert(one, inversion=inversion, anchor_every=anchor_every, parallel=parallel)
        dr2net.set_coefficients(one, alpha, beta)
    return nets


def step(net: nn.Module, x: Tensor, *args: Tensor, **named: Tensor) -> list[Tensor | None]:
    """Gradients of x, of the side inputs and of the parameters after one forward and backward; then the buffers."""
    inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in (x.requires_grad_(), *args, *named.values())]
    torch.manual_seed(3)
    args, named = inputs[1 : 1 + len(args)], dict(zip(named, inputs[1 + len(args) :], strict=True))
    net(inputs[0], *args, **named).square().sum().backward()
    torch.rand(1)
    return [t.grad for t in (*inputs, *net.parameters())] + [b.clone() for b in net.buffers()] + [torch.rand(1)]


def assert_same(ours: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("inversion", WAYS)
@pytest.mark.parametrize("num_branches", [1, 2])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 7])
def test_gradients_are_bitwise_the_same_at_every_depth(inversion: str, num_branches: int, num_blocks: int) -> None:
    plain, ours = both(build_net(num_blocks, num_branches=num_branches), inversion)
    assert_same(step(ours, build_input()), step(plain, build_input()))


@pytest.mark.parametrize("inversion", WAYS)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (7 / 8, 1 / 8), (0.0, 1.0)])
def test_so_they_are_with_dropout_drop_path_and_batch_norm(inversion: str, alpha: float, beta: float) -> None:
    net = build_net(4, dropout=0.2, drop_path=0.3, batch_norm=True)
    plain, ours = both(net, inversion, alpha, beta)
    assert_same(step(ours, build_input()), step(plain, build_input()))


@pytest.mark.parametrize("inversion", WAYS)
def test_so_they_are_with_side_inputs_and_frozen_parts(inversion: str) -> None:
    net = build_net(5)
    for block in net.blocks[:2]:
        block.requires_grad_(False)
    plain, ours = both(net, inversion)
    sides = [torch.randn(3, 1, WIDTH, dtype=torch.float64).requires_grad_(need) for need in (True, False)]
    x = build_input()
    assert_same(step(ours, x, sides[0], shift=sides[1]), step(plain, x, sides[0], shift=sides[1]))


def test_under_autocast_too() -> None:
    plain, ours = both(build_net(3).float(), "exact")
    x = build_input().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(step(ours, x), step(plain, x))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_branch_is_recomputed_before_the_one_behind_it_is_differentiated(parallel: bool) -> None:
    net = both(build_net(4, num_branches=1), "exact")[parallel]
    events: list[str] = []
    for index, block in enumerate(net.blocks.children()):
        block.value.register_forward_hook(lambda *_, i=index: events.append(f"F{i}"))
        block.value.register_full_backward_hook(lambda *_, i=index: events.append(f"dF{i}"))
    output = net(build_input().requires_grad_())
    events.clear()
    output.sum().backward()
    ahead = ["F3", "F2", "dF3", "F1", "dF2", "F0", "dF1", "dF0"]
    assert events == (ahead if parallel else ["F3", "dF3", "F2", "dF2", "F1", "dF1", "F0", "dF0"])


def test_a_backward_that_broke_off_leaves_nothing_to_the_next() -> None:
    plain, ours = both(build_net(4), "exact")
    x = build_input().requires_grad_()
    output = ours(x)
    parameter = next(iter(ours.blocks[2].parameters()))
    handle = parameter.register_hook(lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        output.sum().backward(retain_graph=True)
    handle.remove()
    ours.zero_grad()
    x.grad = None
    output.square().sum().backward()
    expected = step(plain, build_input())
    assert_same([x.grad, *(p.grad for p in ours.parameters())], expected[: 1 + len(list(ours.parameters()))])


def test_two_backwards_over_one_graph_add_up() -> None:
    plain, ours = both(build_net(3), "exact")
    for net in (plain, ours):
        output = net(build_input().requires_grad_()).square().sum()
        output.backward(retain_graph=True)
        output.backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])
