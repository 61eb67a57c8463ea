"""From windows of candidates to detections and numbers; outside class scores; runs and files on the command line."""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from action_detection import data as data_file
from action_detection import evaluate as evaluate_file
from action_detection import model as model_file
from action_detection.configs import ROWS, Config, Detection
from action_detection.data import read_annotations
from action_detection.evaluate import (
    Detected,
    class_scores_of,
    collect,
    detections,
    parse_tiou,
    read_truth,
    score,
    score_files,
    with_classes,
    write_detections,
)
from action_detection.metric import evaluate_files
from action_detection.model import build_model
from action_detection.ops import Window
from action_detection.synthetic import Synthetic, write_dataset
from engine import commands
from engine.command_line import run_command
from engine.settings import to_json
from engine.training import checkpoint
from engine.training.finetuning import apply_method, coefficients

SETTINGS = Detection(nms="none", min_score=0.0)
TRUTH = {
    "one": ("validation", 40.0, [("jump", 2.0, 9.0), ("run", 12.0, 20.0)]),
    "two": ("validation", 30.0, [("run", 1.0, 6.0), ("run", 10.0, 25.0)]),
    "empty": ("validation", 30.0, []),
    "train": ("training", 30.0, [("swim", 1.0, 6.0)]),
}


def window(name: str, number: int, rows: list[tuple[float, float, float, int]]) -> Window:
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    return Window(name, number, values[:, :2], values[:, 2], values[:, 3].long())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A row on annotations without videos: classes jump, run, swim."""
    database = {
        name: {
            "subset": subset,
            "duration": duration,
            "annotations": [{"label": label, "segment": [start, end]} for label, start, end in actions],
        }
        for name, (subset, duration, actions) in TRUTH.items()
    }
    (tmp_path / "activity_net.v1-3.min.json").write_text(json.dumps({"database": database}))
    base = ROWS["untrimmed_tiny_dr2net"]()
    return replace(base, data=replace(base.data, root=tmp_path, num_classes=3, num_videos=None), detection=SETTINGS)


def with_class_scores(config: Config, content: object, sha256: str | None = None) -> Config:
    path = config.data.root / "scores.json"
    path.write_text(json.dumps(content))
    detection = replace(config.detection, class_scores=path, class_scores_sha256=sha256)
    return replace(config, model=replace(config.model, class_agnostic=True), detection=detection)


class Oracle(torch.nn.Module):
    """A network that answers each window with rows that the batch carries; its own head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.head = self

    def forward(self, batch: dict) -> dict:
        return {"rows": batch["rows"]}

    def detect(self, outputs: dict, batch: dict, settings: Detection) -> list[Window]:
        parts = zip(batch["name"], batch["window"].tolist(), outputs["rows"], strict=True)
        return [window(name, number, rows) for name, number, rows in parts]


def batches(windows: list[tuple[str, int, list]], size: int) -> list[dict]:
    parts = [windows[i : i + size] for i in range(0, len(windows), size)]
    return [
        {
            "name": [name for name, _, _ in part],
            "window": torch.tensor([number for _, number, _ in part]),
            "rows": [rows for _, _, rows in part],
        }
        for part in parts
    ]


def evaluate(config: Config, batches: list[dict]) -> dict[str, float]:
    """The metrics of what the batches carry, as the engine finds them."""
    rows = [row for batch in batches for row in collect(Oracle(), batch, config)]
    return score(rows, read_truth(config), config)


def test_windows_of_a_video_are_merged_and_each_counts_once():
    first = window("a", 0, [(1, 2, 0.5, 0)])
    second = window("a", 1, [(5, 6, 0.9, 1), (7, 8, 0.1, 0)])
    other = window("b", 0, [])
    found = detections([second, first, other, second], SETTINGS)
    assert list(found) == ["a", "b"]
    assert found["a"].segments.tolist() == [[5, 6], [1, 2], [7, 8]]
    assert found["a"].labels.tolist() == [1, 0, 0]
    assert found["b"].segments.shape == (0, 2)
    again = detections([other, first, second], SETTINGS)
    assert all(torch.equal(one, two) for one, two in zip(found["a"], again["a"], strict=True))


def test_an_action_seen_by_two_windows_is_suppressed_once():
    windows = [window("a", 0, [(4, 8, 0.9, 0)]), window("a", 1, [(4, 8, 0.8, 0)])]
    settings = replace(SETTINGS, nms="hard", iou_threshold=0.5)
    assert detections(windows, settings)["a"].scores.tolist() == pytest.approx([0.9])


def test_candidates_that_are_not_finite_name_their_video():
    with pytest.raises(ValueError, match="video 'a'.*not finite"):
        detections([window("a", 0, [(1, 2, math.nan, 0)])], SETTINGS)


