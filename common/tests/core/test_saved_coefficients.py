"""alpha and beta survive saving, loading and copying, or a warning says, where it matters, that they may not."""

import copy
import io
import warnings
from fractions import Fraction

import pytest
import torch
from torch import nn
from toy_blocks import build_input, build_net, converted

import dr2net

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fresh() -> nn.Module:
    net = build_net(3)
    dr2net.convert(net)
    return net


def warnings_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("beta", [0.7, Fraction(3, 10)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_dict_brings_its_coefficients_to_a_fresh_conversion(beta, wrapped: bool) -> None:
    trained, x = converted(build_net(3), 0.4, beta), build_input()
    keys = list(build_net(3).state_dict())
    assert list(trained.state_dict()) == keys
    net = fresh()
    source, target = (nn.Sequential(trained), nn.Sequential(net)) if wrapped else (trained, net)
    target.load_state_dict(through_a_file(source.state_dict()))
    assert (net.blocks.alpha, net.blocks.beta) == (0.4, beta)
    assert warnings_of(lambda: net(x)) == []
    assert torch.equal(net(x), trained(x))


def test_a_file_that_lost_the_coefficients_is_named_once_when_it_matters() -> None:
    state = dict(converted(build_net(3), 0.4, 0.7).state_dict())  # as safetensors gives it back
    net, x = fresh(), build_input()
    assert warnings_of(lambda: net.load_state_dict(state)) == []
    (message,) = warnings_of(lambda: net(x))
    assert "blocks runs at (alpha, beta) = (1, 0)" in message and "dr2net.set_coefficients" in message
    assert warnings_of(lambda: net(x)) == []


@pytest.mark.parametrize("order", ["before", "after"])
def test_who_sets_the_coefficients_hears_nothing(order: str) -> None:
    state = dict(build_net(3).state_dict())
    net = fresh()
    if order == "before":
        dr2net.Schedule.constant(7 / 8, 1 / 8).apply(net, 0.0)
    net.load_state_dict(state)
    if order == "after":
        dr2net.Schedule.constant(7 / 8, 1 / 8).apply(net, 0.0)
    assert warnings_of(lambda: net(build_input())) == []


def test_loading_a_part_beside_the_blocks_raises_no_doubt() -> None:
    net = fresh()
    net.load_state_dict({"head.bias": torch.zeros(3).double()}, strict=False)
    assert warnings_of(lambda: net(build_input())) == []


def test_weights_of_a_plain_model_are_right_at_one_and_zero() -> None:
    net = fresh()
    net.load_state_dict(through_a_file(build_net(3).state_dict()))
    assert warnings_of(lambda: net(build_input())) == []
    assert (net.blocks.alpha, net.blocks.beta) == (1, 0)


def test_coefficients_that_were_set_are_kept_and_the_difference_is_said() -> None:
    net, trained = converted(build_net(3), 7 / 8, 1 / 8), converted(build_net(3), 0.4, 0.7)
    net.load_state_dict(trained.state_dict())
    assert net.blocks.beta == 1 / 8
    (message,) = warnings_of(lambda: net(build_input()))
    assert "(0.875, 0.125)" in message and "(0.4, 0.7)" in message
    net.load_state_dict(trained.state_dict())
    dr2net.set_coefficients(net, 0.4, 0.7)  # a resumed run does so at its next step
    assert warnings_of(lambda: net(build_input())) == []


def test_a_running_average_that_stayed_behind_a_moving_schedule_is_named() -> None:
    net, x = fresh(), build_input()
    schedule = dr2net.Schedule(start=(0.9, 0.1), end=(0.5, 0.5))
    schedule.apply(net, 0.0)
    average = torch.optim.swa_utils.AveragedModel(net)
    assert warnings_of(lambda: average(x)) == []
    schedule.apply(net, 0.5)
    average.update_parameters(net)
    (message,) = warnings_of(lambda: average(x))
    assert "it is a copy" in message and "(0.9, 0.1)" in message and "set_coefficients(copy" in message
    assert warnings_of(lambda: average(x)) == []


def test_a_copy_with_coefficients_of_its_own_hears_nothing() -> None:
    net, x = converted(build_net(3), 0.9, 0.1), build_input()
    constant, own, average = (copy.deepcopy(net) for _ in range(3))
    assert warnings_of(lambda: constant(x)) == []
    dr2net.set_coefficients(own, 0.75, 0.25)
    dr2net.set_coefficients(net, 0.5, 0.5)
    assert warnings_of(lambda: own(x)) == []
    average.load_state_dict(net.state_dict())  # an average kept by loading follows
    assert average.blocks.beta == 0.5 and warnings_of(lambda: average(x)) == []


def test_going_back_to_the_plain_model_says_that_it_is_another_function() -> None:
    net, x = converted(build_net(3), 7 / 8, 1 / 8), build_input()
    twin = copy.deepcopy(net)
    (message,) = warnings_of(lambda: dr2net.deconvert(net))
    assert "(0.875, 0.125)" in message and "another function" in message
    assert not torch.allclose(net(x), twin(x))
    dr2net.set_coefficients(twin, 1, 0)
    assert warnings_of(lambda: dr2net.deconvert(twin)) == []


def test_the_report_says_where_the_coefficients_stand() -> None:
    report = dr2net.convert(build_net(2))
    assert "(alpha, beta) = (1, 0)" in str(report) and "set_coefficients" in str(report)
