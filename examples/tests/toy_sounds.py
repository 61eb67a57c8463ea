"""A few drum kits of tones and noise, in wav, flac, aiff and ogg, with drumkit.xml files as Hydrogen writes them."""

from pathlib import Path

import av
import numpy as np

RATE = 48_000
CODECS = {"wav": "pcm_s16le", "flac": "flac", "aiff": "pcm_s16be", "ogg": "libopus"}
NAMES = ("Kick 1", "Snare Rock", "Tom Low", "Closed HH", "Crash", "Hand Clap")


def tone(hertz: float, seconds: float = 0.5, silence: float = 0.1) -> np.ndarray:
    """(2, T) float32, a stroke after some silence, the right channel half as loud."""
    t = np.arange(int(RATE * seconds)) / RATE
    stroke = 0.5 * np.sin(2 * np.pi * hertz * t) * np.exp(-6 * t)
    wave = np.concatenate([np.zeros(int(RATE * silence)), stroke])
    return np.stack([wave, wave / 2]).astype(np.float32)


def write_sound(path: Path, wave: np.ndarray) -> Path:
    """Encode (2, T) by the codec of the suffix."""
    kind = path.suffix[1:]
    layout = {"wav": "s16", "flac": "s16", "aiff": "s16", "ogg": "flt"}[kind]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[kind], rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout="stereo")
        frame.sample_rate = RATE
        for part in av.AudioResampler(format=layout, layout="stereo", rate=RATE).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def write_kit(folder: Path, files: dict[str, list[str]], *, namespace: bool = False) -> Path:
    """A kit whose instruments (names) have layers (files); sounds are made where they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ['<?xml version="1.0" encoding="UTF-8"?>']
    lines.append('<drumkit_info xmlns="http://example.org/drumkit">' if namespace else "<drumkit_info>")
    lines.append("<name>kit</name><instrumentList>")
    for k, (name, layers) in enumerate(files.items()):
        lines.append(f"<instrument><id>{k}</id><name>{name}</name>")
        for index, file in enumerate(layers):
            lines.append(f"<layer><filename>{file}</filename></layer>")
            if "/" not in file and not (folder / file).exists():
                write_sound(folder / file, tone(100 * (k + 1) + 10 * index))
        lines.append("</instrument>")
    (folder / "drumkit.xml").write_text("\n".join([*lines, "</instrumentList></drumkit_info>"]))
    return folder
