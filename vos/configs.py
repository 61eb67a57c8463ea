"""The rows of the video object segmentation table: one plain function per (data set, backbone), times the methods.

    ROWS["referring_tiny_dr2net"]()           # -> Config
    python -m vos.train referring_tiny_dr2net --optimization.epochs 2

A row's name is `<data set>_<backbone>_<method>`; the docstring of its function is its lab notebook. A variant is a
function of three lines plus its name in `ROWS`. Paths are relative to the root of the repository, where the commands
are run.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from dr2net import Options
from engine import config as engine_config
from engine.config import Finetuning, Method, Optimization, Run
from engine.rows import rows_of
from engine.settings import Count, NotNegative, Range, Settings, Share

REFERRING_WEIGHTS = "vos/weights/small.safetensors"  # a whole small MTTR that knows looks, made by vos/pretrain.py
SMALL_WEIGHTS = "action_detection/weights/small.safetensors"  # a small Video Swin, made by scripts/make_swin_weights.sh
HEAD = ("head.transformer",)  # runs again in backward wherever blocks do: without it most of what forward keeps
Side = Annotated[int, Range(low=32, high=4096)]  # of what the network sees, pixels
Deviation = Annotated[float, Range(low=0.001, high=1)]


@dataclass(frozen=True, kw_only=True)
class Data(engine_config.Data):
    """The data set, and how a sentence and its video become the network's inputs. The defaults are MTTR's for A2D."""

    kind: Literal["a2d", "jhmdb", "refytvos"] = "a2d"  # the layout, see `vos.annotations`; jhmdb is never trained on
    root: Path = Path("data/a2d")
    num_classes: Count = 1  # "referred": there are no others
    text: str = "roberta-base"  # "words": a table of hashed words, learned; "minilm": brought by prepare; the folder of
    # an encoder of transformers; or the name of one on the hub. All but words are frozen, their features kept on disk
    max_words: Count = 64  # of a sentence, in the encoder's tokens; longer ones are cut, with a warning
    window: Count = 10  # T, frames around the annotated one; refytvos: consecutive listed frames
    image_size: Side = 320  # of the short side
    max_size: Side = 576  # of the long side
    flip: Share = 0.5  # chance to mirror frames, masks, and "left" and "right" in the sentence
    supervise: Literal["all", "middle"] = "all"  # training: every annotated frame of the window, or the sample's only
    samples: Literal["frames", "sentences"] = "frames"  # of an epoch: each annotated frame of each sentence, or each
    # sentence once with a frame drawn at random
    num_videos: Count | None = None  # use only the first so many of each split, for quick tries
    cache_gib: NotNegative = 0.0  # decoded windows' frames kept in memory, per split and worker; helps small sets
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)  # of the pretrained weights, for values in [0, 1]
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_size < self.image_size:
            raise ValueError(
                f"--data.max-size {self.max_size} is below --data.image-size {self.image_size}: no short side could "
                "become that long; raise the one or lower the other"
            )


REFERRING = Data(
    root=Path("data/referring"),
    text="minilm",
    window=8,
    image_size=80,  # things then have the size in pixels at which the weights were made
    max_size=80,
    samples="sentences",
    cache_gib=1.0,
)
REFYTVOS = Data(kind="refytvos", root=Path("data/refytvos"), window=12, image_size=360, max_size=640)


@dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """The pretrained backbone and MTTR's head. The defaults of the head are MTTR's."""

    backbone: Literal["small", "swin3d_t", "swin3d_s", "swin3d_b"] = "swin3d_t"
    weights: str | None = "kinetics"  # torchvision's; a file: a Video Swin backbone (ours, torchvision's, the official
    # one) or a whole MTTR (ours or the official one); None: random
    patch: Literal["sum", "overlap"] = (
        "sum"  # one token per frame from an embedding that was trained on two: its kernel
    )
    # summed over time (MTTR), or kept and moved by one frame, which keeps what a small network knows of motion
    drop_path: Annotated[float, Range(low=0, below=1)] = (
        0.1  # stochastic depth of the last block, rising linearly from 0
    )
    text_width: Count = 768  # channels of the text encoder; of the table of words
    width: Annotated[int, Range(low=32)] = 256  # channels of the head
    heads: Count = 8
    feedforward: Count = 2048
    encoder_layers: Count = 3
    decoder_layers: Count = 3
    dropout: Annotated[float, Range(low=0, below=1)] = 0.1  # none on attention probabilities, which never exist
    queries: Annotated[int, Range(low=1, high=1000)] = 50  # per frame; the same query in each frame is one object
    kernels: Count = 8  # channels of the last map, and of each query's kernel
    mask_widths: tuple[Count, Count, Count, Count] = (256, 128, 64, 32)  # of the decoder of masks, from coarse to fine

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"--model.width {self.width}: must be a multiple of 4, and of --model.heads {self.heads}")
        if any(width % 8 for width in self.mask_widths):
            raise ValueError(f"--model.mask-widths {self.mask_widths}: multiples of 8, the groups of a normalization")


@dataclass(frozen=True, kw_only=True)
class Config(engine_config.Config):
    """Everything that determines a run."""

    data: Data
    model: Model = field(default_factory=Model)


def referring_tiny(method: Method) -> Config:
    """The tiny preset: the laptop's network with words as text on 40 training and 12 test videos, without a download.

    python -m vos.prepare --preset tiny && python -m vos.train referring_tiny_dr2net
    """
    base = referring_small(method)
    return replace(
        base,
        preset="tiny",
        data=replace(base.data, root=Path("data/referring_tiny"), text="words", num_videos=40),
        model=replace(base.model, weights=SMALL_WEIGHTS, text_width=96),
        optimization=replace(
            base.optimization,
            warmup_epochs=0.2,
            learning_rate=1e-3,
            multipliers={"backbone.": 0.1},
            clip_norm=1.0,
        ),
    )


def referring_small(method: Method) -> Config:
    """The laptop preset: a small Video Swin, pretrained on motion, finds what a sentence names in composed clips.

    python -m vos.prepare --preset laptop && python -m vos.train referring_small_dr2net
    300 training and 60 test videos of 16 frames of 96 x 96 in A2D's files, three objects each; of twins only their
    motion tells which is meant.
    """
    return Config(
        preset="laptop",
        data=REFERRING,
        model=Model(
            backbone="small",
            weights=REFERRING_WEIGHTS,
            patch="overlap",
            drop_path=0.0,
            text_width=384,
            width=96,
            heads=4,
            feedforward=256,
            encoder_layers=2,
            decoder_layers=2,
            queries=10,
            mask_widths=(96, 48, 48, 48),
        ),
        optimization=Optimization(
            epochs=1,
            warmup_epochs=0.1,
            global_batch=4,
            learning_rate=3e-4,
            multipliers={"backbone.": 0.3},
            weight_decay=1e-4,
            clip_norm=0.1,
            precision="fp32",
        ),
        finetuning=Finetuning(
            method=method, also=HEAD, options=Options(tolerance=1e-2, chunk_mib=16, recompute_rest=True)
        ),
        run=Run(micro_batch=4, num_workers=0, evaluate_every_epochs=None),
    )


def a2d_swint(method: Method) -> Config:
    """A2D-Sentences, MTTR on Video Swin-T, windows of 10 frames, 70 epochs: MTTR's recipe. Not run here.

    torchrun --nproc-per-node 2 -m vos.train a2d_swint_dr2net
    Published (MTTR): mAP 46.1, IoU 72.0 overall, 64.0 mean. Not as there: the text encoder is in eval mode (there its
    dropout is active) and its features are kept; no dropout on attention probabilities; masks are matched at their own
    resolution, a quarter of the input; whole words left and right are swapped in mirrored samples (there parts of words
    too, "bright" to "bleft"); bf16 instead of fp16.
    Predicted peak of a step, three windows of 320 x 576: conventional 26.6 GiB, checkpointed 9.2, dr2net 1.41.
    """
    return Config(
        preset="paper",
        data=Data(),
        optimization=Optimization(
            epochs=70,
            warmup_epochs=0,
            global_batch=6,
            learning_rate=1e-4,
            decay="steps",
            drops=(50 / 70,),
            drop_factor=0.4,
            multipliers={"backbone.": 0.1},
            weight_decay=1e-4,
            decay_vectors=True,
            clip_norm=0.1,
            precision="bf16",
        ),
        finetuning=Finetuning(
            method=method, also=HEAD, options=Options(tolerance=1e-2, chunk_mib=64, recompute_rest=True)
        ),
        run=Run(micro_batch=3, evaluation_batch=1, num_workers=8),
    )


def a2d_swint_w8(method: Method) -> Config:
    """As a2d_swint with windows of 8 frames, which need half as much: Swin pads 10 to 16. Not run here.

    Published (MTTR): mAP 44.7, IoU 70.2 overall, 61.8 mean.
    """
    base = a2d_swint(method)
    return replace(base, data=replace(base.data, window=8))


def refytvos_swint(method: Method) -> Config:
    """Ref-YouTube-VOS, MTTR on Video Swin-T, windows of 12 frames, 30 epochs: MTTR's recipe. Not run here.

    torchrun --nproc-per-node 4 -m vos.train refytvos_swint_dr2net
    Published (MTTR): J&F 55.32 on the server, which is gone. Not as there: as in a2d_swint.
    Predicted peak of a step, one window of 360 x 640: conventional 12.5 GiB, checkpointed 3.9, dr2net 1.17.
    """
    base = a2d_swint(method)
    return replace(
        base,
        data=REFYTVOS,
        optimization=replace(base.optimization, epochs=30, drops=(20 / 30,), global_batch=4),
        run=replace(base.run, micro_batch=1),
    )


ROWS = rows_of(referring_tiny, referring_small, a2d_swint, a2d_swint_w8, refytvos_swint)
