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
from typing import Any

import torch

from dr2net.memory import process_peak
from engine.config import Config
from engine.data.loader import Loaders, build_loader, key_batches, steps_of, to_device
from engine.records.provenance import command_line, device_name
from engine.records.record import Record, build_record, finished_record, run_folder, write_record
from engine.task import Batch, DataFile, EvaluateFile, Model
from engine.training import checkpoint
from engine.training.devices import build_accelerator, mean_over_devices, set_seed
from engine.training.ema import EMA
from engine.training.evaluation import collect_rows, score_once
from engine.training.finetuning import apply_method, check_gradient, coefficients, inverts, set_coefficients, set_mode
from engine.training.log import Log
from engine.training.optimization import build_optimizer, learning_rate, refuse_in_backward, set_learning_rate
from engine.training.signals import stop_signals
from engine.training.state import State, resume, save
from engine.training.step import Step, accumulation_steps

NUM_WARMING_STEPS = 3  # first steps pay for allocation and kernel choice: not in the median time of a step
NUM_CHECKED_SAMPLES = 2  # the gradient error is measured on so many samples


def build_loaders(config: Any, data: DataFile[Any]) -> Loaders:
    """The training and validation samples of a task's data.py. Errors as `build_dataset`."""
    run = config.run
    shared = {"seed": run.seed, "num_workers": run.num_workers, "collate": data.collate}
    sizes = {"train": run.micro_batch, "val": run.evaluation_batch or run.micro_batch}
    train, val = (
        build_loader(data.build_dataset(config, split), batch_size=size, train=split == "train", **shared)
        for split, size in sizes.items()
    )
    return Loaders(train, val)


def fit(config: Config, model: Model, loaders: Loaders, evaluate: EvaluateFile[Any]) -> Record:
    """Train as `config` says and leave `<output>/<task>/<row>/seed<k>/{record.json, checkpoint/, tensorboard/}`.

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

    # How many forwards make a step, and how many steps the training.
    accumulation = accumulation_steps(recipe.global_batch, run.micro_batch, world)
    if recipe.in_backward:
        refuse_in_backward(recipe, accumulation, world)
    steps_per_epoch = count_steps(loaders, recipe.global_batch, run.micro_batch)
    total_steps = max(round(recipe.epochs * steps_per_epoch), 1)
    last_step = min(total_steps, run.max_steps or total_steps)

    # What the evaluation lacks is to be known before the training, not after it.
    truth = evaluate.read_truth(config)

    # The network, as the method wants it. From `prepare` on, its forward runs under autocast and returns float32,
    # called directly or through DDP.
    apply_method(model, finetuning)
    model.to(device)
    optimizer = build_optimizer(model, recipe)
    ema = EMA(model, recipe.ema_decay) if recipe.ema_decay else None
    parallel, prepared = accelerator.prepare(model, optimizer)
    checked = inverts(finetuning) and finetuning.check_every_epochs is not None
    check_batch = to_device(first_samples(loaders), device) if checked else {}

    # Where the run stands.
    state, saved = State(), folder / "checkpoint"
    if run.resume and checkpoint.exists(saved):
        state = resume(saved, config, model, optimizer, ema, accelerator)
    step = Step(config, model, parallel, optimizer, prepared, accelerator, accumulation, saved)
    # Memory is measured at the second step, the first that finds an optimizer state; if coefficients move, also where
    # they end.
    measured = {min(1, last_step - 1)}
    if coefficients(finetuning, 0.0) != coefficients(finetuning, 1.0):
        measured.add(last_step - 1)

    title = f"{config.row} seed {run.seed}"
    log = Log(
        folder,
        title,
        total=last_step,
        done=state.step,
        samples=recipe.global_batch,
        every=run.log_every_steps,
        speak=main,
    )
    with log, stop_signals() as received:
        for number, batches in steps_of(
            loaders.train, state.step, last_step, steps_per_epoch, accumulation, rank, world
        ):
            epoch, in_epoch = divmod(number, steps_per_epoch)
            # Before an epoch, on fixed samples and with the draws of the step to come: is the gradient right?
            if checked and in_epoch == 0 and epoch % finetuning.check_every_epochs == 0:
                set_seed(run.seed, 1 + number, rank)
                state.alpha, state.beta = set_coefficients(model, finetuning, number / total_steps)
                state.guard.append(check_gradient(model, check_batch, finetuning, epoch, state, log))

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
                save(saved, config, state, model, optimizer, ema, accelerator, state.step / total_steps)
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
        device=device_name(device),
        guard=state.guard,
        curve=state.curve,
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
