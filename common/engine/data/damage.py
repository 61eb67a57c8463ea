"""Damage that only a decoder sees: every frame of a video is decoded, strictly.

    damage(path)                               # one sentence, or "" for a sound file
    damaged_videos(paths, workers=4, title="opening train")

Decoders conceal: of a stream with flipped bits they show something, without a word, decord as FFmpeg, so training would
go on with it. Here FFmpeg stops at the first error, a frame that is marked as damaged is one, and so are frames that do
not come at the times that the container gives them. VP8 and VP9 are decoded by libvpx, which sees more than FFmpeg's
own decoder. Pixels are not converted. Not here: damage that makes another valid stream, which only a checksum of the
file shows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.data.busy import alive
from engine.data.packets import BrokenVideo, VideoInfo, blamed_on, import_reader, open_container, video_stream, walk
from engine.data.workers import progress_bar, run_jobs

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
STRICTER = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # decoders that check more than FFmpeg's
SIGN_EVERY = 100  # frames


def damage(path: str) -> str:
    """What is wrong with a video file, or nothing: all packets are walked, all frames are decoded."""
    try:
        sound(path)
    except (BrokenVideo, OSError) as error:
        return str(error)
    return ""


def damaged_videos(paths: Sequence[str], *, workers: int, title: str) -> dict[str, str]:
    """What is wrong with each unusable file, one sentence each, by path; see `damage`."""
    with progress_bar(title, len(paths)) as advance:
        found = run_jobs(damage, paths, workers=workers, on_done=advance, chunk=16)
    return {path: line for path, line in zip(paths, found, strict=True) if line}


def sound(path: str) -> VideoInfo:
    """Describe a video of which every frame decodes without an error. FileNotFoundError, or BrokenVideo."""
    info, order = walk(path)
    av, times = import_reader("av"), list[int | None]()
    sizes = set()
    with open_container(path, fragmented=order.structure.fragmented) as container, blamed_on(path, "is damaged"):
        stream = video_stream(container, path)
        decoder = _decoder(stream)
        for packet in container.demux(stream):
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError as error:
                raise BrokenVideo(path, f"is damaged near frame {len(times)} ({type(error).__name__})") from error
            for frame in frames:
                if frame.is_corrupt:
                    raise BrokenVideo(path, f"is damaged at frame {len(times)}")
                times.append(frame.pts)
                sizes.add((frame.width, frame.height))
                if len(times) % SIGN_EVERY == 0:
                    alive()
    if len(sizes) > 1:
        raise BrokenVideo(path, "has frames of several sizes", "convert it with ffmpeg to one size")
    if len(times) != info.num_frames:
        raise BrokenVideo(path, f"is damaged: {len(times)} of {info.num_frames} frames can be decoded")
    if order.timed and times != order.pts:
        wrong = next(i for i, (time, expected) in enumerate(zip(times, order.pts, strict=True)) if time != expected)
        raise BrokenVideo(path, f"is damaged: frame {wrong} is not shown when the container says")
    return info


def _decoder(stream: "VideoStream") -> "VideoCodecContext":
    """The strictest decoder of a stream, on one thread."""
    av: Any = import_reader("av")
    decoder = stream.codec_context
    name = STRICTER.get(decoder.codec.canonical_name, "")
    if name in av.codecs_available and decoder.pix_fmt == "yuv420p":  # of other formats libvpx may know nothing
        decoder = av.CodecContext.create(name, "r")
    decoder.options = STRICT
    decoder.thread_count = 1
    return decoder
