"""The gradient check before an epoch, on samples without a single box: a data set may begin with them."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from detection.configs import ROWS
from detection.model import build_model
from engine.training.finetuning import apply_method, check_gradient


def test_samples_without_a_box_do_not_raise_a_false_alarm() -> None:
    config = ROWS["shapes_tiny_dr2net"]()
    own = replace(config.model, weights=None, queries=20, encoder_layers=1, decoder_layers=2)
    config = replace(config, model=own)
    torch.manual_seed(0)
    model = build_model(config)
    apply_method(model, config.finetuning)
    batch = {
        "image": torch.randn(2, 3, 64, 64),
        "padding": torch.zeros(2, 64, 64, dtype=torch.bool),
        "targets": [{"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)} for _ in range(2)],
        "num_targets": 0.0,
    }
    notes: list[str] = []
    log = SimpleNamespace(draw=lambda values, step: None, note=notes.append)
    state = SimpleNamespace(alpha=7 / 8, beta=1 / 8, step=0)
    found = check_gradient(model, batch, replace(config.finetuning, stop_above_tolerance=True), 0, state, log)
    assert found["error"] == 0.0  # the exact inversion's
    assert len(notes) == 1 and "inf" not in notes[0]
    assert batch["num_targets"] == 0.0
