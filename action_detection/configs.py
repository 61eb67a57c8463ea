"""The rows of the temporal action detection table: one plain function per (data set, backbone), times the methods.

    ROWS["untrimmed_tiny_dr2net"]()           # -> Config
    python -m action_detection.train untrimmed_tiny_dr2net --optimization.epochs 2

A row's name is `<data set>_<backbone>_<method>`; the docstring of its function is its lab notebook. A variant is a
function of three lines plus its name in `ROWS`. Paths are relative to the root of the repository, where the
commands are run.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from action_detection.metric import ACTIVITYNET_TIOU
from dr2net import Options
from engine import config as engine_config
from engine.config import SCHEDULES, Finetuning, Method, Optimization, Run
from engine.rows import rows_of
from engine.settings import Count, NotNegative, Positive, Range, Settings, Share

SMALL_WEIGHTS = "action_detection/weights/small.safetensors"  # made by scripts/make_swin_weights.sh


@dataclass(frozen=True, kw_only=True)
class Data(engine_config.Data):
    """The data set and how its videos become windows of frames. The defaults change nothing at random."""

    kind: Literal["activitynet", "thumos"] = "activitynet"  # the layout, see `read_annotations`
    root: Path = Path("data/untrimmed")
    num_classes: Count = 10  # must be what the annotation file has
    train_subset: str = "training"
    test_subset: str = "validation"
    num_times: Count = 48  # N, the feature grid of a window: a time is a cell of it
    frames_per_time: Count = 2  # T = num_times * frames_per_time frames are decoded
    image_size: Count = 56  # H = W
    windows: Literal["whole", "sliding"] = "sliding"  # a window is the whole video, or a piece of it at `fps`
    fps: Positive = 6.0  # sliding: frames per second that the network sees
    overlap: Annotated[float, Range(low=0, below=1)] = 0.25  # sliding, test: share repeated by the next
    min_overlap: Share = 0.75  # an instance of which a smaller share is inside the window is no target
    train_on_empty: bool = False  # also train on videos without a single instance
    crop_scale: tuple[Share, Share] = (1.0, 1.0)  # training: share of the area kept by the window's random crop
    flip: bool = False  # mirror half of the windows; never where "left" and "right" are classes
    color_jitter: Share = 0.0  # brightness, contrast, saturation in 1 +- this
    blocked: Path | None = None  # JSON list of videos that neither train nor test, such as OpenTAD's blocked.json
    num_videos: Count | None = None  # use only the first so many of each subset, for quick tries
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the pretrained weights, for values in [0, 1]
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    cache_gib: NotNegative = 0.0  # decoded videos kept in memory, per split and worker; helps small sets

    @property
    def num_frames(self) -> int:
        """T of a window."""
        return self.num_times * self.frames_per_time


UNTRIMMED = Data(cache_gib=1.0)
ACTIVITYNET = Data(
    kind="activitynet",
    root=Path("data/activitynet"),
    num_classes=200,
    num_times=192,
    frames_per_time=4,
    image_size=224,
    windows="whole",
    crop_scale=(0.8, 1.0),
    flip=True,
)
THUMOS = Data(
    kind="thumos",
    root=Path("data/thumos14"),
    num_classes=20,
    train_subset="training",
    test_subset="validation",
    num_times=512,
    frames_per_time=2,
    image_size=224,
    windows="sliding",
    fps=15.0,
    overlap=0.5,
    crop_scale=(0.8, 1.0),
    flip=True,
)


@dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """The pretrained backbone and its detection head. Window length and image size are those of `Data`."""

    backbone: Literal["small", "swin3d_t", "swin3d_s", "swin3d_b", "slowfast101"] = "small"
    weights: str | None = SMALL_WEIGHTS  # "kinetics" (torchvision's), a file; None: random, to pretrain or to plan
    drop_path: Share = 0.0  # stochastic depth of the last block, rising linearly from 0
    head: Literal["actionformer", "vsgn"] = "actionformer"
    width: Count = 128  # channels of the head
    num_levels: Count = 4  # of the pyramid, each half as long as the one before
    attention_span: Count | None = 9  # times that local attention sees (actionformer), odd; None: all of them
    position_embedding: bool = False  # absolute, sinusoidal, after the projection (actionformer)
    head_drop_path: Share = 0.0
    label_smoothing: Share = 0.0
    regression_weight: NotNegative = 1.0  # of the boundary loss against the classification loss
    class_agnostic: bool = False  # one class "action"; classes then come from `Detection.class_scores`


@dataclass(frozen=True, kw_only=True)
class Detection(Settings):
    """From the network's candidates to the detections of a video."""

    nms: Literal["soft", "hard", "none"] = "soft"
    sigma: Positive = 0.5  # soft: a score decays by exp(-iou^2 / sigma)
    iou_threshold: Share = 0.1  # hard: above it the lower score goes
    vote_threshold: Share | None = None  # boundaries become the mean over candidates that overlap more than this
    multi_class: bool = True  # suppress within a class only
    min_score: Share = 1e-3
    max_candidates: Count = 2000  # per window, before suppression
    max_detections: Count = 200  # per video
    tious: tuple[Share, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)  # thresholds of the metric
    class_scores: Path | None = None  # JSON of video-level class scores of an outside classifier
    class_scores_sha256: str | None = None  # its checksum; the label file alone moves mAP by points
    class_scores_top: Count = 2  # classes per video taken from it


