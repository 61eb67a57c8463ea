"""Where a number comes from: the code that made it, the commit, the versions, the device, the command.

    sources_hash("vos")      # of the files that `vos.train` imports, and of nothing else

Not here: what a run found (`record.py`).
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = (
    *("torch", "torchvision", "numpy", "timm", "transformers", "pytorchvideo", "accelerate", "safetensors"),
    *("av", "decord"),  # which decide the pixels
)
OWN = ("dr2net", "engine")  # beside the task itself, the packages whose code decides a number
PRESENTATION = ("engine.training.log", "engine.training.plan", "engine.records.tables")  # change no number of a run
CHANGES = ("status", "--porcelain", "-uno", "--", ":(top)", ":(top,exclude)results")  # Records are no change of code


def sources(task: str) -> dict[str, Path]:
    """Module name -> file of all that a training of `task` imports of this repository, anywhere in a file.

    The search begins at `<task>.train`, or at the module `task` itself where it is no package, or one of a package, as
    "examples.text.run".
    """
    top = task.split(".")[0]
    packages = {name: folder for name in (*OWN, top) if (folder := _file_of(name)) is not None}
    start = f"{task}.train" if packages.get(task, Path()).name == "__init__.py" else task
    found: dict[str, Path] = {}
    open_ends = [start]
    while open_ends:
        name = open_ends.pop()
        if name in found or name in PRESENTATION or name.split(".")[0] not in packages:
            continue
        path = _module_path(packages[name.split(".")[0]], name)
        if path is None:  # a function or class of the module before the last dot
            open_ends += [name.rpartition(".")[0]] if "." in name else []
            continue
        found[name] = path
        open_ends += [name.rpartition(".")[0]] if "." in name else []  # the package's own __init__.py runs too
        open_ends += _imports(path)
    return found


def sources_hash(task: str) -> str:
    """Hash of what the code of a task's training does, see `sources`: comments and docstrings aside."""
    digest = hashlib.sha256()
    for name, path in sorted(sources(task).items()):
        digest.update(f"{name}\n{_code(path.read_text())}\n".encode())
    return digest.hexdigest()[:16]


def _file_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin) if spec is not None and spec.origin else None


def _module_path(origin: Path, name: str) -> Path | None:
    """The file of module `name`, whose top package (or which itself) is the file `origin`."""
    inner = name.split(".")[1:]
    if not inner:
        return origin
    base = origin.parent.joinpath(*inner)
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _imports(path: Path) -> list[str]:
    """Dotted names that a file imports: `from a.b import c` gives a.b.c, which may be a module or less."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _code(source: str) -> str:
    """The syntax tree as text, docstrings removed."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree)


def command_line() -> str:
    """The command that started this process, to be typed again."""
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def commit() -> str:
    """The commit of the sources; "unknown" where git does not track them, even inside somebody else's repository.
    `+changes`: tracked files outside results/ differ from it.
    """
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git(*CHANGES) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Python and the packages that matter, as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device, processes: int = 1) -> str:
    """What it ran on, for the Record."""
    times = f"{processes} x " if processes > 1 else ""
    if device.type == "cuda":
        return times + torch.cuda.get_device_name(device)
    return f"{times}{device.type} {platform.machine()}, {torch.get_num_threads()} threads"
