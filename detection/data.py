"""Pictures with boxes, as the network takes them.

    build_dataset(config, "train")     # one random view per picture and visit
    build_dataset(config, "test")      # every picture once, resized by the test rule alone

A batch, in training and evaluation alike:

    image (B, 3, H, W) float32, normalized, zero where there is none    padding (B, H, W) bool, True there
    targets: B tables {"labels": (n,) int64 class indices, "boxes": (n, 4) float32}, boxes as center x, y, width, height
    in shares of the picture's own part of the canvas; crowds are not among them    num_targets: float, their number
    name, skipped: list[str]    image_id: list[int], of the annotation file
    original_size: list[(height, width)] pixels, in which the annotated boxes stand

A sample is a pure function of its key (index, sample seed). Not here: reading files (annotations.py, images.py), what
is done with the pixels (transforms.py), the metric (evaluate.py).
"""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detection import transforms, yolo
from detection.annotations import Annotations, Picture, annotation_file, read_annotations, read_categories
from detection.configs import Config, Data
from detection.images import BrokenImage, read_image
from engine.config import Split
from engine.data.fingerprint import Files
from engine.data.transforms import normalize
from engine.detr.padding import pad_images

CACHE_BYTES = 1 << 28  # a split whose decoded pictures fit in here is decoded once, by each process
MAX_REPLACEMENTS = 20  # unusable pictures in a row, before something else is to blame


class Pictures:
    """Samples by (index, sample seed), of at least one picture."""

    def __init__(self, data: Data, annotations: Annotations, pictures: list[Picture], *, train: bool) -> None:
        self.data, self.train, self.annotations, self.pictures = data, train, annotations, pictures
        self.least = _least_side(data, train)
        small = sum(picture.width * picture.height * 3 for picture in pictures) <= CACHE_BYTES
        self.decoded: dict[int, Tensor] | None = {} if small else None

    def files(self) -> Files:
        """The annotations and the pictures."""
        own = [self.annotations.file]
        if self.data.kind == "yolo":
            own += yolo.label_files(self.data, self.data.train_split if self.train else self.data.test_split)
        return Files(own, [str(picture.path) for picture in self.pictures])

    def __len__(self) -> int:
        return len(self.pictures) * (self.data.repeats if self.train else 1)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The sample. With on_broken="skip", of an unusable picture: in training one of the next usable picture, in
        evaluation a blank one, so that the metric sees each picture once; its objects are missed.
        """
        index, sample_seed = key
        skipped: list[str] = []
        for offset in range(min(MAX_REPLACEMENTS, len(self.pictures)) if self.train else 1):
            place = (index + offset) % len(self.pictures)
            picture = self.pictures[place]
            try:
                image = self._read(place)
            except (BrokenImage, OSError) as error:
                if self.data.on_broken == "raise":
                    raise
                warnings.warn(f"skipped: {error}", stacklevel=2)
                skipped.append(picture.path.name)
                if self.train:
                    continue
                image = torch.full((3, picture.height, picture.width), 127, dtype=torch.uint8)
            return self._sample(image, picture, sample_seed) | {"skipped": skipped}
        names = ", ".join(skipped[:5])
        raise BrokenImage(self.data.root, f"{len(skipped)} pictures in a row cannot be read ({names}, ...)")

    def _read(self, place: int) -> Tensor:
        if self.decoded is not None and place in self.decoded:
            return self.decoded[place]
        picture = self.pictures[place]
        size, as_stored = (picture.height, picture.width), self.data.kind == "coco"
        image = read_image(picture.path, size=size, as_stored=as_stored, least=self.least)
        if self.decoded is not None:
            self.decoded[place] = image
        return image

    def _sample(self, image: Tensor, picture: Picture, sample_seed: int) -> dict[str, Any]:
        use = ~picture.crowd
        boxes = transforms.picture_boxes(picture.boxes[use], picture.height, picture.width)
        if image.shape[-2:] != (picture.height, picture.width):  # decoded at a part of its size
            boxes = F.resize(boxes, list(image.shape[-2:]))
        labels = torch.from_numpy(picture.labels[use])
        if self.train:
            image, boxes, kept = transforms.augment(image, boxes, self.data, np.random.default_rng([sample_seed, 0]))
            labels = labels[kept]
        else:
            image, boxes = transforms.shrink_or_grow(image, boxes, self.data.test_size, self.data.max_size)
        size = (picture.height, picture.width)
        return _finish(self.data, image, boxes, labels, picture.path.name, picture.id, size)


def build_dataset(config: Config, split: Split) -> Pictures:
    """The pictures of a split (val and test are the same), those without boxes left out of training if `keep_empty` is
    False. Errors as `read_annotations`; FileNotFoundError for missing pictures, or with on_broken="skip" a warning;
    ValueError where the two splits have other classes.
    """
    data, train = config.data, split == "train"
    annotations = read_annotations(data, "train" if train else "test")
    if train and data.kind == "coco" and annotations.categories != (others := read_categories(data)):
        where = f"{annotations.file} and {annotation_file(data, 'test')}"
        pair = next(pair for pair in zip(annotations.categories, others, strict=True) if pair[0] != pair[1])
        raise ValueError(f"{where}: have other classes, as {pair[0]} and {pair[1]}; make the two lists agree")
    pictures = list(annotations.pictures.values())
    if train and not data.keep_empty:
        pictures = [picture for picture in pictures if not picture.crowd.all()]
    missing = find_missing(pictures)
    if missing:
        names = ", ".join(str(picture.path) for picture in missing[:10])
        message = f"{annotations.file}: {len(missing)} of {len(pictures)} pictures are missing: {names}"
        if data.on_broken == "raise":
            remedy = "run `python -m detection.prepare`, or leave them out with --data.on-broken skip"
            raise FileNotFoundError(f"{message}; {remedy}")
        warnings.warn(f"{message}; left out", stacklevel=2)
        absent = {picture.id for picture in missing}
        pictures = [picture for picture in pictures if picture.id not in absent]
    if not pictures:
        raise ValueError(
            f"{annotations.file}: no picture to use; check --data.root, the splits and --data.no-keep-empty"
        )
    if train and all(picture.crowd.all() for picture in pictures):
        raise ValueError(
            f"{annotations.file}: none of the {len(pictures)} pictures has a box to train on: are the labels there?"
        )
    return Pictures(data, annotations, pictures, train=train)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of unequal sizes -> one batch, see the top of this file."""
    image, padding = pad_images([sample["image"] for sample in samples])
    return {
        "image": image,
        "padding": padding,
        "targets": [{"labels": sample["labels"], "boxes": sample["boxes"]} for sample in samples],
        "num_targets": float(sum(len(sample["labels"]) for sample in samples)),
        "name": [sample["name"] for sample in samples],
        "skipped": [name for sample in samples for name in sample["skipped"]],
        "image_id": [sample["image_id"] for sample in samples],
        "original_size": [sample["original_size"] for sample in samples],
    }


