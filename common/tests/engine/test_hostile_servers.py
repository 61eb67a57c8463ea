"""What a server can do wrong, one line each: what it answers, and what must happen. All on 127.0.0.1, in threads."""

import gzip
import hashlib
import io
import re
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.data.download import DownloadError, download, main, remember

CONTENT = np.random.default_rng(0).bytes(100_000)
OTHER = np.random.default_rng(1).bytes(100_000)
OLD = "Last-Modified: Mon, 06 Jul 2020 10:00:00 GMT\r\nDate: Fri, 10 Jul 2020 10:00:00 GMT"
NEW = "Last-Modified: Tue, 07 Jul 2020 10:00:00 GMT\r\nDate: Fri, 10 Jul 2020 10:00:00 GMT"
PAGE = b"<!DOCTYPE html><html><title>Sign in</title></html>"


def packed(make: Callable, mode: str) -> bytes:
    buffer = io.BytesIO()
    with make(buffer, mode) as bundle:
        if make is zipfile.ZipFile:
            bundle.writestr("a", CONTENT)
        else:
            info = tarfile.TarInfo("a")
            info.size = len(CONTENT)
            bundle.addfile(info, io.BytesIO(CONTENT))
    return buffer.getvalue()


ZIP = packed(zipfile.ZipFile, "w")
TGZ = packed(lambda file, mode: tarfile.open(fileobj=file, mode=mode), "w:gz")
TAR = gzip.decompress(TGZ)


def answer(body: bytes, *fields: str, status: str = "200 OK", length: int | None = -1, cut: int | None = None) -> bytes:
    """A whole answer; `length` None announces none, `cut` closes after that many bytes of the body."""
    lines = [f"HTTP/1.1 {status}", "Connection: close", *fields]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length == -1 else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body[:cut]


def rest(body: bytes, start: int, *fields: str, total: int | str | None = None, last: int | None = None) -> bytes:
    """A 206 from `start`, which claims a `total`."""
    last = len(body) - 1 if last is None else last
    extent = f"Content-Range: bytes {start}-{last}/{len(body) if total is None else total}"
    return answer(body[start : last + 1], extent, *fields, status="206 Partial Content")


class Server:
    """Gives its answers in turn, the last one again and again; an answer is bytes, or pieces with pauses between."""

    def __init__(self, answers: list) -> None:
        self.answers, self.requests = answers, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.reply, args=(connection,), daemon=True).start()

    def reply(self, connection: socket.socket) -> None:
        with connection:
            request = b""
            while b"\r\n\r\n" not in request:
                piece = connection.recv(65536)
                if not piece:
                    return
                request += piece
            self.requests.append(request.decode())
            reply = self.answers[min(len(self.requests), len(self.answers)) - 1]
            try:
                for piece in [reply] if isinstance(reply, bytes) else reply:
                    connection.sendall(piece)
            except OSError:
                return

    def ranges(self) -> list[int]:
        found = [re.search(r"Range: bytes=(\d+)-", request) for request in self.requests]
        return [int(match[1]) if match else 0 for match in found]


