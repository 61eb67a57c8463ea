"""Gradients of a reversible sequence equal those of stored activations, in every situation a training meets."""

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import WIDTH, build_input, build_net, converted, gradients, relative, stored

# short sequences in float64 are accurate all the same
pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

FLOAT64 = 1e-10  # the bound in float64
GRID = 1e-8  # a float64 stream on the grid of 2^-40: 1e-12 per branch, amplified by a few branches
POINTS = [(1.0, 0.0), (1.0, 0.1), (0.4, 0.7), (0.0, 1.0), (1.0, -1.0)]
WAYS = ["float", "anchored", "exact"]
BOUND = {"float": FLOAT64, "anchored": FLOAT64, "exact": GRID}


def step(net: nn.Module, x: Tensor, *args: Tensor, **named: Tensor) -> Tensor:
    """One forward and backward; returns the outputs."""
    outputs = net(x, *args, **named)
    outputs.square().sum().backward()
    return outputs.detach()


def reference(net: nn.Module, x: Tensor, alpha: float, beta: float, *args: Tensor, **named: Tensor) -> nn.Module:
    """A copy of `net` holding the gradients of stored activations."""
    net = copy.deepcopy(net)
    stored(net, x, alpha, beta, *args, **named).square().sum().backward()
    return net


def exponent(inversion: str, beta: float) -> float:
    """The coefficient `exact` computes with: a multiple of 1/1024."""
    return round(beta * 1024) / 1024 if inversion == "exact" else beta


@pytest.mark.parametrize(
    ("inversion", "alpha", "beta"),
    # exact inversion refuses a negative beta, see test_refusals.py
    [(way, *point) for way in WAYS for point in POINTS if way != "exact" or point[1] >= 0],
)
def test_gradcheck(inversion: str, alpha: float, beta: float) -> None:
    net = converted(build_net(2), alpha, beta, inversion=inversion)
    # In finite differences the grid of 2^-40 shows as 1e-12 / eps = 1e-8, curvature as eps^2 = 1e-8
    assert torch.autograd.gradcheck(net, build_input(2, 2, WIDTH).requires_grad_(), eps=1e-4, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("inversion", WAYS)
@pytest.mark.parametrize("num_branches", [1, 2])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.4, 0.7), (0.0, 1.0)])
def test_gradients_equal_stored_activations_at_every_depth(inversion, num_branches, num_blocks, alpha, beta) -> None:
    net, x = build_net(num_blocks, num_branches=num_branches), build_input()
    ours = converted(net, alpha, beta, inversion=inversion)
    x_ours, x_plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = step(ours, x_ours)
    beta = exponent(inversion, beta)
    plain = reference(net, x_plain, alpha, beta)
    assert relative([outputs], [stored(net, x, alpha, beta)]) < BOUND[inversion]
    assert relative([x_ours.grad, *gradients(ours)], [x_plain.grad, *gradients(plain)]) < BOUND[inversion]


def frozen_stem(net: nn.Module) -> None:
    net.stem.requires_grad_(False)


def one_frozen_branch(net: nn.Module) -> None:
    for part in (net.blocks[1].norm2, net.blocks[1].mlp1, net.blocks[1].mlp2):
        part.requires_grad_(False)


def frozen_prefix(net: nn.Module) -> None:
    net.stem.requires_grad_(False)
    for block in list(net.blocks)[:2]:
        block.requires_grad_(False)


