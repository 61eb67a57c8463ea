"""Unpack or test an archive without trusting it: tar (plain, gz, bz2, xz) or zip.

    extract(path, folder, max_bytes=...)       # nothing outside `folder`, no links, no bombs
    check_archive(path)                        # reads every member: whole and undamaged?

Both walk the archive the same way, so what one refuses the other does. Not here: permissions and dates, which are not
taken over; passwords.
"""

import errno
import gzip
import io
import lzma
import secrets
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

from engine.files import require_file

CHUNK = 1 << 20
GIB = 1 << 30
# A name and its attributes take hundreds of bytes; tarfile would read gigabytes of them into memory.
MAX_HEADER = 1 << 16
MAX_PADDING = 1 << 26  # zeros behind the last member of a tar
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# What the readers of the standard library raise for files that are no archives; OSError is bz2's.
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    struct.error,
    OverflowError,
    ValueError,
    IndexError,
    RuntimeError,  # with RecursionError and NotImplementedError
)


class UnsafeArchive(ValueError):
    """An archive that would write outside its folder, holds links or devices, or exceeds the limits."""


class _Member(NamedTuple):
    name: str
    size: int  # bytes, as the archive declares
    is_folder: bool
    is_locked: bool  # needs a password
    open: Callable[[], IO[bytes]]


def extract(
    archive: Path | str,
    folder: Path | str,
    *,
    further: Sequence[Path | str] = (),
    max_bytes: int = 64 * GIB,
    max_files: int = 1_000_000,
) -> list[Path]:
    """Unpack a tar or zip below `folder`, made if need be; returns the files written, existing ones replaced.

    further: where the archive was cut in pieces, those behind the first, in their order.
    Refused with UnsafeArchive: absolute names, "..", links and devices, names that pass through a link in `folder`,
    more than `max_files` files and folders, more than `max_bytes` unpacked bytes (counted while writing: what the
    archive declares is not believed), headers above MAX_HEADER bytes. Raises ValueError for a file that is neither, is
    damaged or locked; OSError naming archive and member if a file cannot be written. Files unpacked before the offence
    stay.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    made: set[Path] = set()
    total = files = 0
    for member in _members(archive, [Path(piece) for piece in further]):
        if member.is_locked:
            raise ValueError(f"{archive}: {member.name!r} is locked by a password; unpack it with unzip -P")
        files += 1
        with _writing(archive, folder, member.name):
            target = None if member.is_folder else _target(archive, folder, member.name)
        if target is not None:
            parents = list(target.parents)
            new = set(parents[: parents.index(folder)]) - made
            made |= new
            files += len(new)
        if files > max_files:
            raise UnsafeArchive(f"{archive}: more than {max_files} files and folders; raise max_files if that is right")
        if target is None:
            continue
        _check_total(archive, total + member.size, max_bytes)
        part = target.with_name(f".{secrets.token_hex(8)}.part")  # no member can have this name
        with _writing(archive, folder, member.name):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Exclusive: a link that waits under the name is not followed.
                with part.open("xb") as writer:
                    for chunk in _chunks(archive, member):
                        total += len(chunk)
                        _check_total(archive, total, max_bytes)
                        writer.write(chunk)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
        written.append(target)
    return written


def check_archive(archive: Path | str, *, max_bytes: int = 1024 * GIB) -> None:
    """Read every member to its end. ValueError if the file is no archive, is damaged, cut short or unsafe.

    What is locked by a password is not read: only its headers are compared.
    """
    archive, total = Path(archive), 0
    for member in _members(archive):
        if member.is_folder or member.is_locked:
            continue
        for chunk in _chunks(archive, member):
            total += len(chunk)
            _check_total(archive, total, max_bytes)


def _check_total(archive: Path, total: int, max_bytes: int) -> None:
    if total > max_bytes:
        raise UnsafeArchive(f"{archive}: unpacks to more than {max_bytes} bytes; raise max_bytes if that is right")


def _chunks(archive: Path, member: _Member) -> Iterator[bytes]:
    """A member's content, at most CHUNK bytes at a time."""
    with _reading(archive):
        reader = member.open()
    with reader:
        while True:
            with _reading(archive):
                chunk = reader.read(CHUNK)
            if not chunk:
                return
            yield chunk


