"""Which points are centers, neighbors and sources of interpolation: indices, made once per sample by the dataset.

    levels = build_levels(position, ratios=(4, 4), k=32)
    # center_1 (N/4,), neighbor_1 (N/4, 32), up_1 (N, 3), weight_1 (N, 3); center_2 ... of the next level

The field compiles these operations for the GPU. Made in the loader they need neither compiler nor GPU, the model only
gathers, and what it recomputes in backward is recomputed exactly. numpy and scipy's kd-tree (all rows equal open3d's
nearest-neighbor search, at the same speed, and nothing to install). Not here: which points a sample has (`data.py`).
"""

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-8  # in the weights of interpolation, as PointNet++


def farthest_points(points: np.ndarray, count: int) -> np.ndarray:
    """Farthest point sampling from index 0: each next point is the one farthest from those chosen; (count,) int64.

    points: (N, 3). The first of equally far points is taken, as by argmax. ValueError for count > N.
    """
    if not 0 < count <= len(points):
        raise ValueError(f"{count} of {len(points)} points cannot be sampled")
    x, y, z = np.ascontiguousarray(np.asarray(points, np.float32).T)
    nearest = np.full(len(points), np.inf, np.float32)  # squared distance to the chosen ones
    distance, square = np.empty_like(nearest), np.empty_like(nearest)
    chosen = np.zeros(count, np.int64)
    for i in range(1, count):
        last = chosen[i - 1]
        np.subtract(x, x[last], out=distance)
        np.multiply(distance, distance, out=distance)
        for axis in (y, z):
            np.subtract(axis, axis[last], out=square)
            np.multiply(square, square, out=square)
            np.add(distance, square, out=distance)
        np.minimum(nearest, distance, out=nearest)
        chosen[i] = nearest.argmax()
    return chosen


def nearest_points(points: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of `points` to each query, nearest first: indices (M, k) int64 and distances (M, k) float64.

    points: (N, 3), queries: (M, 3). ValueError if there are fewer than k points.
    """
    from scipy.spatial import cKDTree

    if k > len(points):
        raise ValueError(f"{k} neighbors asked for, there are {len(points)} points")
    distance, index = cKDTree(points, balanced_tree=False).query(queries, k=k)
    return np.asarray(index, np.int64).reshape(len(queries), k), np.asarray(distance).reshape(len(queries), k)


def interpolation(points: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How to interpolate from `points` to `queries`: indices (M, 3) int64 and weights (M, 3) float32 that add up to 1.

    Weights are 1 / (d + 1e-8), d the distance, of the three nearest (all of them, repeated, if there are fewer).
    """
    k = min(3, len(points))
    index, distance = nearest_points(points, queries, k)
    weight = 1 / (distance + EPSILON)
    if k < 3:
        index, weight = np.resize(index.T, (3, len(queries))).T, np.resize(weight.T, (3, len(queries))).T
    return index, (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def build_levels(position: np.ndarray, ratios: Sequence[int], k: int) -> dict[str, np.ndarray]:
    """The indices of all levels; level s keeps one of `ratios[s - 1]` points of the level before.

    position: (N, 3). center_<s>: (N_s,) in level s - 1; neighbor_<s>: (N_s, k) in level s - 1, the center first (or a
    point at the same place); up_<s>, weight_<s>: (N_{s-1}, 3) in level s. Indices are int32.
    """
    found: dict[str, np.ndarray] = {}
    points = np.asarray(position, np.float32)
    for s, ratio in enumerate(ratios, start=1):
        center = farthest_points(points, len(points) // ratio)
        neighbor, _ = nearest_points(points, points[center], k)
        up, weight = interpolation(points[center], points)
        found[f"center_{s}"], found[f"neighbor_{s}"] = center.astype(np.int32), neighbor.astype(np.int32)
        found[f"up_{s}"], found[f"weight_{s}"] = up.astype(np.int32), weight
        points = points[center]
    return found
