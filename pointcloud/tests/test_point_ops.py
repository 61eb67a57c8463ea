"""Farthest points, neighbors and interpolation, index for index against brute force."""

import time

import numpy as np
import pytest
import torch

from pointcloud.ops import build_levels, farthest_points, interpolation, nearest_points


def cloud(count, seed=0, scale=2.0):
    return (np.random.default_rng(seed).standard_normal((count, 3)) * scale).astype(np.float32)


def farthest_by_loops(points, count):
    """Each next point maximizes the distance to the nearest chosen one; the first of equals."""
    points = torch.from_numpy(points)
    chosen, nearest = [0], torch.full((len(points),), float("inf"))
    for _ in range(count - 1):
        difference = points - points[chosen[-1]]
        square = difference[:, 0] ** 2 + difference[:, 1] ** 2 + difference[:, 2] ** 2
        nearest = torch.minimum(nearest, square)
        best = 0
        for i in range(len(points)):
            if nearest[i] > nearest[best]:
                best = i
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("count, kept", [(1, 1), (64, 16), (200, 50), (97, 97)])
def test_farthest_points_are_those_of_brute_force(count, kept):
    points = cloud(count, seed=count)
    found = farthest_points(points, kept)
    assert found.tolist() == farthest_by_loops(points, kept)
    assert len(set(found.tolist())) == kept


@pytest.mark.parametrize("count, k", [(40, 1), (100, 8), (300, 32), (32, 32)])
def test_neighbors_are_those_of_brute_force(count, k):
    points = cloud(count, seed=count)
    queries = points[:: max(count // 20, 1)]
    index, distance = nearest_points(points, queries, k)
    exact = np.linalg.norm(queries[:, None].astype(np.float64) - points[None].astype(np.float64), axis=2)
    assert np.array_equal(index, np.argsort(exact, axis=1, kind="stable")[:, :k])
    assert np.allclose(distance, np.sort(exact, axis=1)[:, :k])


def test_interpolation_weights_are_inverse_distances_of_the_three_nearest():
    points, queries = cloud(50), cloud(20, seed=1)
    index, weight = interpolation(points, queries)
    exact = np.linalg.norm(queries[:, None].astype(np.float64) - points[None], axis=2)
    nearest = np.argsort(exact, axis=1)[:, :3]
    wanted = 1 / (np.take_along_axis(exact, nearest, 1) + 1e-8)
    assert np.array_equal(index, nearest) and weight.dtype == np.float32
    assert np.allclose(weight, wanted / wanted.sum(1, keepdims=True), atol=1e-6)


def test_a_known_point_is_interpolated_from_itself_and_two_points_suffice():
    points = cloud(9)
    index, weight = interpolation(points, points[4:5])
    assert index[0, 0] == 4 and weight[0, 0] == pytest.approx(1, abs=1e-6)
    index, weight = interpolation(points[:2], points[2:5])
    assert index.shape == (3, 3) and set(index.flatten().tolist()) == {0, 1}
    assert np.allclose(weight.sum(1), 1)


def test_equal_points_give_finite_levels():
    levels = build_levels(np.ones((64, 3), np.float32), (4, 4), 8)
    assert all(np.isfinite(values).all() for values in levels.values())
    assert levels["center_1"].shape == (16,) and levels["neighbor_2"].shape == (4, 8)


def test_levels_index_the_level_before_and_the_first_neighbor_is_the_center():
    position = cloud(256)
    levels = build_levels(position, (4, 4), 8)
    coarse = position[levels["center_1"]]
    assert np.array_equal(levels["neighbor_1"][:, 0], levels["center_1"])
    assert np.array_equal(levels["neighbor_2"][:, 0], levels["center_2"])
    assert np.array_equal(levels["center_2"], farthest_points(coarse, 16))
    assert levels["up_1"].max() < 64 and levels["up_2"].max() < 16
    assert {name: values.shape for name, values in levels.items() if name.startswith("up")} == {
        "up_1": (256, 3),
        "up_2": (64, 3),
    }


def test_more_points_than_there_are_cannot_be_asked_for():
    with pytest.raises(ValueError, match="5 of 4 points"):
        farthest_points(cloud(4), 5)
    with pytest.raises(ValueError, match="there are 4 points"):
        nearest_points(cloud(4), cloud(4), 5)


def test_a_crop_of_the_paper_is_indexed_in_the_time_of_a_loader():
    """0.3 s on an idle core; CPU seconds of this thread, and three tries, for a core that is shared."""
    position, seconds = cloud(16_384), []
    for _ in range(3):
        start = time.thread_time()
        build_levels(position, (4, 4), 32)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.6, seconds
