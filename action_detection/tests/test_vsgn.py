"""VSGN's head: anchors, graph, assignment and losses by hand; padding; what it finds once trained."""

from types import SimpleNamespace

import pytest
import torch

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


def test_a_pyramid_without_levels_is_refused():
    with pytest.raises(ValueError, match="0 levels"):
        small_head(num_levels=0)
