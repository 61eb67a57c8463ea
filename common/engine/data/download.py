"""Fetch a file over HTTP(S) and unpack an archive, without trusting either.

    download(url, path, sha256=...)            # continues an interrupted transfer, checks, then renames into place
    remember(path)                             # where no checksum is published: later files must be like the first
    extract(path, folder, max_bytes=...)       # tar (plain, gz, bz2, xz) or zip; nothing outside `folder`, no links,
    no bombs

For shell scripts, without starting more than the standard library:

    python common/engine/data/download.py fetch URL FILE            # download and remember
    python common/engine/data/download.py extract ARCHIVE FOLDER [MAX_GIB]

What stands at `path` is complete and checked; what is on its way is `<path>.part`. Not a mirror tool, no parallel
transfers.
"""

import gzip
import hashlib
import http.client
import lzma
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

CHUNK = 1 << 20
GIB = 1 << 30


class DownloadError(RuntimeError):
    """A transfer that failed for good; the message names the address, what happened, and what to do."""


class UnsafeArchive(ValueError):
    """An archive that would write outside its folder, holds links or devices, or exceeds the limits."""


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
    show: bool = True,
) -> Path:
    """Fetch `url` to `path`; returns `path`. A file that is there and passes the checks given is not fetched again.

    An interrupted transfer goes on where it stopped if the server can (Range) and still has the same file (ETag), else
    from the beginning. `retries` further attempts, waiting backoff_seconds, doubled each time. Raises DownloadError:
    refused by the server, too short or too long, or a wrong checksum (then the partial file is removed); ValueError
    for another scheme.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url!r}: only http and https addresses can be fetched")
    path = Path(path)
    if path.is_file() and _mismatch(path, size, sha256, md5) is None:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.etag")
    with _bar(path.name, show) as advance:
        for attempt in range(retries + 1):
            try:
                _transfer(url, part, tag, size, timeout_seconds, advance)
                break
            except urllib.error.HTTPError as error:
                # 408, 429 and 5xx may pass; any other 4xx will not.
                if error.code < 500 and error.code not in (408, 429):
                    raise DownloadError(
                        f"{url}: the server answers {error.code} {error.reason}; check the address"
                    ) from error
                problem: Exception = error
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                problem = error
            if attempt == retries:
                have = part.stat().st_size if part.is_file() else 0
                raise DownloadError(
                    f"{url}: {retries + 1} attempts failed, the last with {problem!r}; "
                    f"{have} bytes are kept in {part}, the same command goes on from there"
                ) from problem
            time.sleep(backoff_seconds * 2**attempt)
    wrong = _mismatch(part, size, sha256, md5)
    if wrong is not None:
        part.unlink()
        tag.unlink(missing_ok=True)
        raise DownloadError(f"{url}: {wrong}; the file was removed, try again, or the source has changed")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    tag.unlink(missing_ok=True)
    return path


def remember(path: Path | str) -> str:
    """For a source that publishes no checksum: keep the first one in <path>.sha256, and hold later files to it.

    Returns the sha256. Raises DownloadError if the file is another than the one remembered.
    """
    path, note = Path(path), Path(f"{path}.sha256")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not note.is_file():
        note.write_text(f"{found}  {path.name}\n")
    elif note.read_text().split()[0] != found:
        raise DownloadError(
            f"{path}: sha256 {found} is not the {note.read_text().split()[0]} of the first download; "
            f"the source has changed: look into it, and remove {note} to accept the new file"
        )
    return found


def extract(
    archive: Path | str, folder: Path | str, *, max_bytes: int = 64 * GIB, max_files: int = 1_000_000
) -> list[Path]:
    """Unpack a tar or zip below `folder`, made if need be; returns the files written, existing ones replaced.

    Refused with UnsafeArchive: absolute names, "..", links and devices, names that pass through a link in `folder`,
    more than `max_files` files, more than `max_bytes` unpacked bytes (counted while writing: what the archive declares
    is not believed). Raises ValueError for a file that is neither, or is damaged. Files unpacked before the offence
    stay.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    total = 0
    try:
        for name, size, source in _members(archive):
            target = _target(archive, folder, name)
            if len(written) >= max_files:
                raise UnsafeArchive(f"{archive}: more than {max_files} files; raise max_files if that is right")
            if total + size > max_bytes:
                raise UnsafeArchive(
                    f"{archive}: unpacks to more than {max_bytes} bytes; raise max_bytes if that is right"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            try:
                with source() as reader, part.open("wb") as writer:
                    while chunk := reader.read(CHUNK):
                        total += len(chunk)
                        if total > max_bytes:
                            raise UnsafeArchive(
                                f"{archive}: unpacks to more than {max_bytes} bytes; raise max_bytes if that is right"
                            )
                        writer.write(chunk)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
            written.append(target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{archive}: is damaged ({error}); download it again") from error
    return written


def free_bytes(folder: Path | str) -> int:
    """Bytes free on the disk that holds `folder`, or the nearest existing folder above it."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _transfer(
    url: str, part: Path, tag: Path, size: int | None, timeout: float, advance: Callable[[int, int | None], None]
) -> None:
    """One attempt: append to `part` what is missing. Raises what urllib raises; ConnectionError if it stays short."""
    have = part.stat().st_size if part.is_file() else 0
    known = tag.read_text() if tag.is_file() else ""
    headers = {"User-Agent": "dr2net", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known:
            headers["If-Range"] = known  # another file by now: the server sends all of it
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        error.close()
        if size == have or error.headers.get("Content-Range") == f"bytes */{have}":
            return  # all of it was there already
        part.unlink()
        raise ConnectionError("the server does not know the rest of the partial file; starting again") from error
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError("the server sent another range than asked for; starting again")
        if not resumed:
            have = 0
        etag = response.headers.get("ETag", "")
        tag.write_text("" if etag.startswith("W/") else etag)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else size
        if size is not None and total is not None and total != size:
            raise DownloadError(f"{url}: the server offers {total} bytes, {size} are expected; the source has changed")
        done = have
        with part.open("ab" if resumed else "wb") as file:
            advance(done, total)
            while chunk := response.read(CHUNK):
                done += len(chunk)
                if total is not None and done > total:
                    raise DownloadError(f"{url}: the server sends more than the {total} bytes announced")
                file.write(chunk)
                advance(done, total)
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


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """(name, declared size, opener) of each file; folders are left out; anything else is refused."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            for member in bundle.infolist():
                kind = member.external_attr >> 16 & 0o170000  # the Unix file type, 0 if the maker had none
                if kind not in (0, 0o100000, 0o040000):
                    raise UnsafeArchive(f"{archive}: {member.filename!r} is a link or device; it is not unpacked")
                if not member.is_dir():
                    yield member.filename, member.file_size, lambda member=member: bundle.open(member)
        return
    try:
        bundle = tarfile.open(archive, "r:*")
    except tarfile.ReadError as error:
        raise ValueError(f"{archive}: is neither tar nor zip ({error}); download it again") from error
    with bundle:
        for member in bundle:
            if not (member.isreg() or member.isdir()):
                raise UnsafeArchive(f"{archive}: {member.name!r} is a link or device; it is not unpacked")
            if member.isreg():
                yield member.name, member.size, lambda member=member: bundle.extractfile(member)
        while bundle.fileobj.read(CHUNK):  # the compressor's checksum stands behind the last member
            pass


def _target(archive: Path, folder: Path, name: str) -> Path:
    """Where a member goes. UnsafeArchive if that is not below `folder`, links in `folder` followed."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name or not parts[-1]:
        raise UnsafeArchive(f"{archive}: {name!r} would be written outside {folder}")
    target = folder.joinpath(*parts)
    root = folder.resolve()
    if (root not in target.parent.resolve().parents and target.parent.resolve() != root) or target.is_symlink():
        raise UnsafeArchive(f"{archive}: {name!r} passes through a link out of {folder}")
    return target


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
            case ["extract", archive, folder, *limit]:
                gib = int(limit[0]) if limit else 64
                print(f"{archive}: {len(extract(archive, folder, max_bytes=gib * GIB))} files unpacked in {folder}")
            case _:
                sys.exit("usage: download.py fetch URL FILE | extract ARCHIVE FOLDER [MAX_GIB]")
    except (DownloadError, ValueError, OSError) as error:
        sys.exit(f"download: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
