"""The rules of the house, checked on the source: imports, equal task folders, safe calls, READMEs that are true."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "common" / "dr2net"
TASK_NAMES = ("action_detection", "vos", "action_recognition", "pointcloud", "detection")
TASKS = [name for name in TASK_NAMES if (ROOT / name / "configs.py").exists()]
TASK_FILES = (
    *("README.md", "__init__.py", "configs.py", "data.py", "model.py", "head.py", "evaluate.py", "train.py"),
    *("prepare.py", "predict.py"),
)
MAX_LINES = 400
ENGINE = ROOT / "common" / "engine"
# Inside the engine a part imports the parts before it, and its own.
LAYERS = (
    ("command_line", "files", "config", "settings", "task", "weights", "data", "synthetic", "visual", "detr"),
    ("backbones", "records"),
    ("training",),
    ("rows", "commands"),
)
STANDARD_LIBRARY = set(sys.stdlib_module_names)


def sources() -> list[Path]:
    folders = [ROOT / "common", ROOT / "scripts", ROOT / "examples", *(ROOT / name for name in TASK_NAMES)]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported(nodes: list[ast.stmt] | list[ast.AST]) -> list[str]:
    """Dotted names of what these statements import: `from a.b import c` gives a.b.c."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def imported_anywhere(path: Path) -> list[str]:
    return imported(list(ast.walk(parse(path))))


def is_test(path: Path) -> bool:
    return "tests" in path.parts


def core_modules() -> list[Path]:
    return sorted(LIBRARY.glob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", core_modules(), ids=relative)
def test_core_modules_import_only_torch_when_they_are_loaded(path: Path) -> None:
    allowed = {*STANDARD_LIBRARY, "torch", "dr2net"}
    foreign = [name for name in imported(parse(path).body) if name.split(".")[0] not in allowed]
    assert not foreign, f"import {foreign} inside the function that needs it"


def test_the_library_knows_nothing_above_it_and_the_engine_no_task() -> None:
    for folder, above in (
        (LIBRARY, {"engine", *TASK_NAMES, "scripts", "examples"}),
        (ENGINE, {*TASK_NAMES, "scripts", "examples"}),
    ):
        for path in folder.rglob("*.py"):
            assert not {name.split(".")[0] for name in imported_anywhere(path)} & above, relative(path)


def test_a_part_of_the_engine_imports_only_what_is_below_it() -> None:
    level = {part: k for k, parts in enumerate(LAYERS) for part in parts}
    parts = {path.stem if path.is_file() else path.name for path in ENGINE.iterdir()} - {"__init__", "__pycache__"}
    assert parts <= level.keys(), f"say in LAYERS where {parts - level.keys()} stands"
    for path in ENGINE.rglob("*.py"):
        own = path.relative_to(ENGINE).parts[0].removesuffix(".py")
        for name in imported_anywhere(path):
            if name.startswith("engine."):
                part = name.split(".")[1]
                assert part == own or level[part] < level.get(own, 0) or level[part] == level[own], relative(path)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_imports_no_other_task_and_no_script(task: str) -> None:
    for path in [*(ROOT / task).rglob("*.py")]:
        tops = {name.split(".")[0] for name in imported_anywhere(path)}
        assert not tops & ({*TASK_NAMES, "scripts"} - {task}), relative(path)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_folder_has_the_same_files(task: str) -> None:
    missing = [name for name in TASK_FILES if not (ROOT / task / name).exists()]
    assert not missing
    assert list((ROOT / task / "tests").glob("test_*.py"))


def test_the_library_loads_without_third_party_packages() -> None:
    blocked = ["timm", "torchvision", "transformers", "accelerate", "tyro", "safetensors", "decord", "av", "rich"]
    blocked += ["matplotlib"]
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(LIBRARY.parent)!r})\nimport dr2net, dr2net.memory, dr2net.cli"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def calls_that_are_unsafe(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg in ("strict", "weights_only") and value is False and name != "zip":
                    found.append(f"line {node.lineno}: {keyword.arg}=False")
            if name in ("pickle.load", "pickle.loads", "eval", "exec", "numpy.fromstring"):
                found.append(f"line {node.lineno}: {name}")
            if name == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if any(k.arg == "allow_pickle" and getattr(k.value, "value", None) is True for k in node.keywords):
                found.append(f"line {node.lineno}: allow_pickle=True")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"line {node.lineno}: bare except")
    return found


