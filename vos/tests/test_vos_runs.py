"""The commands evaluate and predict on a real, untrained network: checkpoints, weights, data sets, files."""

import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine import commands
from engine.command_line import run_command
from engine.settings import to_json
from engine.training import checkpoint
from engine.training.finetuning import apply_method, coefficients
from vos import data as data_file
from vos import model as model_file
from vos.coco_files import read_samples
from vos.configs import ROWS, Config
from vos.evaluate import collect, score_files, score_run, score_weights
from vos.metric import score_samples
from vos.model import build_model
from vos.predict import Arguments, predict
from vos.tests.toy_clips import SIZE, write_a2d, write_jhmdb, write_refytvos

NAMES = ["mAP", "mAP_best", "AP50", "AP75", "P@0.5", "P@0.6", "P@0.7", "P@0.8", "P@0.9", "IoU_overall", "IoU_mean"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """The tiny row on two videos, with a smaller head."""
    base = ROWS["referring_tiny_dr2net"]()
    data = replace(base.data, root=write_a2d(tmp_path_factory.mktemp("toy") / "a2d"), image_size=40, max_size=60)
    model = replace(base.model, weights=None, queries=4, encoder_layers=1, decoder_layers=1)
    return replace(base, data=data, model=model)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    """The folder of a run of that row, untrained."""
    torch.manual_seed(0)
    model = build_model(config, pretrained=False)
    apply_method(model, config.finetuning)
    alpha, beta = coefficients(config.finetuning, 1.0)
    folder = tmp_path_factory.mktemp("run")
    state = {"alpha": alpha, "beta": beta, "row": config.row, "config": to_json(config)}
    checkpoint.save(folder / "checkpoint", {"model": model.state_dict()}, state)
    return folder


def main(monkeypatch: pytest.MonkeyPatch, command: Callable[[list[str]], None], *words: str) -> int | str:
    """The exit status of a command line, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    return stop.value.code or 0


def in_words(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())


def test_a_run_is_evaluated_and_its_files_alone_give_the_same(config, run, monkeypatch, capsys):
    assert main(monkeypatch, score_run, str(run), "--floors") == 0
    *floors, line, path = capsys.readouterr().out.splitlines()
    assert [floor.split(":")[0] for floor in floors] == ["best query by the truth", "random query", "all objects"]
    assert path == str(run / "predictions.json")
    metrics = score_samples(read_samples(run / "ground_truth.json", Path(path)))
    assert list(metrics) == NAMES and line == f"referring_tiny_dr2net seed 0: {in_words(metrics)}"
    assert len(json.loads(Path(path).read_text())) == 4 * 4  # sentences at frames, queries


def test_a_sample_by_itself_has_the_masks_that_it_has_in_a_batch_of_its_size(config, run):
    _, model = commands.load_run(run, Config, model_file)
    samples = data_file.build_dataset(config, "test")
    with torch.no_grad():
        (alone,) = collect(model, data_file.collate([samples[0, 0]]), config)
        second = collect(model, data_file.collate([samples[1, 0], samples[0, 0]]), config)[1]
    assert alone["name"] == second["name"] == "aa 3 1"
    np.testing.assert_allclose(alone["scores"], second["scores"], atol=1e-5)
    assert alone["masks"][0]["size"] == list(SIZE)


def test_rows_take_one_sample_at_a_time_in_evaluation():
    assert {build().run.evaluation_batch for build in ROWS.values() if build().preset == "paper"} == {1}


def test_a_run_of_a2d_goes_to_jhmdb_and_to_videos(run, tmp_path, monkeypatch, capsys):
    root = write_jhmdb(tmp_path / "jhmdb")
    assert main(monkeypatch, score_run, str(run), "--kind", "jhmdb", "--root", str(root)) == 0
    line, path = capsys.readouterr().out.splitlines()
    assert line.startswith("referring_tiny_dr2net seed 0 on jhmdb: mAP ") and path == str(
        run / "jhmdb" / "predictions.json"
    )
    assert {one["image_id"] for one in json.loads(Path(path).read_text())} == {"rr 2 1", "rr 5 1"}
    root = write_refytvos(tmp_path / "refytvos")
    words = (str(run), "--kind", "refytvos", "--root", str(root))
    assert main(monkeypatch, score_run, *words) == 0
    line, path = capsys.readouterr().out.splitlines()
    assert path == str(run / "refytvos" / "submission.zip") and len(zipfile.ZipFile(path).namelist()) == 8
    assert main(monkeypatch, score_files, "--ground-truth", str(root), "--predictions", path) == 0
    alone = [f"{float(text.split()[1]):.1f}" for text in capsys.readouterr().out.splitlines()]
    assert line == "referring_tiny_dr2net seed 0 on refytvos: J&F {}, J {}, F {}".format(*alone)
    said = main(monkeypatch, score_run, *words, "--floors")
    assert isinstance(said, str) and "--floors are for a2d and jhmdb" in said


def test_weights_of_a_segmenter_are_evaluated_by_one_command(config, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    given = tmp_path / "given.safetensors"
    save_file({key: value.contiguous() for key, value in build_model(config).state_dict().items()}, given)
    words = (
        *("referring_tiny_conventional", "--model.weights", str(given), "--data.root", str(config.data.root)),
        *("--data.image-size", "40", "--data.max-size", "60", "--model.queries", "4"),
        *("--model.encoder-layers", "1", "--model.decoder-layers", "1", "--run.output", str(tmp_path / "runs")),
    )
    assert main(monkeypatch, score_weights, *words) == 0
    *_, line, path = capsys.readouterr().out.splitlines()
    folder = tmp_path / "runs" / "vos" / "referring_tiny_conventional" / "given"
    assert path == str(folder / "predictions.json")
    assert line == f"{given}: {in_words(score_samples(read_samples(folder / 'ground_truth.json', Path(path))))}"


def test_a_run_finds_something_for_each_sentence_in_a_video(config, run, tmp_path):
    config, model = commands.load_run(run, Config, model_file)
    video = config.data.root / "Release" / "clips320H" / "aa.mp4"
    arguments = Arguments(run=run, input=video, output=tmp_path, query=("the left one", "a bird"))
    with torch.no_grad():
        copy, sheet, table, folder = predict(config, model, arguments)
    assert all(path.exists() for path in (copy, sheet, table))
    for name in ("0_the_left_one", "1_a_bird"):
        masks = [np.asarray(Image.open(path)) for path in sorted((folder / name).glob("*.png"))]
        assert len(masks) == 9 and {mask.shape for mask in masks} == {SIZE}
