"""Tensors beside x, cut like x or shared by all chunks: streams and gradients are those of the whole branch."""

import copy
from typing import Any

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
    for beside, word in ((x, "rows"), (x[:1], "shared"), (x[0], "shared")):
        assert mix.chunks(x, (beside,), {}, CHUNK_MIB).beside == (word,)
        assert mix.chunks(x, (), {"position": beside}, CHUNK_MIB).beside == (word,)
    assert "shape (3, 4, 8) has no rows of x, (3, 5, 8)" in mix.chunks(x, (x[:, 1:],), {}, CHUNK_MIB)
    assert mlp.chunks(x, (x[:1],), {}, CHUNK_MIB).beside == ("unused",)
    assert copy.deepcopy(mlp).beside == "unused"


class RichBlock(nn.Module):
    """Attention with a mask per sample, rotary tables shared by all, positions by row; an MLP scaled per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.value = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def mix(self, x: Tensor, mask: Tensor, tables: Any, position: Tensor) -> Tensor:
        sin, cos = tables
        h = self.norm1(x + position)
        q = h * sin + h.flip(-1) * cos
        return torch.softmax(q @ h.transpose(1, 2) + mask, -1) @ self.value(h)

    def mlp(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm2(x)))) * scale

    def forward(self, x: Tensor, mask: Tensor, tables: Any, *, position: Tensor, scale: Tensor, name: str) -> Tensor:
        x = x + self.mix(x, mask, tables, position)
        return x + self.mlp(x, scale)


ATTENTION = {"mask": "samples", "tables": "shared", "position": "rows", "scale": "unused"}


@dr2net.branches_of.register
def _(block: RichBlock):
    def attention(x, mask, tables, *, position, scale, name):
        assert name == "text"
        return block.mix(x, mask, tables, position)

    def mlp(x, mask, tables, *, position, scale, name):
        return block.mlp(x, scale)

    b = block
    others = {"mask": "unused", "tables": "unused", "position": "unused"}
    return (
        dr2net.Branch("attention", attention, (b.norm1, b.value), independent="samples", beside=ATTENTION),
        dr2net.Branch("mlp", mlp, (b.norm2, b.up, b.down), independent="tokens", beside={**others, "scale": "samples"}),
    )


def rich_step(net: nn.Module, batch_of_mask: int, by_name: bool) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of all that is beside x, x and the parameters."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 5, WIDTH), (batch_of_mask, 5, 5), (5, WIDTH), (5, WIDTH), (3, 5, WIDTH), (3, 1, 1)]
    x, mask, sin, cos, position, scale = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    y = x
    for block in net:
        if by_name:
            y = block(y, mask=mask, tables=(sin, cos), position=position, scale=scale, name="text")
        else:
            y = block(y, mask, (sin, cos), position=position, scale=scale, name="text")
    y.square().sum().backward()
    return y.detach(), [t.grad for t in (x, mask, sin, cos, position, scale, *net.parameters())]


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("batch_of_mask", [1, 3])
@pytest.mark.parametrize("inversion", ["exact", "anchored"])
def test_each_kind_of_tensor_beside_x_gets_its_gradient(inversion: str, batch_of_mask: int, by_name: bool) -> None:
    torch.manual_seed(0)
    net = nn.ModuleList(RichBlock() for _ in range(2)).double()
    ours = converted(net, 0.5, 0.5, inversion=inversion, chunk_mib=CHUNK_MIB)
    whole = converted(net, 0.5, 0.5, inversion=inversion, store=True)
    found, expected = (rich_step(net, batch_of_mask, by_name) for net in (ours, whole))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-9)
    assert relative(found[1], expected[1]) < 1e-8
    assert ours.whole == {} and all(gradient.abs().sum() > 0 for gradient in found[1])


def test_what_runs_as_a_whole_is_told_with_the_reason() -> None:
    net = net_of()
    report = dr2net.convert(net, chunk_mib=CHUNK_MIB)
    assert "in chunks" not in str(report), "before the first pass nobody knows"
    net(build_input())
    assert "6 of them ran in the last pass, 6 in chunks of 1e-06 MiB" in str(report)
    dr2net.deconvert(net)
    report = dr2net.convert(net, chunk_mib=100)
    net(build_input())
    assert "0 in chunks of 100 MiB, so that chunk_mib=100 has no effect there" in str(report)
    assert "as a whole: 3 'mix': it is smaller than a chunk" in str(report)
    torch.manual_seed(0)
    kind = type("Undeclared", (PositionBlock,), {})

    @dr2net.branches_of.register(kind)
    def _(block: PositionBlock):
        return (
            dr2net.Branch("mix", block.mix, (block.norm1, block.value), independent="samples"),
            dr2net.Branch("mlp", block.mlp, (block.norm2, block.up, block.down), beside="unused"),
        )

    net.blocks = nn.ModuleList(kind(0.0) for _ in range(2)).double()
    report = dr2net.convert(net, chunk_mib=CHUNK_MIB)
    net(build_input())
    assert "as a whole: 2 'mix': it does not say what the tensor 'position' beside x is (Branch.beside)" in str(report)
    assert "as a whole: 2 'mlp': it does not say that tokens or samples are independent" in str(report)


def test_words_and_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(
        ValueError, match="beside of branch 'mlp' must be one of rows, samples, shared, unused, not 'x'"
    ):
        dr2net.Branch("mlp", lambda x: x, (), beside="x")
    with pytest.raises(ValueError, match="beside of 'mask' of branch 'mlp' must be one of"):
        dr2net.Branch("mlp", lambda x: x, (), beside={"mask": "batch"})
    kind = type("Misnamed", (PositionBlock,), {})

    @dr2net.branches_of.register(kind)
    def _(block: PositionBlock):
        modules = tuple(block.children())
        return (dr2net.Branch("mix", block.mix, modules, independent="samples", beside={"places": "rows"}),)

    with pytest.raises(
        ValueError, match="names 'places', which the forward of Misnamed does not take; it takes x, pos"
    ):
        dr2net.convert(nn.Sequential(kind(0.0)))


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
