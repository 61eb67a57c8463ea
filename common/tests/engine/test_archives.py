"""Archives that attack or are damaged: what is refused, and that nothing is written outside or beyond the limits."""

import contextlib
import gzip
import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from engine.data.archives import UnsafeArchive, check_archive, extract


def tar_of(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as bundle:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                bundle.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                bundle.addfile(info, io.BytesIO(content))
    return path


def zip_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in members:
            bundle.writestr(name, content)
    return path


GOOD = [("a/one.txt", b"1"), ("a/b/two.txt", b"22"), ("three.txt", b"")]


@pytest.mark.parametrize("make", [zip_of, tar_of, lambda p, m: tar_of(p, m, "w"), lambda p, m: tar_of(p, m, "w:xz")])
def test_harmless_archives_unpack_again_and_again(make, tmp_path):
    archive = make(tmp_path / "archive", GOOD)
    for _ in range(2):
        written = extract(archive, tmp_path / "out")
        assert {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in written} == dict(GOOD)


@pytest.mark.parametrize("make", [zip_of, tar_of])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:\\evil"])
def test_names_that_leave_the_folder_are_refused(make, name, tmp_path):
    archive = make(tmp_path / "archive", [(name, b"x")])
    with pytest.raises(UnsafeArchive, match="outside"):
        extract(archive, tmp_path / "deep" / "out")
    assert not [p for p in tmp_path.rglob("*") if "evil" in p.name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind, tmp_path):
    link = tarfile.TarInfo("link")
    link.type, link.linkname = kind, "/etc"
    archive = tar_of(tmp_path / "archive", [("link", link), ("link/passwd", b"x")])
    with pytest.raises(UnsafeArchive, match="link or device"):
        extract(archive, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_links_in_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "archive", "w") as bundle:
        bundle.writestr(link, "/etc")
    with pytest.raises(UnsafeArchive, match="link or device"):
        extract(tmp_path / "archive", tmp_path / "out")


def test_a_link_that_waits_in_the_folder_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out" / "three.txt").symlink_to(tmp_path / "elsewhere" / "three.txt")
    for member in (GOOD[0], GOOD[2]):
        with pytest.raises(UnsafeArchive, match="through a link"):
            extract(zip_of(tmp_path / "archive", [member]), tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_bombs_stop_at_the_limits(make, tmp_path):
    bomb = make(tmp_path / "bomb", [("zeros", bytes(5_000_000))])
    assert bomb.stat().st_size < 10_000  # it is one
    with pytest.raises(UnsafeArchive, match="more than 1000000 bytes"):
        extract(bomb, tmp_path / "out", max_bytes=1_000_000)
    with pytest.raises(UnsafeArchive, match="more than 2 files"):
        extract(make(tmp_path / "many", GOOD), tmp_path / "out", max_files=2)
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) < 1_000_000


def test_a_zip_that_lies_about_its_size_stops_at_the_limit_or_is_called_damaged(tmp_path):
    archive = zip_of(tmp_path / "archive", [("zeros", bytes(5_000_000))])
    content = archive.read_bytes()
    lie = content.replace((5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    assert lie != content
    archive.write_bytes(lie)
    with pytest.raises(ValueError, match="archive"):
        extract(archive, tmp_path / "out", max_bytes=1_000_000)
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) <= 1_000_000


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_damaged_archives_are_named(make, tmp_path):
    archive = make(tmp_path / "archive", [("a", np.random.default_rng(0).bytes(100_000))])
    content = archive.read_bytes()
    archive.write_bytes(content[:60_000])
    with pytest.raises(ValueError, match="archive"):
        extract(archive, tmp_path / "out")
    archive.write_bytes(content[:50_000] + bytes(20) + content[50_020:])
    with pytest.raises(ValueError, match="damaged"):
        extract(archive, tmp_path / "out")
    archive.write_text("this is no archive")
    with pytest.raises(ValueError, match="neither tar nor zip"):
        extract(archive, tmp_path / "out")


def raw_tar(path: Path, *headers: tuple[bytes, bytes], mode: str = "wb", end: bytes = bytes(1024)) -> Path:
    """A tar of (type, content) blocks as tarfile itself would not write it."""
    with (gzip.open if mode == "gz" else open)(path, "wb") as file:
        for kind, content in headers:
            info = tarfile.TarInfo("member")
            info.type, info.size = kind, len(content)
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
        file.write(end)
    return path


def pax(**fields: str) -> bytes:
    records = b""
    for key, value in fields.items():
        body = f" {key}={value}\n".encode()
        records += str(len(body) + 3).encode() + body if len(body) + 3 < 1000 else str(len(body) + 5).encode() + body
    return records


def long_names(path: Path, kind: bytes) -> Path:
    return raw_tar(path, (kind, b"30000000 path=" + bytes(30_000_000)), (b"0", b"x"), mode="gz")


def negative_size(path: Path) -> Path:
    return raw_tar(path, (b"x", b"13 size=-999\n"), (b"0", b"x"))


def locked_zip(path: Path) -> Path:
    content = bytearray(zip_of(path, [("a", b"x")]).read_bytes())
    content[6] |= 1  # the flag in the local header, and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    return path


def unknown_compression(path: Path) -> Path:
    content = bytearray(zip_of(path, [("a", b"x")]).read_bytes())
    content[8] = content[content.index(b"PK\x01\x02") + 10] = 99
    path.write_bytes(content)
    return path


def cut_at_a_member(path: Path) -> Path:
    return raw_tar(path, (b"0", b"one"), end=b"")


def garbage_between_members(path: Path) -> Path:
    raw_tar(path, (b"0", b"one"), (b"0", b"two"))
    content = bytearray(path.read_bytes())
    content[1024:1536] = b"\x07" * 512
    path.write_bytes(content)
    return path


def folders(path: Path, make) -> Path:
    return make(path, [(f"{i}/", b"") for i in range(200)])


def folder_tar(path: Path) -> Path:
    return raw_tar(path, *[(tarfile.DIRTYPE, b"")] * 200)


HOSTILE = {
    "a global pax header of 30 MB": (lambda p: long_names(p, b"g"), "more than 65536"),
    "a pax header of 30 MB": (lambda p: long_names(p, b"x"), "more than 65536"),
    "a Solaris header of 30 MB": (lambda p: long_names(p, b"X"), "more than 65536"),
    "a long name of 30 MB": (lambda p: long_names(p, b"L"), "more than 65536"),
    "a long link name of 30 MB": (lambda p: long_names(p, b"K"), "more than 65536"),
    "many global headers": (
        lambda p: raw_tar(p, *[(b"g", pax(**{f"key{i}": "v" * 900})) for i in range(90)], (b"0", b"x"), mode="gz"),
        "more than 65536",
    ),
    "a chain of 5,000 headers": (lambda p: raw_tar(p, *[(b"x", b"6 a=b\n")] * 5000, (b"0", b"x")), "damaged"),
    "a sparse file": (lambda p: raw_tar(p, (b"S", b"x")), "sparse"),
    "a pax sparse file": (
        lambda p: raw_tar(p, (b"x", b"23 GNU.sparse.map=0,1,2\n"[:24]), (b"0", b"x")),
        "sparse|damaged",
    ),
    "a negative size": (negative_size, "-999 bytes"),
    "a size of 400 digits": (
        lambda p: raw_tar(p, (b"x", b"410 size=" + b"9" * 400 + b"\n"), (b"0", b"x")),
        "unpacks to more|damaged",
    ),
    "an unknown type": (lambda p: raw_tar(p, (b"Z", b"x")), "link or device"),
    "200 folders in a tar": (folder_tar, "more than 100 files and folders"),
    "200 folders in a zip": (lambda p: folders(p, zip_of), "more than 100 files and folders"),
    "one file 200 folders deep": (lambda p: zip_of(p, [("d/" * 200 + "f", b"x")]), "more than 100 files and folders"),
    "zeros behind the end": (
        lambda p: raw_tar(p, (b"0", b"x"), mode="gz", end=bytes(80_000_000)),
        "behind its end",
    ),
    "a tar cut between two members": (cut_at_a_member, "damaged"),
    "garbage between two members": (garbage_between_members, "damaged"),
    "a locked zip": (locked_zip, "locked by a password"),
    "an unknown compression": (unknown_compression, "damaged"),
    "an empty file": (lambda p: p.write_bytes(b"") or p, "neither tar nor zip"),
    "a file that is a folder, too": (lambda p: zip_of(p, [("a", b"x"), ("a/b", b"x")]), "cannot be written"),
    "a folder that is a file, too": (lambda p: tar_of(p, [("a/b", b"x"), ("a", b"x")]), "cannot be written"),
    "a name of 300 letters": (lambda p: zip_of(p, [("n" * 300, b"x")]), "cannot be written"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_end_in_one_line_and_little_memory(kind, tmp_path):
    make, message = HOSTILE[kind]
    archive = make(tmp_path / "archive")
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, OSError), match=message) as caught:
            extract(archive, tmp_path / "out", max_bytes=1_000_000, max_files=100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{archive}: ") and "\n" not in str(caught.value)
    assert peak < 25_000_000  # the headers alone hold 30 MB
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_a_link_planted_under_the_temporary_name_is_not_followed(make, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "f.part").symlink_to(victim)
    extract(make(tmp_path / "archive", [("f", b"1"), ("f.part.txt", b"2")]), tmp_path / "out")
    assert victim.read_text() == "mine" and (tmp_path / "out" / "f").read_bytes() == b"1"


def test_a_member_named_like_a_partial_file_stays(tmp_path):
    members = [("f.part", b"1"), ("f", b"2")]
    extract(zip_of(tmp_path / "archive", members), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["f", "f.part"]


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_an_archive_is_tested_without_unpacking(make, tmp_path):
    archive = make(tmp_path / "archive", [("a", np.random.default_rng(0).bytes(100_000))])
    check_archive(archive)
    check_archive(locked_zip(tmp_path / "locked"))
    content = archive.read_bytes()
    for damaged in (content[:60_000], content[:50_000] + bytes(20) + content[50_020:], content[:-30]):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match="archive: "):
            check_archive(archive)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_what_the_data_filter_of_tarfile_changes_or_refuses_is_refused(name, tmp_path):
    member = tarfile.TarInfo(name)
    with contextlib.suppress(tarfile.FilterError):
        assert tarfile.data_filter(member, str(tmp_path / "out")).name != name
    for make in (zip_of, tar_of):
        with pytest.raises(UnsafeArchive):
            extract(make(tmp_path / "archive", [(name, b"x")]), tmp_path / "out")


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_an_archive_that_was_cut_in_pieces_is_unpacked_as_the_whole(mode, count, tmp_path):
    content = tar_of(tmp_path / "whole", [*GOOD, ("noise", np.random.default_rng(0).bytes(5000))], mode).read_bytes()
    pieces = [tmp_path / f"piece{k}" for k in range(count)]
    for k, piece in enumerate(pieces):
        piece.write_bytes(content[len(content) * k // count : len(content) * (k + 1) // count])
    written = extract(pieces[0], tmp_path / "out", further=pieces[1:])
    assert {str(p.relative_to(tmp_path / "out")) for p in written} == {*dict(GOOD), "noise"}
    assert (tmp_path / "out" / "noise").read_bytes() == np.random.default_rng(0).bytes(5000)
    if count > 1 and mode == "w:gz":
        with pytest.raises(ValueError, match="piece0: is damaged"):
            extract(pieces[0], tmp_path / "short", further=pieces[1:-1])


def test_pieces_are_checked_as_whole_archives_are(tmp_path):
    content = tar_of(tmp_path / "whole", [("a.txt", b"1"), ("../evil", b"x")]).read_bytes()
    (tmp_path / "a").write_bytes(content[:40])
    (tmp_path / "b").write_bytes(content[40:])
    with pytest.raises(UnsafeArchive, match="outside"):
        extract(tmp_path / "a", tmp_path / "deep" / "out", further=[tmp_path / "b"])
    assert not [p for p in tmp_path.rglob("*") if "evil" in p.name]
    with pytest.raises(FileNotFoundError, match="c: no such file"):
        extract(tmp_path / "a", tmp_path / "out", further=[tmp_path / "c"])
