"""Check a data set, write a synthetic one, or put what was downloaded in its place.

    python -m action_detection.prepare --preset tiny                   # synthetic mp4 files, in data/untrimmed
    python -m action_detection.prepare --kind activitynet --probe      # count, name what is missing, open every file
    python -m action_detection.prepare --kind thumos --class-scores FILE

A check writes nothing, unless --lists says where. The exit status is 0 if everything is there, or with --on-broken skip
if each subset has a video that can be used. scripts/download_activitynet.sh and download_thumos14.sh do the rest.
"""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from action_detection.annotations import Annotations, read_class_scores, read_database
from action_detection.configs import ROWS, Data
from action_detection.data import VIDEO_FOLDER, annotation_file, check_duration, find_files, read_annotations
from action_detection.synthetic import Synthetic, write_contact_sheet, write_dataset
from engine import commands
from engine.data.check import Check
from engine.data.checksums import differing
from engine.data.damage import sound
from engine.data.video import BrokenVideo, probe
from engine.data.workers import name_some, progress_bar, run_jobs, write_json
from engine.files import read_text
from engine.synthetic.write import STAMP, prepare_files

ROOTS = {"activitynet": Path("data/activitynet"), "thumos": Path("data/thumos14")}
# What the sites announce: activity-net.org for release 1.3; for THUMOS-14 200 and 213 annotated videos, without the two
# of the test set that G-TAD, VSGN and OpenTAD leave out.
COUNTS = {
    "activitynet": {"classes": 200, "training": 10_024, "validation": 4_926},
    "thumos": {"classes": 20, "training": 200, "validation": 211},
}
LEFT_OUT = ("video_test_0000270", "video_test_0001292")  # wrong annotations; nothing but `Ambiguous`
SECONDS_OFF = 1.0  # a file that is this much shorter or longer than annotated is named


@dataclass(frozen=True)
class Arguments(commands.Preparation):
    """See the module's docstring."""

    kind: Literal["activitynet", "thumos"] | None = None  # the layout to check
    synthetic: Synthetic = field(default_factory=Synthetic)  # with a preset: what to write
    class_scores: Path | None = None  # also check this file of an outside classifier's scores
    blocked: Path | None = None  # JSON list of videos to leave out, as in `Data`
    thumos_annotations: Path | None = None  # folder of the official text files: make thumos_14_anno.json of them
    checksums: Path | None = None  # with --probe: a list of sha256 to compare the files with; written if not there


def place(arguments: Arguments) -> Path:
    """The data set's folder."""
    return arguments.root or ROOTS[arguments.kind or "activitynet"]


