"""Records, and the tables and figures made of them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from toy_training import toy_config

from dr2net.options import Options
from dr2net.styles import STYLES
from engine.config import METHODS
from engine.records import provenance, tables
from engine.records import record as results
from engine.records.record import Record
from engine.training.log import Log

ROOT = Path(__file__).parents[3]
MIB = 2**20


def make_record(tmp_path: Path, method: str = "dr2net", seed: int = 0, accuracy: float = 80.0) -> Record:
    options = Options(tolerance=1e-2, chunk_mib=1 if method == "checkpointed_chunks" else None)
    changes = {"finetuning": {"method": method, "options": options}, "run": {"seed": seed}}
    config = toy_config(tmp_path / "runs", changes)
    peak = {"conventional": 5000, "frozen": 300, "checkpointed": 1200, "reversible": 900}.get(method, 930) * MIB
    return results.build_record(
        config,
        metrics={"accuracy": accuracy, "other": 1.0},
        memory={"source": "measured", "peak": peak, "activations": peak // 2},
        seconds={"step": 0.25, "training": 10.0},
        device="cpu",
        gradient_checks=[{"epoch": 0, "alpha": 1.0, "beta": 0.1, "error": 3e-7}]
        if method in ("dr2net", "dr2net_dynamic")
        else [],
        curve=[{"epoch": 1, "loss": 0.1}],
    )


def planned(record: Record) -> Record:
    """The same row at paper scale: never run, memory predicted."""
    memory = {"source": "predicted", "peak": 7000 * MIB, "activations": 6000 * MIB}
    return replace(
        record, row="big_vit_dr2net", status="not run", metrics={}, seconds={}, gradient_checks=[], memory=memory
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A results folder with all methods, two seeds each, and one planned row."""
    target = tmp_path / "results"
    target.mkdir()
    (target / "published.json").write_text((ROOT / "results" / "published.json").read_text())
    records = [make_record(tmp_path, m, seed, 80.0 + 2 * seed) for m in METHODS for seed in (0, 1)]
    results.publish([*records, planned(records[-1])], target)
    return target


def test_a_record_comes_back_equal(tmp_path):
    record = make_record(tmp_path)
    assert results.read_record(results.write_record(record, tmp_path)) == record


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "record.json").write_text('{"row": "x"}')
    with pytest.raises(ValueError, match="record.json is not a Record"):
        results.read_record(tmp_path / "record.json")
    (tmp_path / "row.json").write_text("[]")
    with pytest.raises(ValueError, match="row.json does not hold the Records of a row"):
        results.read_row(tmp_path / "row.json")


def test_a_record_says_where_it_comes_from(tmp_path):
    record = make_record(tmp_path)
    assert (record.task, record.row, record.status) == ("toy_task", "toy_vit_dr2net", "tiny")
    assert record.versions["torch"] and record.commit and record.command
    assert record.config["finetuning"]["schedule"]["start"] == [7 / 8, 1 / 8]
    json.dumps(record.config)


def test_a_run_is_finished_only_with_the_same_config_and_code(tmp_path, monkeypatch):
    config = toy_config(tmp_path)
    record = results.build_record(
        config, metrics={"accuracy": 1.0}, memory={}, seconds={}, device="cpu", gradient_checks=[], curve=[]
    )
    assert not results.is_finished(config)
    results.write_record(record, results.run_folder(config))
    assert results.is_finished(config)
    assert results.is_finished(replace(config, run=replace(config.run, num_workers=7, log_every_steps=1)))
    assert not results.is_finished(replace(config, model=replace(config.model, dropout=0.3)))
    assert not results.is_finished(replace(config, run=replace(config.run, micro_batch=2)))
    monkeypatch.setattr(results, "sources_hash", lambda task: "other code")
    assert not results.is_finished(config)


def test_prose_does_not_change_the_code_hash_but_code_does():
    code = 'def f(x):\n    """Doc."""\n    return x + 1  # why\n'
    assert provenance._code(code) == provenance._code("def f(x):\n    return x + 1\n")
    assert provenance._code(code) != provenance._code("def f(x):\n    return x + 2\n")
    assert provenance.sources_hash("toy_task") == provenance.sources_hash("toy_task")
    assert provenance.sources_hash("toy_task") != provenance.sources_hash("no_such_task")


def test_publishing_replaces_the_same_seed_and_drops_another_recipe(tmp_path):
    first, second = make_record(tmp_path, seed=0), make_record(tmp_path, seed=1)
    results.publish([first, second], tmp_path)
    better = replace(first, metrics={"accuracy": 99.0})
    (path,) = results.publish([better], tmp_path)
    assert results.read_row(path) == [better, second]
    changed = replace(first, config={**first.config, "dropout": 0.9})
    results.publish([changed], tmp_path)
    assert results.read_records("toy_task", tmp_path) == [changed]


