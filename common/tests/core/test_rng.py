"""Random draws of a branch: replayed exactly, new at each step, and without a trace in the global generator."""

import pytest
import torch
from toy_blocks import build_input, build_net, converted, gradients, relative, stored

from dr2net import rng

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

WAYS = ["float", "anchored", "exact"]
DROPS = {"dropout": 0.3, "drop_path": 0.4}
BOUND = {"float": 1e-10, "anchored": 1e-10, "exact": 1e-8}  # float64; the grid of 2^-40 for exact


@pytest.mark.parametrize("inversion", WAYS)
def test_dropout_and_drop_path_are_replayed_exactly(inversion: str) -> None:
    net, x = build_net(4, **DROPS), build_input()
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    torch.manual_seed(5)
    ours(x).square().sum().backward()
    torch.manual_seed(5)
    stored(net, x, 0.5, 0.5).square().sum().backward()
    assert relative(gradients(ours), gradients(net)) < BOUND[inversion]


@pytest.mark.parametrize("inversion", WAYS)
def test_the_global_generator_ends_where_plain_training_leaves_it(inversion: str) -> None:
    net, x = build_net(4, **DROPS), build_input()
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    states = []
    for forward in (ours, lambda x: stored(net, x, 0.5, 0.5)):
        torch.manual_seed(5)
        outputs = forward(x)
        states.append(torch.get_rng_state())
        outputs.sum().backward()
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("inversion", WAYS)
def test_masks_differ_from_step_to_step_and_repeat_with_the_seed(inversion: str) -> None:
    ours, x = converted(build_net(3, **DROPS), 0.5, 0.5, inversion=inversion), build_input()
    torch.manual_seed(5)
    first, second = ours(x), ours(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(ours(x), first) and torch.equal(ours(x), second)


@pytest.mark.parametrize("inversion", WAYS)
def test_draws_between_forward_and_backward_do_no_harm(inversion: str) -> None:
    ours, x = converted(build_net(3, **DROPS), 0.5, 0.5, inversion=inversion), build_input()
    found = []
    for num_draws in (0, 7):
        ours.zero_grad()
        torch.manual_seed(5)
        loss = ours(x).square().sum()
        torch.rand(num_draws)
        before = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), before)
        found.append([g.clone() for g in gradients(ours)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("inversion", WAYS)
def test_evaluation_draws_nothing(inversion: str) -> None:
    ours, x = converted(build_net(3, **DROPS), 0.5, 0.5, inversion=inversion).eval(), build_input()
    before = torch.get_rng_state()
    assert torch.equal(ours(x), ours(x)) and torch.equal(torch.get_rng_state(), before)


def test_a_branch_that_draws_nothing_keeps_no_state() -> None:
    x = torch.zeros(1)
    before = rng.record(x)
    assert rng.drawn(before, x) is None
    torch.rand(1)
    assert rng.drawn(before, x) is before


def test_replay_puts_the_generator_back_even_after_an_error() -> None:
    x = torch.zeros(1)
    states = rng.record(x)
    drawn = torch.rand(3)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), rng.replay(states, x):
        assert torch.equal(torch.rand(3), drawn)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
