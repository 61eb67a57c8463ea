"""Files that are whole or not there: written under a temporary name, synced, renamed.

A kill at any moment leaves the old content or the new one under the name, and at most a `.<name>.<process>.tmp` beside
it, which whoever owns the folder may delete. Not here: what is written.
"""

import contextlib
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a small text file (UTF-8), making its folder where needed. OSError leaves what was there before."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Make a written file permanent under its name: sync it, rename it, sync the folder."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each known to the disk before anything in it is."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):  # a folder may be for passing through only
            sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
