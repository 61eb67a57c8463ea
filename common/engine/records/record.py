"""Records: what a finished run leaves, and where it lies.

    runs/<task>/<row>/seed<k>/record.json    one run, written by the engine (not committed)
    results/<task>/<row>.json                the runs of a row, one per seed (committed): {row, task, method, preset,
    runs: [...]}

A run is finished when its record was made with the same config by the same code from the same data and weights: the
hash covers the files that the training imports, so committing results, better prose or another task's code does not
invalidate anything. Not here: tables, figures, and the command that publishes runs (`tables.py`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.data.fingerprint import same_inputs
from engine.files import read_json, write_text
from engine.records.provenance import command_line, commit, sources_hash, versions
from engine.settings import to_json

Status = Literal["reproduced", "partial", "tiny", "not run"]
SHARED = ("row", "task", "method", "preset")  # facts that all runs of a row have in common
# Fields of `run` that change neither numbers nor measurements.
INCIDENTAL = (
    *("output", "num_workers", "evaluation_batch", "save_every_steps", "log_every_steps", "tracker", "resume"),
)


@dataclass(frozen=True)
class Record:
    """One run of one row. Bytes, seconds; `memory` and `seconds` of one optimizer step at `run.micro_batch`."""

    row: str
    task: str
    method: str
    preset: str
    status: Status
    seed: int
    metrics: dict[str, float]  # of the last evaluation; the first is the one tables show
    memory: dict[
        str, Any
    ]  # source ("measured", "predicted"), peak, parameters, gradients, optimizer, activations, device, process
    seconds: dict[str, float]  # step (median), training, loading, evaluation (sums)
    gradient_checks: list[dict[str, float]]  # per measurement: epoch, alpha, beta, error
    curve: list[dict[str, float]]  # per epoch: losses, learning rate, metrics
    config: dict[str, Any]
    command: str
    commit: str
    sources: str  # hash of the code, see `sources_hash`
    versions: dict[str, str]
    device: str  # several, in their order, for a run that moved
    inputs: dict[str, str] = field(default_factory=dict)  # fingerprints of data and weights, see `inputs_of`


def build_record(
    config: Any,
    *,
    metrics: dict[str, float],
    memory: dict[str, Any],
    seconds: dict[str, float],
    device: str,
    gradient_checks: list[dict[str, float]],
    curve: list[dict[str, float]],
    status: Status | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Record:
    """A Record with the facts about config, code and machine filled in.

    `status` is by default "tiny" for the tiny preset or a shortened run, else "partial"; only a person who compared the
    number with the published one writes "reproduced". A row without a run (paper scale) gives "not run", empty metrics
    and the predicted memory.
    """
    if status is None:
        status = "tiny" if config.preset == "tiny" or config.run.max_steps else "partial"
    task = task_of(config)
    return Record(
        row=config.row,
        task=task,
        method=config.finetuning.method,
        preset=config.preset,
        status=status,
        seed=config.run.seed,
        metrics=metrics,
        memory=memory,
        seconds=seconds,
        gradient_checks=gradient_checks,
        curve=curve,
        config=to_json(config),
        command=command_line(),
        commit=commit(),
        sources=sources_hash(task),
        versions=versions(),
        device=device,
        inputs=dict(inputs or {}),
    )


def task_of(config: Any) -> str:
    """The task folder a config comes from: `action_recognition.configs.Config` -> `action_recognition`."""
    return type(config).__module__.split(".")[0]


def run_folder(config: Any) -> Path:
    """output / task / row / seed<k>."""
    return Path(config.run.output) / task_of(config) / config.row / f"seed{config.run.seed}"


def finished_record(config: Any, inputs: Mapping[str, str] | None = None) -> Record | None:
    """The Record of this very config by this very code in the run folder, or None. inputs: also from these very data
    and weights (`inputs_of`); None: whichever.
    """
    path = run_folder(config) / "record.json"
    if not path.exists():
        return None
    record = read_record(path)
    same = _essential(record.config) == _essential(to_json(config)) and record.sources == sources_hash(task_of(config))
    same = same and (inputs is None or same_inputs(inputs, record.inputs))
    return record if same and record.metrics else None


def is_finished(config: Any, inputs: Mapping[str, str] | None = None) -> bool:
    """Whether training this config again would be in vain."""
    return finished_record(config, inputs) is not None


def write_record(record: Record, folder: Path) -> Path:
    """Write `record.json` into a run folder, atomically and synced. ValueError for one without metrics."""
    if not record.metrics and record.status != "not run":
        raise ValueError(f"{folder}: the run of {record.row} has no metrics, so nothing is recorded of it")
    for left in folder.glob(".record.json.*.tmp*"):  # by processes that were killed
        left.unlink(missing_ok=True)
    return _write(folder / "record.json", asdict(record))


def read_record(path: Path) -> Record:
    """One run's record; ValueError naming the file when it is none."""
    try:
        return Record(**read_json(path, "run the row again"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a Record: {error}; delete it and run the row again") from error


def publish(records: list[Record], results: Path) -> list[Path]:
    """Put runs into `results/<task>/<row>.json`, replacing those of the same seed; returns the files written.

    A row's file holds runs of one config only: runs of an older config leave. Each run keeps the hash of its own code.
    """
    written = []
    for record in records:
        path = results / record.task / f"{record.row}.json"
        earlier = read_row(path) if path.exists() else []
        runs = {old.seed: old for old in earlier if _recipe(old.config) == _recipe(record.config)}
        runs[record.seed] = record
        shared = {name: getattr(record, name) for name in SHARED}
        own = [{k: v for k, v in asdict(runs[seed]).items() if k not in SHARED} for seed in sorted(runs)]
        _write(path, {**shared, "runs": own})
        if path not in written:
            written.append(path)
    return written


def read_row(path: Path) -> list[Record]:
    """The runs of one committed row; ValueError naming the file when it is none."""
    try:
        content = read_json(path, "take it from the repository again")
        return [Record(**{name: content[name] for name in SHARED}, **run) for run in content["runs"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not hold the Records of a row: {error!r}") from error


def read_records(task: str, results: Path = Path("results")) -> list[Record]:
    """All committed Records of a task, by row and seed."""
    return [record for path in sorted((results / task).glob("*.json")) for record in read_row(path)]


def read_runs(task: str, runs: Path = Path("runs")) -> list[Record]:
    """All records in the run folders of a task."""
    return [read_record(path) for path in sorted((runs / task).glob("*/seed*/record.json"))]


def refuse_other_recipe(theirs: dict[str, Any], config: Any, source: Path) -> None:
    """ValueError naming the settings in which a checkpoint's config differs, other than where and how it runs."""
    ours, theirs = _flatten(_recipe(to_json(config), seed=True)), _flatten(_recipe(theirs, seed=True))
    changed = [
        f"{key}: {theirs.get(key, 'absent')} -> {ours.get(key, 'absent')}"
        for key in sorted(ours.keys() | theirs.keys())
        if key not in ours or key not in theirs or ours[key] != theirs[key]
    ]
    if changed:
        raise ValueError(
            f"{source} was trained with other settings ({'; '.join(changed)}). "
            "Give another --run.output, or --run.no-resume to begin anew over it"
        )


def changes_of_run(theirs: dict[str, Any], config: Any) -> list[str]:
    """The settings of `run` that a Record would tell otherwise, each as `name: then -> now`; `max_steps` aside."""
    then, now = (_essential(c)["run"] for c in (theirs, to_json(config)))
    names = [name for name in now if name != "max_steps" and then.get(name) != now[name]]
    return [f"run.{name}: {then.get(name, 'absent')} -> {now[name]}" for name in names]


def _essential(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "run": {k: v for k, v in config["run"].items() if k not in INCIDENTAL}}


def _recipe(config: dict[str, Any], seed: bool = False) -> dict[str, Any]:
    recipe = {key: value for key, value in config.items() if key != "run"}
    return {**recipe, "seed": config["run"]["seed"]} if seed else recipe


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }


def _write(path: Path, content: dict[str, Any]) -> Path:
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path
