"""Read and write video files: `probe`, `read_frames`, `write_video`, `write_frames`.

PyAV walks the packets first (no decoding): that finds files that are no video, have no frames or are cut short, and
gives the presentation time of each frame. Then decord decodes, because it is the quicker reader, where it is known to
be right. Version 0.6.0 silently returns wrong frames where decoding cannot start afresh at each key frame (open GOP, as
x265 makes by default), from AVI and from MPEG-4 part 2, as clips whose frames encode their index showed; it cannot read
AV1; on broken files it may retry for minutes; it hides that frames change their size. In all those cases PyAV decodes,
and where a file is to be shown turned, as phones write it: frames stand upright, height and width too. A frame's index
is its rank by presentation time, in both readers. Not a streaming reader: one call opens, reads and closes, so that
nothing is shared between worker processes.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from engine.data.containers import UPRIGHT, Structure, look, show

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

Sample = TypeVar("Sample")

ATTACHED_PICTURE = 0x400  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC
MAX_REPLACEMENTS = 20  # unusable files in a row before `read_usable` gives up
# What decord 0.6.0 decodes rightly; anything else goes to PyAV straight away.
DECORD_CODECS = frozenset({"h264", "hevc", "vp8", "vp9"})


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
class _Order:
    """How the frames of a file are found."""

    pts: list[int]  # (num_frames,) presentation times in stream units, ascending
    timed: bool  # the container's presentation times can be trusted; else frames are counted from the beginning
    closed: bool  # decoding can start afresh at each key frame, with the same picture size
    structure: Structure


def probe(path: Path | str) -> VideoInfo:
    """Describe a video without decoding it. Raises FileNotFoundError, or BrokenVideo if it is no complete video."""
    info, _ = _walk_packets(path)
    return info


def read_frames(path: Path | str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Decode the frames with the given indices, in the given order, repeats allowed.

    Returns uint8 (T, H, W, 3), RGB. Raises FileNotFoundError, BrokenVideo, or ValueError for an index outside it.
    """
    wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
    info, order = _walk_packets(path)
    if len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= info.num_frames:
        have = f"has frames 0 to {info.num_frames - 1}"
        raise ValueError(f"{path}: {have}, asked for {wanted.tolist()}; sample inside the video")
    if info.codec in DECORD_CODECS and order.timed and order.closed and order.structure.turn == UPRIGHT:
        frames = _read_decord(path, wanted, info)
        if frames is not None:
            return frames
    return _read_av(path, wanted, order, (info.height, info.width))


def read_usable(
    read: Callable[[int], Sample],
    first: int,
    count: int,
    name_of: Callable[[int], str],
    on_broken: Literal["raise", "skip"],
    root: Path | str,
) -> tuple[Sample, int, list[str]]:
    """read(first), or with on_broken="skip" of the next of `count` videos, in a circle, that can be read.

    Returns what it gave, the index read, and the names that were skipped, each with a warning. Raises what `read`
    raises (BrokenVideo, OSError), or BrokenVideo naming `root` after MAX_REPLACEMENTS unusable files in a row.
    """
    skipped: list[str] = []
    for offset in range(min(MAX_REPLACEMENTS, count)):
        index = (first + offset) % count
        try:
            return read(index), index, skipped
        except (BrokenVideo, OSError) as error:
            if on_broken == "raise":
                raise
            warnings.warn(f"skipped: {error}", stacklevel=3)
            skipped.append(name_of(index))
    raise BrokenVideo(root, f"{len(skipped)} videos in a row cannot be read ({', '.join(skipped[:5])}, ...)")


