"""VSGN's head: anchors, graph, assignment and losses by hand; padding; what it finds once trained."""

from types import SimpleNamespace

import pytest
import torch

from action_detection.tests.toy_windows import windows
from action_detection.vsgn import (
    GraphLayer,
    VSGNHead,
    assign_segments,
    boundary_loss,
    boundary_targets,
    giou_loss,
    move_anchors,
    nearest,
    pyramid_anchors,
    sample_around,
    score_at,
)
from dr2net.memory import predict

ROUNDING = 1e-5  # relative and absolute: float32 sums in another order
SETTINGS = SimpleNamespace(min_score=1e-3, max_candidates=100)


def small_head(num_classes: int = 3, **options) -> VSGNHead:
    torch.manual_seed(0)
    return VSGNHead(8, num_classes, **{"width": 16, "num_levels": 3, "num_neighbors": 4, **options})


def test_anchors_lie_around_the_middle_of_their_position_whatever_the_scale():
    anchors = pyramid_anchors([2, 1], (3.0, 7.5), torch.device("cpu"))
    expected = [[-2, 4], [-6.5, 8.5], [0, 6], [-4.5, 10.5], [-4, 8], [-13, 17]]
    torch.testing.assert_close(anchors, torch.tensor(expected))


def test_an_anchor_moves_by_tenths_and_stretches_by_fifths_of_its_length():
    anchors, shifts = torch.tensor([[2.0, 12.0]]), torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]], [[0.0, 5.0]]])
    moved = move_anchors(anchors, shifts)[:, 0]
    e = torch.tensor(1.0).exp().item()
    torch.testing.assert_close(moved, torch.tensor([[2, 12], [5, 15], [7 - 5 * e, 7 + 5 * e]]))


