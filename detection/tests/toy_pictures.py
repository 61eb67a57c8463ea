"""A small data set in COCO's form with channels for boxes: the k-th box of a picture fills its channel k."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from detection.configs import SHAPES, Data

CATEGORIES = [{"id": 44, "name": "cup"}, {"id": 3, "name": "car"}]  # labels 1 and 0
SPLITS = ("train2017", "val2017")
# file name, width, height, boxes with category ids
PICTURES: list[tuple[str, int, int, list[tuple[list[float], int]]]] = [
    ("a.jpg", 160, 120, [([20, 30, 50, 40], 3), ([90, 10, 60, 100], 44)]),
    ("b.png", 100, 140, [([10, 10, 30, 60], 44)]),
    ("c.jpg", 120, 120, []),
]
# file name, width, height, boxes x, y, width, height in pixels with their classes
YOLO_PICTURES: list[tuple[str, int, int, list[tuple[list[float], int]]]] = [
    ("a.jpg", 160, 120, [([20, 30, 50, 40], 1), ([90, 10, 60, 100], 0)]),
    ("b.PNG", 100, 140, [([10, 10, 30, 60], 1)]),
    ("c.bmp", 90, 90, []),
]
YOLO_CLASSES = "path: ../somewhere\ntrain: ../train/images\nval: images/val\nnc: 2\nnames: ['cat', dog]\n"


def draw(width: int, height: int, boxes: list[list[float]]) -> np.ndarray:
    """uint8 (height, width, 3): 255 inside box k of channel k."""
    image = np.zeros((height, width, 3), np.uint8)
    for k, (x, y, w, h) in enumerate(boxes):
        image[int(y) : int(y + h), int(x) : int(x + w), k] = 255
    return image


def coco_of(pictures: Any = PICTURES) -> dict[str, Any]:
    """The annotation file of these pictures, whose ids begin with 7."""
    items: list[dict[str, Any]] = []
    for number, (_, _, _, boxes) in enumerate(pictures, start=7):
        for box, category in boxes:
            area = box[2] * box[3]
            items.append(
                {
                    "id": len(items) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": list(box),
                    "area": area,
                    "iscrowd": 0,
                }
            )
    images = [
        {"id": number, "file_name": name, "width": width, "height": height}
        for number, (name, width, height, _) in enumerate(pictures, start=7)
    ]
    return {"images": images, "annotations": items, "categories": [dict(entry) for entry in CATEGORIES]}


def write_coco(root: Path, content: Any = None, pictures: Any = PICTURES) -> Data:
    """Both splits below `root`, with the annotations `content` where given; returns the settings."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (root / split).mkdir(exist_ok=True)
        for name, width, height, boxes in pictures:
            image = Image.fromarray(draw(width, height, [box for box, _ in boxes]))
            image.save(root / split / name, quality=95)
        text = json.dumps(coco_of(pictures) if content is None else content)
        (root / "annotations" / f"instances_{split}.json").write_text(text)
    return replace(SHAPES, root=root, num_classes=2)


def config_of(data: Data) -> Any:
    """As much of a configuration as data.py looks at."""
    return SimpleNamespace(data=data)


def yolo_line(box: list[float], label: int, width: int, height: int) -> str:
    """A line of a label file."""
    x, y, w, h = box
    return f"{label} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"


def write_yolo(root: Path, form: str = "images/{}") -> Data:
    """Both splits below `root`; returns the settings."""
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_text(YOLO_CLASSES)
    for split in ("train", "val"):
        images = root / form.format(split)
        labels = root / form.format(split).replace("images", "labels")
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for name, width, height, boxes in YOLO_PICTURES:
            Image.fromarray(draw(width, height, [box for box, _ in boxes])).save(images / name)
            if boxes:
                text = "".join(yolo_line(box, label, width, height) for box, label in boxes)
                (labels / name).with_suffix(".txt").write_text(text)
    return replace(SHAPES, kind="yolo", root=root, num_classes=2, train_split="train", test_split="val")
