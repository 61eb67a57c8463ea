"""Frames by their index, whatever the reader, the codec and the timing; what is said about files that are broken."""

import av
import numpy as np
import pytest
from toy_video import NUM_FRAMES, numbered_frames, numbers, write

from engine.data import video
from engine.data.damage import damage
from engine.data.packets import walk
from engine.data.video import BrokenVideo, probe, read_frames, write_frames, write_video

VARIABLE = [int(t) for t in np.cumsum(np.random.default_rng(0).integers(2, 12, NUM_FRAMES))]
FILES = {
    "h264_with_b_frames": ("a.mp4", "libx264", {"bf": "4", "g": "12"}, None),
    "h264_open_gop": ("a.mp4", "libx264", {"x264-params": "open-gop=1:keyint=5:bframes=2:scenecut=0"}, None),
    "h264_open_gop_long": ("a.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=5:scenecut=0"}, None),
    "h264_avi": ("a.avi", "libx264", {"x264-params": "keyint=12:bframes=2"}, None),
    "hevc_open_gop": ("a.mkv", "libx265", {"x265-params": "keyint=7:bframes=4:log-level=none"}, VARIABLE),
    "h264_variable_rate": ("a.mp4", "libx264", {"bf": "2"}, VARIABLE),
    "vp9_webm": ("a.webm", "libvpx-vp9", {"deadline": "realtime", "g": "8"}, None),
    "av1_mp4": ("a.mp4", "libsvtav1", {"preset": "12"}, None),
    "mpeg4_avi": ("a.avi", "mpeg4", {"bf": "2"}, None),
}


@pytest.mark.parametrize("kind", FILES)
def test_frame_numbers_are_right_in_any_order_and_codec(kind, tmp_path):
    name, codec, options, times = FILES[kind]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    path = write(tmp_path / name, codec, options, times)
    rng = np.random.default_rng(1)
    assert probe(path).num_frames == NUM_FRAMES
    assert numbers(read_frames(path, range(NUM_FRAMES))) == list(range(NUM_FRAMES))
    assert damage(str(path)) == ""
    for indices in (rng.integers(0, NUM_FRAMES, 6), [NUM_FRAMES - 1], [37, 3, 3, 20], rng.permutation(NUM_FRAMES)):
        assert numbers(read_frames(path, indices)) == list(indices)


def test_both_readers_return_the_same_pictures(tmp_path):
    path = write(tmp_path / "a.mp4", "libx264", {"bf": "2"})
    info, order = walk(path)
    wanted = np.array([0, 7, 31, 12])
    by_decord = video._read_decord(path, wanted, info)
    assert by_decord is not None
    # The two convert YUV to RGB by different FFmpeg versions; 3 of 255 is their rounding.
    assert np.abs(by_decord.astype(int) - video._read_av(path, wanted, order, (64, 96)).astype(int)).max() <= 3


def test_pyav_takes_over_where_decord_fails_or_miscounts(tmp_path, monkeypatch):
    import decord

    path = write(tmp_path / "a.mp4", "libx264", {})
    original = decord.VideoReader

    def failing(*args, **kwargs):
        raise decord.DECORDError("cannot open")

    class Miscounting(original):
        def __len__(self):
            return super().__len__() - 1

    for reader in (failing, Miscounting):
        monkeypatch.setattr(decord, "VideoReader", reader)
        assert numbers(read_frames(path, [5, 39])) == [5, 39]


