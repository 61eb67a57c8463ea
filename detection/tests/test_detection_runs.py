"""The commands evaluate and predict on a real, untrained network: checkpoints, weights, files, what is wrong."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from detection import data as data_file
from detection import evaluate as evaluate_file
from detection import model as model_file
from detection.configs import ROWS, Config
from detection.evaluate import collect, command_of, score_files, score_weights
from detection.metric import evaluate_files
from detection.model import build_model
from detection.predict import Arguments, predict
from detection.tests.toy_pictures import write_coco
from engine import commands
from engine.command_line import run_command
from engine.data.video import probe, write_frames
from engine.settings import to_json
from engine.training import checkpoint
from engine.training.finetuning import apply_method, coefficients


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """The tiny row on three pictures with two classes."""
    base = ROWS["shapes_tiny_dr2net"]()
    data = write_coco(tmp_path_factory.mktemp("toy"))
    data = replace(data, test_size=80)  # for speed, as the single layers
    model = replace(base.model, weights=None, queries=100, encoder_layers=1, decoder_layers=1)
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


def main(monkeypatch: pytest.MonkeyPatch, command: Callable[[], None], *words: str) -> int | str:
    """The exit status of a command line, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit) as stop:
        command()
    return stop.value.code or 0


def evaluate_run() -> None:
    commands.evaluate(Config, model_file, data_file, evaluate_file)


def predict_run() -> None:
    commands.predict(Config, model_file, predict, Arguments)


def annotations(config: Config) -> Path:
    return config.data.root / "annotations" / "instances_val2017.json"


def test_a_run_is_evaluated_and_its_file_alone_gives_the_same(config, run, monkeypatch, capsys):
    assert main(monkeypatch, evaluate_run, str(run)) == 0
    line, path = capsys.readouterr().out.splitlines()
    assert line.startswith("shapes_tiny_dr2net seed 0: AP ") and path == str(run / "detections.json")
    alone = evaluate_files(annotations(config), path)
    words = ", ".join(f"{name} {value:.1f}" for name, value in alone.items() if value is not None)
    assert line.endswith(f": {words}")
    found = json.loads(Path(path).read_text())
    # 100 queries and two classes; all three pictures, one of them empty
    assert len(found) == 3 * 200 and {one["image_id"] for one in found} == {7, 8, 9}
    assert {one["category_id"] for one in found} == {3, 44}


def test_an_image_by_itself_has_the_detections_that_it_has_in_a_batch_of_its_size(config, run):
    _, model = commands.load_run(run, Config, model_file)
    samples = data_file.build_dataset(config, "test")
    with torch.no_grad():
        (alone,) = collect(model, data_file.collate([samples[0, 0]]), config)
        _, second = collect(model, data_file.collate([samples[0, 0], samples[0, 0]]), config)
    # Batches of another size may round differently in float32.
    torch.testing.assert_close(torch.tensor(alone["scores"]), torch.tensor(second["scores"]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(alone["boxes"]), torch.tensor(second["boxes"]), atol=1e-2, rtol=1e-3)


def test_rows_take_one_image_at_a_time_in_evaluation():
    assert {build().run.evaluation_batch for build in ROWS.values()} == {1}


def test_weights_of_a_detector_are_evaluated_by_one_command(config, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    save_file({k: v.contiguous() for k, v in build_model(config).state_dict().items()}, tmp_path / "given.safetensors")
    root = (
        *("--data.root", str(config.data.root), "--data.num-classes", "2", "--data.test-size", "80"),
        *("--model.queries", "100", "--model.encoder-layers", "1", "--model.decoder-layers", "1"),
        *("--run.output", str(tmp_path / "runs")),
    )
    weights = ("--model.weights", str(tmp_path / "given.safetensors"))
    words = ("shapes_tiny_conventional", *weights, *root)
    assert command_of([*words]) is score_weights
    assert main(monkeypatch, lambda: run_command(score_weights), *words) == 0
    *_, line, path = capsys.readouterr().out.splitlines()
    assert path == str(tmp_path / "runs" / "detection" / "shapes_tiny_conventional" / "given" / "detections.json")
    alone = evaluate_files(annotations(config), path)
    words = ", ".join(f"{name} {value:.1f}" for name, value in alone.items() if value is not None)
    assert line == f"{tmp_path / 'given.safetensors'}: {words}"
    for given, what in (
        (("coco_swint_conventional",), "coco_swint_conventional: its weights are no detector's; give --model.weights"),
        (("shapes_tiny_other",), "shapes_tiny_other"),
        (("shapes_tiny_conventional", "--model.weights", "absent.pth", *root), "absent.pth"),
        (
            ("shapes_tiny_conventional", *weights, *root, "--data.num-classes", "5"),
            "head.class_embed.0.weight and 4 more stay random in this row, so there is nothing to score",
        ),
    ):
        said = main(monkeypatch, lambda: run_command(score_weights), *given)
        assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said and what in said


def test_the_command_line_says_which_of_the_three_is_meant(run):
    assert command_of(["--ground-truth", "a.json", "--predictions", "b.json"]) is score_files
    assert command_of(["--predictions=b.json"]) is score_files
    assert command_of(["coco_swinl_dr2net", "--model.weights", "a.pth"]) is score_weights
    for words in ([str(run)], ["runs/absent"], ["--help"], []):
        assert command_of(words) is None


def test_a_checkpoint_and_a_picture_a_folder_or_a_video_give_files(config, run, tmp_path, monkeypatch, capsys):
    clip = tmp_path / "clip.mp4"
    pixels = torch.arange(128 * 96 * 3).reshape(96, 128, 3).remainder(255).to(torch.uint8).numpy()
    write_frames(clip, (pixels for _ in range(3)), 5.0)
    for given, names in (
        (config.data.root / "val2017" / "a.jpg", ["a.png", "a.json"]),
        (config.data.root / "val2017", ["detections.json", ""]),
        (clip, ["clip.mp4", "clip.json"]),
    ):
        output = tmp_path / "out" / given.stem
        assert main(monkeypatch, predict_run, str(run), str(given), "--output", str(output), "--min-score", "0") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2:] == [str(output / name) for name in names]
    assert len(json.loads((tmp_path / "out" / "a" / "a.json").read_text())) == 200
    assert len(json.loads((tmp_path / "out" / "val2017" / "detections.json").read_text())) == 600
    assert probe(tmp_path / "out" / "clip" / "clip.mp4").num_frames == 3
    assert Image.open(tmp_path / "out" / "val2017" / "b.png").size == (343, 480)


@pytest.mark.parametrize("words", [(), ("absent",), ("absent", "a.jpg"), ("--min-score", "2")])
def test_bad_words_of_predict_are_one_line(run, words, monkeypatch):
    said = main(monkeypatch, predict_run, *words)
    assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said


def test_a_run_whose_classes_are_other_than_the_annotations_is_named(config, run, tmp_path, monkeypatch):
    content = json.loads(annotations(config).read_text())
    content["categories"].append({"id": 90, "name": "third"})
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    for command, words in ((evaluate_run, ()), (predict_run, (str(config.data.root / "val2017" / "a.jpg"),))):
        said = main(monkeypatch, command, str(run), *words, "--root", str(tmp_path))
        assert isinstance(said, str) and "has 3 classes, the configuration says 2" in said and "\n" not in said
