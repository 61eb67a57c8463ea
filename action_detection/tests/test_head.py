"""ActionFormer's head: attention, targets and losses against plain references; padding; what it finds once trained."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from action_detection.head import (
    ActionFormerHead,
    assign_points,
    diou_loss,
    focal_loss,
    local_attention,
    pyramid_points,
    to_windows,
)
from action_detection.tests.toy_windows import windows

ROUNDING = 1e-5  # relative and absolute: float32 sums in another order
SETTINGS = SimpleNamespace(min_score=1e-3, max_candidates=100)


def small_head(num_classes: int = 3, **options) -> ActionFormerHead:
    torch.manual_seed(0)
    return ActionFormerHead(8, num_classes, **{"width": 16, "num_levels": 3, "window": 5, **options})


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = (value.numel() for value in tree_leaves(result) if isinstance(value, Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return result


@settings(max_examples=40, deadline=None)
@given(num_times=st.integers(1, 40), window=st.sampled_from([0, 1, 3, 5, 9, 19]), data=st.data())
def test_local_attention_is_dense_attention_with_a_banded_mask(num_times, window, data):
    real = torch.tensor([num_times, data.draw(st.integers(0, num_times))])
    mask = torch.arange(num_times) < real[:, None]
    torch.manual_seed(num_times)
    query, key, value = torch.randn(3, 2, 2, num_times, 4)
    steps = torch.arange(num_times)
    near = (steps[:, None] - steps).abs() <= (window // 2 if window else num_times)
    score = (query @ key.transpose(2, 3) / 2).masked_fill(~(near & mask[:, None, None, :]), -1e9)
    expected = score.softmax(dim=3) @ value
    found = local_attention(query, key, value, mask, window)
    assert found.isfinite().all()
    torch.testing.assert_close(found[mask[:, None].expand(-1, 2, -1)], expected[mask[:, None].expand(-1, 2, -1)])


def test_local_attention_never_holds_a_map_of_all_pairs():
    num_times, mask = 512, torch.ones(1, 512, dtype=torch.bool)
    query, key, value = torch.randn(3, 1, 1, num_times, 4)
    with LargestTensor() as largest:
        local_attention(query, key, value, mask, 9)
    assert largest.elements < num_times * num_times / 8


def test_points_stand_where_the_strided_convolutions_look_and_share_the_distances():
    points = pyramid_points([3, 2, 1], torch.device("cpu"))
    inf = torch.inf
    expected = [[0.5, 0, 4, 1], [1.5, 0, 4, 1], [2.5, 0, 4, 1], [0.5, 4, 8, 2], [2.5, 4, 8, 2], [0.5, 8, inf, 4]]
    torch.testing.assert_close(points, torch.tensor(expected))


def test_assignment_by_hand():
    points = pyramid_points([16, 8], torch.device("cpu"))
    segments = torch.tensor([[1.0, 4.0], [6.0, 16.0], [10.0, 12.0]])  # short; long, ending with the window; inside it
    classes, distances, positive = assign_points(points, segments, torch.tensor([0, 1, 2]), 3, radius=1.5)
    # Level 0: nearer than 1.5 to the centers 2.5 and 11, no boundary 4 or more away.
    assert positive[:16].nonzero().flatten().tolist() == [1, 2, 3, 10, 11]
    assert classes[2].tolist() == [1, 0, 0] and classes[10].tolist() == [0, 0, 1]
    torch.testing.assert_close(distances[10], torch.tensor([0.5, 1.5]))
    # Level 1: points at 2 j + 0.5 nearer than 3 to the center 11 of the long one; the others are too short for it.
    assert positive[16:].nonzero().flatten().tolist() == [4, 5, 6]
    assert classes[16:][5].tolist() == [0, 1, 0]
    torch.testing.assert_close(distances[16:][5], torch.tensor([4.5, 5.5]) / 2)
    assert not classes[~positive].any()


def test_a_point_within_several_actions_takes_the_shortest_and_all_classes_of_equals():
    points = torch.tensor([[10.5, 0.0, torch.inf, 4.0]])
    segments = torch.tensor([[5.0, 16.0], [8.0, 12.0], [9.0, 13.0]])
    for order in ([0, 1, 2], [1, 2, 0]):
        classes, distances, _ = assign_points(points, segments[order], torch.tensor([0, 1, 2])[order], 3, radius=1.5)
        assert classes.tolist() == [[0, 1, 1]]
        torch.testing.assert_close(distances, torch.tensor([[2.5, 1.5]]) / 4)


def test_the_boundary_of_a_range_belongs_to_the_next_level_only():
    points = pyramid_points([16, 8], torch.device("cpu"))
    segments = torch.tensor([[4.5, 12.5]])  # seen from step 8.5, both boundaries are exactly 4 away
    _, _, positive = assign_points(points, segments, torch.tensor([0]), 1, radius=0.5)
    assert positive.nonzero().flatten().tolist() == [16 + 4]


def test_diou_is_that_of_whole_segments_in_float64():
    torch.manual_seed(0)
    predicted, target = 5 * torch.rand(2, 1000, 2)

    def reference(a: Tensor, b: Tensor) -> Tensor:  # distances from the point 0 -> segments
        a, b = ((torch.stack([-d[:, 0], d[:, 1]], dim=1)).double() for d in (a, b))
        inside = (torch.minimum(a[:, 1], b[:, 1]) - torch.maximum(a[:, 0], b[:, 0])).clamp(min=0)
        union = (a[:, 1] - a[:, 0]) + (b[:, 1] - b[:, 0]) - inside
        hull = torch.maximum(a[:, 1], b[:, 1]) - torch.minimum(a[:, 0], b[:, 0])
        return 1 - inside / union + ((a.mean(dim=1) - b.mean(dim=1)) / hull) ** 2

    expected = reference(predicted, target).float()
    torch.testing.assert_close(diou_loss(predicted, target), expected, atol=ROUNDING, rtol=ROUNDING)


def test_diou_and_its_gradient_are_finite_without_length():
    predicted = torch.zeros(2, 2, requires_grad=True)
    loss = diou_loss(predicted, torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    loss.sum().backward()
    assert loss.isfinite().all() and predicted.grad.isfinite().all()


def test_focal_loss_is_its_formula_in_float64():
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(50, 4), torch.randint(2, (50, 4)).float()
    p = logits.double().sigmoid()
    right = torch.where(target > 0, p, 1 - p)
    expected = -torch.where(target > 0, 0.25, 0.75) * (1 - right) ** 2 * right.log()
    torch.testing.assert_close(focal_loss(logits, target), expected.float(), atol=ROUNDING, rtol=ROUNDING)


def test_detection_cuts_to_the_video_drops_what_is_empty_or_weak_and_keeps_the_best():
    batch = windows(10, [10], [[]], [[]])
    batch["start"], batch["seconds_per_time"] = torch.tensor([4.0]), torch.tensor([2.0])
    batch["duration"], batch["window"] = torch.tensor([20.0]), torch.tensor([7])
    segments = torch.tensor([[[-5.0, 3.0], [1.0, 2.0], [9.0, 12.0], [4.0, 4.0], [2.0, 20.0]]])
    scores = torch.tensor([[[0.9, 0.2], [0.05, 0.3], [0.9, 0.9], [0.8, 0.8], [0.5, 0.01]]])
    (window,) = to_windows(segments, scores, batch, SimpleNamespace(min_score=0.1, max_candidates=3))
    assert (window.name, window.window) == ("video0", 7)
    assert window.segments.tolist() == [[0, 10], [8, 20], [6, 8]]  # the third lies behind the end, the fourth is empty
    assert window.labels.tolist() == [0, 0, 1]
    torch.testing.assert_close(window.scores, torch.tensor([0.9, 0.5, 0.3]))


def test_drop_path_drops_in_training_only():
    head = small_head(drop_path=0.5)
    torch.nn.init.ones_(head.stem[0].scale1)
    x, mask = torch.randn(8, 8, 20), torch.ones(8, 20, dtype=torch.bool)
    assert not torch.equal(head(x, mask)["logits"], head(x, mask)["logits"])
    head.eval()
    assert torch.equal(head(x, mask)["logits"], head(x, mask)["logits"])


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="width 16 does not split into 3"):
        small_head(num_heads=3)
    with pytest.raises(ValueError, match="attention window 4"):
        small_head(window=4)
    with pytest.raises(ValueError, match="0 levels"):
        small_head(num_levels=0)
