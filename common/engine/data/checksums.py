"""The sha256 of a data set's files: what shows damage that makes another valid file, which no reader can see.

    differing(Path("sums.txt"), root, paths, workers=4)     # one sentence per file that is another than in the list

The list is that of `sha256sum`, names below the root, so that `cd ROOT && sha256sum -c sums.txt` says the same. The
first call writes it. Not here: which files are meant, and checksums that a site publishes (`download.py`).
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from engine.data.busy import alive
from engine.data.workers import progress_bar, run_jobs
from engine.files import read_text, require_file, write_text

CHUNK = 1 << 24
REMEDY = "remove it to write it anew from the files as they are"


def differing(file: Path, root: Path, paths: Sequence[str], *, workers: int) -> dict[str, str]:
    """What is wrong with files that are not those of the list `file`, one sentence each, by path.

    The list is written if it is not there. ValueError naming the line for one of another form; OSError.
    """
    names = {path: os.path.relpath(path, root).replace(os.sep, "/") for path in paths}
    known = _read(file) if os.path.lexists(file) else None
    with progress_bar("reading checksums", len(paths)) as advance:
        sums = dict(zip(paths, run_jobs(sha256, paths, workers=workers, on_done=advance, chunk=16), strict=True))
    if known is None:
        write_text(file, "".join(f"{sums[path]}  {names[path]}\n" for path in paths))
        return {}
    wrong = {}
    for path, found in sums.items():
        if names[path] not in known:
            wrong[path] = f"{path}: is not in {file}; {REMEDY}"
        elif known[names[path]] != found:
            wrong[path] = f"{path}: is not the file of {file}, its sha256 is {found[:16]}...; copy it again"
    return wrong


def sha256(path: str) -> str:
    """Of a regular file, in hexadecimal digits."""
    require_file(Path(path), "check the data root")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            alive(path)
    return digest.hexdigest()


def _read(file: Path) -> dict[str, str]:
    known = {}
    for number, line in enumerate(read_text(file, REMEDY).splitlines(), start=1):
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if found is None:
            raise ValueError(f"{file}: line {number} is not `sha256  name`: {line[:80]!r}; {REMEDY}")
        known[found[2]] = found[1]
    return known
