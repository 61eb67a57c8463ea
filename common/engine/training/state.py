"""Where a run stands: what it carries from step to step besides tensors, and how it is saved and found again."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from engine.config import Config
from engine.records.origin import Origin, refuse_other_origin
from engine.records.record import changes_of_run, refuse_other_recipe
from engine.settings import to_json
from engine.training import checkpoint
from engine.training.ema import EMA
from engine.training.optimization import restore_optimizer, restore_scaler
from engine.weights import load_tensors, whole

MAX_DURATIONS = 1000


@dataclass
class State:
    """Exactly what state.json holds of a run, besides its identity (row, seed, config)."""

    step: int = 0  # optimizer steps done
    alpha: float | None = None  # coefficients of the last step
    beta: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluated: int = 0  # the step of it
    curve: list[dict[str, float]] = field(default_factory=list)  # per epoch: losses, learning rate, metrics
    gradient_checks: list[dict[str, float]] = field(default_factory=list)  # per gradient check
    memory: dict[str, Any] | None = None  # of the step with the highest peak
    seconds: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "loading": 0.0, "evaluation": 0.0})
    durations: list[float] = field(default_factory=list)  # seconds of the last steps
    running: dict[str, float] = field(default_factory=dict)  # sums of losses since the epoch began
    running_steps: int = 0
    devices: list[str] = field(default_factory=list)  # on which it ran, in their order

    def add_losses(self, losses: dict[str, float]) -> None:
        """Count a step's mean losses towards the epoch's."""
        for name, value in losses.items():
            self.running[name] = self.running.get(name, 0.0) + value
        self.running_steps += 1

    def end_epoch(self, entry: dict[str, float], metrics: dict[str, float] | None) -> dict[str, float]:
        """Close the epoch with its mean losses (and metrics, if it was evaluated); returns its line of the curve."""
        entry = entry | {name: total / self.running_steps for name, total in self.running.items()}
        entry["loss"] = sum(self.running.values()) / self.running_steps
        if self.alpha is not None and self.beta is not None:
            entry |= {"alpha": self.alpha, "beta": self.beta}
        if metrics is not None:
            assert not entry.keys() & metrics.keys(), f"a metric is named as a loss: {[*entry, *metrics]}"
            self.metrics, self.evaluated = metrics, self.step
            entry |= metrics
        self.curve.append(entry)
        self.running, self.running_steps = {}, 0
        return entry

    def add_duration(self, seconds: float) -> None:
        """The time of one step; only the last ones are kept."""
        self.durations = [*self.durations[1 - MAX_DURATIONS :], seconds]


def save(
    folder: Path,
    config: Config,
    state: State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    accelerator: Accelerator,
    origin: Origin,
) -> None:
    """Write the run's checkpoint from the main process; every process waits for it."""
    tensors = full_tensors(model, optimizer)  # every process has a part in it where a model is sharded
    averages = None if ema is None else whole(ema.tensors)
    if accelerator.is_main_process:
        if averages is not None:
            tensors["ema"] = averages
        scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        identity = {"row": config.row, "seed": config.run.seed, "config": to_json(config), "origin": asdict(origin)}
        checkpoint.save(folder, tensors, {**asdict(state), "scaler": scaler, **identity})
    accelerator.wait_for_everyone()


def full_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Weights by name and the optimizer's state as `<parameter>/<slot>`, whole and on the CPU, sharded or not.

    Empty but on the main process, if there are several.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    moments: dict[str, Any] = dict(cast(Any, state).get("state", {}))
    slots = {f"{name}/{slot}": value for name, own in moments.items() for slot, value in own.items()}
    return {"model": cast(dict[str, Tensor], dict(weights)), "optimizer": slots}


def may_resume(folder: Path, config: Config, origin: Origin, last_step: int) -> str:
    """Whether to go on from the checkpoint: "" if so, else why its run, which has ended, is to be made anew.

    ValueError where neither would be right: another recipe, another origin in the middle of a run, or an end of the
    training before the checkpoint.
    """
    kept = checkpoint.read_state(folder)
    try:
        refuse_other_recipe(kept["config"], config, folder)
        earlier, step = kept.get("origin", {}), kept["step"]  # earlier versions kept no origin
        changes, elsewhere = origin.changes_since(earlier), changes_of_run(kept["config"], config)
        ends = [steps for steps in (earlier.get("total_steps"), kept["config"]["run"]["max_steps"]) if steps]
        ended = step >= min(ends, default=last_step)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not the checkpoint of a run ({type(error).__name__}: {error})") from error
    if (changes and ended) or (elsewhere and step == last_step):
        return "; ".join([*changes, *elsewhere])
    refuse_other_origin(changes, earlier, folder)
    if step > last_step or (step == last_step != kept["evaluated"]):
        raise ValueError(
            f"--run.max-steps {last_step}: the checkpoint in {folder} is at step {step} already; give more, or "
            "--run.no-resume to begin anew over it"
        )
    return ""


def resume(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    accelerator: Accelerator,
) -> State:
    """Put everything where the checkpoint left it. ValueError, naming the file, when it does not fit."""
    found = checkpoint.load(folder)
    missing = {"model", "optimizer", *(["ema"] if ema is not None else [])} - found.tensors.keys()
    if missing:
        raise ValueError(f"{folder}: the checkpoint holds no {' and no '.join(sorted(missing))}; train anew")
    load_tensors(model, found.tensors["model"], str(folder))
    restore_optimizer(model, optimizer, found.tensors["optimizer"], str(folder))
    if ema is not None:
        ema.restore(found.tensors["ema"], str(folder))
    if accelerator.scaler is not None:
        restore_scaler(accelerator.scaler, found.state.get("scaler"), str(folder))
    state = State(**{entry.name: found.state[entry.name] for entry in fields(State) if entry.name in found.state})
    for name, default in vars(State()).items():
        if default is not None and not isinstance(getattr(state, name), type(default)):
            raise ValueError(f"{folder}: not the checkpoint of a run ({name} is {getattr(state, name)!r})")
    return state
