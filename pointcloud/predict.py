"""What is what in a point cloud of yours: a PLY with colors and labels, a picture, how many points each class has.

    python -m pointcloud.predict runs/pointcloud/rooms_tiny_dr2net/seed0 scan.ply --output predictions

reads .ply, .pcd, .txt, .xyz or .npy with x y z, and r g b if there, in meters, z up. Writes into predictions
scan_classes.ply (all points; color, `label` and `confidence` of each) and scan_classes.png (from above and in
perspective, before and after, legend). The cloud is covered by crops as a room is in evaluation. Without colors the
network gets none, as in the training samples whose colors were dropped. Not here: training on such files.
"""

import warnings
from pathlib import Path

import numpy as np

from engine import commands
from engine.data.workers import progress_bar
from engine.files import appearing, make_folder
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
RESOLUTION = 0.005  # meters that coordinates may be apart; the smallest things have a few centimeters
SHOWN_BELOW = 2.2  # meters above the lowest point: without the ceiling one sees into the room


def predict(config: Config, model: Model, arguments: commands.Prediction) -> tuple[Path, Path]:
    """Print the class counts and write the labeled cloud and the picture; returns their paths.

    FileNotFoundError or ValueError, naming the file, for a cloud that cannot be read.
    """
    names, path = class_names(config), arguments.input
    cloud = read_cloud(path)
    warn_of_units(path, cloud.xyz, cloud.resolution)
    if cloud.note:
        print(f"{path}: {cloud.note}")
    if cloud.rgb is None:
        print(f"{path}: has no colors; the network decides by shape alone")
    make_folder(arguments.output)  # what cannot be written is said before the work
    try:
        label, confidence = classify(config, model, cloud.xyz, cloud.rgb)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    counts = np.bincount(label, minlength=len(names))
    for k in np.argsort(-counts, kind="stable"):
        if counts[k]:
            print(f"{counts[k] / len(label):6.1%}  {counts[k]:9d}  {names[k]}")
    labeled, picture = (arguments.output / f"{path.stem}_classes{suffix}" for suffix in (".ply", ".png"))
    write_cloud(labeled, cloud.xyz, COLORS[label], label, confidence)
    before = np.full((len(label), 3), 150, np.uint8) if cloud.rgb is None else cloud.rgb
    draw(picture, cloud.xyz, before, label, names, title=f"{path.name}, {config.row}")
    return labeled, picture


def classify(config: Config, model: Model, xyz: np.ndarray, rgb: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The class (N,) int64 of each point and its mean probability (N,) float32. xyz: (N, 3); rgb: (N, 3) uint8.

    Neither the file's name nor an offset of all points changes them.
    """
    data = config.data
    low = xyz.min(axis=0)
    chosen = voxelize(xyz - low, data.voxel, np.random.default_rng(0))
    colors = np.zeros((len(chosen), 3), np.uint8) if rgb is None else rgb[chosen]
    small = Cloud("cloud", (xyz[chosen] - low).astype(np.float32), colors, np.zeros(len(chosen), np.uint8))
    own = Room(Path(), "file", 0, "cloud", ())
    room = EvaluationRoom(own, data, np.arange(len(chosen)), small, np.zeros(3, np.float32))
    device = next(model.parameters()).device
    with autocast(config.optimization.precision, device), progress_bar("labeling", len(chosen)) as advance:
        logits = predict_voxels(model, room, config, on_seen=advance).astype(np.float64)
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    best, sure = share.argmax(axis=1), share.max(axis=1)
    label, confidence = np.empty(len(xyz), np.int64), np.empty(len(xyz), np.float32)
    for piece, nearest in project(xyz - low, small.xyz):
        label[piece], confidence[piece] = best[nearest], sure[nearest]
    return label, confidence


def warn_of_units(path: Path, xyz: np.ndarray, resolution: float = 0.0) -> None:
    """A warning for a cloud that is hardly in meters with z up, or whose coordinates are too rough for their size."""
    if resolution > RESOLUTION:
        warnings.warn(
            f"{path}: its coordinates reach {np.abs(xyz).max():.4g}, where its kind of numbers are {resolution:.2g} "
            "apart; subtract an offset before they are saved, or save doubles. Labels will be worse",
            stacklevel=2,
        )
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
    """A PNG: from above and in perspective, before and after, with a legend; both without what is above SHOWN_BELOW."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    chosen = np.random.default_rng(0).permutation(len(xyz))[:SHOWN]
    points = xyz[chosen] - xyz.min(axis=0)
    colors = [before[chosen] / 255, COLORS[label[chosen]] / 255]
    inside = points[:, 2] < SHOWN_BELOW  # the lowest point is at 0
    where = "" if inside.all() else f", below {SHOWN_BELOW:g} m"
    size = float(np.clip(60_000 / max(len(points), 1), 1.0, 20.0))  # of a marker: few points are to be seen as well
    figure = Figure(figsize=(12, 10), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (color, what) in enumerate(zip(colors, columns, strict=True)):
        above = figure.add_subplot(2, 2, 1 + column, aspect="equal")
        order = np.flatnonzero(inside)[np.argsort(points[inside, 2], kind="stable")]
        above.scatter(points[order, 0], points[order, 1], c=color[order], s=1.5 * size, linewidths=0)
        above.set(title=f"{what}, from above{where}", xlabel="x in m", ylabel="y in m")
        space = figure.add_subplot(2, 2, 3 + column, projection="3d")
        space.scatter(*points[inside].T, c=color[inside], s=size, linewidths=0)
        space.set(title=f"{what}, in perspective{where}")
        space.locator_params(nbins=4)
        space.set_box_aspect(np.maximum(np.ptp(points, axis=0), 1e-3))
    there = [k for k in range(len(names)) if (label == k).any()]
    marks = [Line2D([], [], marker="o", linestyle="", color=tuple(COLORS[k] / 255), label=names[k]) for k in there]
    figure.legend(handles=marks, loc="outside lower center", ncols=7)
    figure.suptitle(title, parse_math=False)  # a name may hold $
    with appearing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name in other letters: boxes do
        figure.savefig(temporary, dpi=80)


if __name__ == "__main__":
    from pointcloud import model

    commands.predict(Config, model, predict)
