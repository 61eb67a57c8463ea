"""The state of fp16's gradient scaler in a checkpoint: taken as it was saved, or refused by name."""

import pytest
import torch

from engine.training.optimization import restore_scaler

GOOD = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7}
BAD = {
    "scale": [0.0, -1.0, float("nan"), float("inf"), 1e300, 10**400, "1", None, True, [1.0], 1e-60],
    "growth_factor": [1.0, 3.0, float("nan"), "2", None],
    "backoff_factor": [0.0, 2.0, None],
    "growth_interval": [0, -1, 2000.5, 3000, True],
    "_growth_tracker": [-1, 1.5, 10**12, None, True],
}


def scaler() -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cpu")
    made.state_dict = lambda: {**GOOD, "_growth_tracker": 0, "scale": 65536.0}  # on a CPU it may be off, and empty
    made.taken = None
    made.load_state_dict = lambda state: setattr(made, "taken", state)
    return made


def test_a_saved_state_is_taken():
    own = scaler()
    restore_scaler(own, GOOD, "run/checkpoint")
    assert own.taken == GOOD


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values])
def test_an_odd_value_is_refused_by_name_and_nothing_is_taken(name, value):
    own = scaler()
    with pytest.raises(ValueError, match=f"run/checkpoint: {name} of the gradient scaler is ") as caught:
        restore_scaler(own, GOOD | {name: value}, "run/checkpoint")
    assert own.taken is None and len(str(caught.value)) < 200


@pytest.mark.parametrize("state", [None, {}, [], "x", 3, {"scale": 1.0}, GOOD | {"more": 1}])
def test_another_form_is_refused(state):
    with pytest.raises(ValueError, match="run/checkpoint: the state of the gradient scaler is "):
        restore_scaler(scaler(), state, "run/checkpoint")


def test_a_scaler_that_is_off_has_no_state():
    restore_scaler(torch.amp.GradScaler("cpu", enabled=False), {}, "run/checkpoint")