def test_written_video_reads_back_with_its_rate_and_size(tmp_path):
    frames = np.broadcast_to(np.linspace(30, 220, 9, dtype=np.uint8)[:, None, None, None], (9, 50, 70, 3))
    write_video(tmp_path / "a.mp4", frames, 12.5)
    info = probe(tmp_path / "a.mp4")
    assert (info.num_frames, info.height, info.width, info.codec) == (9, 50, 70, "h264")
    assert info.fps == pytest.approx(12.5) and info.seconds == pytest.approx(9 / 12.5)
    back = read_frames(tmp_path / "a.mp4", range(9))
    assert np.abs(back.astype(int) - frames).max() <= 4  # limited range and 8 bits: grey is kept to a few levels
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_timestamps_tell_a_variable_frame_rate(tmp_path):
    path = write(tmp_path / "a.mp4", "libx264", {}, VARIABLE)
    expected = (np.array(VARIABLE) - VARIABLE[0]) / 100
    # mp4 keeps times on its own grid of less than a millisecond.
    np.testing.assert_allclose(probe(path).timestamps, expected, atol=1e-3)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.95])
def test_a_truncated_file_is_named_not_read_as_black_frames(kept, tmp_path):
    write_video(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8), 10)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(BrokenVideo, match="a.mp4"):
        read_frames(tmp_path / "a.mp4", [19])


def test_damage_in_the_middle_is_an_error_or_the_true_number_of_frames(tmp_path):
    path = write(tmp_path / "a.mp4", "libx264", {"g": "10"})
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(content)
    try:
        frames = read_frames(path, range(NUM_FRAMES))
    except BrokenVideo as error:
        assert "a.mp4" in str(error)
    else:
        assert frames.shape == (NUM_FRAMES, 64, 96, 3)


def test_a_file_that_is_no_video_is_named_with_the_reason(tmp_path):
    (tmp_path / "text.mp4").write_text("404, not found" * 50)
    with pytest.raises(BrokenVideo, match="text.mp4: is not a readable video"):
        probe(tmp_path / "text.mp4")
    with pytest.raises(FileNotFoundError, match="absent.mp4"):
        probe(tmp_path / "absent.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BrokenVideo, match="sound.mp4: has no video stream"):
        probe(tmp_path / "sound.mp4")


def test_a_video_without_frames_is_named(tmp_path):
    path = tmp_path / "empty.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    with pytest.raises(BrokenVideo, match="empty.mkv"):
        probe(path)


def test_indices_outside_the_video_are_refused(tmp_path):
    path = write(tmp_path / "a.mp4", "libx264", {})
    for indices in ([NUM_FRAMES], [-1], []):
        with pytest.raises(ValueError, match="frames 0 to 39"):
            read_frames(path, indices)


@pytest.mark.parametrize(
    ("frames", "fps", "match"),
    [
        (np.zeros((2, 63, 64, 3), np.uint8), 10, "even height"),
        (np.zeros((0, 64, 64, 3), np.uint8), 10, "T > 0"),
        (np.zeros((2, 64, 64, 3), np.float32), 10, "uint8"),
        (np.zeros((2, 64, 64, 3), np.uint8), 0, "fps"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_file_appears(frames, fps, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        write_video(tmp_path / "a.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_ordinary_files_are_read_by_decord(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_read_av", lambda *arguments: pytest.fail("PyAV was asked"))
    write_video(tmp_path / "a.mp4", numbered_frames(), 12)
    assert numbers(read_frames(tmp_path / "a.mp4", [30, 2])) == [30, 2]
    for kind in ("h264_with_b_frames", "vp9_webm"):
        name, codec, options, times = FILES[kind]
        assert numbers(read_frames(write(tmp_path / name, codec, options, times), [30, 2])) == [30, 2]


def test_frames_from_an_iterator_give_the_same_file_as_an_array_and_all_have_one_size(tmp_path):
    frames = numbered_frames()
    write_video(tmp_path / "array.mp4", frames, 25)
    write_frames(tmp_path / "iterator.mp4", (frame for frame in frames), 25)
    assert (tmp_path / "array.mp4").read_bytes() == (tmp_path / "iterator.mp4").read_bytes()
    for bad, message in (([frames[0], frames[0][:, :90]], "must all be"), ([], "no frames to write")):
        with pytest.raises(ValueError, match=message):
            write_frames(tmp_path / "bad.mp4", bad, 25)
    assert len(list(tmp_path.iterdir())) == 2
