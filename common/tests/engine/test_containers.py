"""What containers say and hide: turned phones, ends that are missing, edit lists, covers, sizes that change."""

import pickle
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from toy_video import NUM_FRAMES, numbered_frames, numbers, open_or_die, write

from engine.data import video
from engine.data.damage import damage
from engine.data.video import BrokenVideo, probe, read_frames, read_usable
from engine.data.workers import run_jobs

MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0), "mirror": (-1, 0, 0, 1)}


def shown(frame: np.ndarray, turn: int | str) -> np.ndarray:
    """Clockwise by 90, 180 or 270 degrees, or mirrored."""
    return frame[:, ::-1] if turn == "mirror" else np.rot90(frame, -int(turn) // 90)


def turned(path: Path, turn: int | str) -> Path:
    """Write the matrix of a turn into the header of the only track of an mp4."""
    content = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in MATRICES[turn])
    struct.pack_into(">9i", content, content.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("turn", MATRICES)
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])  # one that decord reads, and one that only PyAV does
def test_a_turned_video_stands_upright_with_its_height_and_width(turn, codec, tmp_path):
    plain = read_frames(write(tmp_path / "plain.mp4", codec, {}), [0, 21, 39])
    path = turned(write(tmp_path / "a.mp4", codec, {}), turn)
    expected = np.stack([shown(frame, turn) for frame in plain])
    info = probe(path)
    assert (info.height, info.width) == expected.shape[1:3] and damage(str(path)) == ""
    # The upright one may come from decord, whose conversion to RGB rounds otherwise.
    assert np.abs(read_frames(path, [0, 21, 39]).astype(int) - expected).max() <= 3


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_turned_matroska_file_stands_upright_too(turn, tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.set_display_rotation(-turn)  # FFmpeg counts counterclockwise
        for picture in numbered_frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert (probe(path).height, probe(path).width) == ((64, 96) if turn == 180 else (96, 64))
    assert numbers(np.stack([shown(frame, 360 - turn) for frame in read_frames(path, [3, 37])])) == [3, 37]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.webm", "libvpx-vp9", {"deadline": "realtime", "g": "8"}),
        ("a.webm", "libvpx", {"deadline": "realtime"}),
        ("a.mkv", "libx264", {}),
        ("a.avi", "mpeg4", {}),
        ("a.mp4", "libx264", {}),
    ],
)
def test_a_file_that_is_cut_short_is_named_wherever_it_is_cut(name, codec, options, tmp_path):
    content = write(tmp_path / name, codec, options).read_bytes()
    assert probe(tmp_path / name).num_frames == NUM_FRAMES
    for kept in np.linspace(0, len(content) - 1, 31)[1:]:
        (tmp_path / name).write_bytes(content[: int(kept)])
        with pytest.raises(BrokenVideo, match=f"{name}: "):
            probe(tmp_path / name)