class FrameCache:
    """`probe` and `read_frames` of files that are read again and again: whole decoded videos in at most `max_bytes`.

    What does not fit is decoded each time; nothing is dropped. A file that changes (time or size) is read anew. Each
    worker process fills its own. The frames returned are copies.
    """

    def __init__(self, max_bytes: int) -> None:
        self.bytes_left = max_bytes
        self.videos: dict[tuple[str, int, int], tuple[VideoInfo, np.ndarray]] = {}

    def probe(self, path: Path | str) -> VideoInfo:
        """As the function; decodes and keeps the video if it fits."""
        if self.bytes_left <= 0 and not self.videos:
            return probe(path)
        key = _key(path)
        if key not in self.videos:
            info = probe(path)
            size = info.num_frames * info.height * info.width * 3
            if size > self.bytes_left:
                return info
            self.videos[key] = info, read_frames(path, range(info.num_frames))
            self.bytes_left -= size
        return self.videos[key][0]

    def read_frames(self, path: Path | str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """As the function, from memory if `probe` kept the video."""
        kept = self.videos.get(_key(path)) if self.videos else None
        return read_frames(path, indices) if kept is None else kept[1][indices]


def write_video(path: Path | str, frames: np.ndarray, fps: float, *, crf: int = 20) -> None:
    """Write uint8 RGB frames (T, H, W, 3) as H.264 mp4; H and W even. The file appears only when it is complete."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 (T, H, W, 3) with T > 0, got {frames.dtype} {frames.shape}")
    write_frames(path, frames, fps, crf=crf)


def write_frames(path: Path | str, frames: Iterable[np.ndarray], fps: float, *, crf: int = 20) -> None:
    """As `write_video`, of frames (H, W, 3) that come one at a time, all of one size: for videos of any length."""
    av = _import("av")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    path, shape = Path(path), None
    temporary = path.with_name(path.name + ".part")
    # One thread and no look-ahead: with it, x264 sometimes decides otherwise on the same frames (seen with "veryfast").
    options = {"crf": str(crf), "preset": "ultrafast", "x264-params": "threads=1:lookahead-threads=1:sync-lookahead=0"}
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            for frame in frames:
                if shape is None:
                    shape = _size_to_write(frame)
                    stream.height, stream.width = shape[:2]
                if frame.shape != shape or frame.dtype != np.uint8:
                    raise ValueError(f"frames must all be uint8 {shape}, got {frame.dtype} {frame.shape}")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            if shape is None:
                raise ValueError(f"{path}: no frames to write")
            container.mux(stream.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _size_to_write(frame: np.ndarray) -> tuple[int, ...]:
    """The shape of a frame that can be encoded; ValueError for any other."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
    if frame.shape[0] % 2 or frame.shape[1] % 2:
        raise ValueError(f"H.264 needs an even height and width, got {frame.shape[:2]}; pad or crop by one pixel")
    return frame.shape


def _import(name: str) -> Any:
    """av or decord; a missing one is an error that names the extra."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading video needs {name}; install it with: pip install 'dr2net[engine]'") from error


def _key(path: Path | str) -> tuple[str, int, int]:
    """A file by name, time of change and size."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such video file; check the data root, or run the task's prepare")
    status = Path(path).stat()
    return str(path), status.st_mtime_ns, status.st_size


@contextmanager
def _blamed_on(path: Path | str, problem: str, remedy: str = "download or convert the file again") -> Iterator[None]:
    """Whatever a file's content causes inside, also in PyAV itself, is a BrokenVideo. Whether the
    file may be read has been seen by then (`look`): FFmpeg says "not permitted" of damage too.
    """
    try:
        yield
    except (BrokenVideo, ImportError):
        raise
    except Exception as error:
        raise BrokenVideo(path, f"{problem} ({type(error).__name__}: {error})", remedy) from error


def _open(path: Path | str, *, fragmented: bool = False) -> "InputContainer":
    """fragmented: without its edit list, which FFmpeg applies to the first fragment only, and so loses frames."""
    av = _import("av")
    options = {"ignore_editlist": "1"} if fragmented else {}
    with _blamed_on(path, "is not a readable video"):
        # Names in a file's tags are in any encoding; nothing here reads them.
        return av.open(str(path), options=options, metadata_errors="replace")


def _video_stream(container: "InputContainer", path: Path | str) -> "VideoStream":
    """The first that is a video: not the cover of a music file."""
    pictures = [stream for stream in container.streams.video if not stream.disposition & ATTACHED_PICTURE]
    if not pictures:
        problem = "is music with a cover picture, it has no video" if container.streams.video else "has no video stream"
        raise BrokenVideo(path, problem)
    return pictures[0]


