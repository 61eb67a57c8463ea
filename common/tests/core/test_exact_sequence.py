"""Whole sequences on the grid: every branch sees in the recomputation, bit for bit, what it saw in the forward pass."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_blocks import WIDTH, build_input, build_net, converted, gradients, relative, stored

import dr2net


def record_inputs(net: nn.Module) -> list[torch.Tensor]:
    """What enters each branch, in the order of the calls: each branch begins with its own norm."""
    seen: list[torch.Tensor] = []
    for block in net.blocks.children():
        for norm in (block.norm1, block.norm2):
            norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


def assert_rebuilt_bitwise(seen: list[torch.Tensor], num_branches: int) -> None:
    assert len(seen) == 2 * num_branches
    for forward, again in zip(seen[:num_branches], reversed(seen[num_branches:]), strict=True):
        assert torch.equal(forward, again)


@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(1, 9),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    alpha=st.floats(-1, 1),
    beta=st.one_of(
        st.floats(1 / 1024, 1),
        st.builds(lambda n, d: Fraction(min(n, d), d), st.integers(1, 99), st.integers(1, 2**11)),
    ),
    log_scale=st.floats(-20, 20),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    drop_path=st.sampled_from([0.0, 0.5]),
    autocast=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_inputs_of_all_branches_are_rebuilt_bit_for_bit(
    num_blocks, shape, alpha, beta, log_scale, dtype, drop_path, autocast, seed
) -> None:
    net = converted(build_net(num_blocks, dtype=dtype, drop_path=drop_path, dropout=drop_path / 2), alpha, beta)
    seen = record_inputs(net)
    x = build_input(*shape, WIDTH, seed=seed, dtype=dtype) * 2.0**log_scale
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = net(x).float().sum()
    except (OverflowError, FloatingPointError):  # streams that outgrow their integers, or fade in them
        reject()
    loss.backward()
    assert_rebuilt_bitwise(seen, 2 * num_blocks)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1 / 64), (1, 0.1), (1, 0.5), (0.7, 0.4), (0.4, 0.7), (0, 1), (0, 0.1)])
def test_forty_eight_branches_are_rebuilt_bit_for_bit(alpha: float, beta: float) -> None:
    net = converted(build_net(24, dtype=torch.float32, dropout=0.1), alpha, beta)
    if alpha + beta > 1:  # the stream would grow beyond the grid
        with torch.no_grad():
            for block in net.blocks.children():
                block.value.weight.mul_(0.1), block.mlp2.weight.mul_(0.1)
    seen = record_inputs(net)
    try:
        loss = net(build_input(2, 4, WIDTH, dtype=torch.float32)).sum()
    except OverflowError:
        assert (alpha, beta) == (1, 0.5)  # 1.37 per branch, 3e6 in all: reported, as it must be
        return
    loss.backward()
    assert_rebuilt_bitwise(seen, 48)


class Transposing(nn.Module):
    """A branch without norm that mixes tokens and so leaves its output transposed in memory, or a plain one."""

    def __init__(self, transposes: bool) -> None:
        super().__init__()
        self.transposes = transposes
        self.linear = nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(1, 2)).transpose(1, 2) if self.transposes else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@dr2net.branches_of.register
def _(block: Transposing):
    return (dr2net.Branch("only", block.branch, (block.linear,)),)


@pytest.mark.parametrize("first", [False, True])
def test_streams_are_rebuilt_in_the_same_memory_layout(first: bool) -> None:
    # kernels add in another order in another layout, so a rebuilt stream must have the layout of the first one
    torch.manual_seed(0)
    net = nn.Module()
    net.blocks = nn.Sequential(*(Transposing(i % 3 == first) for i in range(7)))
    dr2net.convert(net)
    dr2net.set_coefficients(net, 0.9, 0.1)
    seen: list[tuple[int, ...]] = []
    for block in net.blocks.children():
        block.linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
    x = build_input(2, WIDTH, WIDTH, dtype=torch.float32)
    for entering in (x, x.transpose(1, 2), x[:, :, :1].expand(-1, -1, WIDTH)):
        seen.clear()
        net.blocks(entering.requires_grad_()).sum().backward()
        assert seen[:7] == seen[:6:-1]


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    net = converted(build_net(6, dtype=torch.float32), 0.9, 0.1)
    x = build_input(4, 5, WIDTH, dtype=torch.float32)
    other = torch.cat([x[:1], 1000 * build_input(3, 5, WIDTH, seed=9, dtype=torch.float32)])
    assert torch.equal(net(x)[0], net(other)[0])


@pytest.mark.parametrize(("alpha", "beta"), [(1, 0), (63 / 64, 1 / 64), (0.9, 0.1), (0.5, 0.5), (0.4, 0.7), (0, 1)])
def test_the_grid_is_finer_than_float32_needs(alpha: float, beta: float) -> None:
    net, x = build_net(12), build_input(4, 6, WIDTH)
    ours = converted(net.float(), alpha, beta)
    outputs = ours(x.float())
    outputs.square().sum().backward()
    beta = round(beta * 1024) / 1024
    expected = stored(net.double(), x, alpha, beta)
    expected.square().sum().backward()
    assert relative([outputs], [expected]) < 1e-4  # the bound against the unquantised network
    assert (
        relative(gradients(ours), gradients(net)) < 1e-3
    )  # 24 branches of float32 arithmetic, grown by up to 1.09 each


def test_the_float_inverse_fails_where_the_exact_one_does_not() -> None:
    net, x = build_net(12), build_input(4, 6, WIDTH, dtype=torch.float32)
    net = net.float()
    errors = {}
    for inversion in ("float", "exact"):
        ours, twin = (converted(net, 1.0, 0.1, inversion=inversion, store=store) for store in (False, True))
        seen = record_inputs(ours)
        with pytest.warns(UserWarning) if inversion == "float" else torch.enable_grad():
            ours(x).square().sum().backward()
        twin(x).square().sum().backward()
        errors[inversion] = relative(gradients(ours), gradients(twin))
        assert torch.equal(seen[0], seen[-1]) == (inversion == "exact")
    assert errors["exact"] < 1e-6 and errors["float"] > 0.5