@dataclass(frozen=True, kw_only=True)
class Config(engine_config.Config):
    """Everything that determines a run."""

    data: Data
    model: Model = field(default_factory=Model)
    detection: Detection = field(default_factory=Detection)


def untrimmed_tiny(method: Method) -> Config:
    """The tiny preset: the laptop row on 24 training and 24 validation videos, under a minute on two cores."""
    base = untrimmed_small(method)
    return replace(
        base,
        preset="tiny",
        data=replace(base.data, num_videos=24),
        optimization=replace(base.optimization, epochs=6),
        run=replace(base.run, evaluate_every_epochs=6),
    )


def untrimmed_small(method: Method) -> Config:
    """The laptop preset: a small Video Swin, pretrained on motion, finds motions in synthetic untrimmed videos.

    python -m action_detection.prepare --preset tiny && python -m action_detection.train untrimmed_small_dr2net
    110 training and 40 validation videos in windows of 96 frames of 56 x 56, 16 seconds. 216 steps take 2 to 6 minutes
    on two cores. Branches in chunks of 32 MiB need less memory than checkpointing and are as fast; whole ones are
    neither. The numbers are in results/README.md.
    """
    return Config(
        preset="laptop",
        data=UNTRIMMED,
        optimization=Optimization(
            epochs=8,
            warmup_epochs=0.5,
            global_batch=4,
            learning_rate=1e-3,
            multipliers={"backbone.": 0.1},
            clip_norm=1.0,
            precision="fp32",
        ),
        finetuning=Finetuning(method=method, options=Options(tolerance=1e-2, chunk_mib=32, recompute_rest=True)),
        run=Run(micro_batch=4, num_workers=0, evaluate_every_epochs=8),
    )


