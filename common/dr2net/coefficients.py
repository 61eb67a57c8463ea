"""alpha and beta of one sequence, and what saving, loading and copying does with them.

They are no tensors, so state_dict has no key for them; they travel in its metadata, which torch.save keeps and
safetensors does not. A copy of a model has the coefficients of the moment it was made. Where that may be wrong, a
warning says so, once, at the next pass. Not here: how they move (`schedule.py`).
"""

import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Optional

KEY = "dr2net.coefficients"  # in the metadata of a state_dict


@dataclass
class Coefficients:
    """Where one sequence stands."""

    alpha: float = 1.0
    beta: float | Fraction = 0.0
    chosen: bool = False  # by `dr2net.set_coefficients`, not by a file
    origin: Optional["Coefficients"] = None  # of the sequence this one is a copy of, until they are chosen here
    doubt: str = ""  # a warning for the next pass
    fixed: bool = False  # at (1, 0) for good, of blocks that are checkpointed and of every copy of them

    @property
    def settled(self) -> bool:
        """A file does not move them."""
        return self.chosen or self.fixed

    def choose(self, alpha: float, beta: float | Fraction) -> None:
        self.alpha, self.beta, self.chosen, self.origin, self.doubt = alpha, beta, True, None, ""

    def take(self, alpha: float, beta: float | Fraction) -> None:
        """Those of the weights, from a file."""
        self.alpha, self.beta, self.origin, self.doubt = alpha, beta, None, ""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Coefficients":
        return Coefficients(self.alpha, self.beta, origin=self.origin or self, doubt=self.doubt, fixed=self.fixed)

    def save(self) -> dict[str, Any]:
        """Numbers only, for `torch.load(weights_only=True)`."""
        beta = self.beta.as_integer_ratio() if isinstance(self.beta, Fraction) else float(self.beta)
        return {"alpha": float(self.alpha), "beta": beta}

    def load(self, metadata: dict[str, Any], name: str) -> None:
        """Take what the weights that are being loaded were saved with, unless others were chosen here.

        metadata: of the sequence's own entry in a state_dict; empty if the file has lost it.
        """
        saved = metadata.get(KEY)
        if saved is None:
            if not self.settled and "version" not in metadata:  # with a version it is a plain model's: (1, 0) is right
                self.doubt = (
                    f"{name} runs at (alpha, beta) = (1, 0), the plain network, with weights from a file that does not "
                    "say at which coefficients they were trained; load with dr2net.restore(model, folder) what "
                    "dr2net.save wrote, or call dr2net.set_coefficients(model, alpha, beta) with those of the end of "
                    "their training, (1, 0) for weights that were not trained reversibly"
                )
            return
        alpha, beta = saved["alpha"], saved["beta"]
        beta = beta if isinstance(beta, float) else Fraction(*beta)
        if not self.settled:
            self.take(alpha, beta)
        elif (alpha, beta) != (self.alpha, self.beta):
            self.doubt = (
                f"{name} runs at (alpha, beta) = {self}, as was set here, with weights that were saved at "
                f"({alpha:.4g}, {float(beta):.4g}); call dr2net.set_coefficients or Schedule.apply after loading"
            )

    def say_doubts(self, name: str) -> None:
        """At the begin of a pass."""
        origin = self.origin
        if origin is not None and (origin.alpha, origin.beta) != (self.alpha, self.beta):
            self.origin = None
            self.doubt = self.doubt or (
                f"{name} runs at (alpha, beta) = {self}: it is a copy, and the model it was copied from has moved to "
                f"{origin} since. Right for a snapshot; for a running average of the weights (EMA), set the "
                "coefficients of the copy too: dr2net.set_coefficients(copy, alpha, beta) or "
                "schedule.apply(copy, progress)"
            )
        if self.doubt:
            doubt, self.doubt = self.doubt, ""
            warnings.warn(doubt, stacklevel=2)

    def __str__(self) -> str:
        return f"({float(self.alpha):.4g}, {float(self.beta):.4g})"
