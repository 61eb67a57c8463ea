"""Three steps of each method of an example on tiny data, and what must hold of the Records they leave."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import examples.compare as comparison
from dr2net import Options
from engine.config import Finetuning
from engine.records.record import read_records
from examples.compare import EXAMPLE_METHODS, Classifier, Data, Example, Recipe, Split, compare


def check_each_method(
    name: str, samples: Split, num_classes: int, build: Callable[[], Classifier], tmp_path: Path
) -> None:
    """Asserts on losses, memory, gradients and on what is not done twice."""
    finetuning = Finetuning(options=Options(tolerance=1e-2, chunk_mib=0.001))
    recipe = Recipe(steps=3, batch=4, finetuning=finetuning)
    data = Data(samples, samples, num_classes, {"made": "for tests"})
    example = Example(name, f"examples.{name}.run", recipe, data, build)
    results = tmp_path / "results"
    results.mkdir()
    (results / "published.json").write_text('{"tasks": {}}')
    records = compare(example, EXAMPLE_METHODS, (0,), tmp_path / "runs", results)
    by_method = {record.method: record for record in records}
    assert tuple(by_method) == EXAMPLE_METHODS and read_records("examples", results)
    assert all(0 <= record.metrics["accuracy"] <= 100 and record.memory["peak"] > 0 for record in records)
    assert all(record.status == "partial" and record.sources and record.inputs == data.inputs for record in records)
    peaks = {method: record.memory["activations"] for method, record in by_method.items()}
    assert peaks["frozen"] < peaks["dr2net"] < peaks["conventional"] > peaks["checkpointed"]
    assert by_method["dr2net"].gradient_checks[0]["error"] < 1e-5 and not by_method["conventional"].gradient_checks
    assert f"| {name}_dr2net |" in (results / "README.md").read_text() and (results / "examples" / f"{name}.png").stat()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "train", None)  # none is trained again
        assert compare(example, EXAMPLE_METHODS, (0,), tmp_path / "runs", None) == records
    other = replace(example, data=replace(data, inputs={"made": "anew"}))
    (again,) = compare(other, ("frozen",), (0,), tmp_path / "runs", None)
    assert again.inputs == {"made": "anew"} and again.metrics == by_method["frozen"].metrics
    assert torch.is_grad_enabled()
