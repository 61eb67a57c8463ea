"""Time of the detection metric against a loop over predictions as the official script has it, on the same file.

    python -m action_detection.benchmark_metric [--videos 5000] [--predictions 200] [--rounds 3]

The file is made up at the size of ActivityNet's validation set: 200 classes, 1.5 actions in a video, predictions of the
right class scattered around them and of one wrong class elsewhere, as with video-level class scores. Both sides get the
same rows; they take turns, and reading the JSON file, which is the same for both, is timed by itself. The loop uses
dictionaries where the official script uses pandas tables. Both must give the same numbers. Times are processor seconds
of one core, which other work on the machine hardly stretches. Writes results/detection_metric.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from action_detection.metric import ACTIVITYNET_TIOU, Rows, evaluate_rows, read_ground_truth, read_predictions
from engine.files import write_text
from engine.records.provenance import commit, versions


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=5000)
    parser.add_argument("--predictions", type=int, default=200, help="per video")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), arguments.videos, arguments.predictions)
        megabytes = paths[1].stat().st_size / 1e6
        rounds = [time_both(*paths) for _ in range(arguments.rounds)]
    seconds = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    ratio = statistics.median(one["loop"] / one["metric"] for one in rounds)
    print(f"{arguments.videos} videos x {arguments.predictions} predictions, {megabytes:.0f} MB of JSON")
    print(f"reading and checking the files {seconds['reading']:.1f} s")
    print(f"metric {seconds['metric']:.2f} s, loop {seconds['loop']:.2f} s: {ratio:.1f} times faster; equal numbers")
    print(f"file to numbers {seconds['reading'] + seconds['metric']:.1f} s")
    content = {
        "videos": arguments.videos,
        "predictions_per_video": arguments.predictions,
        "thresholds": len(ACTIVITYNET_TIOU),
        "rounds": arguments.rounds,
        "seconds": seconds,
        "loop_over_metric": ratio,
        "loop_over_metric_with_reading": (seconds["reading"] + seconds["loop"])
        / (seconds["reading"] + seconds["metric"]),
        "commit": commit(),
        "versions": versions(),
    }
    path = arguments.results / "detection_metric.json"
    write_text(path, json.dumps(content, indent=1) + "\n")
    print(path)


def time_both(ground_truth: Path, predictions: Path) -> dict[str, float]:
    """Processor seconds of reading, of the metric and of the loop. The numbers of both must be the same."""
    marks = [time.process_time()]
    truth, known = read_ground_truth(ground_truth, "validation")
    found = read_predictions(predictions, known)
    marks.append(time.process_time())
    ours = evaluate_rows(truth, found, ACTIVITYNET_TIOU)
    marks.append(time.process_time())
    tuples = as_tuples(truth), as_tuples(found)
    marks.append(time.process_time())
    theirs = loop(*tuples, np.array(ACTIVITYNET_TIOU))
    marks.append(time.process_time())
    assert ours["mAP"] == theirs.tolist(), (ours["mAP"], theirs)
    reading, metric, _, official = np.diff(marks).tolist()
    return {"reading": reading, "metric": metric, "loop": official}


def as_tuples(rows: Rows) -> list[tuple]:
    """(video, label, start, end, score) for each row."""
    videos = [rows.names[k] for k in rows.video.tolist()]
    starts, ends = rows.segments.T.tolist()
    return list(zip(videos, rows.labels, starts, ends, rows.scores.tolist(), strict=True))


def loop(truth: list[tuple], predictions: list[tuple], tiou: np.ndarray) -> np.ndarray:
    """mAP per threshold: for each class, prediction and threshold, walk down the ground truth of the video."""
    classes = list(dict.fromkeys(row[1] for row in truth))
    ap = np.zeros((len(tiou), len(classes)))
    truth_of: dict[str, dict[str, list[tuple]]] = {label: {} for label in classes}
    for row in truth:
        truth_of[row[1]].setdefault(row[0], []).append(row)
    predictions_of: dict[str, list[tuple]] = {label: [] for label in classes}
    for row in predictions:
        predictions_of[row[1]].append(row)
    for number, label in enumerate(classes):
        own = sorted(predictions_of[label], key=lambda row: -row[4])
        videos = {video: np.array([row[2:4] for row in rows]) for video, rows in truth_of[label].items()}
        taken = {video: np.zeros((len(tiou), len(rows)), bool) for video, rows in videos.items()}
        true = np.zeros((len(tiou), len(own)))
        for index, (video, _, start, end, _) in enumerate(own):
            if video not in videos:
                continue
            segments = videos[video]
            inside = (np.minimum(segments[:, 1], end) - np.maximum(segments[:, 0], start)).clip(0)
            overlap = inside / ((segments[:, 1] - segments[:, 0]) + (end - start) - inside)
            order = overlap.argsort()[::-1]
            for k, threshold in enumerate(tiou):
                for j in order:
                    if overlap[j] < threshold:
                        break
                    if not taken[video][k, j]:
                        taken[video][k, j] = True
                        true[k, index] = 1
                        break
        if own:
            positives = sum(len(rows) for rows in videos.values())
            ap[:, number] = [area(row, positives) for row in true]
    return ap.mean(axis=1)


def area(true: np.ndarray, positives: int) -> float:
    """Area under the interpolated precision, from the right."""
    hits, misses = np.cumsum(true), np.cumsum(1 - true)
    recall = np.hstack([[0], hits / positives, [1]])
    precision = np.hstack([[0], hits / (hits + misses), [0]])
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    steps = np.where(recall[1:] != recall[:-1])[0] + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * precision[steps]))


def write_files(folder: Path, num_videos: int, num_predictions: int) -> tuple[Path, Path]:
    """A ground truth and a prediction file in the official forms."""
    rng = np.random.default_rng(0)
    database: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for index in range(num_videos):
        duration = float(rng.uniform(20, 240))
        name, label = f"video{index:06d}", index % 200
        starts = np.sort(rng.uniform(0, duration, 1 + rng.poisson(0.5)))
        ends = np.minimum(starts + rng.exponential(duration / 3, len(starts)) + 0.5, duration + 0.5)
        annotations = [
            {"label": f"class {label}", "segment": [float(s), float(e)]} for s, e in zip(starts, ends, strict=True)
        ]
        database[name] = {"duration": duration, "subset": "validation", "annotations": annotations}
        near = rng.integers(len(starts), size=num_predictions)
        noise = rng.normal(0, duration / 15, (num_predictions, 2))
        segments = np.sort(np.stack([starts[near], ends[near]], 1) + noise, axis=1)
        wrong = rng.random(num_predictions) < 0.5
        scores = rng.random(num_predictions) * np.where(wrong, 0.6, 1.0)
        other = int(rng.integers(min(200, num_videos)))
        results[name] = [
            {
                "label": f"class {other if wrong[i] else label}",
                "score": float(scores[i]),
                "segment": segments[i].tolist(),
            }
            for i in range(num_predictions)
        ]
    ground_truth, predictions = folder / "ground_truth.json", folder / "predictions.json"
    write_text(ground_truth, json.dumps({"version": "made up", "taxonomy": [], "database": database}))
    write_text(predictions, json.dumps({"version": "made up", "results": results, "external_data": {}}))
    return ground_truth, predictions


if __name__ == "__main__":
    main()