def _walk_packets(path: Path | str) -> tuple[VideoInfo, _Order]:
    """What the packets of the frames that will be shown tell, without decoding; remembered for the latest files."""
    return _walk_file(*_key(path))


@lru_cache(maxsize=2)  # `read_frames` follows `probe`; a two-hour video has 200,000 packets
def _walk_file(path: str, changed: int, size: int) -> tuple[VideoInfo, _Order]:
    structure = look(path)
    with _open(path, fragmented=structure.fragmented) as container, _blamed_on(path, "is damaged"):
        if structure.cut is not None:
            raise BrokenVideo(path, f"is cut short or damaged: {structure.cut}")
        return _walk_stream(path, container, _video_stream(container, path), structure)


def _walk_stream(
    path: str, container: "InputContainer", stream: "VideoStream", structure: Structure
) -> tuple[VideoInfo, _Order]:
    turn = structure.turn
    context = stream.codec_context
    codec = context.codec.canonical_name
    # mp4 lists its frames, less those that an edit list leaves out; in other containers the list is of key frames.
    listed = len(stream.index_entries) if "mp4" in container.format.name else 0
    times: list[int] = []
    durations, sizes, hidden, latest_key = [], set(), 0, None
    # Fragments give times of their own, which may contradict the order in which the frames come out of the decoder.
    timed, closed = "avi" not in container.format.name and not structure.fragmented, True
    with _blamed_on(path, "is cut short or damaged"):
        for packet in container.demux(stream):
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
    return info, _Order(pts, timed and len(set(pts)) == len(pts), closed and len(sizes) == 1, structure)


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


def _read_decord(path: Path | str, wanted: np.ndarray, info: VideoInfo) -> np.ndarray | None:
    """Frames by decord, or None where PyAV has to do it: decord fails, or counts other frames than the packets show."""
    decord = _import("decord")
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != info.num_frames:
            return None
        frames = reader.get_batch(wanted.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError):
        return None  # _read_av says what is wrong if it fails too
    return frames if frames.shape == (len(wanted), info.height, info.width, 3) else None


def _read_av(path: Path | str, wanted: np.ndarray, order: _Order, size: tuple[int, int]) -> np.ndarray:
    """Frames by PyAV: by presentation time from the key frame before the first, else counted from the beginning."""
    needed = set(wanted.tolist())
    index_of = {time: i for i, time in enumerate(order.pts)}
    for from_start in (False, True) if order.timed else (True,):  # a seek may land late in files with a bad index
        found: dict[int, np.ndarray] = {}
        try:
            with (
                _open(path, fragmented=order.structure.fragmented) as container,
                _blamed_on(path, "cannot be decoded", "convert it with ffmpeg to H.264"),
            ):
                stream = _video_stream(container, path)
                if not from_start:
                    container.seek(order.pts[min(needed)], stream=stream, backward=True)
                for count, frame in enumerate(container.decode(stream)):
                    index = index_of.get(frame.pts, -1) if order.timed and frame.pts is not None else count
                    if index in needed:
                        if frame.is_corrupt:
                            raise BrokenVideo(path, f"frame {index} is damaged")
                        found[index] = show(frame.to_ndarray(format="rgb24"), order.structure.turn)
                        if len(found) == len(needed):
                            break
        except BrokenVideo:
            if from_start:
                raise
        if len(found) == len(needed):
            break
    if lacking := sorted(needed - found.keys()):
        raise BrokenVideo(path, f"frames {lacking[:10]} cannot be decoded")
    if other := {frame.shape[:2] for frame in found.values()} - {size}:
        height, width = other.pop()
        problem = f"has frames of several sizes, {size[1]}x{size[0]} and {width}x{height}"
        raise BrokenVideo(path, problem, "convert it with ffmpeg to one size")
    return np.stack([found[i] for i in wanted.tolist()])
