"""alpha and beta along training: each path, its ends, and that nothing is remembered."""

import itertools

import pytest
import torch
from toy_blocks import build_net, converted

from dr2net import ReversibleSequence, Schedule

PATHS = ["together", "alternating", "alpha_first", "beta_first"]
AUTHORS = {"start": (1.0, 0.1), "end": (0.4, 0.7), "until": 0.6}


def approximately(pair: tuple[float, float]) -> object:
    return pytest.approx(pair, abs=1e-12)  # float64 arithmetic on numbers near 1


@pytest.mark.parametrize("path", PATHS)
def test_every_path_begins_at_start_and_rests_at_end(path: str) -> None:
    schedule = Schedule(path=path, **AUTHORS)
    assert schedule.at(0.0) == approximately((1.0, 0.1))
    for progress in (0.6, 0.61, 0.999, 1.0):
        assert schedule.at(progress) == approximately((0.4, 0.7))


@pytest.mark.parametrize("path", PATHS)
def test_no_path_turns_back_or_leaves_its_range(path: str) -> None:
    schedule = Schedule(path=path, **AUTHORS)
    points = [schedule.at(i / 500) for i in range(501)]
    for (alpha, beta), (next_alpha, next_beta) in itertools.pairwise(points):
        assert next_alpha <= alpha + 1e-12 and next_beta >= beta - 1e-12
        assert 0.4 - 1e-12 <= next_alpha <= 1 and 0.1 - 1e-12 <= next_beta <= 0.7 + 1e-12


def test_together_is_linear() -> None:
    assert Schedule(**AUTHORS).at(0.3) == approximately((0.7, 0.4))


def test_alternating_moves_one_at_a_time_alpha_before_beta() -> None:
    schedule = Schedule(path="alternating", stages=3, **AUTHORS)
    points = [schedule.at(i / 1000) for i in range(1001)]
    changes = [(a != c, b != d) for (a, b), (c, d) in itertools.pairwise(points) if (a, b) != (c, d)]
    assert len(changes) in (5, 6)  # alpha's first move may be at once
    assert all(alpha != beta for alpha, beta in changes)
    assert all(first != second for first, second in itertools.pairwise(changes))
    distinct = list(dict.fromkeys(points))
    assert distinct[1][0] < distinct[0][0] and distinct[1][1] == distinct[0][1]


def test_alpha_first_and_beta_first_move_one_after_the_other() -> None:
    assert Schedule(path="alpha_first", **AUTHORS).at(0.3) == approximately((0.4, 0.1))
    assert Schedule(path="beta_first", **AUTHORS).at(0.3) == approximately((1.0, 0.7))


def test_the_convex_line_is_kept() -> None:
    schedule = Schedule(start=(0.9, 0.1), end=(0.3, 0.7))
    for i in range(101):
        assert sum(schedule.at(i / 100)) == pytest.approx(1.0, abs=1e-12)


def test_a_constant_stays() -> None:
    for progress in (0.0, 0.5, 1.0):
        assert Schedule.constant(0.0, 1.0).at(progress) == (0.0, 1.0)


def test_it_is_a_pure_function_so_a_resumed_run_continues() -> None:
    schedule = Schedule(**AUTHORS)
    forward = [schedule.at(i / 10) for i in range(11)]
    backward = [Schedule(**AUTHORS).at(i / 10) for i in reversed(range(11))]
    assert forward == backward[::-1]
    assert hash(schedule) == hash(Schedule(**AUTHORS))


def test_apply_sets_what_at_says_for_training_and_evaluation() -> None:
    net = converted(build_net(2), 1.0, 0.0)
    schedule = Schedule(**AUTHORS)
    assert schedule.apply(net, 0.45) == schedule.at(0.45)
    (sequence,) = [m for m in net.modules() if isinstance(m, ReversibleSequence)]
    assert (sequence.alpha, sequence.beta) == schedule.at(0.45)
    net.eval()
    assert (sequence.alpha, sequence.beta) == schedule.at(0.45)


@pytest.mark.parametrize("wrong", [{"path": "sideways"}, {"until": 1.5}, {"until": -0.1}, {"stages": 0}])
def test_a_schedule_that_makes_no_sense_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        Schedule(**wrong)


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_zero_and_one_is_refused(progress: float) -> None:
    with pytest.raises(ValueError):
        Schedule().at(progress)


def test_an_unconverted_model_is_refused() -> None:
    with pytest.raises(ValueError, match="not converted"):
        Schedule().apply(torch.nn.Linear(2, 2), 0.0)
