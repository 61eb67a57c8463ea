"""What a reversible sequence cannot do is said, by the name of the branch, before a wrong gradient is used."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn
from toy_blocks import WIDTH, build_input, build_net, converted, gradients, relative

import dr2net
from dr2net.node import RecomputationError

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

WAYS = ["float", "anchored", "exact"]


class OneBranch(nn.Module):
    """x + function(x); the parameter makes it trainable."""

    def __init__(self, function, module: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.module = module or nn.Identity()
        self.function = function

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


@dr2net.branches_of.register
def _(block: OneBranch):
    return (dr2net.Branch("only", block.branch, (block.linear, block.module)),)


def sequence_of(function, *, inversion: str = "exact", num_blocks: int = 3, alpha=0.5, beta=0.5, module=None):
    torch.manual_seed(0)
    net = nn.Module()
    net.blocks = nn.Sequential(*(OneBranch(function, module) for _ in range(num_blocks)))
    dr2net.convert(net, inversion=inversion)
    dr2net.set_coefficients(net, alpha, beta)
    return net.blocks


def x32(*shape: int) -> torch.Tensor:
    return build_input(*shape, dtype=torch.float32)


@pytest.mark.parametrize("inversion", WAYS)
def test_double_backward(inversion: str) -> None:
    net, x = converted(build_net(2), 0.5, 0.5, inversion=inversion), build_input().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(net(x).square().sum(), x, create_graph=True)


def test_store_allows_double_backward() -> None:
    net = converted(build_net(2), 0.5, 0.5, inversion="float", store=True)
    assert torch.autograd.gradgradcheck(lambda x: net(x).square().sum(), build_input(2, 2, WIDTH).requires_grad_())


@pytest.mark.parametrize("inversion", ["float", "exact"])
def test_backward_that_enters_in_the_middle(inversion: str) -> None:
    net = converted(build_net(3), 0.5, 0.5, inversion=inversion)
    features = [h := net.stem(build_input())]
    for block in net.blocks:
        features.append(h := block(h))
    with pytest.raises(RuntimeError, match=r"branch 1\.mlp.*before its end"):
        features[2].sum().backward()


@pytest.mark.parametrize("inversion", WAYS)
def test_a_parameter_changed_between_forward_and_backward(inversion: str) -> None:
    net = converted(build_net(3), 0.5, 0.5, inversion=inversion)
    loss = net(build_input()).sum()
    with torch.no_grad():
        net.blocks[1].mlp1.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"parameter of branch 1\.mlp"):
        loss.backward()


@pytest.mark.parametrize("inversion", WAYS)
def test_a_side_input_changed_between_forward_and_backward(inversion: str) -> None:
    net, scale = converted(build_net(3), 0.5, 0.5, inversion=inversion), build_input(WIDTH)
    loss = net(build_input(), scale).sum()
    scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("inversion", WAYS)
def test_an_input_changed_between_blocks(inversion: str) -> None:
    net = converted(build_net(3), 0.5, 0.5, inversion=inversion)
    blocks = list(net.blocks)
    h = blocks[0](build_input())
    with pytest.raises(ValueError, match="block 1 is not the output of the block before"):
        blocks[1](h + 1)


def test_an_input_changed_in_place_between_blocks() -> None:
    for inversion in WAYS:
        blocks = list(converted(build_net(3), 0.5, 0.5, inversion=inversion).blocks)
        with pytest.raises((ValueError, RuntimeError)):
            h = blocks[0](build_input())
            with torch.no_grad():
                h.add_(1)
            blocks[2](blocks[1](h)).sum().backward()


def test_a_block_entered_in_the_middle_or_repeated() -> None:
    net = converted(build_net(3), 0.5, 0.5)
    with pytest.raises(ValueError, match="block 1"):
        list(net.blocks)[1](build_input())
    blocks = list(net.blocks)
    h = blocks[1](blocks[0](build_input()))
    with pytest.raises(ValueError, match="block 1"):
        blocks[1](h)


@pytest.mark.parametrize("inversion", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_a_branch_that_changes_its_input_in_place(inversion: str, training: bool) -> None:
    blocks = sequence_of(lambda b, x: b.linear(x.mul_(2)), inversion=inversion)
    # under autograd, torch itself may be the first to object: a leaf is changed
    with torch.set_grad_enabled(training), pytest.raises((ValueError, RuntimeError), match="in place|in-place"):
        blocks(x32()).sum().backward()


@pytest.mark.parametrize("inversion", WAYS)
def test_a_branch_that_changes_the_shape(inversion: str) -> None:
    with pytest.raises(ValueError, match=r"branch 0\.only turned \(3, 5, 8\) into \(3, 5, 4\)"):
        sequence_of(lambda b, x: b.linear(x)[..., :4], inversion=inversion)(x32())


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += 1
        return x * self.count


@pytest.mark.parametrize("inversion", WAYS)
def test_a_module_with_state_of_its_own(inversion: str) -> None:
    blocks = sequence_of(lambda b, x: b.module(b.linear(x)), inversion=inversion, module=Counter())
    with pytest.raises(ValueError, match=r"Counter in branch 0\.only changes its buffer 'count'"):
        blocks(x32())
    blocks.eval()(x32()).sum().backward()


class Table(nn.Module):
    """Positions, made anew for another number of rows; `grows`: each call adds a row, so that two calls differ."""

    def __init__(self, grows: bool) -> None:
        super().__init__()
        self.grows = grows
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grows or self.table.shape[0] != x.shape[1]:
            rows = self.table.shape[0] + 1 if self.grows else x.shape[1]
            self.table = torch.arange(float(rows))[:, None]
        return x * self.table.mean()


@pytest.mark.parametrize("inversion", WAYS)
def test_a_table_that_is_made_anew_for_another_size_is_no_state(inversion: str) -> None:
    def call(b, x):
        return b.module(b.linear(x))

    blocks, fresh = sequence_of(call, inversion=inversion, module=Table(grows=False)), x32().requires_grad_()
    blocks(fresh).sum().backward()
    again = fresh.detach().clone().requires_grad_()
    blocks(again).sum().backward()
    assert torch.equal(again.grad, fresh.grad)
    with pytest.raises(RecomputationError, match=r"branch \d\.only"):
        sequence_of(call, inversion=inversion, module=Table(grows=True))(x32().requires_grad_()).sum().backward()


def test_spectral_norm_and_instance_norm_with_statistics_have_state_too() -> None:
    def call(b, x):
        return b.module(b.linear(x))

    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
    instance = nn.InstanceNorm1d(5, track_running_stats=True)
    for module in (spectral, instance):
        with pytest.raises(ValueError, match=r"branch 0\.only changes its buffer"):
            sequence_of(call, module=module)(x32())


def test_a_branch_that_is_not_deterministic_is_named() -> None:
    calls = itertools.count()
    blocks = sequence_of(lambda b, x: b.linear(x) + (1e-3 * next(calls) if b is blocks[1] else 0))
    loss = blocks(x32().requires_grad_()).sum()
    with pytest.raises(RuntimeError, match=r"branch 1\.only did not compute in backward what"):
        loss.backward()


def test_a_branch_that_shuffles_tokens_anew_is_found() -> None:
    # the same values in other places, added to a residual that stays
    turns = itertools.count()
    blocks = sequence_of(lambda b, x: b.linear(x).roll(next(turns), 1) if b is blocks[1] else b.linear(x))
    loss = blocks(x32().requires_grad_()).sum()
    with pytest.raises(RuntimeError, match="did not compute in backward what"):
        loss.backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite(value: float) -> None:
    x = x32()
    x[1, 2, 3] = value
    with pytest.raises(FloatingPointError, match="the input"):
        sequence_of(lambda b, x: b.linear(x))(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_branch_that_is_not_finite_is_named(training: bool) -> None:
    blocks = sequence_of(lambda b, x: b.linear(x) * (float("nan") if b is blocks[2] else 1))
    with torch.set_grad_enabled(training), pytest.raises(FloatingPointError, match=r"branch 2\.only"):
        blocks(x32())


@pytest.mark.parametrize("training", [True, False])
def test_overflow_of_a_deep_network_is_reported_and_never_wraps(training: bool) -> None:
    blocks = sequence_of(lambda b, x: 0.1 * b.linear(x), num_blocks=60, alpha=1.0, beta=1.0)
    with torch.set_grad_enabled(training), pytest.raises(OverflowError, match=r"branch \d+\.only .*alpha \+ beta <= 1"):
        blocks(x32())


def test_the_deepest_network_that_does_not_overflow_is_right() -> None:
    for num_blocks in range(4, 60, 4):
        net = nn.Module()
        net.blocks = sequence_of(lambda b, x: 0.1 * b.linear(x), num_blocks=num_blocks, alpha=1.0, beta=1.0)
        try:
            error = dr2net.gradient_error(net, x32(), lambda m, x: m.blocks(x).square().mean())
        except OverflowError:
            break
        assert error.overall < 1e-6
    assert 4 < num_blocks < 56


def test_coefficients_the_inversion_cannot_do() -> None:
    exact = converted(build_net(2), 0.5, 0.5)
    for beta in (-1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="exact inversion needs|finite"):
            dr2net.set_coefficients(exact, 1.0, beta)
    with pytest.raises(ValueError, match="finite"):
        dr2net.set_coefficients(exact, float("inf"), 0.5)


@pytest.mark.parametrize("inversion", WAYS)
def test_beta_may_be_a_fraction(inversion: str) -> None:
    net, x = build_net(2), build_input()
    ours = converted(net, 0.5, Fraction(1, 2), inversion=inversion)
    twin = converted(net, 0.5, 0.5, inversion=inversion)
    for model in (ours, twin):
        model(x).sum().backward()
    assert relative(gradients(ours), gradients(twin)) == 0


@pytest.mark.parametrize(
    "wrong", [{"inversion": "magic"}, {"anchor_every": 2}, {"inversion": "anchored", "anchor_every": 0}]
)
def test_wrong_ways_of_inversion(wrong: dict) -> None:
    with pytest.raises(ValueError):
        dr2net.convert(build_net(2), **wrong)


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
def test_a_pass_that_is_left_early_hands_out_no_number_from_beyond_the_grid(bad):
    net = converted(build_net(3), 0.5, 0.5)
    with torch.no_grad():
        next(net.blocks[1].parameters()).fill_(bad)
        steps = list(net.blocks)
        x = steps[0](build_input())
        assert x.isfinite().all()
        assert not steps[1](x).isfinite().all()
