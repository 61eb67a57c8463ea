"""Methods of a row timed side by side: each takes its turn in each round, and the ratio is of one round."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import table_row_time


def test_methods_take_turns_and_the_first_round_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def step(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds * (5 if len(order) <= 2 else len(order))  # a machine that becomes slower

    monkeypatch.setattr(table_row_time.time, "process_time", lambda: now[0])
    found = table_row_time.measure({"a": lambda: step("a", 1.0), "b": lambda: step("b", 2.0)}, rounds=2)
    assert order == ["a", "b"] * 3 and found == {"a": [3.0, 5.0], "b": [8.0, 12.0]}


def test_a_row_is_timed_and_stands_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ["toy_task", "toy_vit", "--methods", "dr2net", "--rounds", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["table_row_time", *words])
    table_row_time.main()
    record = json.loads((tmp_path / "row_time_toy_vit.json").read_text())
    assert record["ratios"]["conventional"] == 1 and list(record["seconds"]) == ["conventional", "dr2net"]
    assert f"{record['ratios']['dr2net']:.2f} x conventional" in capsys.readouterr().out
    text = (tmp_path / "row_time.md").read_text()
    assert "| toy_vit |" in text and f"| {record['ratios']['dr2net']:.2f} |" in text
