"""Files of a Debian package: where they are found, unpacked without being trusted, what is said when they are not."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from engine.data import debian
from engine.data.debian import Debian, unpacked

PACKAGE = Debian("some-words", "usr/share/words", 1)


def member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


def write_deb(path: Path, files: dict[str, bytes], *, compression: str = "xz", link: str | None = None) -> Path:
    """A package of these files; `link` is a symbolic link that points out of it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link is not None:
            info = tarfile.TarInfo(f"./{link}")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    control = io.BytesIO()
    with tarfile.open(fileobj=control, mode="w:gz"):
        pass
    parts = {"debian-binary": b"2.0\n", "control.tar.gz": control.getvalue()}
    parts[f"data.tar.{compression}"] = data.getvalue()
    path.write_bytes(b"!<arch>\n" + b"".join(member(name, content) for name, content in parts.items()))
    return path


@pytest.fixture(params=["dpkg-deb", "by hand"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to open a package; where there is no dpkg-deb, the second stands for the first."""
    if request.param == "by hand":
        which = shutil.which
        monkeypatch.setattr(debian.shutil, "which", lambda name: None if name == "dpkg-deb" else which(name))
    return request.param


def test_the_files_of_a_given_package_are_there_while_the_block_runs(tmp_path: Path, reader: str) -> None:
    files = {"usr/share/words/nouns": b"a\nb\n", "usr/share/words/more/verbs": b"c", "usr/share/doc/x": b"d"}
    deb = write_deb(tmp_path / "words.deb", files)
    with unpacked(PACKAGE, deb) as folder:
        found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {"nouns": b"a\nb\n", "more/verbs": b"c"} and not folder.exists()


def test_links_and_paths_that_lead_out_are_left_out(tmp_path: Path, reader: str) -> None:
    files = {"usr/share/words/nouns": b"a", "usr/share/words/../../../out": b"b"}
    deb = write_deb(tmp_path / "words.deb", files, link="usr/share/words/link", compression="gz")
    with unpacked(PACKAGE, deb) as folder:
        assert [path.name for path in folder.iterdir()] == ["nouns"]
        assert not list(folder.parents[3].rglob("out"))


def test_an_installed_package_is_taken_from_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "usr/share/words").mkdir(parents=True)
    with unpacked(PACKAGE, root=tmp_path) as folder:
        assert folder == tmp_path / "usr/share/words"


@pytest.mark.parametrize(
    "content", [b"", b"not a package", b"!<arch>\n", b"!<arch>\n" + member("debian-binary", b"2.0\n"), b"!<arch>\nxxxx"]
)
def test_what_is_no_package_is_named(tmp_path: Path, reader: str, content: bytes) -> None:
    deb = tmp_path / "words.deb"
    deb.write_bytes(content)
    with (
        pytest.raises(ValueError, match="words.deb: cannot be read as Debian's package some-words"),
        unpacked(PACKAGE, deb),
    ):
        pass


def test_a_package_that_ends_early_is_named(tmp_path: Path, reader: str) -> None:
    deb = write_deb(tmp_path / "words.deb", {"usr/share/words/nouns": bytes(range(256)) * 4000}, compression="gz")
    deb.write_bytes(deb.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="words.deb: cannot be read"), unpacked(PACKAGE, deb):
        pass


def test_another_package_is_named(tmp_path: Path, reader: str) -> None:
    deb = write_deb(tmp_path / "other.deb", {"usr/share/other/nouns": b"a"})
    with pytest.raises(ValueError, match="has no folder usr/share/words"), unpacked(PACKAGE, deb):
        pass


def test_a_package_that_would_fill_the_disk_is_refused(tmp_path: Path, reader: str, monkeypatch) -> None:
    monkeypatch.setattr(debian, "MAX_BYTES", 100)
    deb = write_deb(tmp_path / "words.deb", {"usr/share/words/nouns": b"a" * 101})
    with pytest.raises(ValueError, match="holds more than 100 bytes"), unpacked(PACKAGE, deb):
        pass


def test_a_missing_file_and_a_missing_network_say_what_to_do(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match="leave out --deb"), unpacked(PACKAGE, tmp_path / "absent.deb"):
        pass
    refused = subprocess.CompletedProcess([], 100, "", "Reading...\nE: Unable to locate package some-words\n")
    monkeypatch.setattr(debian.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(debian.subprocess, "run", lambda *words, **named: refused)
    with pytest.raises(ValueError, match="Unable to locate package some-words. Remedies: .*--deb FILE"):
        with unpacked(PACKAGE, root=tmp_path):
            pass
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no apt-get on this machine"), unpacked(PACKAGE, root=tmp_path):
        pass
