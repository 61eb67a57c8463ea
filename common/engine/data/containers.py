"""What the bytes of a video file say that FFmpeg's packets do not: whether its end is there, and which way up it is.

    look(path) -> Structure(cut=None, turn=(0, 1, -1, 0), fragmented=False)      # whole; a phone held upright

mp4 and mov (boxes), webm and mkv (elements), avi (chunks): each tells the size of its parts, so that a part that is
longer than the rest of the file shows where the file was cut. Reads headers only. Damage of any other kind is left to
the decoders.
"""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from engine.data.busy import alive

Turn = tuple[int, int, int, int]
UPRIGHT: Turn = (1, 0, 0, 1)
MAX_PART = 1 << 20  # bytes of a header part that is read whole; real ones have a few hundred

BOXES = frozenset(
    b"ftyp styp moov mdat moof free skip wide sidx ssix mfra uuid meta emsg prft pdin udta trak mvhd".split()
)
EBML, SEGMENT, TRACKS, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1654AE6B, 0x1F43B675
TRACK_ENTRY, TRACK_TYPE, VIDEO, PROJECTION, ROLL = 0xAE, 0x83, 0xE0, 0x7670, 0x7675
# All that the specification has in a segment, and in a cluster; another id there shows damage.
IN_SEGMENT = frozenset({0x114D9B74, 0x1549A966, TRACKS, CLUSTER, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367})
IN_CLUSTER = frozenset({0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF})
SIMPLE_BLOCK, BLOCK_GROUP, BLOCK, TRACK_NUMBER, CHECKSUM = 0xA3, 0xA0, 0xA1, 0xD7, 0xBF
ANYWHERE = frozenset({0xEC, CHECKSUM})  # 0xEC: void
BOM, LISTS = b"\xef\xbb\xbf", (b"#EXTM3U", b"ffconcat", b"v=0", b"<")  # how lists of other files begin
MAX_CLUSTER = 1 << 26  # bytes of a cluster that is looked into
# Elements that hold others and may be without a size, in files that were written as a stream.
UNSIZED = frozenset({SEGMENT, CLUSTER})


class Structure(NamedTuple):
    """What the parts of a file tell."""

    cut: str | None  # what is missing or damaged, or None
    turn: Turn  # (a, b, c, d), each -1, 0 or 1: stored column x and row y are shown at (a x + c y, b x + d y)
    fragmented: bool = False  # an mp4 in pieces, each with its own times, as streaming has it
    text: bool = False  # a list that names other files (m3u8, ffconcat, sdp, xml), or a page


def look(path: Path | str) -> Structure:
    """The structure of a file; of one of another kind that it is whole and upright. Raises OSError."""
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        start = file.read(1024)
        if start.removeprefix(BOM).lstrip().startswith(LISTS):
            return Structure(None, UPRIGHT, text=True)
        if start[4:8] in BOXES:
            return _look_mp4(file, size)
        if start[:4] == EBML.to_bytes(4):
            return _look_matroska(file, size)
        if start[:4] == b"RIFF" and (end := 8 + int.from_bytes(start[4:8], "little")) > size:
            return Structure(_missing(end, size), UPRIGHT)
    return Structure(None, UPRIGHT)


def show(frame: np.ndarray, turn: Turn) -> np.ndarray:
    """A stored frame (H, W, 3) as it is to be seen: (H, W, 3), or (W, H, 3) where the turn exchanges the sides."""
    a, b, c, d = turn
    across, down = (a, d) if a else (c, b)
    frame = frame if a else frame.transpose(1, 0, 2)
    return frame[::down, ::across]


def _missing(end: int, size: int) -> str:
    return f"{end - size} of {end} bytes are missing"


def _nearest_turn(a: float, b: float, c: float, d: float) -> Turn:
    """The turn by quarters that a matrix means; upright for a slanted one."""
    signs = [(value > 0.99) - (value < -0.99) for value in (a, b, c, d)]
    is_turn = bool(signs[0]) == bool(signs[3]) != bool(signs[1]) == bool(signs[2])
    return (signs[0], signs[1], signs[2], signs[3]) if is_turn else UPRIGHT


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start of the content and end of each box between two places; the last may end beyond."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        size, body = int.from_bytes(head[:4]), start + 8
        if size == 1:
            size, body = int.from_bytes(head[8:16]), start + 16
        stop = end if size == 0 else start + size
        if stop < body:
            return
        yield head[4:8], body, stop
        start = stop


def _look_mp4(file: BinaryIO, size: int) -> Structure:
    turn, last, end, fragmented = None, b"", 0, False
    for kind, body, stop in _boxes(file, 0, size):
        if stop > size and kind in BOXES:
            return Structure(_missing(stop, size), turn or UPRIGHT, fragmented)
        if kind == b"moov" and turn is None:
            turn = _turn_of_mp4(file, body, stop)
        fragmented |= kind == b"moof"
        last, end = kind, stop
    cut = "the frames of its last fragment are missing" if last == b"moof" else None
    file.seek(end)
    if 0 < size - end < 8 and any(file.read(8)):  # zeros are padding
        cut = "it ends inside the header of a box"
    return Structure(cut, turn or UPRIGHT, fragmented)


