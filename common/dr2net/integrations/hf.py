"""transformers' Trainer with Dr2Net in one line.

    Trainer(model, ..., callbacks=[dr2net.integrations.hf.Dr2Net(Schedule.constant(7 / 8, 1 / 8))])

The callback converts the model when the Trainer is built, before it is wrapped and has an optimizer (a model that
`model_init` makes later: when training begins; conversion is in place and keeps the parameters, so that is early
enough), sets the coefficients before each step, and puts them into every checkpoint. Not here: the loop, which stays
the Trainer's, and what a checkpoint says (`dr2net/description.py`).
"""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from dr2net.description import is_transformers
from dr2net.integrations.conversion import Conversion, switch_checkpointing_off
from dr2net.saving import (
    WEIGHTS,
    apply_description,
    names_in,
    read_description,
    saved_file,
    write_description,
    write_weights,
)
from dr2net.schedule import Schedule

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("transformers is not installed: pip install 'dr2net[models]'") from error


class Dr2Net(TrainerCallback):
    """Converts, moves alpha and beta, writes them into checkpoints, resumes.

    schedule: of the coefficients over the training, by optimizer steps done / all steps. options: of `dr2net.convert`,
    by name (`chunk_mib=256`); a model that was converted before keeps its own, and other ones here are a ValueError.

    Before training the model has the coefficients of its config, if it was saved by a converted model, else those of
    the schedule's start; after training, those of its last step, or of the best checkpoint where that is loaded.
    Resuming continues the schedule at the Trainer's step, and warns if the checkpoint was at others.
    """

    def __init__(self, schedule: Schedule | None = None, **options: Any) -> None:
        self.conversion = Conversion(schedule, options)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        """Before wrapping."""
        self._prepare(args, named["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        """For a model that came later, and to compare with the checkpoint that training resumes from."""
        model = named["model"]
        self._prepare(args, model)
        self._move(state, model)
        folder = _checkpoint(args, state)
        if state.global_step and (folder / saved_file(model)).is_file():
            saved = read_description(folder, saved_file(model)).sequences
            at = ((name, entry.coefficients) for name, entry in saved.items())
            self.conversion.compare(at, _progress(state, -1), str(folder))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        """Once per optimizer step, before its first batch."""
        self._move(state, named["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        """dr2net.json, or, where config.json says the same, weights by names from which the Trainer can resume."""
        model, folder = named["model"], _checkpoint(args, state)
        if not args.should_save:
            return
        if not folder.is_dir():
            warnings.warn(f"{folder} does not exist, so the coefficients were not written there", stacklevel=2)
        elif not is_transformers(model, "PreTrainedModel"):
            write_description(model, folder)
        elif not args.fsdp and not args.deepspeed:
            _keep_names(model, folder / WEIGHTS)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        """The best checkpoint's coefficients belong to its weights; `trainer.save_model()` writes into output_dir."""
        model = named["model"]
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            apply_description(model, Path(state.best_model_checkpoint))
        if args.should_save and not is_transformers(model, "PreTrainedModel"):
            write_description(model, Path(args.output_dir or "."))

    def _move(self, state: TrainerState, model: nn.Module) -> None:
        self.conversion.schedule.apply(model, _progress(state))

    def _prepare(self, args: TrainingArguments, model: nn.Module) -> None:
        """Before `convert`, which refuses gradient checkpointing."""
        asked = [name for name in ("gradient_checkpointing", "activation_checkpointing") if getattr(args, name, False)]
        for name in asked:
            setattr(args, name, False)
        switch_checkpointing_off(model, " and ".join(f"args.{name}" for name in asked))
        self.conversion.prepare(model)


def _progress(state: TrainerState, later: int = 0) -> float:
    """Steps done / all steps; `later` so many steps later."""
    return min(1.0, max(0, state.global_step + later) / max(1, state.max_steps))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _keep_names(model: nn.Module, path: Path) -> None:
    """Weights under the names they have in the model, if they are not.

    transformers 5 saves some models (ViT) under the names of older checkpoints, but its Trainer resumes, and loads the
    best checkpoint, without renaming (huggingface/transformers#43701): it logs that all keys are missing, and goes on
    with weights that were initialized anew. `from_pretrained` reads both.
    """
    if path.is_file() and not names_in(path) <= model.state_dict().keys():
        write_weights(model, path)
