"""The packets of a video file, walked without decoding: is it a video, is it whole, when is each frame shown?

    info, order = walk(path)                   # BrokenVideo if it is no complete video

Finds files that are no video, have no frames or are cut short. Not here: pixels (`video.py`), damage that only a
decoder sees (`damage.py`), the bytes below the packets (`containers.py`).
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.busy import alive
from engine.data.containers import Structure, look
from engine.files import irregular

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

ATTACHED_PICTURE = 0x400  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC
REMEDY = "check the data root, or run the task's prepare"


class BrokenVideo(ValueError):
    """A video file that cannot be used; the message names the file, what is wrong, and the remedy."""

    def __init__(self, path: Path | str, problem: str, remedy: str = "download or convert the file again"):
        super().__init__(f"{path}: {problem}; {remedy}")
        self.parts = (str(path), problem, remedy)

    def __reduce__(self) -> tuple[type["BrokenVideo"], tuple[str, ...]]:
        """So that it can cross from a worker process."""
        return BrokenVideo, self.parts


@dataclass(frozen=True)
class VideoInfo:
    """What the container says, checked against its packets."""

    num_frames: int
    fps: float  # average; a file of variable frame rate has it only on average
    height: int
    width: int
    seconds: float  # duration, up to the end of the last frame
    codec: str
    timestamps: tuple[float, ...]  # (num_frames,) start of each frame in seconds, the first at 0


@dataclass(frozen=True)
class Order:
    """How the frames of a file are found."""

    pts: list[int]  # (num_frames,) presentation times in stream units, ascending
    timed: bool  # the container's presentation times can be trusted; else frames are counted from the beginning
    closed: bool  # decoding can start afresh at each key frame, with the same picture size
    structure: Structure


def walk(path: Path | str) -> tuple[VideoInfo, Order]:
    """What the packets of the frames that will be shown tell, without decoding; remembered for the latest files."""
    return _walk_file(*key_of(path))


@lru_cache(maxsize=2)  # `read_frames` follows `probe`; a two-hour video has 200,000 packets
def _walk_file(path: str, changed: int, size: int) -> tuple[VideoInfo, Order]:
    structure = look(path)
    if structure.text:  # the demuxers of such lists open what they name, pipes and other people's files too
        raise BrokenVideo(path, "is a list of other files or a web page, not a video")
    with open_container(path, fragmented=structure.fragmented) as container, blamed_on(path, "is damaged"):
        if structure.cut is not None:
            raise BrokenVideo(path, f"is cut short or damaged: {structure.cut}")
        return _walk_stream(path, container, video_stream(container, path), structure)


def _walk_stream(
    path: str, container: "InputContainer", stream: "VideoStream", structure: Structure
) -> tuple[VideoInfo, Order]:
    turn = structure.turn
    context = stream.codec_context
    codec = context.codec.canonical_name
    # mp4 lists its frames, less those that an edit list leaves out; in other containers the list is of key frames.
    listed = len(stream.index_entries) if "mp4" in container.format.name else 0
    times: list[int] = []
    durations, sizes, hidden, latest_key = [], set(), 0, None
    # Fragments give times of their own, which may contradict the order in which the frames come out of the decoder.
    timed, closed = "avi" not in container.format.name and not structure.fragmented, True
    with blamed_on(path, "is cut short or damaged"):
        for packet in container.demux(stream):
            if len(times) % 50 == 0:
                alive()  # a big file on a slow disk
            if not packet.size:
                continue
            if packet.is_discard:
                hidden += 1
                continue
            if packet.is_corrupt:
                raise BrokenVideo(path, f"is cut short or damaged at frame {len(times)}")
            time = packet.pts if packet.pts is not None else packet.dts
            if time is None:
                time = len(times)
            if codec in ("vp8", "vp9") and times and time < times[-1]:  # they have no other order than the file's
                raise BrokenVideo(path, f"is damaged: frame {len(times)} is to be shown before the one before it")
            timed &= packet.pts is not None
            if packet.is_keyframe:
                afresh, size = _key_frame(packet, codec)
                sizes.add(size)
                closed &= latest_key is None or (time >= latest_key and afresh)
                latest_key = time
            elif latest_key is not None:
                closed &= time >= latest_key
            times.append(time)
            durations.append(packet.duration or 0)
    if not times:
        raise BrokenVideo(path, "has no frames")
    if len(times) + hidden < listed:
        raise BrokenVideo(path, f"is cut short: {len(times) + hidden} of {listed} frames are in the file")
    if not context.width or not context.height:
        raise BrokenVideo(path, "declares no frame size")
    if stream.time_base is None:
        raise BrokenVideo(path, "declares no unit of time")
    order = np.argsort(np.asarray(times), kind="stable")
    pts = [times[i] for i in order]
    base = float(stream.time_base)
    fps = float(stream.average_rate or 0)
    last = durations[order[-1]] * base or (1 / fps if fps else 0.0)
    timestamps = tuple((t - pts[0]) * base for t in pts)
    seconds = timestamps[-1] + last
    height, width = (context.height, context.width) if turn[0] else (context.width, context.height)
    info = VideoInfo(
        num_frames=len(pts),
        fps=fps or (len(pts) / seconds if seconds else 0.0),
        height=height,
        width=width,
        seconds=seconds,
        codec=codec,
        timestamps=timestamps,
    )
    return info, Order(pts, timed and len(set(pts)) == len(pts), closed and len(sizes) == 1, structure)


def _key_frame(packet: "Packet", codec: str) -> tuple[bool, bytes]:
    """Whether a key frame resets the decoder (an IDR picture in H.264 and HEVC; False where that cannot be seen), and
    bytes that change with the picture size: its parameter set, or its header. Empty if it repeats none.
    """
    data, start = bytes(packet), 0
    if codec in ("vp8", "vp9"):
        return True, data[6:10] if codec == "vp8" else data[4:9]
    if codec not in ("h264", "hevc"):
        return True, b""
    idr, parameters = ((5,), 7) if codec == "h264" else ((19, 20), 33)
    size = b""
    while start + 4 < len(data):  # units of a 4-byte length and a payload; other packings end here without a match
        kind = data[start + 4] & 31 if codec == "h264" else data[start + 4] >> 1 & 63
        length = int.from_bytes(data[start : start + 4])
        if kind == parameters:
            size = data[start + 4 : start + 4 + length]
        if kind in idr:
            return True, size
        start += 4 + length
    return False, size


def open_container(path: Path | str, *, fragmented: bool = False) -> "InputContainer":
    """fragmented: without its edit list, which FFmpeg applies to the first fragment only, and so loses frames."""
    av = import_reader("av")
    options = {"ignore_editlist": "1"} if fragmented else {}
    with blamed_on(path, "is not a readable video"):
        # Names in a file's tags are in any encoding; nothing here reads them.
        return av.open(plain_name(path), options=options, metadata_errors="replace")


def plain_name(path: Path | str) -> str:
    """The absolute name of a file: FFmpeg takes `pipe:0` for a protocol, and no name that begins with a slash."""
    return os.path.abspath(path)


def video_stream(container: "InputContainer", path: Path | str) -> "VideoStream":
    """The first that is a video: not the cover of a music file."""
    pictures = [stream for stream in container.streams.video if not stream.disposition & ATTACHED_PICTURE]
    if not pictures:
        problem = "is music with a cover picture, it has no video" if container.streams.video else "has no video stream"
        raise BrokenVideo(path, problem)
    return pictures[0]


@contextmanager
def blamed_on(path: Path | str, problem: str, remedy: str = "download or convert the file again") -> Iterator[None]:
    """Whatever a file's content causes inside, also in PyAV itself, is a BrokenVideo. Whether the file may be read has
    been seen by then (`look`): FFmpeg says "not permitted" of damage too.
    """
    try:
        yield
    except (BrokenVideo, ImportError):
        raise
    except Exception as error:
        raise BrokenVideo(path, f"{problem} ({type(error).__name__}: {error})", remedy) from error


def key_of(path: Path | str) -> tuple[str, int, int]:
    """A file by name, time of change and size. FileNotFoundError, or BrokenVideo for what is not a regular file."""
    alive(path)
    try:
        status = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such video file; {REMEDY}") from None
    if problem := irregular(status.st_mode):
        raise BrokenVideo(path, problem, REMEDY)
    return str(path), status.st_mtime_ns, status.st_size


def import_reader(name: str) -> Any:
    """av or decord; a missing one is an error that names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading video needs {name}; install it with: pip install 'dr2net[engine]'") from error
