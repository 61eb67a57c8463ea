"""The console command: its tables, and that every bad input is one clear line and exit code 2."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dr2net
from dr2net.cli import main
from dr2net.inputs import parse_shape
from dr2net.memory import parse_bytes
from dr2net.model_names import find_by_depth, find_model
from dr2net.planner import METHODS

FACTORY = """
from timm.models.vision_transformer import VisionTransformer

def small(depth=3):
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=depth, num_heads=4, num_classes=5)

def deep():  # at (1, 1) a stream grows 1.6 times per branch
    return VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=16, num_heads=1, num_classes=2)

def convolution():
    from torch import nn
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))

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
    """Rows of the table whose header begins with `first`, to the next empty line, by their first cell."""
    lines = printed.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(first))
    lines = list(itertools.takewhile(str.strip, lines[start + 1 :]))
    rows = (re.split(r"\s{2,}", line.strip()) for line in lines)
    return {row[0]: row[1:] for row in rows}


def plan(capsys, command: str) -> str:
    assert main(["plan", *command.split()]) == 0
    return capsys.readouterr().out


def test_plan_lists_every_method_with_its_split_and_largest_batch(factory: str, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    printed = plan(capsys, f"--model {factory}:small --input 64x3x32x32 --budget 8MiB --optimizer sgd")
    rows = table(printed.split("omitted")[0], "method")
    assert list(rows) == [method for method in METHODS if method != "lora"]
    for peak, *parts, fits, most in rows.values():
        assert float(peak.split()[0]) == pytest.approx(sum(float(part.split()[0]) for part in parts), abs=0.4)
        assert len(parts) == 5 and (fits == "yes") == (int(most) >= 64)  # each part is rounded to 0.1 MiB
    assert int(rows["reversible"][-1]) > 2 * int(rows["conventional"][-1])
    assert "omitted: lora (peft is not installed: pip install 'dr2net[lora]')" in printed


@pytest.mark.slow
def test_plan_is_made_for_each_of_several_processes(factory: str, capsys) -> None:
    command = f"--model {factory}:small --input 4x3x32x32 --budget 1MiB --chunk-mib 0 --shards"
    alone, shared = (plan(capsys, f"{command} {shards}") for shards in (1, 4))
    assert "input 4x3x32x32, each of 4 processes" in shared
    few, many = (table(printed.split("omitted")[0], "method")["dr2net"] for printed in (shared, alone))
    assert float(few[0].split()[0]) < float(many[0].split()[0])  # peak
    assert float(few[3].split()[0]) < float(many[3].split()[0]) / 3  # optimizer


def test_plan_can_grow_other_dimensions_in_steps(factory: str, capsys) -> None:
    command = f"--model {factory}:small --input 1x3x32x32 --budget 1GiB --grow 0:10 --chunk-mib 0"
    printed = plan(capsys, f"{command} --optimizer sgd --inversion float --live 3")
    rows = table(printed.split("omitted")[0], "method")
    assert all(int(row[-1]) % 10 == 0 and int(row[-1]) > 0 for row in rows.values())
    assert printed.count("largest at the peak") == len(rows) and "chunks" not in printed


def test_plan_can_grow_the_resolution(factory: str, capsys) -> None:
    rows = table(plan(capsys, f"--model {factory}:convolution --input 1x3x8x8 --budget 1MiB --grow 2,3:8"), "method")
    most = int(rows["conventional"][-1])
    stored = 4 * 3 * most**2  # bytes of the input alone, float32
    assert most % 8 == 0 and 2**20 / 8 < stored < 2**20  # of the 1 MiB, which the output and its gradients share


def test_plan_says_which_methods_a_model_does_not_allow(factory: str, capsys) -> None:
    printed = plan(capsys, f"--model {factory}:convolution --input 1x3x8x8")
    assert list(table(printed.split("omitted")[0], "method")) == ["conventional"]
    reason = "(nothing in Sequential can be made reversible)"
    assert (
        f"checkpointed, checkpointed, chunks, reversible, dr2net, reversible, chunks, dr2net, chunks {reason}"
        in printed
    )


def test_plan_gives_zero_where_not_even_one_fits(factory: str, capsys) -> None:
    rows = table(plan(capsys, f"--model {factory}:small --input 1x3x32x32 --budget 1KiB --chunk-mib 0"), "method")
    assert rows["dr2net"][-2:] == ["no", "0"]


def test_plan_shows_each_phase_of_a_schedule_and_takes_the_worst(factory: str, capsys) -> None:
    printed = plan(capsys, f"--model {factory}:small --input 512x3x32x32 --start 1,0.1 --end 0,1 --chunk-mib 0")
    rows = table(printed, "from")
    assert [row[2] for row in rows.values()] == ["4 bits", "3 bits", "2 bits", "1 bit", "nothing"]
    peaks = [float(row[3].split()[0]) for row in rows.values()]
    assert peaks[0] > peaks[-1] and peaks == sorted(peaks, reverse=True)
    assert float(table(printed, "method")["dr2net"][0].split()[0]) == peaks[0]


def test_plan_draws_peaks_against_size_and_depth(factory: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("dr2net.plan_command.DEPTHS", (1, 2))
    monkeypatch.setattr("dr2net.planner.METHODS", ("conventional", "dr2net"))
    picture = tmp_path / "peaks.png"
    plan(capsys, f"--model {factory}:small --input 1x3x32x32 --budget 2MiB --plot {picture}")
    width, height = (int.from_bytes(picture.read_bytes()[start : start + 4], "big") for start in (16, 20))
    assert width > 2 * height  # of a PNG: two panels side by side


def test_check_prints_the_error_of_each_inversion_along_the_path(factory: str, capsys) -> None:
    command = f"check --model {factory}:small --input 2x3x32x32 --start 1,0.1 --end 0.4,0.7 --path together"
    assert main(command.split()) == 0
    rows = table(capsys.readouterr().out, "progress")
    assert list(rows)[:5] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert rows["0.00"][:2] == ["1", "0.1"] and rows["1.00"][:2] == ["0.4", "0.7"]
    for _, _, exact, _, _, grid in list(rows.values())[:5]:
        assert float(exact) < 1e-5  # float32 rounding, at every coefficient
        assert 0 < float(grid) < 1e-3
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
        ("plan --model FACTORY:small --input 1x3x32x32 --start 1,2", "needs 0 <= beta <= 1"),
        ("plan --model FACTORY:small --input 1x3x32x32 --start 1,1/0", "is not a number"),
        ("plan --model FACTORY:small --input 1x3x32x32 --grow 4", "only the dimensions 0 to 3"),
        ("plan --model FACTORY:small --input 1x3x32x32 --grow 2,:8", "is not a dimension"),
        ("plan --model FACTORY:small --input 1x3x32x32 --grow 2", "does not run on an input of 1x3x1x32"),
        ("plan --model FACTORY:small --input 1x3x32x32 --chunk-mib=-1", "--chunk-mib -1 is no size"),
        ("plan --model FACTORY:small --input 1x3x32x32 --chunk-mib nan", "--chunk-mib nan is no size"),
        ("plan --model FACTORY:small --input 1x3x32x32 --calibrate", "torch sees none here"),
        ("plan --model FACTORY:small --input 1x3x32x32 --shards 0", "0 shards: give the number of processes"),
        ("plan --model FACTORY:convolution --input 1x3x8x8 --plot x.txt", "--plot x.txt is no picture"),
        ("plan --model FACTORY:small --input 999999999x3x32x999999999", "does not run on an input of"),
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
    assert "pip install 'dr2net[models]'" in capsys.readouterr().err


def test_models_of_every_source_are_found() -> None:
    assert type(find_model("torchvision:resnet18")()).__name__ == "ResNet"
    assert type(find_model("transformers:ViTConfig")()).__name__ == "ViTModel"
    assert type(find_model("vit_tiny_patch16_224")()).__name__ == "VisionTransformer"


def test_models_that_take_a_depth_are_built_with_it(factory: str) -> None:
    for name in ("vit_tiny_patch16_224", "transformers:ViTConfig", f"{factory}:small"):
        few, many = (sum(p.numel() for p in find_by_depth(name)(depth).parameters()) for depth in (1, 2))
        assert many > few
    assert (
        find_by_depth("torchvision:swin3d_t") is find_by_depth("resnet18") is find_by_depth(f"{factory}:deep") is None
    )


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
