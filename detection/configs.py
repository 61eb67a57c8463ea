"""The rows of the object detection table: one plain function per (data set, backbone), times the methods.

    ROWS["shapes_tiny_dr2net"]()           # -> Config
    python -m detection.train shapes_tiny_dr2net --optimization.epochs 2

A row's name is `<data set>_<backbone>_<method>`; the docstring of its function is its lab notebook. The method acts on
the backbone and on the encoder of the head (`finetuning.also`), which is two thirds of the memory. Paths are relative
to the root of the repository, where the commands are run.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from dr2net import Options
from engine import config as engine_config
from engine.config import Finetuning, Method, Optimization, Run
from engine.rows import rows_of
from engine.settings import Count, NotNegative, Range, Settings, Share

SMALL_WEIGHTS = "detection/weights/small.safetensors"  # made by scripts/make_detector_weights.sh
ENCODER = ("head.transformer.encoder",)
COCO_SIZES = tuple(range(480, 801, 32))
GROUPS = 32  # of the normalization before the head's encoder; channels are a multiple
Side = Annotated[int, Range(low=32, high=16384)]  # of what the network sees, pixels; 32 is a token of the coarsest map
Deviation = Annotated[float, Range(low=0.001, high=1)]
Zoom = Annotated[float, Range(low=0.01, high=100)]


@dataclass(frozen=True, kw_only=True)
class Data(engine_config.Data):
    """The data set, and how its images become the network's inputs."""

    kind: Literal["coco", "yolo"] = "coco"  # the layout, see `detection.annotations`
    root: Path = Path("data/coco")
    num_classes: Count = 80  # must be what the annotation file has
    train_split: str = "train2017"  # coco: <root>/<split>/*.jpg, <root>/annotations/instances_<split>.json
    test_split: str = "val2017"  # yolo: <root>/images/<split>/*, <root>/labels/<split>/*.txt, <root>/data.yaml
    sizes: tuple[Side, ...] = COCO_SIZES  # training: the short side becomes one of them, at random
    max_size: Side = 1333  # of the long side, in training and evaluation
    test_size: Side = 800  # of the short side
    crop: Literal["detr", "window", "none"] = "detr"  # training. detr: half of the images are first resized to one of
    # `crop_sizes`, cut to a random rectangle, then resized as above; window: cut to a square of `window` pixels at a
    # random scale, turned by quarters and mirrored, for pictures from above; none
    crop_sizes: tuple[Side, ...] = (400, 500, 600)  # detr: short sides before the cut
    crop_range: tuple[Side, Side] = (384, 600)  # detr: sides of the cut, pixels
    window: Side = 256  # window: side of the cut
    scale: tuple[Zoom, Zoom] = (0.75, 1.33)  # window: of the picture before the cut
    flip: Share = 0.5  # chance to mirror left and right
    color_jitter: Share = 0.0  # brightness, contrast, saturation in 1 +- this
    repeats: Count = 1  # times that an epoch visits each image, for small sets
    keep_empty: bool = True  # also train on images without a box
    num_images: Count | None = None  # use only the first so many of each split, for quick tries
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)  # of the pretrained weights, for values in [0, 1]
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, empty in (("sizes", not self.sizes), ("crop-sizes", self.crop == "detr" and not self.crop_sizes)):
            if empty:
                raise ValueError(f"--data.{name} is empty: give at least one side in pixels")
        for name, (low, high) in (("crop-range", self.crop_range), ("scale", self.scale)):
            if low > high:
                raise ValueError(f"--data.{name} {low:g} {high:g}: give the smaller one first")
        sizes = {"--data.test-size": self.test_size}
        if self.crop != "window":
            sizes["--data.sizes"] = max(self.sizes)
        for name, side in sizes.items():
            if self.max_size < side:
                raise ValueError(
                    f"--data.max-size {self.max_size} is below {name} {side}: no image's short side could become "
                    "that long; raise the one or lower the other"
                )


COCO = Data()
TREES = Data(
    root=Path("data/trees"),
    num_classes=1,
    train_split="train",
    test_split="val",
    test_size=256,
    crop="window",
    color_jitter=0.2,
)
SHAPES = Data(
    root=Path("data/shapes"),
    num_classes=5,
    sizes=(112, 128),
    max_size=192,
    test_size=128,
    crop_sizes=(112, 128, 144),
    crop_range=(80, 128),
)


@dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """The pretrained backbone and DINO's head. The defaults of the head are those of DINO 4-scale."""

    backbone: Literal["small", "swin_t", "swin_s", "swin_b", "swin_l"] = "swin_t"
    weights: str | None = (
        None  # a file: a Swin backbone, or a whole detector (ours, official DINO, detrex, mmdetection),
    )
    # of which class layers of another number of classes stay fresh; "imagenet": torchvision's; None: random
    drop_path: Annotated[float, Range(low=0, below=1)] = (
        0.0  # stochastic depth of the last block, rising linearly from 0
    )
    width: Annotated[int, Range(low=64)] = 256  # channels of the head
    heads: Count = 8
    feedforward: Count = 2048
    encoder_layers: Count = 6
    decoder_layers: Count = 6
    extra_levels: Annotated[int, Range(low=1, high=3)] = 1  # levels of half the size each, after those of the backbone
    points: Count = 4  # sampled per head and level
    queries: Annotated[int, Range(low=1, high=100_000)] = 900  # at most as many as the image has tokens
    denoising: Annotated[int, Range(low=0)] = 100  # noised boxes per image, 0: none
    max_denoising: Count = 200  # queries for them, however many boxes an image has; what is over is left out at random
    box_noise: NotNegative = 1.0  # the published runs override .4 of the official configuration file
    label_noise: Share = 0.5  # twice the share of labels that are drawn anew
    shared_heads: bool = True  # one class and one box layer for all decoder layers; detrex, mmdetection: one each
    temperature: Annotated[float, Range(low=1)] = 20.0  # of the encoder's positions; detrex: 10000
    position_offset: float = 0.0  # detrex: -.5
    query_chunk: Count | None = None  # recompute the head: encoder layers in pieces of so many queries, decoder layers
    # as a whole; None: keep all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % GROUPS:
            raise ValueError(f"--model.width {self.width} is no multiple of {GROUPS}, the groups of its normalization")
        if self.width % self.heads:
            raise ValueError(
                f"--model.heads {self.heads}: a --model.width of {self.width} does not split into so many equal heads"
            )