def test_metrics_are_percent_named_by_threshold_and_independent_of_batches(config):
    windows = [
        ("one", 0, [(2, 9, 0.9, 0)]),
        ("one", 1, [(12, 18, 0.8, 1), (30, 31, 0.05, 2)]),  # tIoU .75; swim is not in the subset
        ("two", 0, [(1, 6, 0.7, 1), (10, 25, 0.6, 1)]),
        ("empty", 0, []),
    ]
    config = replace(config, detection=replace(SETTINGS, tious=(0.5, 0.8)))
    metrics = evaluate(config, batches(windows, 1))
    # run at .8: the first of three is false, precision 0, 1/2, 2/3 at recall 0, 1/3, 2/3
    expected = {"average_mAP": (100 + 100 * (1 + 4 / 9) / 2) / 2, "mAP@0.50": 100, "mAP@0.80": 100 * (1 + 4 / 9) / 2}
    assert metrics == pytest.approx(expected)
    assert next(iter(metrics)) == "average_mAP"
    assert evaluate(config, batches(windows, 3)) == metrics
    assert evaluate(config, batches(windows[::-1] + windows[:1], 2)) == metrics
    assert set(evaluate(config, []).values()) == {0.0}


def test_written_detections_evaluated_alone_give_the_same_numbers(config, tmp_path):
    windows = [window("one", 0, [(2.5, 9, 0.9, 0), (11, 20, 0.3, 1)]), window("two", 0, [(3, 24, 0.7, 1)])]
    found = detections(windows, SETTINGS)
    write_detections(tmp_path / "found.json", found, read_annotations(config.data).class_names)
    content = json.loads((tmp_path / "found.json").read_text())
    assert set(content) == {"version", "results", "external_data"}
    assert content["results"]["two"] == [{"label": "run", "score": pytest.approx(0.7), "segment": [3, 24]}]
    tiou = config.detection.tious
    alone = evaluate_files(tmp_path / "activity_net.v1-3.min.json", tmp_path / "found.json", tiou, "validation")
    rows = [
        (w.name, w.window, torch.cat([w.segments, w.scores[:, None], w.labels[:, None]], 1).tolist()) for w in windows
    ]
    metrics = evaluate(config, batches(rows, 2))
    assert list(metrics.values()) == [100 * alone["average_mAP"], *(100 * value for value in alone["mAP"])]


def test_classes_from_outside_multiply_scores_for_the_best_classes():
    actions = Detected(torch.tensor([[0.0, 4.0], [5.0, 9.0]]), torch.tensor([0.8, 0.5]), torch.tensor([0, 0]))
    found = with_classes(actions, np.array([0.1, 0.2, 0.7]), top=2)
    assert found.labels.tolist() == [2, 2, 1, 1]
    assert found.scores.tolist() == pytest.approx([0.56, 0.35, 0.16, 0.10])
    assert found.segments.tolist() == [[0, 4], [5, 9], [0, 4], [5, 9]]
    assert len(with_classes(actions, np.array([1.0]), top=2).labels) == 2


