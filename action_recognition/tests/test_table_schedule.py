"""The table and the figure of the schedule ablation, from Records as the engine writes them."""

from dataclasses import replace
from pathlib import Path

import pytest

from action_recognition import table_schedule
from action_recognition.configs import ROWS
from engine.config import Finetuning
from engine.records import record as results
from engine.settings import to_json

MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A results folder with three seeds of every row of the ablation."""
    first = results.build_record(
        ROWS["motion_vits_conventional"](),
        metrics={},
        memory={"source": "measured", "activations": 300 * MIB},
        seconds={"step": 0.25},
        device="cpu",
        gradient_checks=[],
        curve=[],
    )
    errors = [{"epoch": epoch, "alpha": 1.0, "beta": 0.1, "error": error} for epoch, error in enumerate((0.0, 2e-7))]
    records = []
    for place, name in enumerate(table_schedule.SETTING_ROWS):
        config = ROWS[name]()
        run = replace(first, row=name, method=config.finetuning.method, gradient_checks=[] if place == 0 else errors)
        run = replace(run, memory={**first.memory, "peak": (500 + place) * MIB})
        for seed in (0, 1, 2):
            settings = to_json(replace(config, run=replace(config.run, seed=seed)))
            records.append(replace(run, seed=seed, config=settings, metrics={"top1": 70.0 + place + 2 * seed}))
    results.publish(records, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name, bits",
    [
        ("constant_1_64", 6),
        ("constant_6_64", 4),  # ceil(log2(64 / 6))
        ("constant_1_16", 4),
        ("constant_1_4", 2),
        ("constant_1_2", 1),
        ("authors_alternating_0_1", 4),  # the start, where beta is .1, counts
        ("convex_moving", 4),
        ("float", 0),
    ],
)
def test_stored_bits_are_those_of_the_worst_moment(name, bits):
    assert table_schedule.stored_bits(ROWS[f"motion_vits_dr2net_{name}"]().finetuning) == bits


def test_stored_bits_of_the_other_methods():
    assert table_schedule.stored_bits(Finetuning(method="reversible")) == 0
    assert table_schedule.stored_bits(Finetuning(method="checkpointed")) == 16
    assert table_schedule.stored_bits(Finetuning(method="conventional")) is None


def test_table_and_figure_come_from_the_records(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["table_schedule", "--results", str(folder)])
    table_schedule.main()
    text = (folder / "action_recognition" / "schedule.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(lines) == len(table_schedule.SETTING_ROWS)
    assert lines[0] == "| conventional | - | - | 72.0 ± 2.0 | 3 | - | - | 500 | 0.25 |"
    assert lines[1] == "| reversible | (0, 1) | exact | 73.0 ± 2.0 | 3 | 2.0e-07 | 0 | 501 | 0.25 |"
    assert (
        "| dr2net_authors_alternating_04_07 | (1, 0.1) to (0.4, 0.7) at 0.6, alternating | exact | 77.0 ± 2.0 | 3 "
        "| 2.0e-07 | 4 | 505 | 0.25 |"
    ) in lines
    assert (folder / "action_recognition" / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_an_ablation_that_has_only_begun_is_drawn_too(folder):
    for path in (folder / "action_recognition").glob("*.json"):
        if path.stem not in ("motion_vits_conventional", "motion_vits_dr2net_constant_1_4"):
            path.unlink()
    found = table_schedule.collect(results.read_records("action_recognition", folder))
    assert [line.row for line, _ in found] == ["motion_vits_conventional", "motion_vits_dr2net_constant_1_4"]
    table_schedule.draw(found, folder / "schedule.png")
    assert (folder / "schedule.png").exists()


def test_settings_that_store_the_same_stand_side_by_side():
    places = table_schedule.places_of([("a", 4), ("b", 4), ("c", 4), ("d", 1)])
    assert places == pytest.approx({"a": 4 - 0.13, "b": 4, "c": 4 + 0.13, "d": 1})


def test_no_record_is_an_error_that_names_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["table_schedule", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        table_schedule.main()
    assert "bash scripts/table_schedule.sh" in capsys.readouterr().err


def test_a_dry_run_lists_what_would_be_trained_seed_by_seed(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no runs here
    table_schedule.train_rows([0, 7], True, tmp_path)
    first, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert first[-3:] == ["action_recognition.prepare", "--preset", "laptop"]
    wanted = [[name, "--seed", seed] for seed in ("0", "7") for name in table_schedule.SETTING_ROWS]
    assert [line[-3:] for line in lines] == wanted
