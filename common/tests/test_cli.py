"""The console command: its tables, and that every bad input is one clear line and exit code 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dr2net
from dr2net.cli import find_model, main, parse_bytes, parse_shape

FACTORY = """
from timm.models.vision_transformer import VisionTransformer

def small():
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=5)

def deep():  # at (1, 1) a stream grows 1.6 times per branch
    return VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=16, num_heads=1, num_classes=2)

def not_a_module():
    return 3
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "factory_for_cli.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "factory_for_cli", raising=False)
    return "factory_for_cli"


def table(printed: str, first: str) -> dict[str, list[str]]:
    """Rows of the table whose header begins with `first`, by their first cell."""
    lines = printed.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(first))
    rows = (re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 :])
    return {row[0]: row[1:] for row in rows}


def test_plan_lists_every_method_with_its_split_and_largest_batch(factory: str, capsys) -> None:
    assert main(["plan", "--model", f"{factory}:small", "--input", "64x3x32x32", "--budget", "8MiB"]) == 0
    rows = table(capsys.readouterr().out, "method")
    assert set(rows) == {"conventional", "checkpointed", "reversible", "dr2net"}
    for peak, parameters, gradients, optimizer, activations, fits, most in rows.values():
        parts = [float(cell.split()[0]) for cell in (parameters, gradients, optimizer, activations)]
        assert float(peak.split()[0]) == pytest.approx(sum(parts), abs=0.3)  # each is rounded to 0.1 MiB
        assert (fits == "yes") == (int(most) >= 64)
    assert int(rows["reversible"][-1]) > 2 * int(rows["conventional"][-1])


def test_plan_can_grow_another_dimension_in_steps(factory: str, capsys) -> None:
    command = f"plan --model {factory}:small --input 1x3x32x32 --budget 1GiB --grow 0:10"
    assert main([*command.split(), *"--optimizer sgd --inversion float --live 3".split()]) == 0
    printed = capsys.readouterr().out
    assert all(int(row[-1]) % 10 == 0 and int(row[-1]) > 0 for row in table(printed, "method").values())
    assert printed.count("largest at the peak") == 4


def test_check_prints_the_error_of_each_inversion_along_the_path(factory: str, capsys) -> None:
    command = f"check --model {factory}:small --input 2x3x32x32 --start 1,0.1 --end 0.4,0.7 --path together"
    assert main(command.split()) == 0
    rows = table(capsys.readouterr().out, "progress")
    assert list(rows) == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert rows["0.00"][:2] == ["1", "0.1"] and rows["1.00"][:2] == ["0.4", "0.7"]
    for _, _, exact, _, _ in rows.values():
        assert float(exact) < 1e-5  # float32 rounding, at every coefficient
    assert float(rows["0.00"][4]) > 1e-4  # the float inverse, six branches at growth 10.9 each


def test_check_says_where_the_exact_inversion_overflows(factory: str, capsys) -> None:
    pair = "1,1"
    command = f"check --model {factory}:deep --input 2x3x32x32 --start {pair} --end {pair}"
    assert main(command.split()) == 0
    assert table(capsys.readouterr().out, "progress")["0.00"][2] == "overflow"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan --model no_such_model --input 1x3x32x32", "timm has no model 'no_such_model'"),
        ("plan --model torchvision:no_such --input 1x3x32x32", "torchvision has no model 'no_such'"),
        ("plan --model transformers:NoSuchConfig --input 1x3x32x32", "neither a config class"),
        ("plan --model no_such_package:f --input 1x3x32x32", "cannot import 'f' from 'no_such_package'"),
        ("plan --model FACTORY:absent --input 1x3x32x32", "cannot import 'absent'"),
        ("plan --model FACTORY:not_a_module --input 1x3x32x32", "returned a int, not a torch.nn.Module"),
        ("plan --model FACTORY:small --input 1x3x", "is not a shape"),
        ("plan --model FACTORY:small --input 0x3x32x32", "is not a shape"),
        ("plan --model FACTORY:small --input 1x3x40x40", "does not run on an input of 1x3x40x40"),
        ("plan --model FACTORY:small --input 1x3x32x32 --budget 24", "is not a size"),
        ("plan --model FACTORY:small --input 1x3x32x32 --budget=-1GiB", "is not a size"),
        ("plan --model FACTORY:small --input 1x3x32x32 --beta 2", "outside 0 <= beta <= 1"),
        ("plan --model FACTORY:small --input 1x3x32x32 --beta 1/0", "is not a number"),
        ("plan --model FACTORY:small --input 1x3x32x32 --grow 4", "only the dimensions 0 to 3"),
        ("check --model FACTORY:small --input 1x3x32x32 --start 1", "is not alpha,beta"),
        ("check --model FACTORY:small --input 1x3x32x32 --pretrained", "--pretrained works for timm and torchvision"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(factory: str, capsys, command: str, message: str) -> None:
    arguments = command.replace("FACTORY", factory).split()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["plan", "--model", "vit_tiny_patch16_224", "--input", "1x3x224x224"]) == 2
    assert "pip install 'dr2net[backbones]'" in capsys.readouterr().err


def test_models_of_every_source_are_found() -> None:
    assert type(find_model("torchvision:resnet18")()).__name__ == "ResNet"
    assert type(find_model("transformers:ViTConfig")()).__name__ == "ViTModel"
    assert type(find_model("vit_tiny_patch16_224")()).__name__ == "VisionTransformer"


def test_an_unknown_option_exits_with_code_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--modle", "x"])
    assert stopped.value.code == 2


def test_help_runs_as_a_program() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(dr2net.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "dr2net.cli", "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "dr2net plan" in done.stdout


def test_shapes_and_sizes_are_read() -> None:
    assert parse_shape("16x3x224X224") == (16, 3, 224, 224)
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("80 GB") == 80 * 10**9
    assert parse_bytes("0.5MiB") == 2**19