def only_norms(net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("norm" in name)


def all_frozen_but_the_head(net: nn.Module) -> None:
    net.requires_grad_(False)
    net.head.requires_grad_(True)


def frozen_blocks_behind_a_trainable_stem(net: nn.Module) -> None:
    net.blocks.requires_grad_(False)


@pytest.mark.parametrize("inversion", WAYS)
@pytest.mark.parametrize(
    "freeze",
    [
        frozen_stem,
        one_frozen_branch,
        frozen_prefix,
        only_norms,
        all_frozen_but_the_head,
        frozen_blocks_behind_a_trainable_stem,
    ],
)
def test_frozen_parts_get_no_gradient_and_the_rest_the_right_one(inversion: str, freeze) -> None:
    net, x = build_net(3), build_input()
    freeze(net)
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    step(ours, x)
    assert relative(gradients(ours), gradients(reference(net, x, 0.5, 0.5))) < BOUND[inversion]


@pytest.mark.parametrize("inversion", WAYS)
def test_an_unused_parameter_gets_no_gradient(inversion: str) -> None:
    net, x = build_net(3), build_input()
    net.blocks[1].value.unused = nn.Parameter(torch.ones(2))
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    step(ours, x)
    assert ours.blocks[1].value.unused.grad is None
    assert relative(gradients(ours), gradients(reference(net, x, 0.5, 0.5))) < BOUND[inversion]


@pytest.mark.parametrize("inversion", WAYS)
def test_two_forwards_before_two_backwards(inversion: str) -> None:
    net, first, second = build_net(3, dropout=0.3), build_input(), build_input(2, 4, WIDTH, seed=2)
    ours, twin = (converted(net, 0.5, 0.5, inversion=inversion, store=store) for store in (False, True))
    for model in (ours, twin):
        torch.manual_seed(3)
        losses = [model(x).square().sum() for x in (first, second)]
        for loss in losses:
            loss.backward()
    assert relative(gradients(ours), gradients(twin)) < FLOAT64


@pytest.mark.parametrize("inversion", WAYS)
def test_retained_graph_gives_the_same_gradient_twice(inversion: str) -> None:
    net, x = build_net(4, dropout=0.2), build_input()
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    loss = ours(x).square().sum()
    loss.backward(retain_graph=True)
    once = [g.clone() for g in gradients(ours)]
    loss.backward()
    assert all(torch.equal(g, 2 * o) for g, o in zip(gradients(ours), once, strict=True))


@pytest.mark.parametrize("inversion", WAYS)
def test_accumulated_gradients_are_those_of_the_whole_batch(inversion: str) -> None:
    net, x = build_net(3), build_input(6, 5, WIDTH)
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    for part in x.split(2):
        step(ours, part)
    assert relative(gradients(ours), gradients(reference(net, x, 0.5, 0.5))) < BOUND[inversion]


@pytest.mark.parametrize("inversion", WAYS)
def test_side_inputs_get_gradients_positional_and_by_keyword(inversion: str) -> None:
    net, x = build_net(3), build_input()
    sides = [
        [build_input(WIDTH, seed=5).requires_grad_(), build_input(5, WIDTH, seed=6).requires_grad_()] for _ in "12"
    ]
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    step(ours, x, sides[0][0], shift=sides[0][1])
    plain = reference(net, x, 0.5, 0.5, sides[1][0], shift=sides[1][1])
    found, expected = ([*gradients(n), *(s.grad for s in side)] for n, side in zip((ours, plain), sides, strict=True))
    assert relative(found, expected) < BOUND[inversion]


@pytest.mark.parametrize("inversion", WAYS)
def test_each_block_may_be_given_its_own_side_inputs(inversion: str) -> None:
    net, x = build_net(3), build_input()
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    sides = [[build_input(WIDTH, seed=s).requires_grad_() for s in range(3)] for _ in "12"]
    h = ours.stem(x)
    for block, side in zip(ours.blocks, sides[0], strict=True):
        h = block(h, side)
    h.square().sum().backward()

    h = previous = net.stem(x)
    for block, side in zip(net.blocks, sides[1], strict=True):
        for branch in block.functions():
            h, previous = branch(h, side) + 0.5 * h + 0.5 * previous, h
    h.square().sum().backward()
    found, expected = ([*gradients(n), *(s.grad for s in side)] for n, side in zip((ours, net), sides, strict=True))
    assert relative(found, expected) < BOUND[inversion]


@pytest.mark.parametrize("inversion", WAYS)
def test_intermediate_features_get_the_right_gradients_and_are_not_changed(inversion: str) -> None:
    net, x = build_net(5), build_input()
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    features, h = [], ours.stem(x)
    for block in ours.blocks:
        h = block(h)
        features.append(h)
    kept = [f.detach().clone() for f in features]
    sum(f.square().sum() for f in features).backward()
    assert all(torch.equal(f, k) for f, k in zip(features, kept, strict=True))

    h = previous = net.stem(x)
    loss = 0
    for block in net.blocks:
        for branch in block.functions():
            h, previous = branch(h) + 0.5 * h + 0.5 * previous, h
        loss = loss + h.square().sum()
    loss.backward()
    assert relative(gradients(ours), gradients(net)) < BOUND[inversion]


@pytest.mark.parametrize("inversion", WAYS)
def test_tensors_of_the_caller_are_not_changed(inversion: str) -> None:
    ours = converted(build_net(3), 0.5, 0.5, inversion=inversion)
    x, scale, shift = build_input(), build_input(WIDTH), build_input(5, WIDTH)
    kept = [t.clone() for t in (x, scale, shift)]
    h = ours.blocks(x, scale, shift=shift)
    output = h.detach().clone()
    h.sum().backward()
    assert all(torch.equal(t, k) for t, k in zip((x, scale, shift, h), (*kept, output), strict=True))


@pytest.mark.parametrize("inversion", WAYS)
def test_batch_norm_moves_its_running_statistics_once(inversion: str) -> None:
    net, x = build_net(3, batch_norm=True), build_input()
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    step(ours, x)
    plain = reference(net, x, 0.5, 0.5)
    assert relative(gradients(ours), gradients(plain)) < BOUND[inversion]
    for (name, ours_buffer), plain_buffer in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours_buffer, plain_buffer, rtol=GRID, atol=GRID, msg=name)


