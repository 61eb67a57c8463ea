"""alpha and beta as a pure function of training progress in [0, 1]: "dynamic finetuning" (Dr2Net, Sec. 3).

    Schedule(start=(1, .1), end=(.4, .7), until=.6)    the authors' values for S3DIS, linear, then constant
    Schedule.constant(7 / 8, 1 / 8)                    stay near the pretrained network: our default (common/README.md)
    Schedule.constant(0, 1)                            hard reversible: Re2TAL's rewired network

start and end with alpha + beta = 1 stay on that line when both move together. Nothing is remembered between calls, so a
resumed run continues where it stopped. Not here: the learning rate (`training/optimization.py`).
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from dr2net.convert import set_coefficients

MAX_COEFFICIENT = 1e6  # sensible ones are about 1; float32 ends at 1e38
Path = Literal["together", "alternating", "alpha_first", "beta_first"]


@dataclass(frozen=True)
class Schedule:
    """(alpha, beta) moves linearly from `start` to `end` over the progress [0, until] and then rests.

    path: "together"; "alternating": in `stages` steps each, alpha and beta in turn, alpha before beta (the authors'
    code); "alpha_first" and "beta_first": one moves in the first half of the way, the other in the second. Raises
    ValueError for an unknown path, until outside [0, 1], stages < 1, coefficients that are not finite or are huge.
    """

    start: tuple[float, float] = (7 / 8, 1 / 8)
    end: tuple[float, float] = (7 / 8, 1 / 8)
    until: float = 0.6
    path: Path = "together"
    stages: int = 20

    def __post_init__(self) -> None:
        if self.path not in get_args(Path):
            raise ValueError(f"path must be one of {get_args(Path)}, not {self.path!r}")
        if not all(abs(value) < MAX_COEFFICIENT for value in (*self.start, *self.end)):  # so also for NaN
            raise ValueError(f"start = {self.start} and end = {self.end} must be numbers below {MAX_COEFFICIENT:g}")
        if not 0 <= self.until <= 1 or self.stages < 1:
            raise ValueError(f"until = {self.until} must lie in [0, 1] and stages = {self.stages} be at least 1")

    @classmethod
    def constant(cls, alpha: float, beta: float) -> "Schedule":
        """The same coefficients throughout."""
        return cls(start=(alpha, beta), end=(alpha, beta))

    def at(self, progress: float) -> tuple[float, float]:
        """(alpha, beta) at `progress` in [0, 1] (ValueError outside)."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress = {progress} must lie in [0, 1]")
        way = 1.0 if progress >= self.until else progress / self.until
        moved = {
            "together": (way, way),
            "alternating": tuple((int(way * 2 * self.stages) + lead) // 2 / self.stages for lead in (1, 0)),
            "alpha_first": (min(1.0, 2 * way), max(0.0, 2 * way - 1)),
            "beta_first": (max(0.0, 2 * way - 1), min(1.0, 2 * way)),
        }[self.path]
        alpha, beta = (a + (b - a) * min(1.0, m) for a, b, m in zip(self.start, self.end, moved, strict=True))
        return alpha, beta

    def apply(self, model: nn.Module, progress: float) -> tuple[float, float]:
        """Set the coefficients of a converted model; call it at step boundaries. Returns them."""
        alpha, beta = self.at(progress)
        set_coefficients(model, alpha, beta)
        return alpha, beta
