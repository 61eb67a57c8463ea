"""Lightning's Trainer with Dr2Net in one line.

    Trainer(..., callbacks=[dr2net.integrations.lightning.Dr2Net(Schedule.constant(7 / 8, 1 / 8))])

The callback converts what is in the LightningModule before the strategy wraps it, sets the coefficients before each
step, and puts them into every checkpoint, entry "dr2net". Both packages are known, `lightning` and `pytorch-lightning`.
Not here: the loop, which stays Lightning's, and what a checkpoint says (`dr2net/description.py`).
"""

import importlib
import sys
import warnings
from typing import Any

from dr2net.description import KEY, Description
from dr2net.integrations.conversion import Conversion, switch_checkpointing_off
from dr2net.schedule import Schedule
from dr2net.sequence import ReversibleSequence

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _lightning() -> Any:
    """The package that the program has read already, else the one that is installed."""
    for name in sorted(PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise ImportError("Lightning is not installed: pip install 'dr2net[lightning]'")


Base: Any = _lightning().Callback


class Dr2Net(Base):
    """Converts, moves alpha and beta, writes them into checkpoints, resumes.

    schedule: of the coefficients over the training, by optimizer steps done / all steps (of each optimizer, if there
    are several). options: of `dr2net.convert`, by name (`chunk_mib=256`); a model that was converted before keeps its
    own, and other ones here are a ValueError.

    `trainer.test(model, ckpt_path=...)`, and validate and predict, run at the checkpoint's coefficients. Without a path
    they run at those that the model has; if that was not converted yet, at the schedule's start, and a warning says so
    where the schedule moves. `LightningModule.load_from_checkpoint` reads weights alone.
    """

    def __init__(self, schedule: Schedule | None = None, **options: Any) -> None:
        self.conversion = Conversion(schedule, options)
        self.loaded: Description | None = None
        self.guessed = False  # coefficients of a model that may have been trained at others

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before wrapping. A model that `configure_model` makes is converted after it."""
        self.loaded = None
        if type(pl_module).configure_model is _lightning().LightningModule.configure_model:
            self._prepare(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The coefficients of the weights that were loaded. ValueError if they are of other sequences."""
        self._prepare(pl_module)
        if KEY not in checkpoint:
            return  # of the plain model
        self.loaded = Description.from_json(checkpoint[KEY], f"the checkpoint's entry {KEY!r}")
        own = {name: module for name, module in pl_module.named_modules() if isinstance(module, ReversibleSequence)}
        found = self.loaded.found_in(own)
        if not len(found) == len(own) == len(self.loaded.sequences):
            raise ValueError(
                f"the checkpoint was saved with the reversible sequences {', '.join(self.loaded.sequences)}, the model "
                f"has {', '.join(own)}, or as many branches as then in not all of them"
            )
        for name, described in found.items():
            own[name].set_coefficients(described.coefficients.alpha, described.coefficients.beta)
        self.guessed = False

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Numbers and words, for `torch.load(weights_only=True)`."""
        checkpoint[KEY] = Description.of(pl_module).to_json()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """For a model that came later. ValueError if the schedule moves and the training has no end."""
        self._prepare(pl_module)
        schedule = self.conversion.schedule
        if schedule.start != schedule.end and trainer.max_steps < 0 and (trainer.max_epochs or 0) < 0:
            raise ValueError(
                "the schedule moves over the training, which has no end: set max_steps or max_epochs, or take "
                "Schedule.constant(alpha, beta)"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Compares with the checkpoint that training resumes from."""
        if self.loaded is not None and trainer.global_step:
            saved = ((name, entry.coefficients) for name, entry in self.loaded.sequences.items())
            self.conversion.compare(saved, _progress(trainer, -1), f"the checkpoint {trainer.ckpt_path or ''}".strip())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The same for all batches that are accumulated in one step."""
        self.conversion.schedule.apply(pl_module, _progress(trainer))
        self.guessed = False

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Also before training, where the schedule's start is meant."""
        self._prepare(pl_module)
        self._say_guess(trainer)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """See the class."""
        self._prepare(pl_module)
        self._say_guess(trainer)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """See the class."""
        self._prepare(pl_module)
        self._say_guess(trainer)

    def _prepare(self, pl_module: Any) -> None:
        plain = not any(isinstance(module, ReversibleSequence) for module in pl_module.modules())
        switch_checkpointing_off(pl_module)
        self.conversion.prepare(pl_module)
        if plain:
            at = {(m.alpha, m.beta) for m in pl_module.modules() if isinstance(m, ReversibleSequence)}
            self.guessed = at == {self.conversion.schedule.at(0.0)}

    def _say_guess(self, trainer: Any) -> None:
        schedule = self.conversion.schedule
        if self.guessed and schedule.start != schedule.end and trainer.state.fn != "fit":
            self.guessed = False
            warnings.warn(
                f"the model runs at (alpha, beta) = {schedule.start}, where the schedule starts; if its weights were "
                "trained, give their checkpoint, ckpt_path=..., which has their coefficients, or set them: "
                "dr2net.convert(model), dr2net.set_coefficients(model, alpha, beta)",
                stacklevel=2,
            )


def _progress(trainer: Any, later: int = 0) -> float:
    """Optimizer steps done / all steps; `later` so many steps later."""
    optimizers = max(1, len(trainer.optimizers))
    done = trainer.global_step / optimizers + later
    return min(1.0, max(0.0, done) / max(1, trainer.estimated_stepping_batches))
