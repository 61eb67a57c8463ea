"""Fetch a file over HTTP(S) without trusting the server.

    download(url, path, sha256=...)            # continues an interrupted transfer, checks, then renames into place
    remember(path)                             # where no checksum is published: later files must be like the first

For shell scripts, without starting more than the standard library:

    python common/engine/data/download.py fetch URL FILE            # download and remember
    python common/engine/data/download.py fetch URL FILE SIZE MD5   # where both are published
    python common/engine/data/download.py extract ARCHIVE FOLDER [MAX_GIB]
    python common/engine/data/download.py extract-pieces FOLDER PIECE ...      # of one archive that was cut

What stands at `path` is complete and checked; what is on its way is `<path>.part`, and `<path>.part.source` says of
which version of the file. Not a mirror tool, no parallel transfers. Unpacking is in archives.py.
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.data.archives import CHUNK, GIB, UnsafeArchive, extract
from engine.data.content import check_content, is_page
from engine.data.web import Answer, DownloadError, Slow, extent, validators
from engine.files import publish, read_json, require_file, write_text

USAGE = "fetch URL FILE [SIZE MD5] | extract ARCHIVE FOLDER [MAX_GIB] | extract-pieces FOLDER PIECE ..."
__all__ = ["DownloadError", "UnsafeArchive", "download", "extract", "free_bytes", "remember"]


def download(
    url: str,
    path: Path | str,
    *,
    size: int | None = None,
    sha256: str | None = None,
    md5: str | None = None,
    retries: int = 5,
    backoff_seconds: float = 1.0,
    timeout_seconds: float = 30.0,
    least_rate: int = 1024,
    max_bytes: int = GIB,
    show: bool = True,
) -> Path:
    """Fetch `url` to `path`; returns `path`. A file that is there and passes the checks given is not fetched again.

    An interrupted transfer goes on where it stopped if the server can (Range) and proves by ETag or Last-Modified that
    it still has the same file, or a checksum is given that will tell; else from the beginning. `retries` further
    attempts in a row may bring nothing new, waiting backoff_seconds, doubled each time; one that moves forward gives
    them back. Given up is an attempt that brings less than `least_rate` bytes per second over timeout_seconds, and one
    that passes `max_bytes` if the server announces no length.

    Raises DownloadError: refused by the server, too short or too long, a wrong checksum, or without a checksum a
    content that is not what the name of `path` (or the address) says, see content.py; the partial file is then
    removed. ValueError for another scheme.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url!r}: only http and https addresses can be fetched")
    path = Path(path)
    name = path.name if path.suffix else urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1]
    is_checked = sha256 is not None or md5 is not None
    if path.exists():
        require_file(path, "remove it, or choose another place")
    if path.is_file() and _mismatch(path, size, sha256, md5) is None and (is_checked or not _is_worthless(path, name)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(path.with_name(path.name + ".part"), url)
    was_there = part.size() > 0
    with _bar(path.name, show) as advance:
        while True:
            _attempts(
                lambda: _transfer(url, part, name, size, is_checked, timeout_seconds, least_rate, max_bytes, advance),
                url,
                part,
                retries,
                backoff_seconds,
            )
            wrong = _mismatch(part.path, size, sha256, md5)
            if wrong is None and not is_checked:
                try:
                    check_content(part.path, name)
                except ValueError as error:
                    wrong = str(error)
            if wrong is None:
                break
            part.remove()
            if not was_there:
                raise DownloadError(f"{url}: {wrong}; the file was removed, try again, or the source has changed")
            was_there = False  # what an earlier call left may be to blame: once more from the beginning
    part.publish(path)
    return path


def remember(path: Path | str) -> str:
    """For a source that publishes no checksum: keep the first one in <path>.sha256, and hold later files to it.

    The first file is tested before (content.py). Returns the sha256. Raises DownloadError if the file is another than
    the one remembered, or not what its name says.
    """
    path, note = Path(path), Path(f"{path}.sha256")
    require_file(path, "download it again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not note.exists():
        try:
            check_content(path, path.name)
        except ValueError as error:
            raise DownloadError(f"{error}; remove it and download again") from error
        write_text(note, f"{found}  {path.name}\n")
        return found
    require_file(note, f"remove it to accept the present {path.name}")
    known = note.read_bytes()[:64].decode("ascii", "replace")
    if not re.fullmatch("[0-9a-f]{64}", known):
        raise DownloadError(f"{note}: {known[:20]!r} is no sha256; remove it to accept the present {path.name}")
    if known != found:
        raise DownloadError(
            f"{path}: sha256 {found} is not the {known} of the first download; "
            f"the source has changed: look into it, and remove {note} to accept the new file"
        )
    return found


def free_bytes(folder: Path | str) -> int:
    """Bytes free on the disk that holds `folder`, or the nearest existing folder above it."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _attempts(transfer: Callable[[], None], url: str, part: "_Part", retries: int, backoff_seconds: float) -> None:
    """Call `transfer` until it returns. DownloadError once 1 + `retries` attempts in a row brought nothing new."""
    failures, furthest = 0, part.size()
    while True:
        try:
            return transfer()
        except urllib.error.HTTPError as error:
            error.close()
            # 408, 429 and 5xx may pass; any other answer will not.
            if error.code < 500 and error.code not in (408, 429):
                reason = " ".join(str(error.reason).split())[:200]
                raise DownloadError(f"{url}: the server answers {error.code} {reason}; check the address") from error
            problem: Exception = error
        except (ValueError, http.client.InvalidURL) as error:
            raise DownloadError(f"{url}: {error}; check the address") from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            problem = error
        have = part.size()
        # A thousandth of the file at least: a server that cuts after each byte is not followed for years.
        if have - furthest >= min(CHUNK, (part.total() or CHUNK) // 1000) and not isinstance(problem, Slow):
            failures = 0
        furthest = max(furthest, have)
        if failures >= retries:
            raise DownloadError(
                f"{url}: {failures + 1} attempts failed, the last with {problem!r}; "
                f"{have} bytes are kept in {part.path}, the same command goes on from there"
            ) from problem
        time.sleep(backoff_seconds * 2**failures)
        failures += 1


class _Part:
    """The partial file, and beside it of which version of which address it is a part."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        self.note = path.with_name(path.name + ".source")

    def size(self) -> int:
        """Bytes there. A link or a device is removed, never followed or written to."""
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return 0
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            return found.st_size
        if stat.S_ISDIR(found.st_mode):
            raise DownloadError(f"{self.path}: is a folder where the partial file belongs; remove it")
        self.path.unlink()
        return 0

    def version(self) -> dict[str, str | int | None]:
        """etag, modified (both only if they prove equality) and total; empty if unknown or of another address."""
        try:
            if self.note.is_symlink():
                return {}
            version = read_json(self.note, "remove it")
        except (OSError, ValueError):
            return {}
        return version if isinstance(version, dict) and version.get("url") == self.url else {}

    def total(self) -> int | None:
        total = self.version().get("total")
        return total if isinstance(total, int) else None

    def open(self, version: dict[str, str | int | None] | None) -> int:
        """A descriptor: at the end of what is there, or (with the version that begins) of a new file."""
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        if version is None:
            return os.open(self.path, flags | os.O_APPEND)
        self.remove()
        write_text(self.note, json.dumps({"url": self.url, **version}))
        return os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def publish(self, path: Path) -> None:
        publish(self.path, path)
        self.note.unlink(missing_ok=True)


def _transfer(
    url: str,
    part: _Part,
    name: str,
    size: int | None,
    is_checked: bool,
    timeout: float,
    least_rate: int,
    max_bytes: int,
    advance: Callable[[int, int | None], None],
) -> None:
    """One attempt: append to `part` what is missing. Raises what urllib raises; ConnectionError if it stays short."""
    have, known = part.size(), part.version()
    if have and have == known.get("total"):
        return
    validator = known.get("etag") or known.get("modified")
    headers = {"User-Agent": "dr2net", "Accept-Encoding": "identity"}
    if have and (validator or is_checked):
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = str(validator)  # another file by now: the server sends all of it
    answer = Answer(urllib.request.Request(url, headers=headers), timeout, least_rate)
    try:
        try:
            status, fields = answer.begin()
        except urllib.error.HTTPError as error:
            if error.code != 416 or "Range" not in headers:
                raise
            error.close()
            if is_checked and (size == have or error.headers.get("Content-Range") == f"bytes */{have}"):
                return  # all of it was there already
            part.remove()
            raise ConnectionError("the server does not know the rest of the partial file; starting again") from error
        begin, total = extent(status, fields, have if "Range" in headers else 0)
        version: dict[str, str | int | None] = {**validators(fields), "total": total}
        if begin:
            differs = any(known.get(k) and version[k] and known[k] != version[k] for k in version)
            if differs or (validator and validator not in (version["etag"], version["modified"])):
                part.remove()
                raise ConnectionError("the server sent a piece of another file than the first; starting again")
        total = total if total is not None else size
        if size is not None and total != size:
            raise DownloadError(f"{url}: the server offers {total} bytes, {size} are expected; the source has changed")
        coding = fields.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("", "identity") and not (coding.endswith("gzip") and name.endswith(("gz", ".svgz"))):
            raise DownloadError(f"{url}: the server sends {coding} though the file was asked for; use another mirror")
        is_html = "html" in fields.get("Content-Type", "") and not is_checked
        if is_html and not name.lower().endswith((".html", ".htm")):
            raise DownloadError(
                f"{url}: the server sends a web page ({fields['Content-Type']}) instead of {name}; open the address "
                "in a browser, it may want a login or be over its quota"
            )
        if total is not None and total - begin > free_bytes(part.path.parent):
            raise DownloadError(f"{url}: {total - begin} bytes do not fit on the disk of {part.path}; free space")
        done, limit = begin, total if total is not None else max_bytes
        with os.fdopen(part.open(None if begin else version), "wb") as file:
            advance(done, total)
            for chunk in answer.chunks():
                if not done and not is_checked and is_page(chunk, name):
                    part.remove()
                    raise DownloadError(
                        f"{url}: the server sends a web page ({chunk[:40]!r}) instead of {name}; open the address in "
                        "a browser, it may want a login or be over its quota"
                    )
                done += len(chunk)
                if done > limit:
                    what = "announced" if total is not None else "allowed without an announced length"
                    part.remove()
                    raise DownloadError(f"{url}: the server sends more than the {limit} bytes {what}; look into it")
                try:
                    file.write(chunk)
                    file.flush()
                except OSError as error:
                    raise DownloadError(
                        f"{part.path}: cannot be written ({error.strerror}); free disk space, the same command goes on"
                    ) from error
                advance(done, total)
    finally:
        answer.close()
    if total is not None and done < total:
        raise ConnectionError(f"the connection closed after {done} of {total} bytes")


def _mismatch(path: Path, size: int | None, sha256: str | None, md5: str | None) -> str | None:
    """What is wrong with the file, or None."""
    if size is not None and path.stat().st_size != size:
        return f"{path.stat().st_size} bytes instead of {size}"
    for kind, expected in (("sha256", sha256), ("md5", md5)):
        if expected is not None:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, kind).hexdigest()
            if found != expected.lower():
                return f"{kind} {found} instead of {expected}"
    return None


def _is_worthless(path: Path, name: str) -> bool:
    """Whether a file that stands there is empty or a web page: what earlier versions kept."""
    with path.open("rb") as file:
        start = file.read(1024)
    return not start or is_page(start, name)


@contextmanager
def _bar(name: str, show: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A rich progress bar as a function of (bytes done, bytes in all)."""
    if not show:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def main(words: list[str]) -> None:
    """Command line, see the top of this file."""
    try:
        match words:
            case ["fetch", url, file]:
                print(f"{file}: sha256 {remember(download(url, file))}")
            case ["fetch", url, file, size, md5]:
                print(f"{download(url, file, size=int(size), md5=md5)}: md5 {md5}")
            case ["extract-pieces", folder, first, *further]:
                print(f"{first}: {len(extract(first, folder, further=further))} files unpacked in {folder}")
            case ["extract", archive, folder, *limit]:
                gib = int(limit[0]) if limit else 64
                print(f"{archive}: {len(extract(archive, folder, max_bytes=gib * GIB))} files unpacked in {folder}")
            case _:
                sys.exit(f"usage: download.py {USAGE}")
    except (DownloadError, ValueError, OSError) as error:
        sys.exit(f"download: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
