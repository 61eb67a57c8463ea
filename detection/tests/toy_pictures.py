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