def _turn_of_mp4(file: BinaryIO, start: int, end: int) -> Turn:
    """Of the first video track."""
    for kind, body, stop in _boxes(file, start, end):
        if kind != b"trak" or stop > end:
            continue
        matrix, video = UPRIGHT, False
        for part, inside, past in _boxes(file, body, stop):
            if part == b"tkhd":
                file.seek(inside)
                content = file.read(96)
                at = 52 if content[:1] == b"\1" else 40
                if len(content) >= at + 36:
                    a, b, _, c, d = (value / 65536 for value in struct.unpack_from(">5i", content, at))
                    matrix = _nearest_turn(a, b, c, d)
            elif part == b"mdia":
                for name, place, _ in _boxes(file, inside, past):
                    if name == b"hdlr":
                        file.seek(place + 8)
                        video = file.read(4) == b"vide"
        if video:
            return matrix
    return UPRIGHT


def _number(data: bytes, at: int, *, keep_marker: bool) -> tuple[int, int, bool]:
    """A number of variable length (an id with its marker, a size without): value, place after it, "no size given"."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()
    if not first or at + length > len(data):
        raise EOFError
    value = int.from_bytes(data[at : at + length])
    if keep_marker:
        return value, at + length, False
    value &= (1 << 7 * length) - 1
    return value, at + length, value == (1 << 7 * length) - 1


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Id and content of each element in a small part."""
    at = 0
    try:
        while at < len(data):
            kind, at, _ = _number(data, at, keep_marker=True)
            length, at, _ = _number(data, at, keep_marker=False)
            yield kind, data[at : at + length]
            at += length
    except EOFError:
        return


def _look_matroska(file: BinaryIO, size: int) -> Structure:
    """Top elements in turn. A segment with a size tells the end of the file; one without is walked to its end."""
    at, turn, end = 0, UPRIGHT, None  # end: of a segment with a size
    tracks: set[int] = set()
    while at < (size if end is None else end):
        file.seek(at)
        head = file.read(12)
        try:
            kind, place, _ = _number(head, 0, keep_marker=True)
            length, place, unsized = _number(head, place, keep_marker=False)
        except EOFError:
            cut = "it ends inside the header of an element" if size - at < 12 and any(head) else None
            return Structure(cut, turn)
        body = at + place
        if end is not None and kind not in IN_SEGMENT | ANYWHERE:
            return Structure(f"the part at byte {at} is damaged", turn)
        if unsized and kind in UNSIZED:
            at = body
            continue
        stop = body + length
        if stop > size:
            return Structure(_missing(stop, size), turn)
        if kind == TRACKS and length <= MAX_PART:
            file.seek(body)
            content = file.read(length)
            turn = _turn_of_matroska(content)
            entries = [dict(_elements(entry)) for kind, entry in _elements(content) if kind == TRACK_ENTRY]
            tracks = {int.from_bytes(entry[TRACK_NUMBER]) for entry in entries if TRACK_NUMBER in entry}
        if kind == SEGMENT:
            at, end = body, stop
            continue
        if kind == CLUSTER and length <= MAX_CLUSTER:
            alive()
            file.seek(body)
            content = file.read(length)
            if not _is_cluster(content, tracks):
                return Structure(f"the frames from byte {at} on are damaged", turn)
        at = stop
    if end is not None and at != end:
        return Structure(f"its parts end at byte {at} and not {end}", turn)
    return Structure(None, turn)


def _is_cluster(data: bytes, tracks: set[int]) -> bool:
    """Whether known elements fill a cluster to its end, their blocks of known tracks, as its checksum says if it has
    one; else the demuxer leaves frames out, or shows damaged ones, without a word. tracks: none if not known yet.
    """
    at, known = 0, IN_CLUSTER | ANYWHERE
    try:
        while at < len(data):
            kind, at, _ = _number(data, at, keep_marker=True)
            length, at, unsized = _number(data, at, keep_marker=False)
            if kind not in known or unsized:
                return False
            checked = memoryview(data)[at + length :]
            if kind == CHECKSUM and data[at : at + length] != zlib.crc32(checked).to_bytes(4, "little"):
                return False
            if kind == BLOCK_GROUP:
                blocks = [block for part, block in _elements(data[at : at + length]) if part == BLOCK]
            else:
                blocks = [data[at : at + 8]] if kind == SIMPLE_BLOCK else []
            if tracks and any(_number(block, 0, keep_marker=False)[0] not in tracks for block in blocks):
                return False
            at += length
    except EOFError:
        return False
    return at == len(data)


def _turn_of_matroska(tracks: bytes) -> Turn:
    """Of the first video track: the roll of its projection, in degrees, counterclockwise."""
    for kind, entry in _elements(tracks):
        parts = dict(_elements(entry)) if kind == TRACK_ENTRY else {}
        if parts.get(TRACK_TYPE, b"")[-1:] == b"\1":
            roll = dict(_elements(dict(_elements(parts.get(VIDEO, b""))).get(PROJECTION, b""))).get(ROLL, b"")
            degrees = struct.unpack(">f" if len(roll) == 4 else ">d", roll)[0] if len(roll) in (4, 8) else 0.0
            angle = math.radians(degrees) if math.isfinite(degrees) else 0.0
            return _nearest_turn(math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))
    return UPRIGHT