def test_lines_summarise_seeds(folder):
    lines = tables.group_lines(results.read_records("toy_task", folder))["toy_vit"]
    assert [line.method for line in lines] == list(METHODS)
    assert (lines[0].mean, lines[0].num_seeds) == (81.0, 2)
    assert lines[0].std == pytest.approx(2**0.5)
    assert lines[-1].gradient_error == 3e-7 and lines[0].gradient_error is None


def test_variants_of_a_method_stand_behind_the_methods_and_outside_the_figure(tmp_path, folder):
    plain = tables.group_lines(results.read_records("toy_task", folder))["toy_vit"]
    tables.draw("toy_vit", plain, tmp_path / "plain.png")
    record = make_record(tmp_path, accuracy=70.0)
    names = ["toy_vit_dr2net_constant_1_64", "toy_vit_dr2net_float"]
    results.publish([replace(record, row=name) for name in names], folder)
    records = results.read_records("toy_task", folder)
    lines = tables.group_lines(records)["toy_vit"]
    assert lines[: len(METHODS)] == plain and [line.row for line in lines[len(METHODS) :]] == names
    assert [line.setting for line in lines[len(METHODS) - 1 :]] == ["", "constant_1_64", "float"]
    tables.draw("toy_vit", lines, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert not tables.has_figure([plain[0], *lines[len(METHODS) :]])
    text = io.StringIO()
    tables.print_table(records, Console(file=text, width=120))
    assert "\n  dr2net_constant_1_64  " in text.getvalue() and "toy_vit_dr2net" not in text.getvalue()


def test_a_planned_row_shows_predicted_memory_and_dashes(folder):
    (line,) = tables.group_lines(results.read_records("toy_task", folder))["big_vit"]
    assert tables.cells(line) == [
        "big_vit_dr2net", "Dr2Net, constant", "-", "7,000 (predicted)", "6,000 (predicted)", "-", "-", "-", "not run",
    ]  # fmt: skip


def test_further_metrics_have_columns_of_their_own_behind_the_first(tmp_path):
    first, second = make_record(tmp_path, seed=0), make_record(tmp_path, seed=1)
    records = [
        replace(first, metrics={"mAP": 50.0, "mAP@0.5": 60.0}),
        replace(second, metrics={"mAP": 52, "mAP@0.5": 63}),
    ]
    other = replace(first, row=f"{first.row}_x", metrics={"mAP": 1.0, "mAP@0.7": 2.0})
    (lines,) = tables.group_lines([*records, other]).values()
    assert tables.headers(lines)[:5] == ["row", "method", "mAP", "mAP@0.5", "mAP@0.7"]
    further = tables.further_metrics(lines)
    assert [tables.cells(line, further)[2:5] for line in lines] == [["51.0 ± 1.4", "61.5", "-"], ["1.0", "-", "2.0"]]


def test_the_terminal_table_shows_every_method(folder):
    text = io.StringIO()
    tables.print_table(results.read_records("toy_task", folder), Console(file=text, width=160))
    for word in (*(STYLES[method].title for method in METHODS), "81.0 ± 1.4", "5,000", "3.0e-07", "7,000 (predicted)"):
        assert word in text.getvalue()


def test_the_readme_and_figures_are_written_and_reproducible(folder):
    written = tables.write_all(folder)
    assert [path.name for path in written] == ["toy_vit.png", "README.md"]
    text = (folder / "README.md").read_text()
    assert "| toy_vit_dr2net | Dr2Net, constant | 81.0 ± 1.4 | 1.0 | 930 | 465 | 0.25 | 3.0e-07 | 2 | tiny |" in text
    assert "![toy_vit: metric against peak memory](toy_task/toy_vit.png)" in text
    assert "| COCO 2017 | DINO 4-scale, R50, 12 epochs | AP | 49.2 | - | detrex README |" in text
    assert written[0].read_bytes().startswith(b"\x89PNG")
    tables.write_all(folder)
    assert (folder / "README.md").read_text() == text


def test_the_committed_readme_is_the_one_the_records_give():
    generated, committed = tables.readme(ROOT / "results"), (ROOT / "results" / "README.md").read_text()
    assert generated == committed, "run: python -m engine.records.tables show <task>"


def test_the_log_writes_curves_and_plain_lines(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Log(tmp_path, "row", total=4, done=0, samples=8, every=2, speak=True) as log:
        for step in range(1, 5):
            log.step(step, {"loss_a": 1.0 / step}, 0.1, 0.5, 0.25)
        log.epoch(1, 4, {"epoch": 1, "step": 4, "accuracy": 50.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["2/4", "4/4"]
    assert "alpha 0.500 beta 0.250" in lines[1] and "accuracy 50" in lines[-1]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    assert events.Scalars("epoch/accuracy")[0].value == 50


def test_a_silent_process_writes_nothing(tmp_path, capsys):
    with Log(tmp_path, "row", total=1, done=0, samples=8, every=1, speak=False) as log:
        log.step(1, {"loss": 1.0}, 0.1, None, None)
        log.note("not heard")
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