def test_a_webm_written_as_a_stream_is_read_whole_and_named_when_cut_in_a_block(tmp_path):
    path = tmp_path / "a.webm"
    with av.open(str(path), "w", options={"live": "1"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=Fraction(25), options={"deadline": "realtime"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for picture in numbered_frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert numbers(read_frames(path, range(NUM_FRAMES))) == list(range(NUM_FRAMES)) and damage(str(path)) == ""
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BrokenVideo, match="cut short"):
        probe(path)


def test_a_losslessly_trimmed_mp4_is_complete(tmp_path):
    source, path = write(tmp_path / "a.mp4", "libx264", {"g": "10", "bf": "0"}), tmp_path / "trimmed.mp4"
    with av.open(str(source)) as whole, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.stream, packet.pts, packet.dts = stream, packet.pts - 17 * 512, packet.dts - 17 * 512
                container.mux(packet)
    with av.open(str(path)) as container:
        true = numbers(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    assert len(true) < NUM_FRAMES - 10  # the edit list hides frames
    assert probe(path).num_frames == len(true)
    assert numbers(read_frames(path, range(len(true)))) == true and damage(str(path)) == ""
    assert [numbers(read_frames(path, [i]))[0] for i in range(len(true))] == true


def write_two_sizes(path: Path, codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.height, stream.width, stream.pix_fmt, stream.time_base = 64, 96, "yuv420p", Fraction(1, 25)
        for part, (height, width) in enumerate(((64, 96), (48, 80))):
            encoder = av.CodecContext.create(codec, "w")
            encoder.height, encoder.width, encoder.pix_fmt = height, width, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
            encoder.options = {"bf": "0", "deadline": "realtime"}
            for t in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 20 * t, np.uint8), format="rgb24")
                frame.pts, frame.time_base = 10 * part + t, Fraction(1, 25)
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
            for packet in encoder.encode():
                packet.stream = stream
                container.mux(packet)


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.webm", "libvpx"), ("a.mkv", "libx264")])
def test_frames_of_several_sizes_are_a_broken_video_that_skip_skips(name, codec, tmp_path):
    path = tmp_path / name
    write_two_sizes(path, codec)
    for wanted in (range(20), [3, 15]):
        with pytest.raises(BrokenVideo, match=f"{name}: has frames of several sizes"):
            read_frames(path, wanted)
    assert f"{name}: has frames of several sizes" in damage(str(path))
    good = write(tmp_path / "good.mp4", "libx264", {})
    files = [path, good]
    with pytest.warns(UserWarning, match="several sizes"):
        _, used, _ = read_usable(lambda i: read_frames(files[i], [3, 15]), 0, 2, str, "skip", tmp_path)
    assert used == 1


def test_music_with_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    cover = av.CodecContext.create("png", "w")
    cover.height, cover.width, cover.pix_fmt, cover.time_base = 64, 96, "rgb24", Fraction(1, 25)
    image = bytes(cover.encode(av.VideoFrame.from_ndarray(numbered_frames(1)[0], format="rgb24"))[0])
    body = b"\0image/png\0\3\0" + image
    tag = b"APIC" + len(body).to_bytes(4) + b"\0\0" + body
    size = len(tag)
    header = b"ID3\3\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    silence = b"\xff\xfb\x90\x00" + bytes(413)  # a frame of MPEG layer 3, 128 kbit/s
    path.write_bytes(header + tag + silence * 40)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(BrokenVideo, match=r"song.mp3: is music with a cover picture"):
        probe(path)


def test_an_unknown_codec_is_a_broken_video(tmp_path):
    for name, tag in (("a.mp4", b"avc1"), ("a.mkv", b"V_MPEG4/ISO/AVC"), ("a.avi", b"H264")):
        path = write(tmp_path / name, "libx264", {})
        path.write_bytes(path.read_bytes().replace(tag, b"zqxjwvkytrewqsd"[: len(tag)]))
        with pytest.raises(BrokenVideo, match=name):
            read_frames(path, [0])


def test_a_broken_video_crosses_a_process(tmp_path):
    error = pickle.loads(pickle.dumps(BrokenVideo("a.mp4", "has no frames", "convert it")))
    assert isinstance(error, BrokenVideo)
    assert str(error) == "a.mp4: has no frames; convert it"


@pytest.mark.parametrize(
    "options",
    [
        {"movflags": "frag_keyframe+empty_moov"},
        {"movflags": "dash+empty_moov", "frag_duration": "300000"},
        {"movflags": "dash+delay_moov", "frag_size": "600"},
        {"movflags": "frag_keyframe", "use_editlist": "1", "frag_duration": "300000"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_every_frame_of_a_fragmented_mp4_with_b_frames_is_right_alone_and_together(options, tmp_path):
    path = tmp_path / "a.mp4"
    x264 = {"x264-params": "bframes=3:b-adapt=0:keyint=12:scenecut=0"}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options=x264)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for picture in numbered_frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert probe(path).num_frames == NUM_FRAMES
    assert numbers(read_frames(path, range(NUM_FRAMES))) == list(range(NUM_FRAMES)) and damage(str(path)) == ""
    assert [numbers(read_frames(path, [i]))[0] for i in range(NUM_FRAMES)] == list(range(NUM_FRAMES))
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"mdat") + 20])
    with pytest.raises(BrokenVideo, match="cut short"):
        probe(path)


def test_errors_of_other_libraries_and_deaths_cross_from_workers_as_one_line(tmp_path):
    (tmp_path / "a.mp4").write_text("no video" * 9)
    with pytest.raises(ValueError, match=r"a\.mp4") as caught:
        run_jobs(open_or_die, [str(tmp_path / "a.mp4")], workers=2)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    with pytest.raises(OSError, match="a worker process died after 0 of 1 jobs"):
        run_jobs(open_or_die, ["die"], workers=2)


def test_what_ffmpeg_calls_not_permitted_is_a_broken_video(tmp_path, monkeypatch):
    path = turned(write(tmp_path / "a.mp4", "libx264", {}), 180)

    def refuse(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(video, "show", refuse)
    with pytest.raises(BrokenVideo, match=r"a.mp4: cannot be decoded \(PermissionError"):
        read_frames(path, [0])
