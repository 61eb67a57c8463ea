"""Files that a Debian package only carries, such as sounds or a dictionary: apt-get fetches the package's file, it is
unpacked into a folder of this repository, and nothing of it is installed or run.

    with unpacked(Debian("wordnet-base", "usr/share/wordnet", 7)) as folder:       # no root is needed
        shutil.copy(folder / "data.noun", ...)

Where the package is installed already, its files are taken from there. Not here: whether they are the known ones (by
their own checksums, since Debian's releases pack the same files anew), and which are wanted.
"""

import lzma
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

APT_SECONDS = 900  # 143 MB at 160 kB/s
MAX_BYTES, MAX_FILES = 2**31, 20_000  # of what is unpacked
AR_MAGIC, AR_HEADER = b"!<arch>\n", 60


class Debian(NamedTuple):
    """A package, and the folder below / in which it puts the files that are wanted."""

    package: str
    folder: str
    megabytes: int  # of the package's file


@contextmanager
def unpacked(debian: Debian, deb: Path | None = None, root: Path = Path("/")) -> Iterator[Path]:
    """The folder with the package's files, for as long as the block runs.

    deb: the package's file, if you have it; None: from where it is installed below `root`, else apt-get fetches it.
    ValueError with the remedies where it is not to be had or is no package; FileNotFoundError for a `deb` that is not
    there.
    """
    if deb is None and (root / debian.folder).is_dir():
        yield root / debian.folder
        return
    if deb is not None and not deb.is_file():
        raise FileNotFoundError(f"{deb}: no such file; leave out --deb to fetch {debian.package} with apt-get")
    with tempfile.TemporaryDirectory() as scratch:
        path = _fetch(debian, Path(scratch)) if deb is None else deb
        target = Path(scratch) / "unpacked"
        try:
            _unpack(path, debian.folder, target)
        except (tarfile.TarError, lzma.LZMAError, OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as Debian's package {debian.package} ({error})") from error
        if not (target / debian.folder).is_dir():
            raise ValueError(f"{path}: has no folder {debian.folder}, so it is not Debian's package {debian.package}")
        yield target / debian.folder


def _fetch(debian: Debian, folder: Path) -> Path:
    """The package's file, in the folder."""
    reason = "there is no apt-get on this machine"
    if shutil.which("apt-get"):
        try:
            command = ["apt-get", "download", debian.package]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=APT_SECONDS)
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"nothing after {APT_SECONDS} s"
    found = next(folder.glob("*.deb"), None)
    if found is None:
        raise ValueError(
            f"Debian's package {debian.package} ({debian.megabytes} MB) could not be fetched: {reason}. Remedies: "
            f"apt-get update; apt-get install {debian.package}; or get its .deb elsewhere and name it with --deb FILE"
        )
    return found


def _unpack(deb: Path, folder: str, target: Path) -> None:
    """The regular files of a .deb that lie below `folder`, into `target`; links and whatever else are left out."""
    with _tar_of(deb) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
        total = count = 0
        for member in archive:
            name = PurePosixPath(member.name)
            if not member.isfile() or ".." in name.parts or not name.is_relative_to(folder):
                continue
            total, count = total + member.size, count + 1
            if total > MAX_BYTES or count > MAX_FILES:
                raise ValueError(f"holds more than {MAX_BYTES} bytes or {MAX_FILES} files")
            content = archive.extractfile(member)
            assert content is not None, "of a regular file"
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with open(target / name, "wb") as file:
                shutil.copyfileobj(content, file)


@contextmanager
def _tar_of(deb: Path) -> Iterator[IO[bytes]]:
    """The data of a package as a tar, compressed or not: by dpkg-deb, which knows all that Debian used, or cut out of
    the ar archive that a .deb is.
    """
    if shutil.which("dpkg-deb"):
        command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None, "both are pipes"
            try:
                yield process.stdout
            except tarfile.ReadError as error:  # of a stream that dpkg-deb did not begin
                said = process.stderr.read().decode(errors="replace").strip().splitlines()
                raise ValueError(said[-1] if said else str(error)) from error
            finally:
                process.stdout.close()
        return
    with open(deb, "rb") as file:
        _seek_data(file)
        yield file


def _seek_data(file: IO[bytes]) -> None:
    """Go to the member data.tar.* of an ar archive, the last one of a package. ValueError where there is none."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise ValueError("it is no ar archive")
    while len(header := file.read(AR_HEADER)) == AR_HEADER:
        if header.startswith(b"data.tar"):
            return
        size = header[48:58].strip()
        if not size.isdigit():
            raise ValueError("the ar archive is damaged")
        file.seek(int(size) + int(size) % 2, 1)  # members begin at even places
    raise ValueError("it has no data.tar")
