"""Mixed and low precision: branches in bfloat16, streams in float32, no weight silently without gradient."""

import copy

import pytest
import torch
from toy_blocks import build_input, build_net, converted, gradients, relative

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

# Recomputed branches are bitwise the same; the float inverse perturbs x, which flips roundings to bfloat16 (2^-9)
BOUND = {"exact": 1e-6, "anchored": 2e-2, "float": 2e-2}
WAYS = list(BOUND)


def train_step(net: torch.nn.Module, forward_in: bool, backward_in: bool) -> None:
    x = build_input(4, 6, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward_in):
        loss = net(x).float().square().sum()
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_in):
        loss.backward()


@pytest.mark.parametrize("inversion", WAYS)
@pytest.mark.parametrize(("forward_in", "backward_in"), [(True, False), (True, True), (False, True)])
def test_autocast_around_forward_and_backward_in_any_combination(inversion, forward_in, backward_in) -> None:
    net = build_net(3, dtype=torch.float32, dropout=0.1)
    ours, twin = (converted(net, 0.2, 0.8, inversion=inversion, store=store) for store in (False, True))
    for model in (ours, twin):
        torch.manual_seed(3)
        train_step(model, forward_in, backward_in)
    assert all(g is not None and g.abs().sum() > 0 and g.dtype == torch.float32 for g in gradients(ours))
    # Without autocast around the forward only the products of the backward are in bfloat16: rebuilt streams, 2e-7 off,
    # flip a few of their roundings (1e-5 to 3e-5 with different masks)
    bound = BOUND[inversion] if forward_in else 1e-4
    assert relative(gradients(ours), gradients(twin)) < bound


@pytest.mark.parametrize("inversion", WAYS)
def test_autocast_gradients_are_near_those_of_float64(inversion: str) -> None:
    net = build_net(3, dtype=torch.float32)
    ours, plain = converted(net, 0.2, 0.8, inversion=inversion), converted(net.double(), 0.2, 0.8, store=True)
    train_step(ours, True, True)
    plain(build_input(4, 6, 8, dtype=torch.float32).double()).square().sum().backward()
    assert relative(gradients(ours), gradients(plain)) < 5e-2  # bfloat16 has 8 bits


@pytest.mark.parametrize("inversion", WAYS)
def test_a_model_wholly_in_bfloat16_has_float32_streams_and_bfloat16_outputs(inversion: str) -> None:
    net, x = build_net(3, dtype=torch.bfloat16), build_input(dtype=torch.bfloat16)
    ours, twin = (converted(net, 0.2, 0.8, inversion=inversion, store=store) for store in (False, True))
    for model in (ours, twin):
        outputs = model(x)
        assert outputs.dtype == torch.bfloat16
        outputs.float().square().sum().backward()
    assert all(g.dtype == torch.bfloat16 for g in gradients(ours))
    assert relative(gradients(ours), gradients(twin)) < BOUND[inversion]


def test_bfloat16_streams_would_be_lost_but_ours_invert() -> None:
    # 24 branches at (0, 1): streams in bfloat16 lose everything, float32 streams with bfloat16 branches do not
    net = build_net(12, dtype=torch.float32)
    ours, twin = (converted(net, 0.0, 1.0, inversion="float", store=store) for store in (False, True))
    for model in (ours, twin):
        train_step(model, True, False)
    assert relative(gradients(ours), gradients(twin)) < 5e-2


def test_evaluation_under_autocast_runs_the_arithmetic_of_training() -> None:
    ours, x = converted(build_net(3, dtype=torch.float32), 0.2, 0.8), build_input(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        trained = ours(x)
        with torch.no_grad():
            assert torch.equal(ours(x), trained)


def test_the_weights_cast_for_a_frozen_copy_do_not_reach_the_training_one() -> None:
    # autocast caches casts: a cast made under no_grad and reused in the recomputation would cut the gradient
    ours = converted(build_net(2, dtype=torch.float32), 0.2, 0.8)
    expected = copy.deepcopy(ours)
    train_step(expected, True, False)
    x = build_input(4, 6, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            ours(x)
        ours(x).float().square().sum().backward()
    # of the blocks: around them it is torch's own cache, which cut the gradient up to 2.9
    assert relative(gradients(ours.blocks), gradients(expected.blocks)) == 0
