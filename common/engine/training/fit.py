"""The one training loop: `fit(config, model, loaders, evaluate) -> Record`.

    python -m action_recognition.train motion_tiny_dr2net                       # one process
    torchrun --nproc-per-node 4 -m action_recognition.train ssv2_vits_dr2net    # DDP, same recipe

Learning rate, alpha and beta are functions of progress = steps done / all steps; a step is `optimization.global_batch`
samples, split into devices x accumulation x `run.micro_batch`. At each step boundary, and only there, the engine sets
train/eval mode, coefficients, learning rate and the seeds of all random generators (from seed, step and process). So a
resumed run is bit for bit the uninterrupted one, whatever was evaluated, logged or saved in between.

Not here: what is learned (model), where batches come from (data), the step itself (`step.py`), what a run carries
(`state.py`), what is written (`checkpoint.py`, records, `log.py`).
"""

import statistics
import time
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator

from dr2net.memory import process_peak
from engine.config import Config, Split
from engine.data.loader import Loaders, build_loader, key_batches, steps_of, to_device
from engine.records.origin import origin_of
from engine.records.provenance import command_line, device_name
from engine.records.record import Record, build_record, finished_record, run_folder, write_record
from engine.task import Batch, DataFile, EvaluateFile, KeyedDataset, Model
from engine.training import checkpoint
from engine.training.devices import build_accelerator, mean_over_devices, set_seed
from engine.training.ema import EMA
from engine.training.evaluation import collect_rows, score_once
from engine.training.finetuning import apply_method, check_gradient, coefficients, inverts, set_coefficients, set_mode
from engine.training.lock import locked
from engine.training.log import Log, say
from engine.training.optimization import build_optimizer, learning_rate, refuse_in_backward, set_learning_rate
from engine.training.signals import stop_signals
from engine.training.state import State, may_resume, resume, save
from engine.training.step import Step, accumulation_steps

NUM_WARMING_STEPS = 3  # first steps pay for allocation and kernel choice: not in the median time of a step
NUM_CHECKED_SAMPLES = 2  # the gradient error is measured on so many samples


def build_loaders(config: Any, data: DataFile[Any]) -> Loaders:
    """The training and validation samples of a task's data.py. Errors as `build_dataset`."""
    run = config.run
    shared: dict[str, Any] = {"seed": run.seed, "num_workers": run.num_workers, "collate": data.collate}
    sizes: dict[Split, int] = {"train": run.micro_batch, "val": run.evaluation_batch or run.micro_batch}
    train, val = (
        build_loader(data.build_dataset(config, split), batch_size=size, train=split == "train", **shared)
        for split, size in sizes.items()
    )
    return Loaders(train, val)


def fit(config: Config, model: Model, loaders: Loaders, evaluate: EvaluateFile[Any]) -> Record:
    """Train as `config` says and leave `<output>/<task>/<row>/seed<k>/{record.json, checkpoint/, tensorboard/}`.

    A finished run (same config, code, data and weights) is returned as it is; an interrupted one is continued if
    `run.resume`; one that ended under another origin (`records/origin.py`) is made anew.
    Raises ValueError for settings that do not fit, for another origin in the middle of a run and for a folder in which
    another process trains, FloatingPointError for a non-finite loss (the last checkpoint stays), SystemExit(130) after
    Ctrl-C (143 after SIGTERM), when the step is finished and saved.
    """
    accelerator = build_accelerator(config.run.device, config.optimization.precision)
    with locked(run_folder(config)) if accelerator.is_main_process else nullcontext():
        return _fit(config, model, loaders, evaluate, accelerator)


