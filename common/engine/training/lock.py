"""One run folder, one run: a lock that lives as long as the process that trains.

    with locked(folder):          # ValueError, naming the other process and its machine, if one is there

The lock is the system's (`flock` on `<folder>/lock`), so it ends with the process however that ends; the file, which
says who has it, stays. It reaches as far as the file system carries it: one machine, and most network file systems.
"""

import errno
import fcntl
import functools
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.files import make_folder

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_held: set[int] = set()  # descriptors of this process's locks


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder. ValueError if another process, or this one, has it already; OSError that names the
    flag if there can be no such folder.
    """
    path = folder / "lock"
    _let_go_in_children()
    try:
        make_folder(folder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        problem = f"the folder {str(folder)[:300]} cannot be made or written to ({error.strerror})"
        raise OSError(error.errno, f"--run.output: {problem}; give another") from error
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise ValueError(
                f"{folder} is in use by {owner}: wait until it ends or stop it, or give another --run.output"
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            warnings.warn(f"{path}: no locks on this file system; start no second run of this folder", stacklevel=3)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


@functools.cache
def _let_go_in_children() -> None:
    """A loader's worker inherits the descriptor, and would hold the lock for seconds after the run was killed."""

    def let_go() -> None:
        for descriptor in _held:
            os.close(descriptor)
        _held.clear()

    os.register_at_fork(after_in_child=let_go)