def test_class_scores_are_found_by_name_whatever_the_order(config):
    content = {
        "class": ["swim", "other", "run", "jump"],
        "results": {"one": [0.1, 0.0, 0.2, 0.7], "two": [0, 0, 1, 0], "empty": [0, 0, 0, 1], "further": []},
    }
    config = with_class_scores(config, content)
    scores = class_scores_of(config, read_annotations(config.data))
    assert scores["one"].tolist() == [0.7, 0.2, 0.1]  # jump, run, swim
    assert set(scores) == {"one", "two", "empty"}
    renamed = with_class_scores(config, {"classes": content["class"], "results": content["results"]})
    assert class_scores_of(renamed, read_annotations(config.data))["two"].tolist() == [0, 1, 0]
    rows = [("one", 0, [(2, 9, 0.9, 0)]), ("two", 0, [(1, 6, 0.7, 0), (10, 25, 0.6, 0)])]
    metrics = evaluate(config, batches(rows, 1))
    # jump in `one` and run in `two` are found; run in `one` is not at its place: (1 + 2/3) / 2
    assert metrics["mAP@0.50"] == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_class_scores_that_do_not_fit_are_named_before_training(config):
    names, full = ["jump", "run", "swim"], {name: [0.1, 0.2, 0.7] for name in ("one", "two", "empty")}
    for content, message in (
        ({"class": names[:2], "results": full}, "no scores for 1 classes, among them swim"),
        ({"class": names, "results": {"one": full["one"]}}, "no scores for 2 of 3 test videos, among them two, empty"),
        ({"class": names, "results": {**full, "two": [0.5]}}, "video two: want 3 finite numbers"),
        ({"class": names, "results": {**full, "two": [0.5, 0.5, math.nan]}}, "video two: want 3 finite numbers"),
        ({"class": names, "results": {**full, "two": [0.5, "x", 0.5]}}, "video two: want 3 finite numbers"),
        ({"results": full}, "scores.json: want JSON"),
        ([1], "scores.json: want JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            read_truth(with_class_scores(config, content))
    fine = with_class_scores(config, {"class": names, "results": full})
    digest = hashlib.sha256(fine.detection.class_scores.read_bytes()).hexdigest()
    read_truth(with_class_scores(config, {"class": names, "results": full}, digest))
    with pytest.raises(ValueError, match=f"has sha256 {digest}, expected 0000"):
        read_truth(with_class_scores(config, {"class": names, "results": full}, "0000"))
    with pytest.raises(FileNotFoundError, match="absent.json"):
        read_truth(replace(fine, detection=replace(fine.detection, class_scores=Path("absent.json"))))


def test_class_scores_and_a_class_agnostic_network_need_each_other(config):
    agnostic = replace(config, model=replace(config.model, class_agnostic=True))
    scored = replace(config, detection=replace(config.detection, class_scores=Path("scores.json")))
    for one in (agnostic, scored):
        with pytest.raises(ValueError, match="need each other"):
            read_truth(one)


def test_a_test_subset_without_actions_is_named(config):
    content = json.loads((config.data.root / "activity_net.v1-3.min.json").read_text())
    for name in ("one", "two"):
        content["database"][name]["annotations"] = []
    (config.data.root / "activity_net.v1-3.min.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no annotated actions|classes"):
        read_truth(replace(config, data=replace(config.data, num_classes=1)))


def run_main(monkeypatch: pytest.MonkeyPatch, main: Callable, *words: str) -> int | str:
    """The exit status of a command line, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code or 0


def test_files_on_the_command_line_give_percent_and_one_line_for_bad_input(config, tmp_path, monkeypatch, capsys):
    found = detections([window("one", 0, [(2, 9, 0.9, 0), (12, 18, 0.8, 1)])], SETTINGS)
    write_detections(tmp_path / "found.json", found, ("jump", "run", "swim"))
    files = (
        "--ground-truth",
        str(tmp_path / "activity_net.v1-3.min.json"),
        "--predictions",
        str(tmp_path / "found.json"),
    )
    assert run_main(monkeypatch, score_files, *files, "--tiou", "0.7:0.8:2") == 0
    expected = ["average_mAP 58.33", "mAP@0.70 66.67", "mAP@0.80 50.00"]
    assert capsys.readouterr().out.splitlines() == expected
    (tmp_path / "blocked.json").write_text('["two"]')
    words = (*files, "--tiou", "0.5", "--blocked", str(tmp_path / "blocked.json"))
    assert run_main(monkeypatch, score_files, *words) == 0
    assert capsys.readouterr().out.splitlines() == ["average_mAP 100.00", "mAP@0.50 100.00"]
    for words in ((*files, "--subset", "test"), (*files, "--tiou", "half"), (*files[:2], "--predictions", "absent")):
        said = run_main(monkeypatch, score_files, *words)
        assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said
    for words, what in (((), "ground-truth"), (files[:2], "predictions"), (("run", *files), "run")):
        said = run_main(monkeypatch, score_files, *words)
        assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said and what in said


def test_thresholds_are_written_as_a_range_or_a_list():
    assert parse_tiou("0.5:0.95:10") == tuple(np.linspace(0.5, 0.95, 10))
    assert parse_tiou("0.3,0.5") == (0.3, 0.5)


def save(config: Config, folder: Path) -> None:
    torch.manual_seed(0)
    model = build_model(config, pretrained=False)
    apply_method(model, config.finetuning)
    alpha, beta = coefficients(config.finetuning, 1.0)
    state = {"alpha": alpha, "beta": beta, "row": config.row, "config": to_json(config)}
    checkpoint.save(folder, {"model": model.state_dict()}, state)


def test_a_run_is_evaluated_and_its_file_alone_gives_the_same(tmp_path, monkeypatch, capsys):
    synthetic = Synthetic(num_training=1, num_validation=2, size=32, seconds=(20.0, 20.0), fps=8.0)
    write_dataset(tmp_path / "data", synthetic, workers=1)
    base = ROWS["untrimmed_tiny_dr2net"]()
    data = replace(base.data, root=tmp_path / "data", num_times=16, frames_per_time=2, image_size=32, fps=4.0)
    # An untrained network knows nothing: thresholds that noise reaches.
    detection = replace(base.detection, tious=(0.05, 0.1), min_score=0.0)
    config = replace(base, data=data, detection=detection)
    save(config, tmp_path / "run" / "checkpoint")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        commands.evaluate(Config, model_file, data_file, evaluate_file)
    assert not stop.value.code
    line, path = capsys.readouterr().out.splitlines()
    assert line.startswith("untrimmed_tiny_dr2net seed 0: average_mAP ")
    alone = evaluate_files(tmp_path / "data" / "activity_net.v1-3.min.json", path, detection.tious, "validation")
    assert f"average_mAP {100 * alone['average_mAP']:.1f}, mAP@0.05 {100 * alone['mAP'][0]:.1f}" in line
    loaded, model = commands.load_run(tmp_path / "run", Config, model_file)
    assert loaded == config and not model.training
