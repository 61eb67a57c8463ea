"""What is released: a wheel and an sdist that `python -m build` makes, installed where there is little beside torch.

Bare environments are made without downloads: a virtual environment of its own, which reaches torch, and in one case
timm, with what they require, through a folder of links to the packages of this interpreter. pip resolves dr2net's
requirements against that folder, with no index. Not here: the rules of the source (`test_repository.py`).
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dr2net

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
import dr2net, torch

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.f = torch.nn.Linear(4, 4)

    def forward(self, x):
        return x + self.f(x)

dr2net.branches_of.register(Block, lambda block: (dr2net.Branch("f", block.f, (block.f,)),))
model = torch.nn.Sequential(torch.nn.Sequential(Block(), Block()))
dr2net.convert(model)
dr2net.set_coefficients(model, alpha=7 / 8, beta=1 / 8)
model(torch.randn(2, 3, 4)).square().mean().backward()
assert model[0][0].f.weight.grad.abs().sum() > 0
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from it, of a copy of the source."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "common", source / "common", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, source)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    run(build, cwd=folder)
    return folder / "dist"


def wheel_of(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def run(command: list[str], **how: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def required_by(name: str) -> set[str]:
    """Names of the distributions that `name` needs here, itself included."""
    found: set[tuple[str, str]] = set()
    waiting = [(name, "")]  # a distribution and an extra of it, "" for none
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) not in found:
            found.add((name, extra))
            for need in map(Requirement, importlib.metadata.requires(name) or []):
                if need.marker is None or need.marker.evaluate({"extra": extra}):
                    waiting += [(canonicalize_name(need.name), wanted) for wanted in ("", *need.extras)]
    return {name for name, _ in found}


def bare_environment(folder: Path, wheel: Path, package: str) -> Path:
    """The Python of a new environment with `wheel`, and nothing else but links to `package` and what it needs."""
    links = folder / "links"
    links.mkdir()
    for name in required_by(package):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (links / top).exists():
                (links / top).symlink_to(Path(str(distribution.locate_file(top))))
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "links.pth").write_text(f"{links}\n")
    # its requirements are looked for, and found, in the links: there is no index, nor a folder of wheels
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--quiet", str(wheel)]
    run(install, env={**alone, "PIP_CONFIG_FILE": os.devnull})
    assert {path.name.split("-")[0] for path in site.glob("*.dist-info")} == {"dr2net"}
    return python


def execute(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run in the environment, away from the repository."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    folder = python.parents[2]
    return subprocess.run([str(python), *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_wheel_has_the_library_its_licence_and_its_metadata_alone(built: Path) -> None:
    with zipfile.ZipFile(wheel_of(built)) as archive:
        names = archive.namelist()
        (place,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(place).decode())
    info = f"dr2net-{dr2net.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"dr2net", info}
    assert {"dr2net/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= set(names)
    library = ROOT / "common" / "dr2net"
    sources = {f"dr2net/{path.relative_to(library)}" for path in library.rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert metadata["Name"] == "dr2net" and metadata["Version"] == dr2net.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    assert any("arxiv.org/abs/2401.04105" in url for url in metadata.get_all("Project-URL"))
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    always = [need for need in map(Requirement, metadata.get_all("Requires-Dist")) if need.marker is None]
    assert [need.name for need in always] == ["torch"]


@pytest.mark.slow
def test_the_sdist_brings_what_the_wheel_is_made_of(built: Path, tmp_path: Path) -> None:
    # `python -m build` made the wheel from the unpacked sdist; the tree must give the same one
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= inside
    assert not [name for name in inside if re.match(r"common/(engine|tests)|scripts|results|vos|detection", name)]
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(ROOT / "common" / "dr2net", source / "common" / "dr2net")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    run(build, cwd=source)
    (ours,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(ours) as one, zipfile.ZipFile(wheel_of(built)) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        assert [
            name for name in one.namelist() if not name.endswith("RECORD") and one.read(name) != other.read(name)
        ] == []


@pytest.mark.slow
def test_beside_torch_alone_the_library_runs_and_names_what_is_missing(built: Path, tmp_path: Path) -> None:
    python = bare_environment(tmp_path, wheel_of(built), "torch")
    where = execute(python, "-c", "import dr2net; print(dr2net.__file__, dr2net.__version__)")
    assert where.stdout.split() == [str(next(tmp_path.rglob("dr2net/__init__.py"))), dr2net.__version__], where.stderr
    for name in ("timm", "torchvision", "transformers", "numpy", "engine"):
        assert execute(python, "-c", f"import {name}").returncode == 1, f"{name} is there: not bare"
    done = execute(python, "-c", BLOCK)
    assert done.returncode == 0, done.stderr
    for model in ("vit_tiny_patch16_224", "torchvision:swin_t"):
        plan = execute(python.parent / "dr2net", "plan", "--model", model, "--input", "1x3x224x224")
        package = "torchvision" if ":" in model else "timm"
        assert plan.returncode == 2 and "Traceback" not in plan.stderr, plan.stderr
        assert f"{package} is not installed" in plan.stderr and "pip install 'dr2net[models]'" in plan.stderr


@pytest.mark.slow
def test_the_five_lines_of_the_readme_run_where_timm_is(built: Path, tmp_path: Path) -> None:
    python = bare_environment(tmp_path, wheel_of(built), "timm")
    (block,) = re.findall(r"^```python\n(import dr2net, timm, torch\n.*?)^```", readme(), re.DOTALL | re.MULTILINE)
    assert len(block.replace("\n\n", "\n").splitlines()) == 5
    offline = block.replace("pretrained=True", "pretrained=False")  # the one word that downloads
    assert offline != block
    done = execute(python, "-c", offline + "\nassert all(p.grad is not None for p in model.parameters())")
    assert done.returncode == 0, done.stderr


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_citation_and_change_log_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dr2net.__version__
    assert re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == dr2net.__version__


def test_the_citation_has_what_its_format_requires_and_names_the_paper() -> None:
    # cff-version 1.2.0 requires these four, of a reference type, title and authors; an author has a name
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))
    paper = citation["preferred-citation"]
    assert all(paper[key] for key in ("type", "title", "authors"))
    for author in [*citation["authors"], *paper["authors"]]:
        assert set(author) in ({"name"}, {"given-names", "family-names"})
    assert len(paper["authors"]) == 8 and paper["year"] == 2024
    assert paper["identifiers"][0]["value"] == "arXiv:2401.04105"
