"""What every callback does to a model before it trains: convert it, once, and switch off what stands in the way.

Not here: when that is, and what is saved (`hf.py`, `lightning.py`).
"""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from dr2net.convert import convert, sequences
from dr2net.description import OPTIONS, recorded
from dr2net.options import Options
from dr2net.patches import own_checkpointing
from dr2net.schedule import Schedule
from dr2net.sequence import ReversibleSequence


class Conversion:
    """The options that a callback was made with, by name, and its schedule."""

    def __init__(self, schedule: Schedule | None, named: dict[str, Any]) -> None:
        self.schedule = schedule or Schedule()
        self.named = named
        self.options = replace(Options(), **named)

    def prepare(self, model: nn.Module) -> None:
        """Convert `model` unless it is; its coefficients are those of its config, or of the schedule's start.

        A model that was converted before keeps its options and coefficients; ValueError if others were named here.
        """
        if not any(isinstance(module, ReversibleSequence) for module in model.modules()):
            known = recorded(model)
            convert(model, self.options)
            if known is None:
                self.schedule.apply(model, 0.0)
        for sequence in (found := sequences(model)):
            for name in self.named.keys() & {*OPTIONS} - {"keep"}:
                self._refuse_other(name, getattr(sequence, name), getattr(self.options, name))
            _warn_of_wrapped_blocks(sequence)
        if "keep" in self.named:  # which `convert` deals out
            branches = sum(sequence.num_branches() for sequence in found)
            self._refuse_other("keep", sum(sequence.keep for sequence in found), min(branches, self.options.keep))

    def _refuse_other(self, name: str, own: Any, here: Any) -> None:
        if own != here:
            raise ValueError(
                f"the model was converted with {name}={own} before, and Dr2Net(...) has {name}={here}; say it in one "
                "of the two places"
            )

    def compare(self, saved: Iterable[tuple[str, Any]], progress: float, where: str) -> None:
        """Warn if the coefficients that were saved by name are not the schedule's at that progress."""
        alpha, beta = self.schedule.at(progress)
        for name, at in saved:
            if (at.alpha, at.beta) != (alpha, beta):
                warnings.warn(
                    f"{where} was saved with {name} at (alpha, beta) = {at}, where this schedule has ({alpha:.4g}, "
                    f"{float(beta):.4g}) and goes on: it or the number of steps is another than before",
                    stacklevel=3,
                )


def switch_checkpointing_off(model: nn.Module, asked: str = "") -> None:
    """With a warning: a reversible block keeps nothing that it could save, and would run twice. asked: who wants it."""
    on = [(module, name) for module in model.modules() if (name := own_checkpointing(module))]
    for module, name in on:
        setattr(module, name, False)
    if asked or on:
        warnings.warn(
            f"{asked or f'gradient checkpointing of the model ({on[0][1]}=True)'} was switched off: the blocks are "
            "reversible, and keep nothing that it could save; what stands around them is checkpointed by "
            "Dr2Net(..., recompute_rest=True)",
            stacklevel=4,
        )


def _warn_of_wrapped_blocks(sequence: ReversibleSequence) -> None:
    for name, block in sequence.named_children():
        if type(block).__module__.split(".")[0] == "peft":
            warnings.warn(
                f"{sequence.place}.{name} is wrapped as a whole by peft ({type(block).__name__}), which ends the "
                "reversible run before it and begins another after it; name modules inside the block in "
                "modules_to_save or target_modules, not the block",
                stacklevel=5,
            )
