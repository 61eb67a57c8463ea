"""Scenes of crowns cut out of photographs with boxes, for the last part of the pretraining.

    stock = read_stock(Path("data/trees"))         # the training split alone: its crowns, its ground without any
    scene = compose_stand(7, stock)

A crown is what an ellipse with a frayed edge keeps of its box: corners of the box that are ground go with it or not, as
the ellipse is rounder or squarer. Crowns are stretched, dimmed and tinted a little, and laid densely on ground of the
same photograph, which is in the shade in half of the scenes; then the picture is turned, mirrored and photographed
anew. The boxes are those of what is seen, as people would not draw them exactly. A pure function of seed and stock.
Only the pictures of the split `train` are opened. Not here: how scenes are composed (`scenes.py`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from detection.objects import CLASSES, SIDE, Thing, halve_again, noise
from detection.scenes import Scene, Stock, compose
from detection.trees import annotation_file
from engine.files import read_json

SPLIT = "train"
COUNT, EXTENT = (3, 28), (22.0, 110.0)  # things in 256 x 256 pixels, and the longest side of their boxes in pixels
LEAST_EXTENT = 12  # pixels: smaller crowns are not cut out
GROUND_SIDES, GROUND_STEP = (256, 192, 128), 64  # of the squares without boxes, pixels
MAX_GROUNDS = 80
FILL = 0.9  # of the picture of a thing, so that turning does not cut it
SUN = (-0.6, 0.8)  # of the training photograph: shadows fall to the upper right


def read_stock(root: Path) -> Stock:
    """Crowns and ground of the training split below `root`, as `python -m detection.prepare --preset laptop` writes it.

    FileNotFoundError or ValueError naming the file if annotations or pictures are missing, or nothing can be cut out.
    """
    file = annotation_file(root, SPLIT)
    content = read_json(file, "run `python -m detection.prepare --preset laptop`")
    boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
    crowds: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
    for one in content["annotations"]:
        (crowds if one["iscrowd"] else boxes)[one["image_id"]].append(one["bbox"])
    found: list[tuple[float, Thing]] = []
    grounds: list[np.ndarray] = []
    for image in content["images"]:
        with Image.open(root / SPLIT / image["file_name"]) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        own = np.array(boxes[image["id"]], np.float64).reshape(-1, 4)
        rng = np.random.default_rng([18, image["id"]])
        for box in own:
            if _is_whole(box, pixels.shape[:2]) and max(box[2:]) >= LEAST_EXTENT:
                found.append((float(max(box[2:])), cut_out(rng, pixels, box)))
        both = np.concatenate([own, np.array(crowds[image["id"]], np.float64).reshape(-1, 4)])
        grounds += _grounds(pixels, both)
    if not found or not grounds:
        raise ValueError(f"{file}: no crown, or no ground without one, can be cut out: is it another data set?")
    found.sort(key=lambda pair: pair[0])
    chosen = np.random.default_rng(18).permutation(len(grounds))[:MAX_GROUNDS]
    sun = np.array(SUN, np.float32)
    return Stock(
        things=tuple(thing for _, thing in found),
        extents=np.array([extent for extent, _ in found]),
        grounds=tuple(grounds[index] for index in sorted(chosen.tolist())),
        sun=sun / np.hypot(*sun),
    )


def compose_stand(seed: int | Sequence[int], stock: Stock, size: tuple[int, int] = (256, 256)) -> Scene:
    """A dense scene of crowns cut out of photographs."""
    share = size[0] * size[1] / 256**2
    count = (max(1, round(COUNT[0] * share)), max(3, round(COUNT[1] * share)))
    return compose(seed, size, labels=[CLASSES.index("crown")], count=count, extent=EXTENT, stock=stock)


def cut_out(rng: np.random.Generator, pixels: np.ndarray, box: np.ndarray) -> Thing:
    """The crown in a box x, y, width, height of a picture (H, W, 3) uint8, in a soft ellipse with a frayed edge."""
    left, top, width, height = box
    piece = pixels[int(top) : int(np.ceil(top + height)), int(left) : int(np.ceil(left + width))]
    scale = FILL * SIDE / max(piece.shape[:2])
    sides = (max(2, round(piece.shape[1] * scale)), max(2, round(piece.shape[0] * scale)))
    color = np.asarray(Image.fromarray(piece).resize(sides, Image.Resampling.BICUBIC))
    y, x = np.linspace(-1, 1, sides[1], dtype=np.float32)[:, None], np.linspace(-1, 1, sides[0], dtype=np.float32)
    power = np.float32(rng.uniform(1.9, 3.2))  # 2: an ellipse; more: nearer to the box
    radius = (abs(x) ** power + abs(y) ** power) ** (1 / power)
    inside = 1.0 - radius + 0.06 * noise(rng, sides[1], sides[0], ((14, 1.0), (6, 0.8), (3, 0.5)))
    mask = np.clip(inside * SIDE / 6 + 0.5, 0, 1)
    picture = np.zeros((SIDE, SIDE, 4), np.uint8)
    y0, x0 = (SIDE - sides[1]) // 2, (SIDE - sides[0]) // 2
    view = picture[y0 : y0 + sides[1], x0 : x0 + sides[0]]
    view[..., :3], view[..., 3] = color, (mask * 255 + 0.5).astype(np.uint8)
    return Thing(CLASSES.index("crown"), halve_again(picture), photographed=True)


def _is_whole(box: np.ndarray, size: tuple[int, ...]) -> bool:
    """It does not touch the border, where it may have been cut."""
    x, y, width, height = box
    return bool(x > 0 and y > 0 and x + width < size[1] and y + height < size[0])


def _grounds(pixels: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
    """Squares in which there is no box, the largest that are found; none within another."""
    taken = np.zeros(pixels.shape[:2], bool)
    for x, y, width, height in boxes:
        taken[int(y) : int(np.ceil(y + height)), int(x) : int(np.ceil(x + width))] = True
    found = []
    for side in GROUND_SIDES:
        for top in range(0, pixels.shape[0] - side + 1, GROUND_STEP):
            for left in range(0, pixels.shape[1] - side + 1, GROUND_STEP):
                if not taken[top : top + side, left : left + side].any():
                    taken[top : top + side, left : left + side] = True
                    found.append(pixels[top : top + side, left : left + side])
    return found