def test_the_graph_joins_the_real_positions_that_look_most_alike():
    x = torch.tensor([[[0.0, 10.0, 1.0, 11.0, 10.4, 0.1]]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    index = nearest(x, mask, 2)[0]
    assert [sorted(row.tolist()) for row in index[:5]] == [[0, 2], [1, 4], [0, 2], [3, 4], [1, 4]]


def test_the_graph_layer_is_the_maximum_over_edges_of_a_map_of_both_ends():
    torch.manual_seed(0)
    layer, x, mask = GraphLayer(4, 3), torch.randn(1, 4, 6), torch.ones(1, 6, dtype=torch.bool)
    weight = torch.cat([layer.neighbor.weight, layer.center.weight], dim=1)[:, :, 0]  # W of [x_j, x_i]
    index = nearest(x, mask, 3)[0]
    edges = [
        torch.stack([weight @ torch.cat([x[0, :, j], x[0, :, i]]) for j in index[i]]).amax(dim=0) for i in range(6)
    ]
    graph = torch.stack(edges, dim=1) + layer.center.bias[:, None]
    expected = torch.relu(graph + layer.temporal(x)[0]).unflatten(1, (3, 2)).amax(dim=2)
    torch.testing.assert_close(layer(x, mask)[0], expected, atol=ROUNDING, rtol=ROUNDING)


def test_assignment_by_hand():
    candidates = torch.tensor([[0.0, 10.0], [1.0, 9.0], [0.0, 4.0], [20.0, 30.0], [28.0, 33.0], [40.0, 50.0]])
    segments, labels = torch.tensor([[0.0, 9.0], [29.0, 37.0]]), torch.tensor([7, 5])
    real = torch.tensor([True, True, True, True, True, True])
    label, matched, positive = assign_segments(candidates, real, segments, labels, 0.6)
    # IoU: 9/10, 8/9, 4/9 with the first; 1/17 and 4/9 with the second, whose best candidate counts all the same.
    assert positive.tolist() == [True, True, False, False, True, False]
    assert label[positive].tolist() == [7, 7, 5]
    assert matched[positive].tolist() == [[0, 9], [0, 9], [29, 37]]
    real[4] = False  # a padded anchor is nobody's best; now the one with 1/17 is
    assert assign_segments(candidates, real, segments, labels, 0.6)[2].tolist() == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]


def test_nothing_is_positive_without_actions():
    candidates = torch.tensor([[0.0, 4.0], [-2.0, 2.0], [0.0, 0.0]])
    real, none = torch.ones(3, dtype=torch.bool), torch.zeros(0, 2)
    assert not assign_segments(candidates, real, none, torch.zeros(0, dtype=torch.long), 0.6)[2].any()


def test_giou_by_hand():
    found = torch.tensor([[0.0, 4.0], [4.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    target = torch.tensor([[0.0, 4.0], [0.0, 4.0], [1.0, 4.0], [6.0, 8.0]])
    # The same; the same with its ends swapped; 1 of 4 common; nothing common, and 4 of the hull's 8 uncovered.
    torch.testing.assert_close(giou_loss(found, target), torch.tensor([0, 0, 0.75, 1.5]))


def test_boundary_features_come_from_the_cells_around_and_never_from_padding():
    x = torch.arange(6.0)[None, None].expand(1, 2, 6)
    at = sample_around(x, torch.tensor([[2.5, 0.2, 5.5]]), torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([5]))
    assert at[0, :, ::2].tolist() == [[1, 2, 3], [0, 0, 1], [4, 4, 4]]


def test_curves_are_read_between_the_middles_of_steps():
    curve = torch.tensor([[0.0, 1.0, 4.0, 9.0]])
    found = score_at(curve, torch.tensor([[-3.0, 0.5, 1.0, 2.5, 9.0]]), torch.tensor([3]))
    torch.testing.assert_close(found, torch.tensor([[0, 0, 0.5, 4, 4]]))


def test_boundary_targets_by_hand():
    targets = boundary_targets(torch.tensor([[2.0, 5.2]]), 8)
    assert [row.nonzero().flatten().tolist() for row in targets] == [[1, 2], [5], [2, 3, 4]]
    wide = boundary_targets(torch.tensor([[0.0, 40.0]]), 48)  # a tenth of the length: 4 steps
    assert [row.nonzero().flatten().tolist() for row in wide[:2]] == [[0, 1], [38, 39, 40, 41]]


def test_positives_and_negatives_of_the_curves_weigh_the_same():
    segments, mask = torch.tensor([[2.2, 5.2]]), torch.ones(16, dtype=torch.bool)
    half = boundary_loss(torch.zeros(3, 16), mask, segments)
    torch.testing.assert_close(half, 3 * torch.tensor(2.0).log())
    certain = 40 * boundary_targets(segments, 16) - 20
    assert boundary_loss(certain, mask, segments) < 1e-6
    certain[:, 12:] = 20  # wrong, but padded
    assert boundary_loss(certain, torch.arange(16) < 12, segments) < 1e-6


@pytest.mark.parametrize("num_steps", [16, 13, 2, 1])
def test_padding_and_what_stands_in_it_change_no_real_output(num_steps):
    head = small_head()
    x = torch.randn(1, 8, num_steps)
    padded = torch.cat([x, 100 * torch.randn(1, 8, 19 - num_steps)], dim=2)
    mask = torch.arange(19)[None] < num_steps
    expected, found = head(x, mask[:, :num_steps]), head(padded, mask)
    assert found["mask"].sum() == expected["mask"].numel()
    for name in ("logits", "located", "adjusted"):
        torch.testing.assert_close(found[name][found["mask"]], expected[name][0], atol=ROUNDING, rtol=ROUNDING)
    curves = found["boundaries"][:, :, :num_steps]
    torch.testing.assert_close(curves, expected["boundaries"], atol=ROUNDING, rtol=ROUNDING)


def test_losses_do_not_depend_on_the_split_of_a_batch():
    head = small_head()
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
    ("num_steps", "real", "segments"),
    [(20, 20, []), (1, 1, [[0, 1]]), (20, 0, []), (20, 1, [[0, 1]]), (20, 20, [[3, 3]]), (20, 20, [[0, 20]])],
)
def test_windows_without_actions_without_steps_or_of_one_step_give_finite_losses_and_gradients(
    num_steps, real, segments
):
    head = small_head()
    batch = windows(num_steps, [real], [segments], [[1] * len(segments)])
    sum(head.losses(head(torch.randn(1, 8, num_steps), batch["mask"]), batch).values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_every_parameter_gets_a_gradient():
    head = small_head()
    batch = windows(32, [32], [[[2, 5], [8, 14], [4, 30]]], [[0, 1, 2]])
    sum(head.losses(head(torch.randn(1, 8, 32), batch["mask"]), batch).values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_one_window_is_learnt_and_found():
    torch.manual_seed(0)
    head = VSGNHead(8, 3, width=32, num_levels=3)
    x = torch.randn(2, 8, 32)
    batch = windows(32, [32, 32], [[[2, 7.5], [12, 25]], [[6, 10]]], [[0, 2], [1]])
    batch["start"], batch["seconds_per_step"] = torch.tensor([10.0, 0.0]), torch.tensor([0.5, 0.5])
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
        torch.testing.assert_close(
            found.segments[found.labels == label][best], torch.tensor(expected), atol=0.3, rtol=0
        )


def test_one_class_reads_no_labels():
    head = small_head(num_classes=1)
    x = torch.randn(1, 8, 20)
    a, b = (windows(20, [20], [[[2, 6]]], [[label]]) for label in (0, 150))
    outputs = head(x, a["mask"])
    assert outputs["logits"].shape[2] == 1
    assert head.losses(outputs, a) == head.losses(outputs, b)


def test_low_precision_gives_float32_losses_and_segments():
    head = small_head()
    batch = windows(20, [20], [[[2, 6], [8, 19]]], [[0, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(torch.randn(1, 8, 20), batch["mask"])
        losses = head.losses(outputs, batch)
    assert outputs["logits"].dtype == torch.bfloat16
    assert outputs["located"].dtype == outputs["adjusted"].dtype == torch.float32
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_a_step_runs_on_fake_tensors():
    head = small_head()

    def step() -> None:
        batch = windows(20, [20, 20], [[[2, 6]], []], [[0], []])
        outputs = head(torch.randn(2, 8, 20), torch.ones(2, 20, dtype=torch.bool))
        sum(head.losses(outputs, batch).values()).backward()

    assert predict(step, head, torch.optim.AdamW(head.parameters())).activations > 0


def test_a_pyramid_without_levels_is_refused():
    with pytest.raises(ValueError, match="0 levels"):
        small_head(num_levels=0)
