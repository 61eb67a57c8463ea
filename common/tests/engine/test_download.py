"""Transfers that break, servers that misbehave and archives that attack; all against a server on 127.0.0.1."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from engine.data.download import DownloadError, UnsafeArchive, download, extract, main, remember

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`; the attributes say how it misbehaves."""

    content = CONTENT
    etag = '"one"'
    ranges = True
    cut_after: int | None = None  # bytes of a body after which the next `cuts` connections break
    cuts = 0
    failures: list[int]  # status codes to answer first
    seen: list[str | None]  # the Range header of each request


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.seen.append(wanted)
        if server.failures:
            self.send_error(server.failures.pop(0))
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if self.headers.get("If-Range", server.etag) != server.etag:
            start = 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.etag)
        self.end_headers()
        if server.cuts > 0 and server.cut_after is not None:
            server.cuts -= 1
            body = body[: server.cut_after]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.failures, server.seen = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server: Server, path: Path, **checks) -> Path:
    url = f"http://127.0.0.1:{server.server_port}/file.bin"
    return download(url, path, backoff_seconds=0.01, timeout_seconds=5, show=False, **checks)


def test_a_file_arrives_checked_and_is_not_fetched_twice(server, tmp_path):
    path = tmp_path / "new" / "file.bin"
    for _ in range(2):
        assert fetch(server, path, size=len(CONTENT), sha256=SHA256, md5=MD5).read_bytes() == CONTENT
    assert server.seen == [None]
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_an_interrupted_transfer_goes_on_where_it_stopped(server, tmp_path):
    server.cut_after, server.cuts = 70_000, 3
    assert fetch(server, tmp_path / "f", sha256=SHA256).read_bytes() == CONTENT
    starts = [0] + [int(r.removeprefix("bytes=").removesuffix("-")) for r in server.seen[1:]]
    assert len(starts) == 4 and starts == sorted(set(starts))


def test_when_all_attempts_fail_the_next_call_uses_the_partial_file(server, tmp_path):
    server.cut_after, server.cuts = 70_000, 2
    with pytest.raises(DownloadError, match="2 attempts failed.*goes on from there"):
        fetch(server, tmp_path / "f", retries=1)
    assert not (tmp_path / "f").exists()
    kept = (tmp_path / "f.part").stat().st_size
    assert kept > 0
    assert fetch(server, tmp_path / "f", sha256=SHA256).read_bytes() == CONTENT
    assert server.seen[-1] == f"bytes={kept}-"


def test_a_server_without_ranges_is_read_from_the_beginning(server, tmp_path):
    server.ranges, server.cut_after, server.cuts = False, 70_000, 1
    assert fetch(server, tmp_path / "f", sha256=SHA256).read_bytes() == CONTENT
    assert len(server.seen) == 2


def test_a_file_that_changed_meanwhile_is_not_spliced(server, tmp_path):
    server.cut_after, server.cuts = 70_000, 1
    with pytest.raises(DownloadError):
        fetch(server, tmp_path / "f", retries=0)
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT[::-1]


def test_a_complete_partial_file_needs_no_more_bytes(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path / "f", sha256=SHA256).read_bytes() == CONTENT


def test_a_partial_file_longer_than_the_source_is_dropped(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT + b"more")
    assert fetch(server, tmp_path / "f", sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("check", [{"sha256": "0" * 64}, {"md5": "0" * 32}])
def test_a_wrong_checksum_leaves_nothing_behind(check, server, tmp_path):
    with pytest.raises(DownloadError, match="instead of"):
        fetch(server, tmp_path / "f", **check)
    assert not list(tmp_path.iterdir())


def test_a_wrong_size_is_refused_before_the_transfer(server, tmp_path):
    with pytest.raises(DownloadError, match="300000 bytes, 5 are expected"):
        fetch(server, tmp_path / "f", size=5)
    assert not (tmp_path / "f").exists()


def test_where_no_checksum_is_published_later_files_are_held_to_the_first(server, tmp_path):
    path = fetch(server, tmp_path / "file.bin")
    assert remember(path) == remember(path) == SHA256
    assert (tmp_path / "file.bin.sha256").read_text() == f"{SHA256}  file.bin\n"
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match="is not the .* of the first download; the source has changed"):
        remember(path)


def test_the_command_line_fetches_and_unpacks_and_says_one_line_of_errors(server, tmp_path, capsys):
    server.content = zip_of(tmp_path / "source.zip", [("a/b.txt", b"x")]).read_bytes()
    url, file = f"http://127.0.0.1:{server.server_port}/file.zip", str(tmp_path / "file.zip")
    main(["fetch", url, file])
    main(["extract", file, str(tmp_path / "out")])
    assert (tmp_path / "out" / "a" / "b.txt").read_bytes() == b"x"
    assert "sha256" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="usage"):
        main(["mirror"])
    with pytest.raises(SystemExit, match="download: .*only http"):
        main(["fetch", "ftp://x", file])


def test_passing_failures_are_retried_and_final_ones_are_not(server, tmp_path):
    server.failures = [503, 429]
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    server.failures, server.seen = [404], []
    with pytest.raises(DownloadError, match="404"):
        fetch(server, tmp_path / "g")
    assert len(server.seen) == 1


def test_only_web_addresses_are_fetched(tmp_path):
    for url in ("file:///etc/hostname", "ftp://127.0.0.1/x", "/etc/hostname"):
        with pytest.raises(ValueError, match="only http and https"):
            download(url, tmp_path / "f", show=False)


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