def class_names(config: Config) -> list[str]:
    """The name of each class, by index. Errors as `read_categories`."""
    return [category.name for category in read_categories(config.data)]


def find_missing(pictures: list[Picture]) -> list[Picture]:
    """Those without a file; each folder is listed once, no file is opened."""
    there: dict[Path, set[str]] = {}
    for folder in {picture.path.parent for picture in pictures}:
        there[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
    return [picture for picture in pictures if picture.path.name not in there[picture.path.parent]]


def sample_of_image(data: Data, image: Tensor, name: str) -> dict[str, Any]:
    """A picture without annotations as a sample for `collate`, by the test rule. image: uint8 (3, H, W)."""
    height, width = image.shape[-2:]
    boxes, labels = transforms.picture_boxes(np.zeros((0, 4)), height, width), torch.zeros(0, dtype=torch.long)
    resized, boxes = transforms.shrink_or_grow(image, boxes, data.test_size, data.max_size)
    return _finish(data, resized, boxes, labels, name, 0, (height, width)) | {"skipped": []}


def _finish(
    data: Data,
    image: Tensor,
    boxes: tv_tensors.BoundingBoxes,
    labels: Tensor,
    name: str,
    image_id: int,
    original_size: tuple[int, int],
) -> dict[str, Any]:
    """Normalized pixels, boxes as center and size in shares of the picture."""
    height, width = image.shape[-2:]
    corners = boxes.as_subclass(Tensor) / torch.tensor([width, height, width, height])
    return {
        "image": normalize(image[None], data.mean, data.std)[:, 0],
        "labels": labels,
        "boxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1),
        "name": name,
        "image_id": image_id,
        "original_size": original_size,
    }


def _least_side(data: Data, train: bool) -> int | None:
    """The short side that a picture is resized to at most; None where the scale is a share of the picture's own."""
    if not train:
        return data.test_size
    return None if data.crop == "window" else max((*data.sizes, *data.crop_sizes))
