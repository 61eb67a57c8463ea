"""Small files: read with one line about what is wrong; written whole or not at all.

    read_json(path, "download it again")      # the one way in which this repository opens a JSON file
    read_csv(path, "download it again")       # and one of commas

Written under a temporary name, synced, renamed.

A kill at any moment leaves the old content or the new one under the name, and at most a `.<name>.<process>.tmp<suffix>`
beside it, which whoever owns the folder may delete. Not here: what is in them.
"""

import contextlib
import csv
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 31  # of a text file; the largest annotations have some hundred MB
MAX_DIGITS = 300  # of a whole number; a longer one is no float


def require_file(path: Path, remedy: str) -> os.stat_result:
    """The status of a regular file, to be asked for before one is opened: opening a pipe waits for a writer, for ever,
    and a device may have no end. FileNotFoundError, or ValueError for anything else under the name, with the remedy.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file; {remedy}") from None
    if problem := irregular(status.st_mode):
        raise ValueError(f"{path}: {problem}; {remedy}")
    return status


def irregular(mode: int) -> str:
    """What stands under a name, by its mode; nothing of a regular file."""
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, it is not a regular file"


def read_text(path: Path, remedy: str) -> str:
    """A text in UTF-8, without the byte-order mark that some editors write.

    Raises FileNotFoundError, or ValueError for what is no regular file (a pipe is not waited for), too large or not
    UTF-8, each with the remedy.
    """
    status = require_file(path, remedy)
    if status.st_size > MAX_BYTES:
        raise ValueError(f"{path}: has {status.st_size} bytes, too many for what it should be; {remedy}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not in UTF-8 ({error.reason} at byte {error.start}); {remedy}") from error


def read_json(path: Path, remedy: str, *, without: Collection[str] = ()) -> Any:
    """The content of a JSON file.

    without: keys whose values are let go as soon as they are read, in whatever object; large ones that nobody needs.
    Raises as `read_text`, and ValueError for what is not JSON, nested too deep, has a key twice in one object (of which
    the parser would lose the first) or a whole number that is no float.
    """
    text = read_text(path, remedy)
    try:
        return json.loads(text, object_pairs_hook=partial(_without_repeats, without), parse_int=_whole_number)
    except RecursionError:
        raise ValueError(f"{path}: is nested too deep to be what it should; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); {remedy}") from error


def _without_repeats(without: Collection[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = next(name for name in counts if counts[name] > 1)
        raise ValueError(f"{repeated[:80]!r} is listed twice")
    for name in without:
        table.pop(name, None)
    return table


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"the number {digits[:12]}... has {len(digits)} digits")
    return int(digits)


def read_csv(path: Path, remedy: str) -> list[tuple[int, list[str]]]:
    """The rows of a file of commas, each with the number of its line; empty lines are left out.

    Raises as `read_text`, and ValueError naming the line for a field that is too long, or goes over a line's end, as
    behind a quote that nobody closed: it holds the rows up to the next quote, which would be gone in silence.
    """
    reader = csv.reader(io.StringIO(read_text(path, remedy), newline=""))
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for row in reader:
            if any("\n" in field or "\r" in field for field in row):
                ends = f"the quote that opens in line {line} goes on to line {reader.line_num}"
                raise ValueError(f"{path}: {ends}; close it in its line, and write a quote inside of quotes twice")
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: line {line} cannot be read as csv ({error}); {remedy}") from error
    return rows


def write_text(path: Path, text: str) -> None:
    """Write a small text file (UTF-8), making its folder where needed. OSError leaves what was there before."""
    with appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A new empty file to write into, of the same suffix, that becomes `path` when the block ends without an error.

    For whatever writes to a name: pictures, videos. Makes the folder where needed. OSError leaves what was there.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        temporary.unlink(missing_ok=True)
        # Exclusive: a link that waits under the name is not followed.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Make a written file permanent under its name: sync it, rename it, sync the folder."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each known to the disk before anything in it is; NotADirectoryError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(f"{folder}: is there already and is no folder; give another one") from None
        with contextlib.suppress(OSError):  # a folder may be for passing through only
            sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
