"""The one training loop: `fit(config, model, criterion, loaders, evaluate) -> Record`.

    python -m action_recognition.train motion_tiny_dr2net                       # one process
    torchrun --nproc-per-node 4 -m action_recognition.train ssv2_vits_dr2net    # DDP, same recipe

Learning rate, alpha and beta are functions of progress = steps done / all steps; a step is `optimization.global_batch`
samples, split into devices x accumulation x `run.micro_batch`. At each step boundary, and only there, the engine sets
train/eval mode, coefficients, learning rate and the seeds of all random generators (from seed, step and process). So a
resumed run is bit for bit the uninterrupted one, whatever was evaluated, logged or saved in between.

Not here: what is learned (model, criterion), where batches come from (data), what is written (checkpoint, results,
log).
"""

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dr2net.memory import process_peak
from engine.data.loader import Loaders, Timed, key_batches, to_device
from engine.records.provenance import command_line, device_name
from engine.records.record import (
    Record,
    as_json,
    build_record,
    finished_record,
    refuse_other_recipe,
    run_folder,
    write_record,
)
from engine.training import checkpoint
from engine.training.devices import build_accelerator, mean_over_devices, set_seed
from engine.training.finetuning import (
    REVERSIBLE,
    apply_method,
    check_gradient,
    set_coefficients,
    set_mode,
)
from engine.training.log import Log
from engine.training.optimization import (
    Averages,
    build_optimizer,
    learning_rate,
    optimizer_tensors,
    refuse_in_backward,
    restore_optimizer,
    set_learning_rate,
    step_in_backward,
)
from engine.training.signals import stop_signals

Batch = dict[str, Any]
Criterion = Callable[[Any, Batch], dict[str, Tensor]]
Evaluate = Callable[[nn.Module, Iterable[Batch]], dict[str, float]]

NUM_WARMING_STEPS = 3  # first steps pay for allocation and kernel choice: not in the median time of a step
MAX_GUARD_SAMPLES = 2  # the gradient error is measured on so many samples


def accumulation_steps(global_batch: int, micro_batch: int, world: int) -> int:
    """Forward passes per optimizer step and device; ValueError when the batches do not divide."""
    if micro_batch < 1 or global_batch < 1:
        raise ValueError(f"global_batch {global_batch} and micro_batch {micro_batch} must be at least 1")
    if global_batch % (micro_batch * world):
        raise ValueError(
            f"optimization.global_batch {global_batch} is not a multiple of "
            f"run.micro_batch {micro_batch} x {world} devices; choose run.micro_batch to divide"
        )
    return global_batch // (micro_batch * world)


