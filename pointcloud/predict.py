"""What is what in a point cloud of yours: a PLY with colors and labels, a picture, how many points each class has.

    python -m pointcloud.predict runs/pointcloud/rooms_tiny_dr2net/seed0 scan.ply --output predictions

reads .ply, .pcd (open3d), .txt, .xyz or .npy with x y z, and r g b if there, in meters, z up. Writes into predictions
scan_classes.ply (all points; color, `label` and `confidence` of each) and scan_classes.png (from above and in
perspective, before and after, legend). The cloud is covered by crops as a room is in evaluation. Without colors the
network gets none, as in the training samples whose colors were dropped. Not here: training on such files.
"""

import warnings
from pathlib import Path

import numpy as np

from engine import commands
from engine.files import appearing
from engine.task import Model
from engine.training.finetuning import autocast
from pointcloud.clouds import read_cloud, write_cloud
from pointcloud.configs import Config
from pointcloud.data import Cloud, EvaluationRoom, class_names
from pointcloud.evaluate import predict_voxels, project
from pointcloud.s3dis import Room, voxelize

# ceiling, floor, wall, beam, column, window, door, chair, table, bookcase, sofa, board, clutter
COLORS = np.array(
    [
        *((190, 210, 230), (170, 140, 110), (200, 200, 190), (255, 200, 0), (255, 0, 255), (90, 160, 255)),
        *((200, 120, 50), (220, 50, 60), (120, 90, 200), (20, 120, 90), (230, 120, 170), (40, 40, 90)),
        (120, 120, 120),
    ],
    np.uint8,
)
SHOWN = 60_000  # points in a picture
EXTENT = (0.5, 100.0)  # meters that a room or a floor of a building reaches over


def predict(config: Config, model: Model, arguments: commands.Prediction) -> tuple[Path, Path]:
    """Print the class counts and write the labeled cloud and the picture; returns their paths.

    FileNotFoundError or ValueError, naming the file, for a cloud that cannot be read.
    """
    names, path = class_names(config), arguments.input
    cloud = read_cloud(path)
    warn_of_units(path, cloud.xyz)
    if cloud.rgb is None:
        print(f"{path}: has no colors; the network decides by shape alone")
    label, confidence = classify(config, model, cloud.xyz, cloud.rgb, path.stem)
    counts = np.bincount(label, minlength=len(names))
    for k in np.argsort(-counts, kind="stable"):
        if counts[k]:
            print(f"{counts[k] / len(label):6.1%}  {counts[k]:9d}  {names[k]}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    labeled, picture = (arguments.output / f"{path.stem}_classes{suffix}" for suffix in (".ply", ".png"))
    write_cloud(labeled, cloud.xyz, COLORS[label], label, confidence)
    before = np.full((len(label), 3), 150, np.uint8) if cloud.rgb is None else cloud.rgb
    draw(picture, cloud.xyz, before, label, names, title=f"{path.name}, {config.row}")
    return labeled, picture


def classify(
    config: Config, model: Model, xyz: np.ndarray, rgb: np.ndarray | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The class (N,) int64 of each point and its mean probability (N,) float32. xyz: (N, 3); rgb: (N, 3) uint8."""
    data = config.data
    chosen = voxelize(xyz, data.voxel, np.random.default_rng(0))
    low = xyz.min(axis=0)
    colors = np.zeros((len(chosen), 3), np.uint8) if rgb is None else rgb[chosen]
    small = Cloud(name, (xyz[chosen] - low).astype(np.float32), colors, np.zeros(len(chosen), np.uint8))
    own = Room(Path(name), "file", 0, name, ())
    room = EvaluationRoom(own, data, np.arange(len(chosen)), small, np.zeros(3, np.float32))
    with autocast(config.optimization.precision, next(model.parameters()).device):
        logits = predict_voxels(model, room, config).astype(np.float64)
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    label, confidence = np.empty(len(xyz), np.int64), np.empty(len(xyz), np.float32)
    for piece, nearest in project(xyz - low, small.xyz):
        label[piece], confidence[piece] = share[nearest].argmax(axis=1), share[nearest].max(axis=1)
    return label, confidence


def warn_of_units(path: Path, xyz: np.ndarray) -> None:
    """A warning for a cloud that is hardly in meters with z up."""
    extent = xyz.max(axis=0) - xyz.min(axis=0)
    if not EXTENT[0] <= extent.max() <= EXTENT[1]:
        warnings.warn(f"{path}: reaches over {extent.max():.3g}; are these meters? labels will be wrong", stacklevel=2)
    elif extent[2] > 2 * max(extent[0], extent[1]):
        warnings.warn(f"{path}: is {extent[2]:.3g} m high and narrow; is z up? labels will be wrong", stacklevel=2)


def draw(
    path: Path,
    xyz: np.ndarray,
    before: np.ndarray,
    label: np.ndarray,
    names: list[str],
    *,
    title: str,
    columns: tuple[str, str] = ("before", "after"),
) -> None:
    """A PNG: from above (what is below 2.2 m) and in perspective, before and after, with a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    chosen = np.random.default_rng(0).permutation(len(xyz))[:SHOWN]
    points = xyz[chosen] - xyz.min(axis=0)
    colors = [before[chosen] / 255, COLORS[label[chosen]] / 255]
    low = points[:, 2] < 2.2
    inside = low if low.any() else np.ones_like(low)
    size = float(np.clip(60_000 / max(len(points), 1), 1.0, 20.0))  # of a marker: few points are to be seen as well
    figure = Figure(figsize=(12, 10), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (color, what) in enumerate(zip(colors, columns, strict=True)):
        above = figure.add_subplot(2, 2, 1 + column, aspect="equal")
        order = np.flatnonzero(inside)[np.argsort(points[inside, 2], kind="stable")]
        above.scatter(points[order, 0], points[order, 1], c=color[order], s=1.5 * size, linewidths=0)
        above.set(title=f"{what}, from above", xlabel="x in m", ylabel="y in m")
        space = figure.add_subplot(2, 2, 3 + column, projection="3d")
        space.scatter(*points[inside].T, c=color[inside], s=size, linewidths=0)
        space.set(title=f"{what}, in perspective")
        space.set_box_aspect(np.maximum(np.ptp(points, axis=0), 1e-3))
    there = [k for k in range(len(names)) if (label == k).any()]
    marks = [Line2D([], [], marker="o", linestyle="", color=tuple(COLORS[k] / 255), label=names[k]) for k in there]
    figure.legend(handles=marks, loc="outside lower center", ncols=7)
    figure.suptitle(title)
    with appearing(path) as temporary:
        figure.savefig(temporary, dpi=80)


if __name__ == "__main__":
    from pointcloud import model

    commands.predict(Config, model, predict)
