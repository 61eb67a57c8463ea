"""Transfers that break and servers that misbehave; all against a server on 127.0.0.1."""

import hashlib
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from engine.data.download import DownloadError, download, main, remember

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
    return download(url, path, backoff_seconds=0.01, timeout_seconds=60, show=False, **checks)


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
    server.cut_after, server.cuts = 70_000, 1
    with pytest.raises(DownloadError, match="1 attempts failed.*closed after") as caught:
        fetch(server, tmp_path / "f", retries=0)
    assert "goes on from there" in str(caught.value)
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
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as bundle:
        bundle.writestr("a/b.txt", b"x")
    server.content = (tmp_path / "source.zip").read_bytes()
    url, file = f"http://127.0.0.1:{server.server_port}/file.zip", str(tmp_path / "file.zip")
    main(["fetch", url, file])
    main(["extract", file, str(tmp_path / "out")])
    assert (tmp_path / "out" / "a" / "b.txt").read_bytes() == b"x"
    assert "sha256" in capsys.readouterr().out
    known = [str(len(server.content)), hashlib.md5(server.content).hexdigest()]
    main(["fetch", url, str(tmp_path / "again.zip"), *known])
    assert f"again.zip: md5 {known[1]}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="download: .* instead of 0000"):
        main(["fetch", url, str(tmp_path / "other.zip"), known[0], "0000"])
    with pytest.raises(SystemExit, match="download: .*offers .* bytes, 5 are expected"):
        main(["fetch", url, str(tmp_path / "other.zip"), "5", known[1]])
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
