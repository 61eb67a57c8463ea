"""Is a downloaded file what its name says? A server that wants a login answers with a page, and with status 200.

    check_content(path, "train.csv")           # ValueError: empty, a web page, no archive, damaged

Not here: whether it is the right file; that takes a checksum.
"""

import gzip
import zlib
from pathlib import Path

from engine.data.archives import CHUNK, check_archive
from engine.files import read_json, read_text, require_file

ARCHIVES = (".zip", ".whl", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
TEXTS = (".csv", ".tsv", ".txt")
PAGES = (".html", ".htm", ".xhtml", ".xml", ".svg")
REMEDY = "download it again"
_PAGE_MARKS = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml")


def is_page(start: bytes, name: str) -> bool:
    """Whether a file that begins with these bytes is a web page though its name does not say so."""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1024].lower()
    if not start.startswith(b"<") or name.lower().endswith(PAGES):
        return False
    return name.lower().endswith((".json", *TEXTS)) or any(mark in start for mark in _PAGE_MARKS)


def check_content(path: Path, name: str) -> None:
    """Read the file as what `name` ends in: archives and gzip to the end, json and text too; others only not a page.

    Raises ValueError with the file's name.
    """
    require_file(path, REMEDY)
    with path.open("rb") as file:
        start = file.read(4096)
    if not start:
        raise ValueError(f"{path}: is empty")
    if is_page(start, name):
        raise ValueError(
            f"{path}: is a web page ({start[:60]!r}), not the file asked for: open the address in a browser, "
            "it may want a login or be over its quota"
        )
    name = name.lower()
    if name.endswith(ARCHIVES):
        check_archive(path)
    elif name.endswith(".gz"):
        try:
            with gzip.open(path) as file:
                while file.read(CHUNK):
                    pass
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: is damaged ({error}); download it again") from error
    elif name.endswith(".json"):
        read_json(path, REMEDY)
    elif name.endswith(TEXTS) and "\0" in read_text(path, REMEDY):
        raise ValueError(f"{path}: is not text, it holds zero bytes; {REMEDY}")
