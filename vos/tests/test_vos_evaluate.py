"""From the network's masks to numbers and files: runs and files alike, A2D, Ref-YouTube-VOS, and what is wrong."""

import json
import math
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from engine.command_line import run_command
from vos import evaluate as module
from vos.configs import ROWS, Config
from vos.evaluate import as_samples, collect, floors, read_truth, score, score_files, score_weights, write
from vos.tests.toy_clips import EXPRESSIONS, FRAMES, SIZE, masks_of_sentences, objects_of, write_a2d, write_refytvos

ALL = pytest.approx(100, abs=1e-9)  # the official precision has an epsilon of 2e-16 below its fraction line
Answer = tuple[Tensor, Tensor]  # scores (T, Q), masks (T, Q, H, W)


class Oracle(torch.nn.Module):
    """A network that answers each sentence with what it was given; its own head."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        super().__init__()
        self.answers, self.head, self.asked = answers, self, []

    def forward(self, batch: dict[str, Any]) -> list[str]:
        return batch["name"]

    def scores(self, outputs: list[str], batch: dict[str, Any]) -> list[Tensor]:
        return [self.answers[name][0] for name in outputs]

    def segment_frames(
        self, outputs: list[str], batch: dict[str, Any], sample: int, queries: Tensor | None = None
    ) -> Iterator[Tensor]:
        for masks in self.answers[outputs[sample]][1]:
            chosen = masks if queries is None else masks[queries]
            self.asked.append(len(chosen))
            yield chosen


def answers() -> dict[str, Answer]:
    """Of the true mask, its left half and nothing, scores .2, .9 and .1, the truth in the second of two frames."""
    found = {}
    for name, mask in masks_of_sentences().items():
        half = mask.copy()
        half[:, mask.any(axis=0).nonzero()[0][6] :] = False
        masks = np.stack([np.zeros((3, *SIZE), bool), np.stack([mask, half, np.zeros(SIZE, bool)])])
        found[name] = torch.tensor([[0.5] * 3, [0.2, 0.9, 0.1]]), torch.from_numpy(masks)
    return found


def rows_of(found: dict[str, Answer], config: Config, size: int = 1, frame: int = 1) -> list:
    names = list(found)
    parts = [names[k : k + size] for k in range(0, len(names), size)]
    return [row for part in parts for row in collect(Oracle(found), {"name": part, "frame": [frame] * size}, config)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    base = ROWS["referring_tiny_dr2net"]()
    return replace(base, data=replace(base.data, root=write_a2d(tmp_path / "a2d"), num_videos=None))


@pytest.fixture
def videos(tmp_path: Path) -> Config:
    base = ROWS["refytvos_swint_dr2net"]()
    return replace(base, data=replace(base.data, root=write_refytvos(tmp_path / "refytvos")))


def test_right_masks_behind_worse_ones_count_in_map_alone(config):
    metrics = score(rows_of(answers(), config), read_truth(config), config)
    assert next(iter(metrics)) == "mAP"
    assert metrics["mAP"] > 50 > metrics["mAP_best"]
    assert metrics["P@0.5"] == 0 and metrics["IoU_overall"] == metrics["IoU_mean"] == pytest.approx(50)


def test_the_true_masks_give_a_hundred_at_the_size_of_the_annotation(config):
    best = {name: (scores[:, :1], masks[:, :1]) for name, (scores, masks) in answers().items()}
    metrics = score(rows_of(best, config), read_truth(config), config)
    assert metrics == dict.fromkeys(metrics, ALL)


def test_numbers_do_not_depend_on_batches_their_order_or_samples_seen_twice(config):
    found, truth = answers(), read_truth(config)
    assert list(truth.masks) == ["aa 3 1", "aa 7 1", "aa 3 2", "bb 2 1"]
    rows = rows_of(found, config)
    metrics = score(rows, truth, config)
    assert score(rows_of(found, config, 2), truth, config) == metrics
    assert score(rows[::-1] + rows[:1], truth, config) == metrics


def test_the_written_files_alone_give_the_numbers_of_the_run(config, tmp_path, monkeypatch, capsys):
    truth = read_truth(config)
    rows = rows_of(answers(), config)
    path = write(tmp_path, rows, truth, config)
    entries = json.loads(path.read_text())
    assert path.name == "predictions.json" and len(entries) == 12
    assert set(entries[0]) == {"image_id", "category_id", "segmentation", "score"}
    files = ("--ground-truth", str(tmp_path / "ground_truth.json"), "--predictions", str(path))
    assert run_main(monkeypatch, *files) == 0
    expected = [f"{name} {value:.2f}" for name, value in score(rows, truth, config).items()]
    assert capsys.readouterr().out.splitlines() == expected


def test_floors_say_what_is_reached_without_the_sentence(config):
    truth = read_truth(config)
    found = floors(as_samples(rows_of(answers(), config), truth), truth.objects)
    assert list(found) == ["best query by the truth", "random query", "all objects"]
    assert found["best query by the truth"] == dict.fromkeys(found["random query"], ALL)
    # Where a frame has two objects of one size, both together share half with one of them: .5, 1, .5, 1.
    assert found["all objects"]["IoU_mean"] == pytest.approx(75)
    assert found["random query"]["IoU_mean"] < 90
    assert floors(
        {"a": {"truth": truth.masks["aa 3 1"], "masks": [], "scores": np.zeros(0)}}, {"a": truth.objects["aa 3 1"]}
    )


def test_samples_that_were_not_looked_at_are_told_and_count_as_missed(config):
    rows = rows_of({name: a for name, a in answers().items() if name != "bb 2 1"}, config)
    truth = read_truth(config)
    with pytest.warns(UserWarning, match=r"1 of 4 samples were not looked at \(bb 2 1\)"):
        metrics = score(rows, truth, config)
    assert metrics["IoU_mean"] == pytest.approx(37.5, abs=1e-4)
    with pytest.raises(ValueError, match="'zz 1 1': a sample that the annotations do not have"):
        score([{**rows[0], "name": "zz 1 1"}], truth, config)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_their_sample(config, value):
    found = answers()
    found["aa 7 1"][0][1, 2] = value
    with pytest.raises(ValueError, match="aa 7 1: the network's scores are not finite"):
        rows_of(found, config)


def test_truth_that_cannot_be_read_is_told_before_a_training(config):
    h5 = config.data.root / "text_annotations" / "a2d_annotation_with_instances" / "aa" / "00007.h5"
    whole = h5.read_bytes()
    h5.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00007.h5"):
        read_truth(config)
    with h5py.File(h5, "w") as file:  # the instances can be read, the masks cannot
        file["instance"] = np.array([1])
    with pytest.raises(ValueError, match=r"00007.h5"):
        read_truth(config)
    skipping = replace(config, data=replace(config.data, on_broken="skip"))
    with pytest.warns(UserWarning, match=r"aa 7 1 is not scored: .*00007.h5"):
        truth = read_truth(skipping)
    assert list(truth.masks) == ["aa 3 1", "aa 3 2", "bb 2 1"]
    assert score(rows_of(answers(), skipping), truth, skipping)["IoU_mean"] == pytest.approx(50)
    with pytest.raises(FileNotFoundError, match=r"videoset.csv"):
        read_truth(replace(config, data=replace(config.data, root=config.data.root / "absent")))


def expressions(change: bool = False) -> dict[str, Answer]:
    """Two queries: nothing at .4, the true mask at .3, then .9; with `change` that of one expression is empty."""
    found = {}
    for video, own in EXPRESSIONS.items():
        count = len(FRAMES[video])
        for key, instance in own.items():
            masks = np.stack([objects_of(video, k) == int(instance) for k in range(count)])
            if change and (video, key) == ("vv", "1"):
                masks[:] = False
            scores = torch.full((count, 2), 0.4)
            scores[:, 1] = torch.tensor([0.3, *[0.9] * (count - 1)])
            found[f"{video} {key}"] = scores, torch.from_numpy(np.stack([np.zeros_like(masks), masks], axis=1))
    return found


def test_of_a_video_the_query_of_the_best_mean_is_taken_and_no_other_mask_made(videos):
    model = Oracle(expressions())
    rows = collect(model, {"name": list(model.answers), "frame": [-1] * 3}, videos)
    assert set(model.asked) == {1}
    assert [len(row["masks"]) for row in rows] == [3, 3, 2]
    assert score(rows, read_truth(videos), videos) == {"J&F": 100, "J": 100, "F": 100}


def test_a_video_without_the_object_in_its_last_frame_wants_an_empty_mask_there(videos):
    metrics = score(rows_of(expressions(change=True), videos, frame=-1), read_truth(videos), videos)
    assert metrics == pytest.approx(dict.fromkeys(("J&F", "J", "F"), 100 * (1 + 1 / 3 + 1) / 3))


def test_an_object_that_no_mask_shows_is_told_as_empty_masks_are_right_there(videos):
    file = videos.data.root / "meta_expressions" / "valid" / "meta_expressions.json"
    file.write_text(file.read_text().replace('"obj_id": "2"', '"obj_id": "9"'))
    rows = rows_of(expressions(), videos, frame=-1)
    with pytest.warns(UserWarning, match=r"1 of 3 expressions are about an object that no true mask shows.*: vv 1; "):
        score(rows, read_truth(videos), videos)


def test_the_written_zip_alone_gives_the_numbers_of_the_run(videos, tmp_path, monkeypatch, capsys):
    rows, truth = rows_of(expressions(change=True), videos, frame=-1), read_truth(videos)
    path = write(tmp_path, rows, truth, videos)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 8
    expected = [f"{name} {value:.2f}" for name, value in score(rows, truth, videos).items()]
    root = str(videos.data.root)
    assert run_main(monkeypatch, "--ground-truth", root, "--predictions", str(path)) == 0
    assert capsys.readouterr().out.splitlines() == expected
    assert run_main(monkeypatch, "--ground-truth", str(path), "--predictions", str(path)) == 0
    assert capsys.readouterr().out.splitlines() == ["J&F 100.00", "J 100.00", "F 100.00"]


def test_without_true_masks_there_is_the_zip_and_a_warning(tmp_path):
    base = ROWS["refytvos_swint_dr2net"]()
    root = write_refytvos(tmp_path / "refytvos", with_objects=False)
    config = replace(base, data=replace(base.data, root=root))
    with pytest.warns(UserWarning, match="no expression of valid has masks, so a training ends without metrics"):
        truth = read_truth(config)
    rows = rows_of(expressions(), config, frame=-1)
    with pytest.warns(UserWarning, match="no expression has true masks"):
        assert score(rows, truth, config) == {}
    assert write(tmp_path, rows, truth, config).exists()


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str, command: Any = score_files) -> int | str:
    """The exit status of the command line, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    return stop.value.code or 0


def test_words_choose_between_files_weights_and_runs(tmp_path, monkeypatch):
    assert module.command_of(["--ground-truth", "a", "--predictions", "b"]) is score_files
    assert module.command_of(["a2d_swint_conventional", "--model.weights", "x"]) is score_weights
    assert module.command_of([str(tmp_path), "--floors"]) is module.score_run
    for words, said in (
        (["a2d_swint_conventional"], "its weights are a backbone's; give --model.weights FILE"),
        (["referring_tiny_dr2net"], "its weights are a backbone's"),
    ):
        line = run_main(monkeypatch, *words, command=score_weights)
        assert isinstance(line, str) and said in line
