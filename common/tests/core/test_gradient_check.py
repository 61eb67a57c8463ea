"""The error law's numbers, and the measured error: noise where the law says so, nothing where it must be nothing."""

import math
import warnings

import pytest
import torch
from toy_blocks import WIDTH, build_input, build_net, converted, gradients, relative

import dr2net
from dr2net import anchor_spacing, gradient_error, growth, predicted_error

TABLE = {  # shared method notes, section 3: three digits were printed
    (1, 0.1): 10.9,
    (1, 0.5): 2.73,
    (1, 1): 1.62,
    (0.7, 0.3): 3.33,
    (0.5, 0.5): 2.00,
    (0.4, 0.7): 1.52,
    (0.2, 0.8): 1.25,
    (0.1, 0.9): 1.11,
    (0, 1): 1.00,
    (1, -1): 1.00,
}


def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().sum()


@pytest.mark.parametrize("point", TABLE)
def test_growth_per_branch(point: tuple[float, float]) -> None:
    assert growth(*point) == pytest.approx(TABLE[point], rel=5e-3)


def test_growth_is_what_the_inverse_recurrence_does_to_a_perturbation() -> None:
    for alpha, beta in TABLE:
        if beta == -1:
            continue  # complex roots: the size oscillates
        error, previous = 1.0, 0.0
        for _ in range(200):
            error, previous = (previous - alpha * error) / beta, error
            scale = abs(error) + abs(previous)
            error, previous = error / scale, previous / scale
        following = (previous - alpha * error) / beta
        assert abs(following / error) == pytest.approx(growth(alpha, beta), rel=1e-6) or (beta == 1 and alpha == 0)


def test_nothing_grows_without_beta() -> None:
    assert growth(1, 0) == math.inf and predicted_error(1, 0, 4, torch.float32) == 1.0


def test_predicted_error_grows_with_depth_and_stops_at_one() -> None:
    errors = [predicted_error(1, 0.1, n, torch.float32) for n in (1, 4, 8, 24, 10**6)]
    assert errors == sorted(errors) and errors[-1] == 1.0
    assert predicted_error(0, 1, 24, torch.float32) < 1e-6


def test_anchor_spacing_keeps_the_prediction_below_the_tolerance() -> None:
    for alpha, beta in TABLE:
        for tolerance in (1e-5, 1e-3, 1e-1):
            spacing = anchor_spacing(alpha, beta, torch.float32, tolerance)
            if spacing is None:
                assert growth(alpha, beta) == pytest.approx(1.0)
            elif spacing > 1:
                assert predicted_error(alpha, beta, spacing, torch.float32) <= tolerance * 1.0001
                assert predicted_error(alpha, beta, spacing + 1, torch.float32) > tolerance
    assert anchor_spacing(1, 0.1, torch.bfloat16, 1e-3) == 1


BOUNDS = [
    ("exact", 1, 1 / 64, 1e-6),
    ("exact", 1, 0.1, 1e-6),
    ("exact", 1, 0.5, 1e-6),
    ("exact", 0.7, 0.4, 1e-6),
    ("exact", 0.5, 0.5, 1e-6),
    ("exact", 0.4, 0.7, 1e-6),
    ("exact", 0.1, 0.9, 1e-6),
    ("exact", 0, 1, 1e-6),
    ("anchored", 1, 0.1, 1e-3),
    ("anchored", 0.5, 0.5, 1e-3),
]


@pytest.mark.parametrize(
    ("inversion", "alpha", "beta", "bound", "autocast"),
    # the bound of float inversion is for float32 branches
    [(*case, autocast) for case in BOUNDS for autocast in (False, True)] + [("float", 0, 1, 1e-6, False)],
)
def test_measured_error_over_24_branches_stays_below_the_issue_s_bound(inversion, alpha, beta, bound, autocast) -> None:
    net = converted(build_net(12, dtype=torch.float32, dropout=0.1, drop_path=0.1), alpha, beta, inversion=inversion)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        error = gradient_error(net, build_input(4, 6, WIDTH, dtype=torch.float32), loss)
    if (
        autocast
    ):  # the stem's output is bfloat16, so a last bit of its gradient's float32 sum may flip a rounding (2^-9)
        assert error.groups.pop("stem") < 1e-3
        assert max(error.groups.values()) <= bound
    else:
        assert error.overall <= bound


def test_float_inversion_at_the_usual_start_is_noise_and_says_so() -> None:
    net = converted(build_net(12, dtype=torch.float32), 1, 0.1, inversion="float")
    with pytest.warns(UserWarning, match="predicted relative gradient error"):
        error = gradient_error(net, build_input(dtype=torch.float32), loss)
    assert error.overall > 0.5
    assert max(error.groups, key=error.groups.get) != "head"
    assert error.groups["head"] < 1e-6


def test_float_inversion_where_it_is_accurate_does_not_warn() -> None:
    net = converted(build_net(12, dtype=torch.float32), 0, 1, inversion="float")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(net, build_input(dtype=torch.float32)).backward()


def test_the_reference_is_what_store_computes() -> None:
    net, x = build_net(4, dtype=torch.float32), build_input(dtype=torch.float32)
    for inversion in ("float", "exact"):
        kept = converted(net, 0, 1, inversion=inversion, store=True)
        loss(kept, x).backward()
        ours = converted(net, 0, 1, inversion=inversion)
        error = gradient_error(ours, x, loss).overall
        loss(ours, x).backward()
        assert relative(gradients(ours), gradients(kept)) == pytest.approx(error, rel=1e-3, abs=1e-12)
        assert all(m.store for m in kept.modules() if isinstance(m, dr2net.ReversibleSequence))


def test_measuring_leaves_no_trace() -> None:
    net = converted(build_net(3, dropout=0.2, batch_norm=True, dtype=torch.float32), 0.5, 0.5)
    x = build_input(dtype=torch.float32)
    loss(net, x).backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    buffers = [b.clone() for b in net.buffers()]
    state = torch.get_rng_state()
    gradient_error(net, x, loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.store for m in net.modules() if isinstance(m, dr2net.ReversibleSequence))


def test_groups_are_the_blocks_and_the_parts_around_them() -> None:
    error = gradient_error(converted(build_net(3), 0.5, 0.5), build_input(), loss)
    assert list(error.groups) == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]


def test_a_gradient_that_is_not_finite_is_an_infinite_error() -> None:
    net = converted(build_net(2), 0.5, 0.5, inversion="float")
    assert gradient_error(net, build_input(), lambda m, b: loss(m, b) * float("nan")).overall == math.inf


def test_frozen_and_unconverted_models_are_refused() -> None:
    with pytest.raises(ValueError, match="not converted"):
        gradient_error(build_net(2), build_input(), loss)
    net = converted(build_net(2), 0.5, 0.5).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        gradient_error(net, build_input(), loss)