def test_no_source_file_loads_loosely_or_swallows_errors() -> None:
    found = {relative(path): calls_that_are_unsafe(parse(path)) for path in sources() if not is_test(path)}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_unsafe_calls_are_recognised() -> None:
    code = """
model.load_state_dict(weights, strict=False)
torch.load(path)
torch.load(path, weights_only=False)
zip(a, b, strict=False)
torch.load(path, weights_only=True)
try: pass
except: pass
"""
    assert len(calls_that_are_unsafe(ast.parse(code))) == 4


def test_every_source_file_is_short_and_begins_with_a_docstring() -> None:
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= MAX_LINES, f"{relative(path)} has more than one idea?"
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{relative(path)} does not say what it is"


def untyped(tree: ast.Module) -> list[str]:
    """Public functions of a module and public methods of its public classes that lack an annotation."""
    found = []
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    classes = [node for node in classes if "torch.autograd.Function" not in map(ast.unparse, node.bases)]
    for node in (node for scope in (tree, *classes) for node in scope.body):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            bare = [a.arg for a in every if a and a.annotation is None and a.arg not in ("self", "cls")]
            found += [f"line {node.lineno}: {node.name}({name})" for name in bare]
            found += [f"line {node.lineno}: {node.name} -> ?"] if node.returns is None else []
    return found


def test_public_functions_are_typed() -> None:
    assert {relative(p): lines for p in sources() if not is_test(p) and (lines := untyped(parse(p)))} == {}
    assert len(untyped(ast.parse("def f(a, *, b: int):\n    pass\nclass C:\n    def g(self, c) -> int: ..."))) == 3


def test_there_are_two_autograd_functions_and_no_backbone_has_its_own() -> None:
    found = []
    for path in sources():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base) for base in node.bases}
                if bases & {"torch.autograd.Function", "autograd.Function", "Function"}:
                    found.append(f"{relative(path)}: {node.name}")
    assert [line for line in found if "tests/" not in line] == found
    assert [line.split()[-1] for line in found] == ["Checkpointed", "DualResidual"]


def readmes() -> list[Path]:
    names = ("README.md", "CONTRIBUTING.md", "common/README.md", "results/README.md")
    places = [*(ROOT / name for name in names), *sorted((ROOT / "docs").glob("*.md"))]
    places += sorted((ROOT / "examples").glob("*/README.md"))
    return [path for path in [*places, *(ROOT / task / "README.md" for task in TASKS)] if path.exists()]