def fit(config: Any, model: nn.Module, criterion: Criterion, loaders: Loaders, evaluate: Evaluate) -> Record:
    """Train as `config` says and leave `<output>/<task>/<row>/seed<k>/{record.json, checkpoint/, tensorboard/}`.

    model(batch) -> outputs; model.backbone is what the method applies to; model.layer_of(name), model.num_layers serve
    layer decay. criterion(outputs, batch) -> named losses whose sum is minimised. evaluate(model, batches) -> metrics,
    the first being the one tables show; called without gradients on each device's share (see `data.gather`).

    A finished run (same config, same code) is returned as it is; an interrupted one is continued if `run.resume`.
    Raises ValueError for settings that do not fit, FloatingPointError for a non-finite loss (the last checkpoint
    stays), SystemExit(130) after Ctrl-C (143 after SIGTERM), when the step is finished and saved.
    """
    recipe, run, finetuning = config.optimization, config.run, config.finetuning
    accelerator = build_accelerator(run.device, recipe.precision)
    device, main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    folder = run_folder(config)
    if run.resume and (finished := finished_record(config)) is not None:
        accelerator.print(f"{config.row} seed {run.seed}: finished with this config and code, see {folder}")
        return finished

    accumulation = accumulation_steps(recipe.global_batch, run.micro_batch, world)
    if recipe.in_backward:
        refuse_in_backward(recipe, accumulation, world)
    steps_per_epoch = count_steps(loaders, recipe.global_batch, run.micro_batch)
    total_steps = max(round(recipe.epochs * steps_per_epoch), 1)
    last_step = min(total_steps, run.max_steps or total_steps)

    apply_method(model.backbone, finetuning)
    model.to(device)
    optimizer = build_optimizer(model, recipe)
    averages = Averages(model, recipe.ema_decay) if recipe.ema_decay else None
    # From here on model.forward runs under autocast and returns float32, called directly or through DDP.
    parallel, prepared = accelerator.prepare(model, optimizer)
    guarded = finetuning.method in REVERSIBLE and finetuning.guard_every_epochs > 0
    guard_batch = to_device(first_samples(loaders.train), device) if guarded else {}

    state = new_state()
    saved = folder / "checkpoint"
    if run.resume and checkpoint.exists(saved):
        state = resume(saved, config, model, optimizer, averages, accelerator)
    seconds, durations = state["seconds"], deque(state["durations"], maxlen=1000)
    # The second step is the first that finds an optimizer state. Moving coefficients: also where they end.
    moves = finetuning.method == "dr2net" and finetuning.path != "constant"
    measured_steps = {min(1, last_step - 1)} | ({last_step - 1} if moves else set())

    def training_step(micro_batches: Iterable[Batch]) -> dict[str, float]:
        """One optimizer step; returns this device's mean losses."""
        means: dict[str, float] = {}
        for index, batch in enumerate(micro_batches):
            # What is measured is what the step makes: let it make its input too, as `memory.predict` asks for.
            batch = to_device(batch, device, copy=state["step"] in measured_steps)
            with nullcontext() if index + 1 == accumulation else accelerator.no_sync(parallel):
                losses = criterion(parallel(batch), batch)
                numbers = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
                values = dict(zip(losses, numbers, strict=True))
                refuse_non_finite(values, state["step"] + 1, batch, saved)
                with step_in_backward(optimizer) if recipe.in_backward else nullcontext():
                    accelerator.backward(sum(losses.values()) / accumulation)
            for name, value in values.items():
                means[name] = means.get(name, 0.0) + value / accumulation
        if recipe.clip_norm:
            accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        prepared.step()  # finds no gradient where backward has made the steps
        prepared.zero_grad(set_to_none=True)
        return means

    def save() -> None:
        if main:
            tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
            if averages is not None:
                tensors["ema"] = averages.tensors
            scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
            position = {"epoch": state["step"] // steps_per_epoch, "step_in_epoch": state["step"] % steps_per_epoch}
            progress = {"progress": state["step"] / total_steps, "scaler": scaler, "durations": list(durations)}
            identity = {"row": config.row, "seed": run.seed, "config": as_json(config)}
            checkpoint.save(saved, tensors, {**state, **position, **progress, **identity})
        accelerator.wait_for_everyone()

    log = Log(
        folder,
        f"{config.row} seed {run.seed}",
        total=last_step,
        done=state["step"],
        samples=recipe.global_batch,
        every=run.log_every_steps,
        speak=main,
    )
    with log, stop_signals() as received:
        while state["step"] < last_step:
            epoch, first = divmod(state["step"], steps_per_epoch)
            last = min(steps_per_epoch, last_step - epoch * steps_per_epoch)
            if first == 0 and guarded and epoch % finetuning.guard_every_epochs == 0:
                set_seed(run.seed, 1 + state["step"], rank)  # the guard draws what the step to come will draw
                set_coefficients(model, finetuning, state, total_steps)
                state["guard"].append(check_gradient(model, criterion, guard_batch, finetuning, epoch, state, log))
            key_batches(loaders.train).place(
                epoch=epoch, rank=rank, world=world, first=first * accumulation, last=last * accumulation
            )
            source = Timed(iter(loaders.train))
            for _ in range(first, last):
                step = state["step"]
                set_seed(run.seed, 1 + step, rank)
                set_mode(model, finetuning)
                set_coefficients(model, finetuning, state, total_steps)
                rate = learning_rate(step / total_steps, recipe)
                set_learning_rate(optimizer, rate)

                started, loading = time.perf_counter(), source.seconds
                micro_batches: Iterable[Batch] = itertools.islice(source, accumulation)
                if step in measured_steps:
                    losses, memory = measure(training_step, list(micro_batches), model, optimizer)
                    state["memory"] = max((memory, state["memory"] or memory), key=lambda m: m["peak"])
                else:
                    losses = training_step(micro_batches)
                if averages is not None:
                    averages.update(step)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                loading = source.seconds - loading
                duration = time.perf_counter() - started - loading
                seconds["training"] += duration
                seconds["loading"] += loading
                if step >= NUM_WARMING_STEPS and step not in measured_steps:
                    durations.append(duration)

                state["step"] = step + 1
                losses, stop = mean_over_devices(losses, received, accelerator)
                for name, value in losses.items():
                    state["running"][name] = state["running"].get(name, 0.0) + value
                state["running_steps"] += 1
                log.step(state["step"], losses, rate, state["alpha"], state["beta"])

                done = state["step"] == last_step
                if state["step"] % steps_per_epoch == 0 or done:
                    entry = {"epoch": epoch + 1, "step": state["step"], "learning_rate": rate}
                    entry |= {name: total / state["running_steps"] for name, total in state["running"].items()}
                    entry["loss"] = sum(state["running"].values()) / state["running_steps"]
                    if finetuning.method == "dr2net":
                        entry |= {"alpha": state["alpha"], "beta": state["beta"]}
                    if done or (run.evaluate_every_epochs and (epoch + 1) % run.evaluate_every_epochs == 0):
                        started = time.perf_counter()
                        metrics = evaluate_now(model, evaluate, loaders, averages, accelerator, log)
                        seconds["evaluation"] += time.perf_counter() - started
                        assert not entry.keys() & metrics.keys(), f"a metric is named as a loss: {[*entry, *metrics]}"
                        state["metrics"] = metrics
                        entry |= metrics
                    state["curve"].append(entry)
                    state["running"], state["running_steps"] = {}, 0
                    log.epoch(epoch + 1, state["step"], entry)
                due = state["step"] % (run.save_every_steps or steps_per_epoch) == 0
                if due or done or stop:
                    save()
                if stop and not done:
                    log.note(
                        f"stopped after step {state['step']} of {total_steps}, saved in {saved}. "
                        f"To resume: {command_line()}"
                    )
                    raise SystemExit(128 + stop)

    step_seconds = statistics.median(durations or [seconds["training"] / max(state["step"], 1)])
    record = build_record(
        config,
        metrics=state["metrics"],
        memory={"source": "measured", **state["memory"], "process": process_peak()},
        seconds={"step": step_seconds, **seconds},
        device=device_name(device),
        guard=state["guard"],
        curve=state["curve"],
    )
    if main:
        write_record(record, folder)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(parallel, keep_fp32_wrapper=False)  # give the caller's forward back
    return record


def new_state() -> dict[str, Any]:
    """What a run carries from step to step besides tensors; exactly what `state.json` stores."""
    return {
        "step": 0,  # optimizer steps done
        "alpha": None,  # coefficients of the last step
        "beta": None,
        "metrics": {},  # of the last evaluation
        "curve": [],
        "guard": [],
        "memory": None,
        "seconds": {"training": 0.0, "loading": 0.0, "evaluation": 0.0},
        "durations": [],  # seconds of the last steps
        "running": {},  # sums of losses since the epoch began
        "running_steps": 0,
    }


def count_steps(loaders: Loaders, global_batch: int, micro_batch: int) -> int:
    """Optimizer steps per epoch; an incomplete last global batch is dropped. ValueError when not one is complete."""
    batches = key_batches(loaders.train)
    if batches.batch_size != micro_batch:
        raise ValueError(
            f"the training loader has batch size {batches.batch_size}, but run.micro_batch is {micro_batch}"
        )
    if batches.num_samples < global_batch:
        raise ValueError(
            f"{batches.num_samples} training samples do not fill one global batch of {global_batch}; "
            "lower optimization.global_batch"
        )
    return batches.num_samples // global_batch


def refuse_non_finite(losses: dict[str, float], step: int, batch: Batch, saved: Path) -> None:
    """FloatingPointError naming step, loss terms and samples when a loss is NaN or infinite."""
    if all(math.isfinite(value) for value in losses.values()):
        return
    terms = ", ".join(f"{name} = {value:g}" for name, value in losses.items())
    names = ", ".join(str(name) for name in batch["name"]) if "name" in batch else "not named by the batch"
    kept = f"the last good checkpoint is in {saved}" if checkpoint.exists(saved) else "no checkpoint was saved yet"
    raise FloatingPointError(f"the loss is not finite at step {step}: {terms}; samples: {names}; {kept}")


def measure(
    training_step: Callable[[Iterable[Batch]], dict[str, float]], batches: list[Batch], model: nn.Module, optimizer: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Run one training step and count its peak memory in bytes, split by what it is for."""
    from dr2net import memory

    losses: dict[str, float] = {}
    found = asdict(memory.measure(lambda: losses.update(training_step(batches)), model, optimizer))
    del found["live"]
    return losses, found


def first_samples(loader: DataLoader) -> Batch:
    """A fixed small training batch: the first samples of epoch 0, the same on every device and after every restart."""
    batches = key_batches(loader)
    batches.place(first=0, last=1)
    keys = next(iter(batches))[:MAX_GUARD_SAMPLES]
    return loader.collate_fn([loader.dataset[key] for key in keys])


@torch.no_grad()
def evaluate_now(
    model: nn.Module,
    evaluate: Evaluate,
    loaders: Loaders,
    averages: Averages | None,
    accelerator: Accelerator,
    log: Log,
) -> dict[str, float]:
    """Metrics of the current (averaged, if there are averages) weights; each device sees its share of the samples."""
    key_batches(loaders.val).place(rank=accelerator.process_index, world=accelerator.num_processes)
    model.eval()
    if averages is not None:
        averages.swap()
    try:
        batches = (to_device(batch, accelerator.device) for batch in log.track(loaders.val))
        return {name: float(value) for name, value in evaluate(model, batches).items()}
    finally:
        if averages is not None:
            averages.swap()


def resume(
    saved: Path,
    config: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Averages | None,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Put everything where the checkpoint left it and return its state. ValueError when it was made with another
    recipe.
    """
    found = checkpoint.load(saved)
    refuse_other_recipe(found.state["config"], config, saved)
    checkpoint.load_tensors(model, found.tensors["model"], str(saved))
    restore_optimizer(model, optimizer, found.tensors["optimizer"], str(saved))
    if averages is not None:
        averages.restore(found.tensors["ema"], str(saved))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(found.state["scaler"])
    accelerator.print(f"continuing from step {found.state['step']} of {saved}")
    return {name: found.state[name] for name in new_state()}