@pytest.mark.parametrize("shape", [(0, 5, WIDTH), (1, 5, WIDTH), (3, 1, WIDTH), (1, 1, WIDTH), (7, 13, WIDTH)])
@pytest.mark.parametrize("inversion", WAYS)
def test_empty_and_odd_batches(inversion: str, shape: tuple[int, ...]) -> None:
    net, x = build_net(2), build_input(*shape)
    ours = converted(net, 0.5, 0.5, inversion=inversion)
    outputs = step(ours, x)
    assert outputs.shape == (shape[0], 3)
    if shape[0]:
        assert relative(gradients(ours), gradients(reference(net, x, 0.5, 0.5))) < GRID
    else:
        assert all(g is not None and not g.any() for g in gradients(ours))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inversion", WAYS)
def test_without_gradients_the_output_is_that_of_training(inversion: str, mode) -> None:
    ours, x = converted(build_net(3), 0.5, 0.5, inversion=inversion), build_input()
    with mode():
        evaluated = ours(x)
    assert torch.equal(evaluated, ours(x)) and not evaluated.requires_grad


def test_a_deep_copy_is_independent() -> None:
    ours, x = converted(build_net(2), 0.5, 0.5), build_input()
    copied = copy.deepcopy(ours)
    expected = copied(x)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    assert torch.equal(copied(x), expected)
    step(copied, x)
    assert all(g is None for g in gradients(ours)) and all(g is not None for g in gradients(copied))


def test_an_optimizer_may_step_in_backward() -> None:
    ours, x = converted(build_net(4), 0.5, 0.5), build_input()
    plain = copy.deepcopy(ours)
    step(plain, x)

    def descend(parameter: nn.Parameter) -> None:
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)
        parameter.grad = None

    for parameter in ours.parameters():
        parameter.register_post_accumulate_grad_hook(descend)
    step(ours, x)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b - 0.1 * b.grad)