@pytest.mark.parametrize("readme", readmes(), ids=relative)
def test_links_of_a_readme_lead_somewhere(readme: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", readme.read_text())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (readme.parent / link).exists()] == []


def commands(text: str) -> list[str]:
    """Command lines of the indented or fenced shell blocks, continuation lines joined, comments cut."""
    lines = text.replace("\\\n", " ").splitlines()
    stripped = [re.sub(r"\s{2,}#.*", "", line.strip().removeprefix("$ ")) for line in lines]
    return [line for line in stripped if re.match(r"(bash|python|torchrun|dr2net) [\w-]", line)]


@pytest.mark.parametrize("task", TASKS)
def test_the_result_that_a_readme_expects_is_that_of_a_record(task: str) -> None:
    lines = re.findall(r"^ +(\w+) seed (\d+): (.+)$", (ROOT / task / "README.md").read_text(), flags=re.M)
    assert lines
    for row, seed, metrics in lines:
        runs = json.loads((ROOT / "results" / task / f"{row}.json").read_text())["runs"]
        (run,) = [run for run in runs if run["seed"] == int(seed)]
        assert metrics == ", ".join(f"{name} {value:.1f}" for name, value in run["metrics"].items())


def test_the_result_that_an_example_expects_is_that_of_a_record() -> None:
    found = {}
    for readme in (ROOT / "examples").glob("*/README.md"):
        for row, seed, metrics in re.findall(r"^ +(\w+) seed (\d+): (.+)$", readme.read_text(), flags=re.M):
            runs = json.loads((ROOT / "results" / "examples" / f"{row}.json").read_text())["runs"]
            (run,) = [run for run in runs if run["seed"] == int(seed)]
            assert metrics == ", ".join(f"{name} {value:.1f}" for name, value in run["metrics"].items())
            found[readme.parent.name] = row
    assert found.keys() == {"audio", "text"}


@pytest.mark.parametrize("task", TASKS)
def test_settings_that_a_readme_names_exist(task: str) -> None:
    rows = importlib.import_module(f"{task}.configs").ROWS
    config = next(build() for name, build in rows.items() if name.endswith("_dr2net"))
    for flag in re.findall(r"`[^`]*?--(\w+\.[\w.-]*\w)", (ROOT / task / "README.md").read_text()):
        found: Any = config
        for name in flag.replace("-", "_").split("."):
            assert hasattr(found, name) or hasattr(found, name.removeprefix("no_")), f"--{flag}"
            found = getattr(found, name, None)


@pytest.mark.parametrize("readme", readmes(), ids=relative)
def test_commands_of_a_readme_exist(readme: Path) -> None:
    for line in commands(readme.read_text()):
        for script in re.findall(r"\bbash (\S+\.sh)", line):
            assert (ROOT / script).exists(), line
        for module in re.findall(r" -m ([\w.]+)", line):
            if module.split(".")[0] in (*TASK_NAMES, "scripts", "examples"):
                assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), line
        if line.startswith("dr2net "):
            from dr2net.cli import build_parser

            build_parser().parse_args(line.split()[1:])  # an unknown option exits


def test_committed_results_are_strict_json() -> None:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    files = list((ROOT / "results").rglob("*.json"))
    assert files
    for path in files:
        json.loads(path.read_text(), parse_constant=refuse)


def test_the_package_needs_only_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {Requirement(need).name for need in project["dependencies"]} == {"torch"}


def test_the_lock_has_one_version_of_everything_that_an_extra_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    strange = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+(; sys_platform == \"linux\")?", line)]
    assert not strange, "a lock names packages and versions: no host, path or hash"
    locked = {pin.name.lower(): pin.specifier for pin in map(Requirement, lines)}
    assert len(locked) == len(lines)
    for need in map(Requirement, sum(project["optional-dependencies"].values(), project["dependencies"])):
        if need.name != project["name"]:
            assert need.name.lower() in locked, f"{need} is not in requirements.lock"
            (pin,) = locked[need.name.lower()]
            assert need.specifier.contains(pin.version), f"requirements.lock has {need.name} {pin.version}, not {need}"
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    for name in ("torch", "torchvision"):
        assert f"{name}{locked[name]}" in setup


def test_an_error_names_an_extra_that_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in [*sources(), *readmes()]:
        for named in re.findall(r"dr2net\[([\w,]+)\]", path.read_text()):
            assert set(named.split(",")) <= extras.keys(), f"{relative(path)}: dr2net[{named}]"


def copy_of_the_source(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns(".git", ".venv", "data", "runs", "results", "__pycache__", "*.egg-info", "build")
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignored))


@pytest.mark.slow
def test_an_install_for_development_sees_the_engine(tmp_path: Path) -> None:
    source, installed = copy_of_the_source(tmp_path), tmp_path / "installed"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "--target",
        str(installed),
    ]
    subprocess.run([*install, "-e", "."], cwd=source, check=True, timeout=120)
    code = (
        f"import site, importlib.util as found\nsite.addsitedir({str(installed)!r})\n"
        "print(*(found.find_spec(name).origin for name in ('dr2net', 'engine')))"
    )
    # without the site-packages of this interpreter, in which the repository itself is installed
    paths = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert paths.stdout.split() == [str(source / "common" / name / "__init__.py") for name in ("dr2net", "engine")]


def test_shell_scripts_stop_at_the_first_error() -> None:
    for path in [ROOT / ".ci" / "run", *(ROOT / "scripts").glob("*.sh")]:
        assert "set -euo pipefail" in path.read_text(), relative(path)
        subprocess.run(["bash", "-n", str(path)], check=True)