@pytest.fixture
def serve() -> Iterator[Callable[[list], Server]]:
    servers = []

    def start(answers: list) -> Server:
        servers.append(Server(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.socket.shutdown(socket.SHUT_RDWR)
        server.socket.close()


def fetch(server: Server, path: Path, **options) -> bytes:
    settings = {"retries": 2, "backoff_seconds": 0.01, "timeout_seconds": 0.5, "show": False} | options
    return download(f"{server.url}/{path.name}", path, **settings).read_bytes()


class Drip:
    """Pieces with pauses, for at most five seconds."""

    def __init__(self, start: bytes, piece: bytes, pause: float = 0.05) -> None:
        self.start, self.piece, self.pause = start, piece, pause

    def __iter__(self) -> Iterator[bytes]:
        yield self.start
        end = time.monotonic() + 5
        while time.monotonic() < end:
            yield self.piece
            time.sleep(self.pause)


ETAG, WEAK = 'ETag: "one"', 'ETag: W/"one"'
CUT = 30_000

# name of the file, answers in turn, what arrives (or what the error says)
KINDS = {
    "206 to a first request, a part of the file": (
        "f",
        [rest(CONTENT, 0, ETAG, last=999), rest(CONTENT, 1000, ETAG)],
        CONTENT,
    ),
    "206 without Content-Range": ("f", [answer(CONTENT[:999], status="206 Partial Content")], "Content-Range None"),
    "206 of an unknown total": ("f", [rest(CONTENT, 0, total="*", last=999)], "Content-Range"),
    "206 from elsewhere": ("f", [answer(CONTENT, ETAG, cut=CUT), rest(CONTENT, 5, ETAG), answer(CONTENT)], CONTENT),
    "206 in small pieces": (
        "f",
        [rest(CONTENT, i, ETAG, last=i + 9_999) for i in range(0, 100_000, 10_000)],
        CONTENT,
    ),
    "changed, no validator": ("f", [answer(CONTENT, cut=CUT), answer(OTHER)], OTHER),
    "changed, weak ETag": ("f", [answer(CONTENT, WEAK, cut=CUT), answer(OTHER, WEAK)], OTHER),
    "changed, If-Range ignored, other ETag": (
        "f",
        [answer(CONTENT, ETAG, cut=CUT), rest(OTHER, CUT, 'ETag: "two"'), answer(OTHER, 'ETag: "two"')],
        OTHER,
    ),
    "changed, If-Range ignored, no ETag": (
        "f",
        [answer(CONTENT, ETAG, cut=CUT), rest(OTHER, CUT), answer(OTHER)],
        OTHER,
    ),
    "changed, If-Range ignored, other date": (
        "f",
        [answer(CONTENT, OLD, cut=CUT), rest(OTHER, CUT, NEW), answer(OTHER, NEW)],
        OTHER,
    ),
    "changed, same date, other weak ETag": (
        "f",
        [answer(CONTENT, OLD, WEAK, cut=CUT), rest(OTHER, CUT, OLD, 'ETag: W/"two"'), answer(OTHER)],
        OTHER,
    ),
    "changed, other total": (
        "f",
        [answer(CONTENT, ETAG, cut=CUT), rest(OTHER + b"x", CUT, ETAG), answer(OTHER)],
        OTHER,
    ),
    "same date: goes on": ("f", [answer(CONTENT, OLD, cut=CUT), rest(CONTENT, CUT, OLD)], CONTENT),
    "an empty body": ("f", [answer(b"")], "is empty"),
    "no content": ("f", [answer(b"", status="204 No Content")], "answers 204"),
    "a login page": ("a.zip", [answer(PAGE, "Content-Type: text/html; charset=utf-8")], "web page"),
    "a login page called binary": ("a.zip", [answer(PAGE, "Content-Type: application/zip")], "web page"),
    "a page for a name without ending": ("f", [answer(b" \n" + PAGE)], "web page"),
    "an error in XML for a list": ("a.csv", [answer(b"<Error><Code>AccessDenied</Code></Error>")], "web page"),
    "a page for JSON": ("a.json", [answer(b"<p>quota exceeded</p>")], "web page"),
    "JSON cut short": ("a.json", [answer(b'{"a": [1, 2')], "cannot be read as JSON"),
    "a list with zero bytes": ("a.csv", [answer(b"a,b\0")], "zero bytes"),
    "bytes for a list": ("a.csv", [answer(b"\xff\xfe" + CONTENT)], "not in UTF-8"),
    "text for a zip": ("a.zip", [answer(b"quota exceeded")], "neither tar nor zip"),
    "a zip cut short": ("a.zip", [answer(ZIP[:-200])], "neither tar nor zip|damaged"),
    "a tar.gz cut short, no length": ("a.tar.gz", [answer(TGZ[:-200], length=None)], "damaged"),
    "a tar cut short, no length": ("a.tar", [answer(TAR[:2048], length=None)], "damaged"),
    "a gz cut short, no length": ("a.gz", [answer(gzip.compress(CONTENT)[:-9], length=None)], "damaged"),
    "a good tar.gz without length": ("a.tar.gz", [answer(TGZ, length=None)], TGZ),
    "a good tar.gz with its coding": ("a.tar.gz", [answer(TGZ, "Content-Encoding: x-gzip")], TGZ),
    "a good zip": ("a.zip", [answer(ZIP)], ZIP),
    "compressed unasked": ("f", [answer(gzip.compress(CONTENT), "Content-Encoding: gzip")], "sends gzip"),
    "a length of words": ("f", [answer(CONTENT, "Content-Length: many", length=None)], "length of 'many'"),
    "a negative length": ("f", [answer(CONTENT, length=-5)], "length of '-5'"),
    "a length of an exabyte": ("f", [answer(CONTENT, length=10**17)], "do not fit on the disk"),
    "too short again and again": ("f", [answer(CONTENT, cut=0)], "3 attempts failed"),
    "no length, no end": (
        "f",
        [Drip(answer(b"", length=None), bytes(200_000), 0)],
        "allowed without an announced length",
    ),
    "a body that drips": ("f", [Drip(answer(CONTENT, cut=10), b"x")], "bytes came in 0.5 s"),
    "a header that drips": ("f", [Drip(b"HTTP/1.1 200 OK\r\n", b"x")], "came in 0.5 s"),
    "a header without end": ("f", [Drip(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n", 0)], "headers"),
    "continue for ever": ("f", [Drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01)], "came in 0.5 s"),
    "trailers without end": (
        "f",
        [Drip(answer(b"1\r\nx\r\n0\r\n", "Transfer-Encoding: chunked", length=None), b"x: y\r\n")],
        "came in 0.5 s",
    ),
    "chunks of words": ("f", [answer(b"many\r\nx", "Transfer-Encoding: chunked", length=None)], "3 attempts failed"),
    "silence": ("f", [Drip(b"", b"", 0.1)], "3 attempts failed"),
    "nonsense": ("f", [b"\x00\xff" * 50 + b"\r\n"], "3 attempts failed"),
    "redirected to ftp": ("f", [answer(b"", "Location: ftp://127.0.0.1/f", status="302 Found")], "only http and https"),
    "redirected to a file": ("f", [answer(b"", "Location: file:///etc/hostname", status="302 Found")], "302"),
    "redirected in a circle": ("f", [answer(b"", "Location: /f", status="302 Found")], "302"),
    "redirected to nonsense": ("f", [answer(b"", "Location: http://[::1/f", status="302 Found")], "check the address"),
    "progress gives attempts back": (
        "f",
        [answer(CONTENT, ETAG, cut=9_000)]
        + [rest(CONTENT, i, ETAG, last=i + 8_999) for i in range(9_000, 90_000, 9_000)]
        + [rest(CONTENT, 90_000, ETAG)],
        CONTENT,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_server_gives_the_right_file_or_one_line(kind, serve, tmp_path):
    name, answers, outcome = KINDS[kind]
    server = serve(answers)
    began = time.monotonic()
    if isinstance(outcome, bytes):
        assert fetch(server, tmp_path / name) == outcome
        assert [path.name for path in tmp_path.iterdir()] == [name]
    else:
        with pytest.raises(DownloadError, match=outcome) as caught:
            fetch(server, tmp_path / name, max_bytes=1_000_000)
        assert server.url in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / name).exists()
    assert time.monotonic() - began < 4


def test_a_checksum_lets_a_transfer_go_on_without_validators_and_catches_a_splice(serve, tmp_path):

    digest = hashlib.sha256(CONTENT).hexdigest()
    server = serve([answer(CONTENT, cut=CUT), rest(CONTENT, CUT)])
    assert fetch(server, tmp_path / "f", sha256=digest) == CONTENT and server.ranges() == [0, CUT]
    (tmp_path / "g.part").write_bytes(OTHER[:CUT])
    server = serve([rest(CONTENT, CUT), answer(CONTENT)])
    assert fetch(server, tmp_path / "g", sha256=digest) == CONTENT and server.ranges() == [CUT, 0]


def test_a_part_of_another_address_is_not_continued(serve, tmp_path):
    with pytest.raises(DownloadError):
        fetch(serve([answer(CONTENT, ETAG, cut=CUT)]), tmp_path / "f", retries=0)
    server = serve([answer(OTHER, ETAG)])
    assert fetch(server, tmp_path / "f") == OTHER and server.ranges() == [0]


@pytest.mark.parametrize("plant", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("suffix", [".part", ".part.source"])
def test_links_planted_beside_the_file_are_not_followed(plant, suffix, serve, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    getattr(tmp_path / f"f{suffix}", plant)(victim)
    assert fetch(serve([answer(CONTENT, ETAG)]), tmp_path / "f") == CONTENT
    assert victim.read_text() == "mine" and not (tmp_path / "f").is_symlink()


def test_a_worthless_file_of_an_earlier_version_is_fetched_again(serve, tmp_path):
    for worthless in (b"", PAGE):
        (tmp_path / "a.zip").write_bytes(worthless)
        assert fetch(serve([answer(ZIP)]), tmp_path / "a.zip") == ZIP


def test_what_is_no_archive_never_becomes_the_reference(serve, tmp_path):
    path = tmp_path / "a.tar.gz"
    for body in (PAGE, b"", TGZ[:-100]):
        with pytest.raises(SystemExit, match="download: http"):
            main(["fetch", f"{serve([answer(body)]).url}/a.tar.gz", str(path)])
        path.write_bytes(body)  # as an earlier version left it
        with pytest.raises(DownloadError, match="a.tar.gz: .*download"):
            remember(path)
        path.unlink()
        assert not list(tmp_path.iterdir())
    main(["fetch", f"{serve([answer(TGZ)]).url}/a.tar.gz", str(path)])
    note = tmp_path / "a.tar.gz.sha256"
    for content in ("", "\xff", "not a sum"):
        note.write_text(content)
        with pytest.raises(DownloadError, match="is no sha256; remove it"):
            remember(path)
