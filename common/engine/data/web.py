"""One HTTP(S) request to a server that is not trusted: bounded in time, never led to another scheme.

    answer = Answer(request, timeout=30.0, least_rate=1024)
    status, fields = answer.begin()
    for chunk in answer.chunks(): ...

and what an answer's fields say of the file. Not here: retries, and what becomes of the bytes (download.py).
"""

import contextlib
import email.utils
import http.client
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import IO, Any

_PIECE = 1 << 18  # bytes asked of the network at a time


class DownloadError(RuntimeError):
    """A transfer that failed for good; the message names the address, what happened, and what to do."""


class Slow(ConnectionError):
    """An attempt that was given up because the server sends too little; it does not count as progress."""


def extent(status: int, fields: http.client.HTTPMessage, asked: int) -> tuple[int, int | None]:
    """(first byte, bytes of the whole file or None) of an answer. ConnectionError if it does not say or make sense."""
    length = fields.get("Content-Length")
    if length is not None and not re.fullmatch("[0-9]{1,18}", length):
        raise ConnectionError(f"the server announces a length of {length[:40]!r}")
    if status == 200:
        return 0, None if length is None or fields.get("Transfer-Encoding") else int(length)
    found = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", fields.get("Content-Range", "").strip())
    if status != 206 or found is None:
        raise ConnectionError(f"the server answers {status} with Content-Range {fields.get('Content-Range')!r}")
    begin, last, total = map(int, found.groups())
    if begin != asked or not begin <= last < total or (length is not None and int(length) != last + 1 - begin):
        raise ConnectionError(f"the server sent bytes {begin}-{last} of {total} when asked for {asked}-")
    return begin, total


def validators(fields: http.client.HTTPMessage) -> dict[str, str | int | None]:
    """What tells versions apart. `etag` (a strong one) and `modified` (a date past when it was sent) prove equality."""
    etag, modified = fields.get("ETag", ""), fields.get("Last-Modified", "")
    try:
        sent, changed = (email.utils.parsedate_to_datetime(fields.get(k, "")) for k in ("Date", "Last-Modified"))
        is_settled = (sent - changed).total_seconds() >= 1
    except (ValueError, TypeError, OverflowError):
        is_settled = False
    is_strong = re.fullmatch(r'"[^"\r\n]{1,1000}"', etag) is not None
    weak = None if is_strong or not etag else etag[:1000]
    return {"etag": etag if is_strong else None, "weak": weak, "modified": modified if is_settled else None}


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Never from the web to another scheme, nor from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if urllib.parse.urlsplit(newurl).scheme not in allowed:
            raise DownloadError(
                f"{req.full_url}: is redirected to {newurl!r}; only {' and '.join(allowed)} is followed"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


class Answer:
    """A request read in its own thread, so that no server can hold us: neither in a handshake, a header nor a body."""

    def __init__(self, request: urllib.request.Request, timeout: float, least_rate: int) -> None:
        self.timeout, self.least_rate = timeout, least_rate
        self.pieces: queue.Queue = queue.Queue(maxsize=8)
        self.is_closed = threading.Event()
        threading.Thread(target=self._read, args=(request,), daemon=True).start()

    def begin(self) -> tuple[int, http.client.HTTPMessage]:
        """Status and header fields. Raises what urllib raises; Slow after the timeout."""
        status, fields = self._next(time.monotonic() + self.timeout, 0)
        return status, fields

    def chunks(self) -> Iterator[bytes]:
        """The body; Slow if a period of `timeout` brings less than `least_rate` bytes per second."""
        deadline, received = time.monotonic() + self.timeout, 0
        while (chunk := self._next(deadline, received)) is not None:
            received += len(chunk)
            if received >= self.least_rate * self.timeout:
                deadline, received = time.monotonic() + self.timeout, 0
            elif time.monotonic() > deadline:
                raise Slow(f"only {received} bytes came in {self.timeout} s")
            yield chunk

    def close(self) -> None:
        self.is_closed.set()

    def _next(self, deadline: float, received: int) -> Any:
        try:
            piece = self.pieces.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise Slow(f"only {received} bytes came in {self.timeout} s") from None
        if isinstance(piece, Exception):
            raise piece
        return piece

    def _put(self, piece: object) -> None:
        while not self.is_closed.is_set():
            with contextlib.suppress(queue.Full):
                self.pieces.put(piece, timeout=0.2)
                break

    def _read(self, request: urllib.request.Request) -> None:
        try:
            with _opener().open(request, timeout=self.timeout) as response:
                self._put((response.status, response.headers))
                while not self.is_closed.is_set() and (chunk := response.read1(_PIECE)):
                    self._put(chunk)
            self._put(None)
        except (urllib.error.URLError, http.client.HTTPException, DownloadError) as error:
            self._put(error)
        except OSError as error:
            self._put(ConnectionError(f"{type(error).__name__}: {error}"))
        except Exception as error:  # the thread's errors are the caller's
            self._put(error)
