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
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from engine.data.containers import UPRIGHT, show
from engine.data.packets import (
    BrokenVideo,
    Order,
    VideoInfo,
    blamed_on,
    import_reader,
    key_of,
    open_container,
    plain_name,
    video_stream,
    walk,
)
from engine.files import appearing

Sample = TypeVar("Sample")

MAX_REPLACEMENTS = 20  # unusable files in a row before `read_usable` gives up
# What decord 0.6.0 decodes rightly; anything else goes to PyAV straight away.
DECORD_CODECS = frozenset({"h264", "hevc", "vp8", "vp9"})


def probe(path: Path | str) -> VideoInfo:
    """Describe a video without decoding it. Raises FileNotFoundError, or BrokenVideo if it is no complete video."""
    info, _ = walk(path)
    return info


def read_frames(path: Path | str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Decode the frames with the given indices, in the given order, repeats allowed.

    Returns uint8 (T, H, W, 3), RGB. Raises FileNotFoundError, BrokenVideo, or ValueError for an index outside it.
    """
    wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
    info, order = walk(path)
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
        key = key_of(path)
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
        kept = self.videos.get(key_of(path)) if self.videos else None
        return read_frames(path, indices) if kept is None else kept[1][indices]


def write_video(path: Path | str, frames: np.ndarray, fps: float, *, crf: int = 20) -> None:
    """Write uint8 RGB frames (T, H, W, 3) as H.264 mp4; H and W even. The file appears only when it is complete."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 (T, H, W, 3) with T > 0, got {frames.dtype} {frames.shape}")
    write_frames(path, frames, fps, crf=crf)


def write_frames(path: Path | str, frames: Iterable[np.ndarray], fps: float, *, crf: int = 20) -> None:
    """As `write_video`, of frames (H, W, 3) that come one at a time, all of one size: for videos of any length."""
    av = import_reader("av")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    path, shape = Path(path), None
    # One thread and no look-ahead: with it, x264 sometimes decides otherwise on the same frames (seen with "veryfast").
    options = {"crf": str(crf), "preset": "ultrafast", "x264-params": "threads=1:lookahead-threads=1:sync-lookahead=0"}
    with appearing(path) as temporary:
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


def _size_to_write(frame: np.ndarray) -> tuple[int, ...]:
    """The shape of a frame that can be encoded; ValueError for any other."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
    if frame.shape[0] % 2 or frame.shape[1] % 2:
        raise ValueError(f"H.264 needs an even height and width, got {frame.shape[:2]}; pad or crop by one pixel")
    return frame.shape


def _read_decord(path: Path | str, wanted: np.ndarray, info: VideoInfo) -> np.ndarray | None:
    """Frames by decord, or None where PyAV has to do it: decord fails, or counts other frames than the packets show."""
    decord = import_reader("decord")
    try:
        reader = decord.VideoReader(plain_name(path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != info.num_frames:
            return None
        frames = reader.get_batch(wanted.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError):
        return None  # _read_av says what is wrong if it fails too
    return frames if frames.shape == (len(wanted), info.height, info.width, 3) else None


def _read_av(path: Path | str, wanted: np.ndarray, order: Order, size: tuple[int, int]) -> np.ndarray:
    """Frames by PyAV: by presentation time from the key frame before the first, else counted from the beginning."""
    needed = set(wanted.tolist())
    index_of = {time: i for i, time in enumerate(order.pts)}
    for from_start in (False, True) if order.timed else (True,):  # a seek may land late in files with a bad index
        found: dict[int, np.ndarray] = {}
        try:
            with (
                open_container(path, fragmented=order.structure.fragmented) as container,
                blamed_on(path, "cannot be decoded", "convert it with ffmpeg to H.264"),
            ):
                stream = video_stream(container, path)
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