@dataclass(frozen=True, kw_only=True)
class Detection(Settings):
    """From the network's outputs to the detections of an image."""

    max_detections: Count = 300  # per image, the best over queries and classes
    # IoU with a better one of its class above which a detection is dropped. None: none is, as in DINO, which learns in
    # many epochs to find each object once; after a few hundred steps .6 helps (README)
    max_overlap: Share | None = None


@dataclass(frozen=True, kw_only=True)
class Config(engine_config.Config):
    """Everything that determines a run."""

    data: Data
    model: Model = field(default_factory=Model)
    detection: Detection = field(default_factory=Detection)


SMALL = Model(
    backbone="small",
    weights=SMALL_WEIGHTS,
    width=128,
    heads=4,
    feedforward=512,
    encoder_layers=2,
    decoder_layers=3,
    extra_levels=2,
    queries=150,
    denoising=50,
    max_denoising=100,
)


def trees_small(method: Method) -> Config:
    """The laptop preset: a small Swin detector, pretrained on composed scenes, finds trees in aerial photographs.

    python -m detection.prepare --preset laptop && python -m detection.train trees_small_dr2net
    Real photographs with boxes drawn by people (NEON crops in the deepforest package, MIT), 10 cm per pixel; trained on
    random windows of one picture, tested on 20 tiles of another, 279 boxes, most of them small.
    """
    return Config(
        preset="laptop",
        data=TREES,
        model=SMALL,
        optimization=Optimization(
            epochs=6,
            warmup_epochs=0.3,
            global_batch=4,
            learning_rate=8e-4,  # of everything: the backbone has seen no photograph either
            weight_decay=1e-4,
            clip_norm=0.1,
            precision="fp32",
        ),
        finetuning=Finetuning(method=method, also=ENCODER, options=Options(tolerance=1e-2, recompute_rest=True)),
        run=Run(micro_batch=4, evaluation_batch=1, num_workers=0, evaluate_every_epochs=None),
    )


def shapes_tiny(method: Method) -> Config:
    """The tiny preset: the laptop's detector on 64 composed pictures in COCO's form, with every hazard of real files.

    python -m detection.prepare --preset tiny && python -m detection.train shapes_tiny_dr2net
    """
    base = trees_small(method)
    return replace(
        base,
        preset="tiny",
        data=SHAPES,
        optimization=replace(
            base.optimization,
            epochs=3,
            learning_rate=4e-4,
            # the class layers are new: five classes instead of one
            multipliers={"backbone.": 0.25, "head.class_embed.": 4.0, "head.transformer.enc_out_class_embed.": 4.0},
        ),
    )


def coco_swint(method: Method) -> Config:
    """COCO 2017, DINO 4-scale on Swin-T, 12 epochs: detrex's recipe, which alone has published it. Not run here.

    torchrun --nproc-per-node 8 -m detection.train coco_swint_dr2net --model.weights FILE
    Published: AP 51.3 (detrex, ImageNet-1k weights of Microsoft; torchvision's, which `imagenet` brings, are another
    training). Not as there: weight decay also on norms, images without boxes are kept, resized sides are rounded down,
    as in the official DINO; one head for all decoder layers. Memory is predicted for images that pad to 1333 x 1333.
    Conventional and frozen keep everything; the other methods also recompute the head in pieces (`query_chunk`).
    """
    return Config(
        preset="paper",
        data=COCO,
        model=Model(
            backbone="swin_t",
            weights="imagenet",
            drop_path=0.1,
            query_chunk=None if method in ("conventional", "frozen") else 2048,
        ),
        optimization=Optimization(
            epochs=12,
            warmup_epochs=0,
            global_batch=16,
            learning_rate=1e-4,
            decay="steps",
            drops=(11 / 12,),
            multipliers={"backbone.": 0.1},
            weight_decay=1e-4,
            decay_vectors=True,
            clip_norm=0.1,
            precision="bf16",
        ),
        finetuning=Finetuning(
            method=method, also=ENCODER, options=Options(tolerance=1e-2, chunk_mib=64, recompute_rest=True)
        ),
        run=Run(micro_batch=2, evaluation_batch=1, num_workers=8),
    )


def coco_swinl(method: Method) -> Config:
    """COCO 2017, DINO 4-scale on Swin-L (window 12, ImageNet-22k), 12 epochs: the official recipe. Not run here.

    torchrun --nproc-per-node 8 -m detection.train coco_swinl_dr2net
    Published: AP 56.8. Weights: Microsoft's swin_large_patch4_window12_384_22k.pth, put there or given with
    --model.weights FILE.
    """
    base = coco_swint(method)
    weights = "data/swin_large_patch4_window12_384_22k.pth"
    return replace(base, model=replace(base.model, backbone="swin_l", weights=weights, drop_path=0.2))


ROWS = rows_of(shapes_tiny, trees_small, coco_swint, coco_swinl)