def check(arguments: Arguments) -> Check:
    """Count classes, videos and segments; name odd segments, missing, empty and damaged videos, missing class scores.

    Raises as `read_annotations`, but for the number of classes. Full lists go to the folder `--lists`, if given.
    """
    root, lists = place(arguments), arguments.lists
    if arguments.thumos_annotations is not None:
        written = write_thumos_annotations(arguments.thumos_annotations, root, arguments.on_broken)
        print(f"{written}: written")
    assert arguments.kind is not None, "preparation checks a layout that was named"
    if arguments.checksums is not None and not arguments.probe:
        raise ValueError("--checksums: the files are read with --probe; give that too")
    data = Data(kind=arguments.kind, root=root, blocked=arguments.blocked, on_broken=arguments.on_broken)
    file = annotation_file(data)
    data = replace(data, num_classes=len(read_database(file)[0]))
    counts, problems, empty = {"classes": data.num_classes}, [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        annotations = read_annotations(data)
    problems += [str(warning.message) for warning in caught]
    looks = {}
    if arguments.probe:
        looks = _look_at_all(data, annotations, arguments.workers, arguments.checksums)
    for subset in (data.train_subset, data.test_subset):
        videos = {name: video for name, video in annotations.videos.items() if video.subset == subset}
        counts[subset] = len(videos)
        counts[f"segments in {subset}"] = sum(len(video.labels) for video in videos.values())
        paths, missing = find_files(data, list(videos))
        out = {
            what: None if lists is None else lists / f"{what}_{subset}.txt" for what in ("missing", "damaged", "empty")
        }
        if lists is not None:
            lists.mkdir(parents=True, exist_ok=True)
        name_some(problems, missing, out["missing"], f"of {len(videos)} {subset} videos are missing")
        unusable = 0
        if arguments.probe:
            found = [looks[path] for path in paths.values()]
            damaged = [look.problem for look in found if look.unusable]
            unusable = len(damaged)
            name_some(problems, damaged, out["damaged"], f"{subset} files are damaged")
            off = [look.problem for look in found if look.problem and not look.unusable]
            name_some(problems, off, None, f"{subset} durations are off")
        if len(paths) == unusable:
            empty.append(subset)
        without = [name for name, video in videos.items() if not len(video.labels)]
        use = "not trained on" if subset == data.train_subset else "tested all the same"
        name_some(problems, without, out["empty"], f"{subset} videos have no annotation, they are {use}")
        name_some(problems, _repeated(videos), None, f"{subset} videos repeat an annotation (the metric counts both)")
    if not (Path(data.root) / STAMP).is_file() and data.blocked is None:
        for name, expected in COUNTS[data.kind].items():
            if counts.get(name) != expected:
                problems.append(f"{name}: {counts.get(name, 0)} instead of the announced {expected}")
    if arguments.class_scores is not None:
        tested = [name for name, video in annotations.videos.items() if video.subset == data.test_subset]
        try:
            read_class_scores(arguments.class_scores, annotations.class_names, tested)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    return Check(str(root), counts, problems, empty)


def write_thumos_annotations(folder: Path, root: Path, on_broken: Literal["raise", "skip"] = "raise") -> Path:
    """<root>/thumos_14_anno.json, in OpenTAD's form, of the official text files and the durations of the videos.

    folder: holds <Class>_val.txt and <Class>_test.txt, lines `video start end` in seconds; `Ambiguous` is left out, and
    the two videos of LEFT_OUT. Missing and broken videos are errors, or with on_broken="skip" named and left out.
    Raises FileNotFoundError, ValueError naming file and line, BrokenVideo.
    """
    segments: dict[str, list[dict]] = {}
    files = sorted(path for path in folder.rglob("*_*.txt") if path.stem.endswith(("_val", "_test")))
    if not files:
        raise FileNotFoundError(f"{folder}: no <Class>_val.txt and <Class>_test.txt; unpack the official annotations")
    for text in files:
        label = text.stem.rsplit("_", 1)[0]
        for number, line in enumerate(read_text(text, "unpack the official annotations again").splitlines(), start=1):
            if not line.strip() or label == "Ambiguous":
                continue
            try:
                name, start, end = line.split()
                item = {"label": label, "segment": [float(start), float(end)]}
            except ValueError as error:
                raise ValueError(f"{text}: line {number} is not `video start end`: {line!r}") from error
            if name not in LEFT_OUT:
                segments.setdefault(name, []).append(item)
    data = Data(kind="thumos", root=root)
    paths, missing = find_files(data, sorted(segments))
    problems: list[str] = []
    name_some(problems, missing, None, f"of {len(segments)} videos are missing in {root / VIDEO_FOLDER}")
    if missing and on_broken == "raise":
        raise FileNotFoundError(f"{problems[0]}; put them there, or leave them out with --on-broken skip")
    database = {}
    for name, path in paths.items():
        try:
            seconds = probe(path).seconds
        except BrokenVideo as error:
            if on_broken == "raise":
                raise
            problems.append(str(error))
            continue
        database[name] = {
            "subset": "training" if name.startswith("video_validation") else "validation",  # OpenTAD's names for them
            "duration": round(seconds, 3),
            "annotations": sorted(segments[name], key=lambda item: item["segment"]),
        }
    for problem in problems:
        print(f"left out: {problem}")
    write_json(annotation_file(data), {"version": "Thumos14", "database": database})
    return annotation_file(data)


def fetch(arguments: Arguments) -> None:
    """Nothing comes without a form or a password; ValueError naming the script that knows."""
    name = "thumos14" if arguments.kind == "thumos" else arguments.kind
    raise ValueError(f"--download: use bash scripts/download_{name}.sh {place(arguments)}")


def write_synthetic(arguments: Arguments) -> None:
    """Write the synthetic data set with a progress bar; says so and returns at once if it is complete already."""
    root, synthetic = arguments.root or Data().root, arguments.synthetic
    total, what = synthetic.num_training + synthetic.num_validation, "videos"
    workers = arguments.workers
    prepare_files(root, total, what, lambda done: write_dataset(root, synthetic, workers=workers, on_done=done))
    if arguments.sheet is not None:
        write_contact_sheet(arguments.sheet, synthetic)


class _Look(NamedTuple):
    """What is odd about a file, or nothing, and whether it cannot be used."""

    problem: str
    unusable: bool


def _look_at_all(data: Data, annotations: Annotations, workers: int, checksums: Path | None) -> dict[str, _Look]:
    """Decode the files of both subsets, by path."""
    names = [n for n, video in annotations.videos.items() if video.subset in (data.train_subset, data.test_subset)]
    paths, _ = find_files(data, names)
    jobs = [(path, annotations.videos[name].duration) for name, path in paths.items()]
    with progress_bar("decoding videos", len(jobs)) as advance:
        found = run_jobs(_look, jobs, workers=workers, on_done=advance, chunk=16)
    looks = dict(zip(paths.values(), found, strict=True))
    if checksums is not None:
        sound = [path for path, look in looks.items() if not look.unusable]
        others = differing(checksums, Path(data.root), sound, workers=workers)
        looks |= {path: _Look(line, True) for path, line in others.items()}
    return looks


def _look(job: tuple[str, float]) -> _Look:
    path, duration = job
    try:
        seconds = sound(path).seconds
        check_duration(path, duration, seconds)
    except (BrokenVideo, OSError) as error:
        return _Look(str(error), True)
    off = abs(seconds - duration) > SECONDS_OFF
    return _Look(f"{path}: lasts {seconds:.1f} s, annotated are {duration:.1f} s" if off else "", False)


def _repeated(videos: dict) -> list[str]:
    """Names of the videos in which a segment of a class stands twice."""
    names = []
    for name, video in videos.items():
        items = [
            (*segment, label) for segment, label in zip(video.segments.tolist(), video.labels.tolist(), strict=True)
        ]
        if len(set(items)) != len(items):
            names.append(name)
    return names


if __name__ == "__main__":
    commands.prepare(Arguments, ROWS, synthetic=write_synthetic, check=check, download=fetch)
