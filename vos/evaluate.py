"""Masks of a network, a run or a prediction file against the truth: mAP, P@K and IoU, or J&F (`metric.py`).

    python -m vos.evaluate runs/vos/referring_tiny_dr2net/seed0 [--floors]
    python -m vos.evaluate runs/vos/a2d_swint_dr2net/seed0 --kind jhmdb --root data/jhmdb
    python -m vos.evaluate a2d_swint_conventional --model.weights mttr_a2d_w10.pth.tar
    python -m vos.evaluate --ground-truth ground_truth.json --predictions predictions.json
    python -m vos.evaluate --ground-truth data/refytvos --predictions submission.zip

The first writes predictions.json and ground_truth.json (`coco_files.py`), of Ref-YouTube-VOS submission.zip, into the
run's folder and prints the metrics in percent; with --floors also what would be known without the sentence: the best
query by the truth, any query, all objects of the frame. The second takes a run of A2D to JHMDB, which nobody trains on;
the third scores MTTR's weights, untrained by us; the others score files. Masks are compared at the annotation's size;
rows evaluate a sample at a time, as padding changes what a network sees. Not here: masks from outputs (`head.py`).
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, TypedDict, cast

import numpy as np
import tyro

from engine import commands
from engine.command_line import parse, run_command
from engine.data.video import BrokenVideo
from engine.data.workers import first_of
from engine.settings import Arguments
from engine.task import Batch, Model
from vos.annotations import Clip, read_annotations, read_masks
from vos.coco_files import read_samples, write_proposals, write_truth
from vos.configs import REFYTVOS, ROWS, SMALL_WEIGHTS, Config
from vos.data import sample_name
from vos.masks import read_index
from vos.metric import Runs, Sample, decode_mask, encode_masks, iou_of, score_samples
from vos.submission import Expressions, Key, MaskFiles, Reader, score_masks, warn_of_more, write_submission

SEED = 0  # of the random query


class Found(TypedDict):
    """What the network makes of one sentence."""

    name: str  # "<video> <frame> <instance>", of Ref-YouTube-VOS "<video> <expression>"
    scores: np.ndarray  # (Q,) float32; of Ref-YouTube-VOS the mean over frames
    masks: list[Runs]  # of each query; of Ref-YouTube-VOS those of the best query in each frame


class Truth(NamedTuple):
    """What the metric needs besides the masks of the network."""

    masks: dict[str, Runs]  # of a2d and jhmdb, by the sample's name
    objects: dict[str, Runs]  # all objects of the same frame together
    clips: dict[str, Clip]  # of Ref-YouTube-VOS, by the sample's name; its masks are read when they are compared
    broken: set[str]  # names of samples whose true mask cannot be read, with on_broken="skip"


def read_truth(config: Config) -> Truth:
    """The true masks of the test split.

    Raises FileNotFoundError or ValueError if annotations or masks are missing, broken or not as configured; with
    on_broken="skip" samples of broken masks are left out, with a warning.
    """
    data = config.data
    clips = read_annotations(data, "test").clips
    truth = Truth({}, {}, {}, set())
    frame_of: tuple[tuple[str, int], dict[str, np.ndarray]] | None = None  # the last one that was read
    for clip in clips:
        if data.kind == "refytvos":
            truth.clips[sample_name(clip)] = clip
            continue
        for frame in clip.frames:
            name = sample_name(clip, frame)
            if name in truth.masks:
                raise ValueError(f"{data.root}: the sample {name!r} is there twice; a sentence needs an id of its own")
            if frame_of is None or frame_of[0] != (clip.video, frame):
                try:
                    frame_of = (clip.video, frame), read_masks(data, clip, frame)
                except (BrokenVideo, OSError) as error:
                    if data.on_broken == "raise":
                        raise
                    warnings.warn(f"{name} is not scored: {error}", stacklevel=2)
                    truth.broken.add(name)
                    continue
            own = frame_of[1][clip.instance]
            every = np.any(list(frame_of[1].values()), axis=0)
            truth.masks[name], truth.objects[name] = encode_masks(np.stack([own, every]))
    if truth.clips and not any(clip.instance for clip in truth.clips.values()):
        warnings.warn(
            f"{data.root}: no expression of valid has masks, so a training ends without metrics and Record; its "
            "checkpoint stays, and evaluate writes submission.zip from it",
            stacklevel=2,
        )
    return truth


def collect(model: Model, batch: Batch, config: Config) -> list[Found]:
    """The masks for each sentence of the batch. ValueError naming a sample for which scores are not finite."""
    head, outputs = cast(Any, model).head, model(batch)
    rows = []
    for place, (name, scores) in enumerate(zip(batch["name"], head.scores(outputs, batch), strict=True)):
        if not scores.isfinite().all():
            raise ValueError(f"{name}: the network's scores are not finite; its weights or precision are at fault")
        frame = int(batch["frame"][place])
        if frame >= 0:
            masks = next(islice(head.segment_frames(outputs, batch, place), frame, None))
            row = Found(name=name, scores=scores[frame].numpy(), masks=encode_masks(masks.numpy()))
        else:
            mean = scores.mean(dim=0)
            best = mean.argmax()[None]
            frames = head.segment_frames(outputs, batch, place, best)
            row = Found(name=name, scores=mean.numpy(), masks=[encode_masks(one.numpy())[0] for one in frames])
        rows.append(row)
    return rows


def score(rows: Sequence[Found], truth: Truth, config: Config) -> dict[str, float]:
    """mAP, mAP_best, AP50, AP75, P@0.5 to P@0.9, IoU_overall, IoU_mean; of Ref-YouTube-VOS J&F, J, F; in percent.

    Without true masks (the valid split as it was published) nothing, with a warning.
    """
    if config.data.kind != "refytvos":
        return score_samples(list(as_samples(rows, truth).values()))
    found = _by_name(rows, truth.clips, set())
    known = {name: clip for name, clip in truth.clips.items() if clip.instance and name in found}
    if not known:
        warnings.warn("no expression has true masks: there are no metrics, only the zip", stacklevel=2)
        return {}
    masks = {_key(clip): dict(zip(clip.names, found[name]["masks"], strict=True)) for name, clip in known.items()}
    return score_clips(lambda key, frame: decode_mask(masks[key][frame]), list(known.values()))


def write(folder: Path, rows: Sequence[Found], truth: Truth, config: Config) -> Path:
    """predictions.json and, beside it, ground_truth.json; of Ref-YouTube-VOS submission.zip, checked before."""
    if config.data.kind == "refytvos":
        clips = {name: truth.clips[name] for name in _by_name(rows, truth.clips, set())}
        masks = {_key(truth.clips[row["name"]]): row["masks"] for row in rows}
        return write_submission(folder / "submission.zip", masks, {_key(one): one.names for one in clips.values()})
    path = folder / "predictions.json"
    samples = as_samples(rows, truth)
    write_truth(folder / "ground_truth.json", truth.masks)
    write_proposals(path, {name: (one["masks"], one["scores"].tolist()) for name, one in samples.items()})
    return path


def as_samples(rows: Sequence[Found], truth: Truth) -> dict[str, Sample]:
    """Truth and proposals of each sample of a2d or jhmdb, in the order of the truth; of one that was not looked at
    there are no proposals, and a warning names it.
    """
    found = _by_name(rows, truth.masks, truth.broken)
    nothing = Found(name="", scores=np.zeros(0, np.float32), masks=[])
    samples = {}
    for name, mask in truth.masks.items():
        row = found.get(name, nothing)
        samples[name] = Sample(truth=mask, masks=row["masks"], scores=row["scores"])
    return samples


def floors(samples: Mapping[str, Sample], objects: Mapping[str, Runs]) -> dict[str, dict[str, float]]:
    """What is reached without understanding the sentence: the metrics of one mask per sample, chosen otherwise.

    The query that the truth knows to be the best (what the masks would allow), any query, and all objects of the frame.
    """
    chance = np.random.default_rng(SEED)
    chosen: dict[str, list[Sample]] = {"best query by the truth": [], "random query": [], "all objects": []}
    for name, sample in samples.items():
        truth, masks = sample["truth"], sample["masks"]
        best = max(masks, key=lambda mask: iou_of(truth, mask)[0], default=None)
        anyone = masks[int(chance.integers(len(masks)))] if masks else None
        for own, mask in zip(chosen.values(), (best, anyone, objects[name]), strict=True):
            one = [mask] if mask is not None else []
            own.append(Sample(truth=truth, masks=one, scores=np.ones(len(one))))
    return {title: score_samples(own) for title, own in chosen.items()}


def score_clips(found: Reader, clips: Sequence[Clip]) -> dict[str, float]:
    """J&F, J and F of Ref-YouTube-VOS in the frames that have true masks; a warning names what no mask shows."""
    by_key = {_key(clip): clip for clip in clips}
    unseen = dict.fromkeys(by_key)

    def read(key: Key, frame: str) -> np.ndarray:
        clip = by_key[key]
        mask = read_index(clip.masks / f"{frame}.png") == int(clip.instance)
        if mask.any():
            unseen.pop(key, None)
        return mask

    wanted: Expressions = {key: [clip.names[k] for k in clip.frames] for key, clip in by_key.items()}
    metrics = score_masks(found, read, wanted)
    if unseen:
        some = first_of(f"{video} {expression}" for video, expression in unseen)
        warnings.warn(
            f"{len(unseen)} of {len(by_key)} expressions are about an object that no true mask shows, so that empty "
            f"masks count as right: {some}; check obj_id and the masks",
            stacklevel=2,
        )
    return metrics


def _key(clip: Clip) -> Key:
    return clip.video, clip.expression


def _by_name(rows: Sequence[Found], wanted: Mapping[str, Any], broken: set[str]) -> dict[str, Found]:
    """The rows by sample, each once, without those of broken truth; a warning names what was not looked at. ValueError
    for one that the annotations do not have.
    """
    found = {row["name"]: row for row in rows if row["name"] not in broken}
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{unknown[0]!r}: a sample that the annotations do not have; they changed during the run")
    if lacking := [name for name in wanted if name not in found]:
        warnings.warn(f"{len(lacking)} of {len(wanted)} samples were not looked at ({first_of(lacking)})", stacklevel=3)
    return found


@dataclass(frozen=True)
class OfRun(Arguments):
    """Score a trained run, write its masks into its folder."""

    run: tyro.conf.Positional[Path]  # a run's folder, or a checkpoint folder
    root: Path | None = None  # the data set's folder, if it has moved; of another kind: data/<kind>
    kind: Literal["a2d", "jhmdb", "refytvos"] | None = None  # another data set than the run's, as jhmdb for a2d
    device: commands.Device = "auto"
    floors: bool = False  # also print what is reached without the sentence (a2d, jhmdb)


@dataclass(frozen=True)
class Files(Arguments):
    """Score a prediction file: proposals as JSON against truth as JSON, or a zip or folder of PNGs against another one
    or the root of Ref-YouTube-VOS.
    """

    ground_truth: Path
    predictions: Path


def score_run(words: list[str]) -> None:
    """The command line that scores a run; also over several processes, by torchrun."""
    from vos import data, evaluate, model

    arguments = parse(OfRun, words)
    config, network = commands.load_run(arguments.run, Config, model, root=arguments.root)
    folder, title = arguments.run, f"{config.row} seed {config.run.seed}"
    if arguments.kind not in (None, config.data.kind):
        root = arguments.root or Path("data") / arguments.kind
        run = replace(config.run, evaluation_batch=1)  # videos of unequal sizes and lengths
        config = replace(config, data=replace(config.data, kind=arguments.kind, root=root), run=run)
        folder, title = folder / arguments.kind, f"{title} on {arguments.kind}"
    if arguments.floors and config.data.kind == "refytvos":
        raise ValueError("--floors are for a2d and jhmdb: of Ref-YouTube-VOS only the best query's masks are kept")
    part = _with_floors() if arguments.floors else evaluate
    commands.score_network(config, network, data, part, folder, title, device=arguments.device)


def _with_floors() -> Any:
    """This file as the engine wants it, with a `score` that prints the floors, too."""

    def score_and_tell(rows: Sequence[Found], truth: Truth, config: Config) -> dict[str, float]:
        for title, metrics in floors(as_samples(rows, truth), truth.objects).items():
            print(
                f"{title}: " + ", ".join(f"{name} {metrics[name]:.1f}" for name in ("mAP", "IoU_overall", "IoU_mean"))
            )
        return score(rows, truth, config)

    return SimpleNamespace(read_truth=read_truth, collect=collect, score=score_and_tell, write=write)


def score_weights(words: list[str]) -> None:
    """The command line that scores a row's pretrained weights, without training.

    Also over several processes, by torchrun. ValueError for a row whose weights are no segmenter's.
    """
    from vos import data, evaluate, model

    config = commands.parse_config(ROWS, words)
    if config.model.weights in (None, "kinetics", SMALL_WEIGHTS):
        raise ValueError(f"{config.row}: its weights are a backbone's; give --model.weights FILE of a whole MTTR")
    weights = Path(config.model.weights)
    folder = config.run.output / "vos" / config.row / Path(weights.name.removesuffix(".tar")).stem
    network = model.build_model(config)
    commands.score_network(config, network, data, evaluate, folder, str(weights), device=config.run.device)


def score_files(words: list[str]) -> None:
    """The command line that compares two files or folders."""
    files = parse(Files, words)
    if files.ground_truth.suffix == ".json":
        metrics = score_samples(read_samples(files.ground_truth, files.predictions))
    else:
        with MaskFiles(files.predictions) as found:
            if (files.ground_truth / "meta_expressions").is_dir():
                clips = read_annotations(replace(REFYTVOS, root=files.ground_truth), "test").clips
                if not any(clip.instance for clip in clips):
                    raise ValueError(f"{files.ground_truth}: no expression of valid has true masks to compare with")
                warn_of_more(found.expressions, {_key(clip): clip.names for clip in clips})
                metrics = score_clips(found.read, [clip for clip in clips if clip.instance])
            else:
                with MaskFiles(files.ground_truth) as truth:
                    warn_of_more(found.expressions, truth.expressions)
                    metrics = score_masks(found.read, truth.read, truth.expressions)
    for name, value in metrics.items():
        print(f"{name} {value:.2f}")


def command_of(words: list[str]) -> Callable[[list[str]], None]:
    """The function for these words: files, weights of a row, or a run's folder."""
    if any(word.startswith(("--ground-truth", "--predictions")) for word in words):
        return score_files
    is_row = words and not words[0].startswith("-") and "/" not in words[0] and not Path(words[0]).exists()
    return score_weights if is_row else score_run


if __name__ == "__main__":
    run_command(command_of(sys.argv[1:]))
