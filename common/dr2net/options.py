"""How a model is made reversible: one dataclass for `convert`, the sequences, the planner and configurations."""

from dataclasses import dataclass
from typing import Literal, get_args

from dr2net.error_law import TOLERANCE

Inversion = Literal["exact", "anchored", "float"]


@dataclass(frozen=True)
class Options:
    """Everything about a conversion but the coefficients. None is off. ValueError for values that make no sense."""

    inversion: Inversion = "exact"  # how activations come back, see `dr2net.reversible`
    anchor_every: int | None = None  # "anchored": keep both streams every so many branches; None: from `tolerance`
    tolerance: float = TOLERANCE  # relative gradient error above which "float" warns and below which "anchored" stays
    store: bool = False  # keep all activations: the reference; no memory is saved
    # The dial between memory and time: the last so many branches of the model keep what they compute, as in the plain
    # network, and are not run again; streams are rebuilt below them. `dr2net.plan_budget` chooses it.
    keep: int = 0
    # Run and differentiate branches in chunks of about so many MiB (`chunks.py`), torchvision's window attention fused.
    # None: each as a whole, by the model's own code to the last bit. 256 with `recompute_rest` is the setting for
    # hierarchical networks and long inputs.
    chunk_mib: float | None = None
    # Checkpoint what is not reversible (patch embedding and merging, norms, blocks that change the shape), except
    # modules with buffers other than batch norm's.
    recompute_rest: bool = False

    def __post_init__(self) -> None:
        if self.inversion not in get_args(Inversion):
            raise ValueError(f"inversion must be one of {get_args(Inversion)}, not {self.inversion!r}")
        if self.anchor_every is not None and (self.inversion != "anchored" or self.anchor_every < 1):
            raise ValueError(f"anchor_every={self.anchor_every} needs inversion='anchored' and a value of at least 1")
        if not isinstance(self.keep, int) or self.keep < 0:
            raise ValueError(f"keep={self.keep} must be a number of branches, 0 or more")
        if not 0 < self.tolerance < float("inf"):
            raise ValueError(f"tolerance={self.tolerance} must be a positive number, such as 0.001")
        if self.chunk_mib is not None and not 0 < self.chunk_mib < float("inf"):
            raise ValueError(f"chunk_mib={self.chunk_mib} must be a positive number of MiB, or None for whole branches")
