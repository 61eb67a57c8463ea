"""Read and write video files: `probe`, `read_frames`, `write_video`, `write_frames`.

PyAV walks the packets first (no decoding): that finds files that are no video, have no frames or are cut short, and
gives the presentation time of each frame. Then decord decodes, because it is the quicker reader, where it is known to
be right. Version 0.6.0 silently returns wrong frames where decoding cannot start afresh at each key frame (open GOP, as
x265 makes by default), from AVI and from MPEG-4 part 2, as clips whose frames encode their index showed; it cannot read
AV1; on broken files it may retry for minutes. In all those cases PyAV decodes. A frame's index is its rank by
presentation time, in both readers. Not a streaming reader: one call opens, reads and closes, so that nothing is shared
between worker processes.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer

Sample = TypeVar("Sample")

MAX_REPLACEMENTS = 20  # unusable files in a row before `read_usable` gives up
# What decord 0.6.0 decodes rightly; anything else goes to PyAV straight away.
DECORD_CODECS = frozenset({"h264", "hevc", "vp8", "vp9"})


class BrokenVideo(ValueError):
    """A video file that cannot be used; the message names the file, what is wrong, and the remedy."""

    def __init__(self, path: Path | str, problem: str, remedy: str = "download or convert the file again"):
        super().__init__(f"{path}: {problem}; {remedy}")


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
    closed: bool  # decoding can start afresh at each key frame


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
    if info.codec in DECORD_CODECS and order.timed and order.closed:
        frames = _read_decord(path, wanted, info)
        if frames is not None:
            return frames
    return _read_av(path, wanted, order)


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


def _import(name: str):
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


def _open(path: Path | str) -> "InputContainer":
    av = _import("av")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, ValueError) as error:
        raise BrokenVideo(path, f"is not a readable video ({error})") from error
    if not container.streams.video:
        container.close()
        raise BrokenVideo(path, "has no video stream")
    return container


def _walk_packets(path: Path | str) -> tuple[VideoInfo, _Order]:
    """What the packets of the frames that will be shown tell, without decoding; remembered for the latest files."""
    return _walk_file(*_key(path))


@lru_cache(maxsize=2)  # `read_frames` follows `probe`; a two-hour video has 200,000 packets
def _walk_file(path: str, changed: int, size: int) -> tuple[VideoInfo, _Order]:
    av = _import("av")
    with _open(path) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        times, durations, latest_key, timed, closed = [], [], None, "avi" not in container.format.name, True
        try:
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:
                    continue
                if packet.is_corrupt:
                    raise BrokenVideo(path, f"is cut short or damaged at frame {len(times)}")
                time = packet.pts if packet.pts is not None else packet.dts
                if time is None:
                    time = len(times)
                timed &= packet.pts is not None
                if latest_key is not None:
                    closed &= time >= latest_key and (
                        not packet.is_keyframe or _starts_afresh(packet, context.codec.canonical_name)
                    )
                latest_key = time if packet.is_keyframe else latest_key
                times.append(time)
                durations.append(packet.duration or 0)
        except av.error.FFmpegError as error:
            raise BrokenVideo(path, f"is cut short or damaged after {len(times)} frames ({error})") from error
        if not times:
            raise BrokenVideo(path, "has no frames")
        # mp4 declares its number of frames; fewer packets than that means the end is missing. WebM declares 0: unknown.
        # Two are allowed for: packets that an edit list hides are not always marked.
        if stream.frames and len(times) < stream.frames - 2:
            raise BrokenVideo(path, f"is cut short: {len(times)} of {stream.frames} frames are in the file")
        if not context.width or not context.height:
            raise BrokenVideo(path, "declares no frame size")
        order = np.argsort(np.asarray(times), kind="stable")
        pts = [times[i] for i in order]
        base = float(stream.time_base)
        fps = float(stream.average_rate or 0)
        last = durations[order[-1]] * base or (1 / fps if fps else 0.0)
        timestamps = tuple((t - pts[0]) * base for t in pts)
        seconds = timestamps[-1] + last
        info = VideoInfo(
            num_frames=len(pts),
            fps=fps or (len(pts) / seconds if seconds else 0.0),
            height=context.height,
            width=context.width,
            seconds=seconds,
            codec=context.codec.canonical_name,
            timestamps=timestamps,
        )
        return info, _Order(pts, timed and len(set(pts)) == len(pts), closed)


def _starts_afresh(packet: "Packet", codec: str) -> bool:
    """Whether a key frame resets the decoder (an IDR picture in H.264 and HEVC). False where that cannot be seen."""
    if codec not in ("h264", "hevc"):
        return True
    data, start = bytes(packet), 0
    while start + 4 < len(data):  # units of a 4-byte length and a payload; other packings end here without a match
        header = data[start + 4]
        if header & 31 == 5 if codec == "h264" else header >> 1 & 63 in (19, 20):
            return True
        start += 4 + int.from_bytes(data[start : start + 4])
    return False


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


def _read_av(path: Path | str, wanted: np.ndarray, order: _Order) -> np.ndarray:
    """Frames by PyAV: by presentation time from the key frame before the first, else counted from the beginning."""
    av = _import("av")
    needed = set(wanted.tolist())
    index_of = {time: i for i, time in enumerate(order.pts)}
    for from_start in (False, True) if order.timed else (True,):  # a seek may land late in files with a bad index
        found: dict[int, np.ndarray] = {}
        with _open(path) as container:
            stream = container.streams.video[0]
            try:
                if not from_start:
                    container.seek(order.pts[min(needed)], stream=stream, backward=True)
                for count, frame in enumerate(container.decode(stream)):
                    index = index_of.get(frame.pts) if order.timed else count
                    if index in needed:
                        found[index] = frame.to_ndarray(format="rgb24")
                        if len(found) == len(needed):
                            break
            except av.error.FFmpegError as error:
                if from_start:
                    problem = f"cannot be decoded ({error})"
                    raise BrokenVideo(path, problem, "convert it to H.264, for example with ffmpeg") from error
        if len(found) == len(needed):
            return np.stack([found[i] for i in wanted.tolist()])
    raise BrokenVideo(path, f"frames {sorted(needed - found.keys())[:10]} cannot be decoded")
