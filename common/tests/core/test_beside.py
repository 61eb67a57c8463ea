"""A tensor beside x that is cut like x: chunks, streams and gradients are those of the whole branch."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_blocks import WIDTH, build_input, converted, gradients, relative

import dr2net

CHUNK_MIB = 1e-6  # one group at a time


class PositionBlock(nn.Module):
    """x + position, mixed within a sample, then an MLP that knows no position. x, position: (B, N, WIDTH)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.value = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def mix(self, x: Tensor, position: Tensor) -> Tensor:
        h = self.norm1(x + position)
        return position + self.dropout(torch.softmax(h @ h.transpose(1, 2), -1) @ self.value(h))

    def mlp(self, x: Tensor, position: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm2(x))))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x = x + self.mix(x, position)
        return x + self.mlp(x, position)


@dr2net.branches_of.register
def _(block: PositionBlock):
    mlp = (block.norm2, block.up, block.down)
    return (
        dr2net.Branch(
            "mix", block.mix, (block.norm1, block.value, block.dropout), independent="samples", beside="rows"
        ),
        dr2net.Branch("mlp", block.mlp, mlp, independent="tokens", beside="unused"),
    )


class PositionNet(nn.Module):
    """Learned positions enter each block."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.place = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([PositionBlock(dropout) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        position = self.place(x)
        for block in self.blocks:
            x = block(x, position)
        return x


def net_of(dropout: float = 0.0) -> PositionNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PositionNet(dropout).double()


def step(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    outputs = net(x)
    outputs.square().sum().backward()
    return outputs.detach()


@pytest.mark.parametrize("inversion", ["exact", "anchored"])
@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (0.875, 0.125), (0.0, 1.0)])
def test_chunks_with_a_tensor_beside_x_are_the_whole_branch(inversion: str, alpha: float, beta: float) -> None:
    x = build_input()
    ours = converted(net_of(), alpha, beta, inversion=inversion, chunk_mib=CHUNK_MIB)
    whole = converted(net_of(), alpha, beta, inversion=inversion, store=True)
    plain = net_of()
    torch.testing.assert_close(step(ours, x), step(whole, x), rtol=1e-9, atol=1e-9)
    assert relative(gradients(ours), gradients(whole)) < 1e-8
    assert ours.place.weight.grad.abs().sum() > 0, "positions are learned through the branches"
    if (alpha, beta) == (1, 0):
        step(plain, x)
        assert relative(gradients(ours), gradients(plain)) < 1e-5  # the grid of exact inversion


def test_randomness_beside_a_cut_tensor_is_replayed() -> None:
    x, net = build_input(), net_of(dropout=0.4)
    ours, twin = (converted(net, 0.6, 0.4, store=store, chunk_mib=CHUNK_MIB) for store in (False, True))
    assert torch.equal(step(ours, x), step(twin, x))
    assert relative(gradients(ours), gradients(twin)) < 1e-8


def test_a_position_without_gradient_gets_none_and_costs_none() -> None:
    net = net_of()
    net.place.requires_grad_(False)
    ours, whole = converted(net, 0.5, 0.5, chunk_mib=CHUNK_MIB), converted(net, 0.5, 0.5, store=True)
    x = build_input()
    step(ours, x), step(whole, x)
    assert ours.place.weight.grad is None
    assert relative(gradients(ours), gradients(whole)) < 1e-8


def test_only_what_is_declared_and_has_a_row_for_each_row_is_cut() -> None:
    x = build_input()
    mix, mlp = dr2net.branches_of(PositionBlock(0.0))
    assert mix.chunks(x, (x,), {}, CHUNK_MIB).cuts_beside
    assert mix.chunks(x, (), {"position": x}, CHUNK_MIB).cuts_beside
    assert mix.chunks(x, (x[:1],), {}, CHUNK_MIB) is None, "a tensor that is broadcast is not cut"
    assert not mlp.chunks(x, (x[:1],), {}, CHUNK_MIB).cuts_beside
    assert copy.deepcopy(mlp).beside == "unused"


def test_a_part_around_the_blocks_is_recomputed_and_its_statistics_move_once() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).double()
    again = copy.deepcopy(plain)
    dr2net.recompute(again)
    x = build_input(6, WIDTH)
    for net in (plain, again):
        net(x).square().sum().backward()
    assert relative(gradients(again), gradients(plain)) < 1e-12
    assert torch.equal(again[1].running_mean, plain[1].running_mean)
    dr2net.deconvert(again)
    assert "forward" not in vars(again)
    with pytest.raises(ValueError, match="Identity without parameters"):
        dr2net.recompute(nn.Identity())
