"""What both heads promise: padding, batches and precision change nothing; odd windows are survived, actions found."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from action_detection.head import ActionFormerHead
from action_detection.tests.toy_windows import windows
from action_detection.vsgn import VSGNHead
from dr2net.memory import predict

ROUNDING = 1e-5  # relative and absolute: float32 sums in another order
SETTINGS = SimpleNamespace(min_score=1e-3, max_candidates=100)

MakeHead = Callable[..., nn.Module]


def actionformer(num_classes: int = 3, *, window: int = 5, **options) -> nn.Module:
    torch.manual_seed(0)
    head = ActionFormerHead(
        8, num_classes, window=window, position_embedding=True, **{"width": 16, "num_levels": 3, **options}
    )
    for block in [*head.stem, *head.branch]:  # at the initial scale attention would hide behind the rounding
        nn.init.ones_(block.scale1)
    return head


def actionformer_that_sees_all(num_classes: int = 3, **options) -> nn.Module:
    return actionformer(num_classes, window=0, **options)


def vsgn(num_classes: int = 3, **options) -> nn.Module:
    torch.manual_seed(0)
    return VSGNHead(8, num_classes, **{"width": 16, "num_levels": 3, "num_neighbors": 4, **options})


@pytest.fixture(params=[actionformer, actionformer_that_sees_all, vsgn])
def make_head(request: pytest.FixtureRequest) -> MakeHead:
    return request.param


@pytest.mark.parametrize("num_times", [16, 13, 2, 1])
def test_padding_and_what_stands_in_it_change_no_real_output(make_head: MakeHead, num_times: int) -> None:
    head = make_head()
    x = torch.randn(1, 8, num_times)
    padded = torch.cat([x, 100 * torch.randn(1, 8, 19 - num_times)], dim=2)
    mask = torch.arange(19)[None] < num_times
    expected, found = head(x, mask[:, :num_times]), head(padded, mask)
    assert found["mask"].sum() == expected["mask"].numel()
    for name in {"logits", "offsets", "located", "adjusted"} & set(expected):
        torch.testing.assert_close(found[name][found["mask"]], expected[name][0], atol=ROUNDING, rtol=ROUNDING)
    if "points" in expected:
        torch.testing.assert_close(found["points"][found["mask"][0], 0], expected["points"][:, 0])
    if "boundaries" in expected:
        curves = found["boundaries"][:, :, :num_times]
        torch.testing.assert_close(curves, expected["boundaries"], atol=ROUNDING, rtol=ROUNDING)


def test_losses_do_not_depend_on_the_split_of_a_batch(make_head: MakeHead) -> None:
    head = make_head()
    x = torch.randn(3, 8, 20)
    batch = windows(20, [20, 11, 20], [[[1, 4], [7, 18]], [[2, 9]], []], [[0, 2], [1], []])
    whole = head.losses(head(x, batch["mask"]), batch)
    parts = []
    for i in range(3):
        part = {name: value[i : i + 1] for name, value in batch.items()}
        parts.append(head.losses(head(x[i : i + 1], part["mask"]), part))
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([p[name] for p in parts]).mean(), atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize(
    ("num_times", "real", "segments"),
    [(20, 20, []), (1, 1, [[0, 1]]), (20, 0, []), (20, 1, [[0, 1]]), (20, 20, [[3, 3]]), (20, 20, [[0, 20]])],
)
def test_windows_without_actions_without_steps_or_of_one_step_give_finite_losses_and_gradients(
    make_head: MakeHead, num_times: int, real: int, segments: list
) -> None:
    head = make_head()
    batch = windows(num_times, [real], [segments], [[1] * len(segments)])
    sum(head.losses(head(torch.randn(1, 8, num_times), batch["mask"]), batch).values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_every_parameter_gets_a_gradient(make_head: MakeHead) -> None:
    head = make_head()
    batch = windows(32, [32], [[[2, 5], [8, 14], [4, 30]]], [[0, 1, 2]])
    sum(head.losses(head(torch.randn(1, 8, 32), batch["mask"]), batch).values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_two_windows_are_learnt_and_their_actions_found(make_head: MakeHead) -> None:
    head = make_head(width=32)
    x = torch.randn(2, 8, 32)
    batch = windows(32, [32, 32], [[[2, 7.5], [12, 25]], [[6, 10]]], [[0, 2], [1]])
    batch["start"], batch["seconds_per_time"] = torch.tensor([10.0, 0.0]), torch.tensor([0.5, 0.5])
    optimizer = torch.optim.AdamW(head.parameters(), 5e-3)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 100)
        losses = head.losses(head(x, batch["mask"]), batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert sum(losses.values()) < 0.2
    first, second = head.detect(head(x, batch["mask"]), batch, SETTINGS)
    for found, label, expected in [(first, 0, [11.0, 13.75]), (first, 2, [16.0, 22.5]), (second, 1, [3.0, 5.0])]:
        best = found.scores[found.labels == label].argmax()
        assert found.scores[found.labels == label][best] > 0.5
        segment = found.segments[found.labels == label][best]
        torch.testing.assert_close(segment, torch.tensor(expected), atol=0.3, rtol=0)


def test_a_window_without_candidates_is_an_empty_result(make_head: MakeHead) -> None:
    head = make_head()
    batch = windows(9, [0], [[]], [[]])
    (window,) = head.detect(head(torch.randn(1, 8, 9), batch["mask"]), batch, SETTINGS)
    assert window.segments.shape == (0, 2) and window.scores.shape == window.labels.shape == (0,)


def test_one_class_reads_no_labels(make_head: MakeHead) -> None:
    head = make_head(num_classes=1)
    x = torch.randn(1, 8, 20)
    a, b = (windows(20, [20], [[[2, 6]]], [[label]]) for label in (0, 150))
    outputs = head(x, a["mask"])
    assert outputs["logits"].shape[2] == 1
    assert head.losses(outputs, a) == head.losses(outputs, b)


def test_low_precision_gives_float32_losses(make_head: MakeHead) -> None:
    head = make_head()
    batch = windows(20, [20], [[[2, 6], [8, 19]]], [[0, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(torch.randn(1, 8, 20), batch["mask"])
        losses = head.losses(outputs, batch)
    assert outputs["logits"].dtype == torch.bfloat16
    for name in {"located", "adjusted"} & set(outputs):  # of VSGN: segments in steps
        assert outputs[name].dtype == torch.float32
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_a_step_runs_on_fake_tensors(make_head: MakeHead) -> None:
    head = make_head()

    def step() -> None:
        batch = windows(20, [20, 20], [[[2, 6]], []], [[0], []])
        outputs = head(torch.randn(2, 8, 20), torch.ones(2, 20, dtype=torch.bool))
        sum(head.losses(outputs, batch).values()).backward()

    assert predict(step, head, torch.optim.AdamW(head.parameters())).activations > 0
