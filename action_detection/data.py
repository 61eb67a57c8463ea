"""Untrimmed videos in their official layouts, cut into windows; the loaders of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Data:
    """The data set and how its videos become windows of frames. The defaults change nothing at random."""

    kind: Literal["activitynet", "thumos"] = "activitynet"  # the layout, see `read_annotations`
    root: Path = Path("data/untrimmed")
    num_classes: int = 10  # must be what the annotation file has
    train_subset: str = "training"
    test_subset: str = "validation"
    num_steps: int = 48  # N, the feature grid of a window
    frames_per_step: int = 2  # T = num_steps * frames_per_step frames are decoded
    image_size: int = 56  # H = W
    windows: Literal["whole", "sliding"] = "sliding"  # a window is the whole video, or a piece of it at `fps`
    fps: float = 6.0  # sliding: frames per second that the network sees
    overlap: float = 0.25  # sliding: share of a window that the next one repeats, in the test
    min_overlap: float = 0.75  # training: an instance of which less is inside the window (share of its length) is ignored
    crop_scale: tuple[float, float] = (1.0, 1.0)  # training: share of the area kept by the window's random crop
    flip: bool = False  # mirror half of the windows; never where "left" and "right" are classes
    color_jitter: float = 0.0  # brightness, contrast, saturation in 1 +- this
    num_videos: int = 0  # use only the first so many of each subset, for quick tries; 0: all
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the pretrained weights, for values in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    cache_gib: float = 0.0  # decoded videos kept in memory, per split and worker; helps small sets
    on_broken: Literal["raise", "skip"] = "raise"  # an unreadable file: stop, or name it and take another

    @property
    def num_frames(self) -> int:
        """T of a window."""
        return self.num_steps * self.frames_per_step