@contextmanager
def _writing(archive: Path, folder: Path, name: str) -> Iterator[None]:
    """A name the disk does not take, a full disk, a file where a folder belongs: OSError that says whose fault."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{archive}: {name[:80]!r} cannot be written below {folder} ({error.strerror}); "
            "free disk space, or remove what stands in its place"
        ) from error


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Whatever a file can make its reader raise is ValueError with the file's name."""
    try:
        yield
    except UnsafeArchive as error:
        raise UnsafeArchive(f"{archive}: {error}") from error
    except (FileNotFoundError, PermissionError):
        raise
    except (*_DAMAGE, OSError) as error:
        raise ValueError(f"{archive}: is damaged ({error or type(error).__name__}); download it again") from error


def _members(archive: Path, further: Sequence[Path] = ()) -> Iterator[_Member]:
    """Each file and folder; anything else is refused."""
    for piece in (archive, *further):
        require_file(piece, "download it again")
    with io.BufferedReader(_Pieces([archive, *further]), CHUNK) as file:
        with _reading(archive):
            is_zip = zipfile.is_zipfile(file)
            file.seek(0)
        members = _zip_members(file) if is_zip else _tar_members(file)
        while True:
            with _reading(archive):
                member = next(members, None)
            if member is None:
                return
            yield member


class _Pieces(io.RawIOBase):
    """Files that are read as one, from end to end."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.place = paths, 0
        self.ends = list(accumulate(path.stat().st_size for path in paths))
        self.number, self.file = 0, paths[0].open("rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.ends[-1]}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, f"negative place {start + offset}")
        self.place = start + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        number = bisect(self.ends, self.place)
        if number == len(self.paths):
            return 0
        if number != self.number:
            self.file.close()
            self.number, self.file = number, self.paths[number].open("rb")
        begin = self.ends[number - 1] if number else 0
        self.file.seek(self.place - begin)
        read = self.file.readinto(memoryview(buffer)[: self.ends[number] - self.place])
        self.place += read
        return read

    def close(self) -> None:
        self.file.close()
        super().close()


def _zip_members(file: IO[bytes]) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as bundle:
        for member in bundle.infolist():
            kind = member.external_attr >> 16 & 0o170000  # the Unix file type, 0 if the maker had none
            if kind not in (0, 0o100000, 0o040000):
                raise UnsafeArchive(f"{member.filename!r} is a link or device; it is not unpacked")
            is_locked = bool(member.flag_bits & 1)
            yield _Member(
                member.filename,
                member.file_size,
                member.is_dir(),
                is_locked,
                partial(bundle.open, member),
            )


def _tar_members(file: IO[bytes]) -> Iterator[_Member]:
    try:
        bundle = _Tar.open(fileobj=file, mode="r:*", tarinfo=_Header)
    except tarfile.ReadError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"is neither tar nor zip: {reason}") from error
    with bundle:
        while (member := bundle.next()) is not None:
            bundle.members = []  # tarfile keeps them all
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise UnsafeArchive(f"{member.name!r} is a link or device; it is not unpacked")
            if member.size < 0:
                raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
            yield _Member(member.name, member.size, member.isdir(), False, partial(bundle.extract_member, member))
        padding = 0
        while chunk := bundle.fileobj.read(CHUNK):  # the compressor's checksum stands behind the last member
            padding += len(chunk)
            if padding > MAX_PADDING:
                raise UnsafeArchive(f"more than {MAX_PADDING} bytes behind its end; download it again")


class _Tar(tarfile.TarFile):
    """With what is counted over the whole archive."""

    members: list[tarfile.TarInfo]
    global_bytes = 0  # of the headers that stay in memory until the end

    def extract_member(self, member: tarfile.TarInfo) -> IO[bytes]:
        reader = self.extractfile(member)
        assert reader is not None, "only of files"
        return reader


class _Header(tarfile.TarInfo):
    """A header of bounded size; one that cannot be read is damage, where tarfile takes it for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):
            return super().frombuf(buf, encoding, errors)  # the mark of the end
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"not a tar header: {error}") from error

    def _proc_member(self, bundle: _Tar) -> tarfile.TarInfo:
        if self.size < 0:
            raise tarfile.ReadError(f"{self.name!r} has {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._proc_gnusparse_10()
        if self.type in _EXTENSIONS:
            read = self.size
            if self.type == tarfile.XGLTYPE:
                read = bundle.global_bytes = bundle.global_bytes + self.size
            if read > MAX_HEADER:
                raise UnsafeArchive(f"a header of {read} bytes, more than {MAX_HEADER}; it is not unpacked")
        return super()._proc_member(bundle)  # type: ignore[misc]  # the entry for subclasses, not in the stubs

    def _proc_gnusparse_10(self, *arguments: object) -> None:
        raise UnsafeArchive(f"{self.name[:80]!r} is a sparse file; it is not unpacked: repack it without --sparse")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10


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