def _fit(
    config: Config, model: Model, loaders: Loaders, evaluate: EvaluateFile[Any], accelerator: Accelerator
) -> Record:
    recipe, run, finetuning = config.optimization, config.run, config.finetuning
    device, main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    title, folder = f"{config.row} seed {run.seed}", run_folder(config)

    # How many forwards make a step, and how many steps the training.
    accumulation = accumulation_steps(recipe.global_batch, run.micro_batch, world)
    if recipe.in_backward:
        refuse_in_backward(recipe, accumulation, world)
    steps_per_epoch = count_steps(loaders, recipe.global_batch, run.micro_batch)
    total_steps = max(round(recipe.epochs * steps_per_epoch), 1)
    last_step = min(total_steps, run.max_steps or total_steps)

    # Is there a run already, and may this one go on from it?
    datasets = {name: cast(KeyedDataset, getattr(loaders, name).dataset) for name in ("train", "val")}
    origin = origin_of(config, datasets, model.backbone, total_steps)
    saved = folder / "checkpoint"
    resumes = run.resume and checkpoint.exists(saved)
    if run.resume and (finished := finished_record(config, origin.inputs)) is not None:
        say(f"{title}: finished with this config and code, see {folder}", main)
        return finished
    if resumes and (why := may_resume(saved, config, origin, last_step)):
        say(f"{title}: the finished run in {folder} is not what this command gives ({why}): training anew", main)
        resumes = False
    if main:
        checkpoint.delete_unnamed(saved)

    # What the evaluation lacks is to be known before the training, not after it.
    truth = evaluate.read_truth(config)

    # The network, as the method wants it. From `prepare` on, its forward runs under autocast and returns float32,
    # called directly or through DDP.
    apply_method(model, finetuning)
    model.to(device)
    optimizer = build_optimizer(model, recipe)
    ema = EMA(model, recipe.ema_decay) if recipe.ema_decay else None
    parallel, prepared = accelerator.prepare(model, optimizer)
    check_every = finetuning.check_every_epochs if inverts(finetuning) else None
    check_batch = to_device(first_samples(loaders), device) if check_every else {}

    # Where the run stands.
    state = resume(saved, model, optimizer, ema, accelerator) if resumes else State()
    if resumes:
        say(f"continuing from step {state.step} of {saved}", main)
    here = device_name(device, world)
    if here not in state.devices:
        state.devices.append(here)
    step = Step(config, model, parallel, optimizer, prepared, accelerator, accumulation, saved)
    # Memory is measured at the second step, the first that finds an optimizer state; if coefficients move, also where
    # they end.
    measured = {min(1, last_step - 1)}
    if coefficients(finetuning, 0.0) != coefficients(finetuning, 1.0):
        measured.add(last_step - 1)

    log = Log(
        folder,
        title,
        total=last_step,
        done=state.step,
        samples=recipe.global_batch,
        every=run.log_every_steps,
        speak=main,
        tracker=run.tracker,
    )
    with log, stop_signals() as received:
        for number, batches in steps_of(
            loaders.train, state.step, last_step, steps_per_epoch, accumulation, rank, world
        ):
            epoch, in_epoch = divmod(number, steps_per_epoch)
            # Before an epoch, on fixed samples and with the draws of the step to come: is the gradient right?
            if check_every and in_epoch == 0 and epoch % check_every == 0:
                set_seed(run.seed, 1 + number, rank)
                state.alpha, state.beta = set_coefficients(model, finetuning, number / total_steps)
                state.gradient_checks.append(check_gradient(model, check_batch, finetuning, epoch, state, log))

            # The boundary of a step: all that a step depends on is set here.
            set_seed(run.seed, 1 + number, rank)
            set_mode(model, finetuning)
            state.alpha, state.beta = set_coefficients(model, finetuning, number / total_steps)
            rate = learning_rate(number / total_steps, recipe)
            set_learning_rate(optimizer, rate)

            # The step, and how long it took without the wait for its samples.
            started, waited = time.perf_counter(), batches.seconds
            if number in measured:
                losses, memory = step.measure(batches, number)
                state.memory = max((memory, state.memory or memory), key=lambda m: m["peak"])
            else:
                losses = step(batches, number)
            if ema is not None:
                ema.update(number)
            if device.type == "cuda":
                torch.cuda.synchronize()
            waited = batches.seconds - waited
            duration = time.perf_counter() - started - waited
            state.seconds["training"] += duration
            state.seconds["loading"] += waited
            if number >= NUM_WARMING_STEPS and number not in measured:
                state.add_duration(duration)

            # What is told and counted of it.
            state.step = number + 1
            losses, stop = mean_over_devices(losses, received, accelerator)
            state.add_losses(losses)
            log.step(state.step, losses, rate, state.alpha, state.beta)

            # The end of an epoch: evaluation, and a line of the curve.
            done, ended = state.step == last_step, state.step % steps_per_epoch == 0
            if ended or done:
                metrics = None
                if done or (run.evaluate_every_epochs and (epoch + 1) % run.evaluate_every_epochs == 0):
                    started = time.perf_counter()
                    if ema is not None:
                        ema.swap()
                    try:
                        rows = collect_rows(config, model, loaders.val, evaluate, accelerator, log.track)
                        metrics = score_once(config, rows, truth, evaluate)
                    finally:
                        if ema is not None:
                            ema.swap()
                    state.seconds["evaluation"] += time.perf_counter() - started
                entry = {"epoch": epoch + 1, "step": state.step, "learning_rate": rate}
                log.epoch(epoch + 1, state.step, state.end_epoch(entry, metrics))

            # The checkpoint, and the end if somebody asked for it.
            if state.step % (run.save_every_steps or steps_per_epoch) == 0 or done or stop:
                save(saved, config, state, model, optimizer, ema, accelerator, origin)
            if stop and not done:
                log.note(f"stopped after step {state.step} of {total_steps}, saved in {saved}.")
                log.note(f"To resume: {command_line()}")
                raise SystemExit(128 + stop)

    assert state.memory is not None, "no step was measured"
    step_seconds = statistics.median(state.durations or [state.seconds["training"] / max(state.step, 1)])
    record = build_record(
        config,
        metrics=state.metrics,
        memory={"source": "measured", **state.memory, "process": process_peak()},
        seconds={"step": step_seconds, **state.seconds},
        device=", then ".join(state.devices),
        gradient_checks=state.gradient_checks,
        curve=state.curve,
        inputs=origin.inputs,
    )
    if main:
        write_record(record, folder)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(parallel, keep_fp32_wrapper=False)  # give the caller's forward back
    return record


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


def first_samples(loaders: Loaders) -> Batch:
    """A fixed small training batch: the first samples of epoch 0, the same on every device and after every restart."""
    loader, batches = loaders.train, key_batches(loaders.train)
    batches.place(first=0, last=1)
    keys = next(iter(batches))[:NUM_CHECKED_SAMPLES]
    return loader.collate_fn([loader.dataset[key] for key in keys])
