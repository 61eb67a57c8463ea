"""What a GPU is checked with, on a CPU: each line of it runs, finds what it looks for, survives what a card may do."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import check_gpu, gpu_contracts, gpu_costs, gpu_parallel
from scripts.gpu_card import Card, attempt, find_card, relative
from scripts.gpu_contracts import Case
from scripts.gpu_costs import RESOLUTION, longest

ROOT = Path(__file__).resolve().parents[3]
PARTS = ("contracts", "peaks", "times", "clips")


def start(python: str | Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts" / "check_gpu.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_without_a_card_the_script_says_so_in_one_line() -> None:
    done = start(sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["check_gpu.sh: torch sees no CUDA device here: skipped"]


def test_with_a_card_the_script_starts_the_checks(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$PYTORCH_ALLOC_CONF $*"\n')  # sees a card
    python.chmod(0o755)
    done = start(python, "--minutes", "3")
    assert done.stdout == "expandable_segments:True -m scripts.check_gpu --minutes 3\n", done.stderr


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, record, page."""
    code = check_gpu.main(["--device", "cpu", "--small", "--output", str(tmp_path), *words])
    (record,), (text,) = ([p.read_text() for p in tmp_path.glob(f"cpu*.{kind}")] for kind in ("json", "md"))
    return code, json.loads(record), text


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One network, one precision, two methods, one clip."""
    for module in (gpu_contracts, gpu_costs):
        monkeypatch.setattr(module, "KINDS", ("ViT",))
    monkeypatch.setattr(gpu_contracts, "PRECISIONS", {"fp16": torch.float16})
    monkeypatch.setattr(gpu_costs.planner, "PRECISIONS", {"bf16": torch.bfloat16})
    monkeypatch.setattr(gpu_costs, "METHODS", ("conventional", "dr2net, chunks"))
    monkeypatch.setattr(gpu_costs, "CLIPS", ("conventional",))
    monkeypatch.setattr(gpu_costs, "ROUNDS", 2)


def test_contracts_run_on_a_cpu_and_the_page_is_of_the_record(little: None, tmp_path: Path) -> None:
    code, record, text = run(tmp_path, "--parts", "contracts")
    assert code == 0 and [row["ok"] for row in record["parts"]["contracts"]] == 7 * [True], text
    assert text == check_gpu.page(record) and "Tiny networks" in text


def test_peaks_times_and_clips_run_on_a_cpu_where_the_plan_is_what_is_counted(little: None, tmp_path: Path) -> None:
    code, record, text = run(tmp_path, "--parts", "peaks", "times", "clips")
    assert code == 0 and all(row["ok"] for rows in record["parts"].values() for row in rows), text
    assert text == check_gpu.page(record) and "Peaks are counted by dr2net.memory: no allocator's, on a CPU." in text
    plain, ours = record["parts"]["peaks"]
    assert plain["measured"] == pytest.approx(plain["planned"], rel=0.02) and ours["measured"] < plain["measured"]
    assert [len(row["seconds"]) for row in record["parts"]["times"]] == [2, 2]
    (clip,) = record["parts"]["clips"]
    assert clip["trains"] == clip["planned"] and clip["why"] == "out of memory"


@pytest.mark.slow
def test_all_networks_precisions_and_ways_to_go_parallel_pass_on_a_cpu(tmp_path: Path) -> None:
    code, record, text = run(tmp_path, "--parts", "contracts", "parallel", "--minutes", "60")
    assert code == 0 and "Failed:\n\nNone." in text
    assert [len(rows) for rows in record["parts"].values()] == [63, 3]


def small_card(**changes: Any) -> Card:
    return Card(
        **{"device": "cpu", "name": "cpu", "budget": 1 << 30, "small": True, "ends": time.monotonic() + 999} | changes
    )


@pytest.mark.filterwarnings("ignore:float inversion")
def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Case.converted
    monkeypatch.setattr(Case, "converted", lambda case, **how: right(case, **{"inversion": "float"} | how))
    found = gpu_contracts.streams(Case(small_card(), "ViT", "fp32"))
    assert not found["ok"] and found["found"].startswith("1 of 4")  # the last is kept, not rebuilt
    monkeypatch.setattr(Case, "converted", lambda case, **how: right(case, **how if how else {"inversion": "float"}))
    found = gpu_contracts.gradient(Case(small_card(), "ViT", "fp32"))
    assert not found["ok"] and found["noise"] == 0 and found["error"] > 1e-5


def test_a_check_that_fails_is_named_and_the_others_go_on(little, monkeypatch, tmp_path, capsys) -> None:
    def refuse(_: Case) -> dict:
        raise RuntimeError("no kernel image | for this device\nand more")

    monkeypatch.setattr(gpu_contracts, "CONTRACTS", {"gradient": refuse, "weights": gpu_contracts.weights})
    code, record, text = run(tmp_path, "--parts", "contracts")
    assert code == 1 and [row["ok"] for row in record["parts"]["contracts"]] == [False, True]
    failed = "ViT, fp16, gradient: RuntimeError: no kernel image | for this device"
    assert f"- {failed}\n" in text and "FAILED: RuntimeError: no kernel image / for" in text
    assert f"failed: {failed}" in capsys.readouterr().out


def test_when_the_time_is_up_nothing_begins_and_nothing_fails(little: None, tmp_path: Path) -> None:
    code, record, text = run(tmp_path, "--minutes", "-1", "--parts", *PARTS, "parallel")
    rows = [row for rows in record["parts"].values() for row in rows]
    assert code == 0 and {row["ok"] for row in rows} == {None}
    assert text.count("not begun: the time was up") == len(rows) == 15


def test_an_empty_record_of_two_cards_says_that_the_processes_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parallel.mp, "spawn", lambda *given, nprocs: None)
    rows = gpu_parallel.run(small_card())
    assert [row["problem"] for row in rows] == len(gpu_parallel.WAYS) * ["the processes ended without a result"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu_parallel.run(small_card(device="cuda")) == []


def test_the_longest_is_found_whatever_the_plan_said() -> None:
    for limit in (1, 2, 3, 7, 50, 333):
        for start in (1, 2, 5, 40, 333, 2000):
            low, high = longest(lambda n, limit=limit: n <= limit, start, lambda: False)
            assert low <= limit < high and high - low <= max(1, low // RESOLUTION)
    assert longest(lambda n: n <= 10, 10, lambda: True) == (1, None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of 80 GiB"), RuntimeError("index does not fit 32 bit")])
def test_a_clip_that_is_refused_is_given_up_with_the_reason(monkeypatch, error: Exception) -> None:
    def measure(step, model, optimizer) -> Any:
        tried.append(1)
        if len(tried) in refused:
            raise error
        return type("Memory", (), {"peak": 0})

    monkeypatch.setattr(gpu_costs.memory, "measure", measure)
    monkeypatch.setattr(gpu_costs.memory, "largest", lambda peak, budget: 2)
    model = gpu_costs.video_swin("tiny")
    tried, refused = [], {3}
    found = gpu_costs.clip(small_card(), model, "conventional")
    why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "RuntimeError: index does not fit 32 bit"
    assert (found["planned"], found["trains"], found["refused"], found["why"]) == (32, 32, 48, why)
    assert gpu_costs.shown(found) == f"32; 48: {why}"
    assert gpu_costs.shown(found | {"refused": None}) == "at least 32: the time was up"
    tried, refused = [], {1}
    found = gpu_costs.clip(small_card(), model, "conventional")
    assert not found["ok"] and found["problem"] == f"not even 16 frames train: {why}" == gpu_costs.shown(found)


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_gpu.main([]) == 2 and check_gpu.main(["--device", "cpu"]) == 2
    assert [line[:24] for line in capsys.readouterr().err.splitlines()] == [
        "check_gpu: --device cuda",
        "check_gpu: --device cpu ",
    ]


def test_facts_of_a_card_are_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"total_memory": 100})
    answers = {"is_available": True, "mem_get_info": (90, 100), "get_device_name": "Card X", "device_count": 1}
    answers |= {"get_device_capability": (9, 0)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    card = find_card("cuda", small=False, minutes=1)
    assert (card.name, card.budget, card.peak_is) == ("Card X", 90, "the allocator's") and not card.late()
    facts = check_gpu.facts_of(card)
    assert (facts["card"], facts["bytes"], facts["budget"], facts["capability"]) == ("Card X", 100, 90, [9, 0])


def test_gradients_that_miss_one_or_are_not_finite_are_infinitely_far() -> None:
    one = torch.ones(2)
    assert relative([one, None], [one, one]) == relative([one], [one * torch.inf]) == float("inf")
    assert relative([one], [one]) == 0 and relative([2 * one], [one]) == 1
    assert gpu_contracts.number(float("inf")) == "inf"


def test_committed_pages_of_cards_are_those_of_their_records() -> None:
    for path in (ROOT / "results" / "gpu").glob("*.json"):
        assert path.with_suffix(".md").read_text() == check_gpu.page(json.loads(path.read_text()))


def test_an_error_without_a_message_has_a_name() -> None:
    def fail() -> dict:
        raise KeyError

    assert attempt(small_card(), {"net": "x"}, fail) == {
        "net": "x",
        "ok": False,
        "problem": "KeyError: without a message",
    }
