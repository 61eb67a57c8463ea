"""The example and the notebook that a newcomer copies run as they stand, and say what they promise."""

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "finetune.ipynb"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """Its file as a module, under a name of its own."""
    spec = importlib.util.spec_from_file_location("finetune_own_model", EXAMPLES / "finetune_own_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_folder(folder: Path, classes: str, per_class: int = 5) -> Path:
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", (90, 70), (80 * index, 20 * number, 0)).save(folder / name / f"{number}.jpg")
    return folder


@pytest.mark.slow
def test_a_network_of_ones_own_is_compared_in_three_ways(example: ModuleType, tmp_path: Path, capsys: Any) -> None:
    folder = write_folder(tmp_path / "mine", "ab", per_class=20)
    short = ["--steps", "2", "--pretraining-steps", "1", "--batch-size", "16"]
    results = example.main(["--images", str(folder), *short])
    assert list(results) == ["conventional", "checkpointed", "dr2net"]
    conventional, checkpointed, ours = results.values()
    assert checkpointed.loss == conventional.loss  # the same function, the same dropout masks
    assert ours.memory.activations < checkpointed.memory.activations < conventional.memory.activations / 4
    printed = capsys.readouterr().out
    assert "32 pictures to train on, 8 held out, classes: a, b" in printed
    assert "24  branches ran" in printed and "problem" not in printed


def test_a_folder_that_is_no_folder_of_classes_is_named_in_one_line(
    example: ModuleType, tmp_path: Path, capsys: Any
) -> None:
    for folder, reason in ((write_folder(tmp_path / "one", "a"), "only the class 'a'"), (tmp_path / "none", "none")):
        with pytest.raises(SystemExit) as ended:
            example.main(["--images", str(folder)])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and str(folder) in error and reason in error


def test_drawn_pictures_have_their_shape_in_the_quarter_that_is_asked_for(example: ModuleType) -> None:
    for shape in example.SHAPES:
        for quarter in ((0, 0), (1, 0), (0, 1), (1, 1)):
            picture = example.to_tensor(example.draw(shape, example.random.Random(3), quarter))
            assert picture.shape == (3, 64, 64) and picture.abs().max() <= 1


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_and_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("agg")
    scope: dict[str, Any] = {"__name__": "__main__"}
    for cell in code_cells():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), scope)
        shown = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
        # figures depend on the processor; the lines and their words do not
        words = [[w for w in line.split() if w.isalpha()] for line in printed.getvalue().splitlines()]
        assert words == [[w for w in line.split() if w.isalpha()] for line in shown.splitlines()]
    assert scope["found"].ok
    for values in scope["losses"].values():
        assert sum(values[-10:]) / 10 < sum(values[:5]) / 5 - 0.2


def test_the_notebook_is_committed_with_its_outputs_and_small() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in cells[-1]["outputs"])
    assert NOTEBOOK.stat().st_size < 100_000