def anet_swint(method: Method) -> Config:
    """ActivityNet-1.3, Video Swin-T, ActionFormer head: OpenTAD's recipe, 15 epochs. Not run here.

    torchrun --nproc-per-node 4 -m action_detection.train anet_swint_dr2net
    Published (OpenTAD, with CUHK's video-level class scores): 36.89 average mAP plain, 36.47 with Re2TAL. Drop path is
    .1, for reversible methods .2, as there. Not as there: losses are normalized per video, not by a running mean; no
    photometric augmentation but color jitter; the learning rate of the head is not lowered for its norms.
    """
    return Config(
        preset="paper",
        data=ACTIVITYNET,
        model=Model(
            backbone="swin3d_t",
            weights="kinetics",
            drop_path=0.2 if method in SCHEDULES else 0.1,
            width=256,
            num_levels=6,
            attention_span=None,
            position_embedding=True,
            head_drop_path=0.1,
            label_smoothing=0.1,
            regression_weight=2.0,
            class_agnostic=True,
        ),
        detection=Detection(
            sigma=0.7,
            vote_threshold=0.9,
            multi_class=False,
            max_detections=100,
            tious=ACTIVITYNET_TIOU,
            class_scores=Path("data/activitynet/cuhk_val_simp_7.json"),
        ),
        optimization=Optimization(
            epochs=15,
            warmup_epochs=5,
            global_batch=8,
            learning_rate=1e-3,
            multipliers={"backbone.": 0.01},
            clip_norm=1.0,
            ema_decay=0.999,
            precision="bf16",
        ),
        finetuning=Finetuning(method=method, options=Options(tolerance=1e-2, chunk_mib=64, recompute_rest=True)),
        run=Run(micro_batch=2, num_workers=8),
    )


def thumos_swint(method: Method) -> Config:
    """THUMOS-14, Video Swin-T, ActionFormer head: OpenTAD's recipe, 120 epochs. Not run here.

    torchrun --nproc-per-node 2 -m action_detection.train thumos_swint_dr2net
    Published (OpenTAD): 67.10 average mAP plain, 66.89 with Re2TAL. There the cosine has 1500 epochs, of which 120 are
    trained: the rate hardly falls, hence `min_learning_rate`. Frames are taken at 15 per second by their time (there:
    every second frame of videos that mostly have 30). Not as there: videos shorter than a window are not shortened at
    random in training.
    """
    base = anet_swint(method)
    return replace(
        base,
        data=THUMOS,
        model=replace(
            base.model,
            width=512,
            position_embedding=False,
            label_smoothing=0.0,
            regression_weight=1.0,
            class_agnostic=False,
        ),
        detection=Detection(sigma=0.7, max_detections=2000),
        optimization=replace(
            base.optimization,
            epochs=120,
            global_batch=4,
            learning_rate=1e-4,
            min_learning_rate=9.8e-5,
            multipliers={"backbone.": 0.1},
        ),
    )


def anet_swint_vsgn(method: Method) -> Config:
    """ActivityNet-1.3, Video Swin-T with the VSGN head, likely the paper's setting (its Fig. 1). Not run here."""
    base = anet_swint(method)
    model = replace(base.model, head="vsgn", num_levels=5)
    return replace(base, model=model)


def anet_slowfast101(method: Method) -> Config:
    """ActivityNet-1.3, SlowFast-101, ActionFormer head: Re2TAL's second backbone. Not run here.

    Published (OpenTAD): 37.35 average mAP plain, 37.55 with Re2TAL. Weights: pytorchvideo's checkpoint
    SLOWFAST_8x8_R101, put there or given with --model.weights FILE. Batch norm statistics are frozen, as there.
    """
    base = anet_swint(method)
    model = replace(base.model, backbone="slowfast101", weights="data/slowfast_r101.pyth", drop_path=0.0)
    return replace(base, model=model)


def thumos_slowfast101(method: Method) -> Config:
    """THUMOS-14, SlowFast-101: as thumos_swint. Published (OpenTAD): 69.97 plain, 70.19 with Re2TAL. Not run here."""
    base = thumos_swint(method)
    model = replace(base.model, backbone="slowfast101", weights="data/slowfast_r101.pyth", drop_path=0.0)
    return replace(base, model=model)


ROWS = rows_of(
    *(untrimmed_tiny, untrimmed_small),
    *(anet_swint, anet_swint_vsgn, anet_slowfast101, thumos_swint, thumos_slowfast101),
)
