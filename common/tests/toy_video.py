"""Small videos whose frames carry their index as pixels, so that a wrong frame is seen."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

NUM_FRAMES, BITS = 40, 6


def numbered_frames(count: int = NUM_FRAMES) -> np.ndarray:
    """Frames that carry their index as black and white columns, which survive any codec."""
    frames = np.zeros((count, 64, 96, 3), np.uint8)
    for t in range(count):
        for bit in range(BITS):
            frames[t, :, bit * 16 : (bit + 1) * 16] = 255 * (t >> bit & 1)
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    bits = frames[:, 32, 8::16].mean(axis=-1)[:, :BITS] > 128
    return [int(b @ (1 << np.arange(BITS))) for b in bits]


def write(path: Path, codec: str, options: dict[str, str], times: list[int] | None = None) -> Path:
    """Write the numbered frames with any codec; `times` in hundredths of a second makes the frame rate variable."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        for t, picture in enumerate(numbered_frames()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[t], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def open_or_die(path: str) -> None:
    """For a worker process: PyAV's own error, which cannot be unpickled; or the end of the process."""
    if path == "die":
        os._exit(1)
    av.open(path).close()
