"""Counting, naming what is missing, opening files, synthetic sets, and Kinetics-400 from a mirror on 127.0.0.1."""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toy_mirror import script, serving

from action_recognition import prepare
from action_recognition.configs import ROWS, Data
from action_recognition.data import read_entries
from action_recognition.prepare import Arguments, download_kinetics, fetch, write_synthetic
from action_recognition.synthetic import Synthetic, write_dataset
from engine import commands
from engine.data.check import Check
from engine.data.download import DownloadError
from engine.data.video import write_video

SMALL = Synthetic(num_classes=4, num_train=30, num_validation=8, size=32, num_frames=(4, 5))
ROOT = Path(__file__).parents[2]


def check(root: Path, **asked) -> Check:
    return prepare.check(Arguments(**{"kind": "ssv2", "root": root, "workers": 1} | asked))


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str:
    """The exit status of the command line, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["prepare", *words])
    with pytest.raises(SystemExit) as stop:
        commands.prepare(Arguments, ROWS, synthetic=write_synthetic, check=prepare.check, download=fetch)
    return stop.value.code or 0


@pytest.fixture
def motion(tmp_path) -> Path:
    write_dataset(tmp_path / "motion", SMALL, workers=1)
    return tmp_path / "motion"


def test_a_complete_synthetic_set_passes(motion):
    found = check(motion, probe=True)
    assert found.problems == [] and found.counts == {"classes": 4, "train": 30, "validation": 8, "videos": 38}


def test_missing_videos_are_counted_and_the_first_twenty_named(motion, monkeypatch):
    for number in range(1, 26):
        (motion / prepare.VIDEO_FOLDER / f"{number}.mp4").unlink()
    found = check(motion)
    assert len(found.problems) == 1
    assert "25 something-something-v2-train.json: of 30 videos are missing" in found.problems[0]
    assert ", 20, ..." in found.problems[0] and "21" not in found.problems[0].split("):")[1]
    assert (motion / "missing_train.txt").read_text().split() == [str(n) for n in range(1, 26)]
    assert run(monkeypatch, "--kind", "ssv2", "--root", str(motion)) == 1


def test_damaged_videos_are_found_only_by_opening(motion):
    path = motion / prepare.VIDEO_FOLDER / "5.mp4"
    path.write_bytes(path.read_bytes()[:-300])
    assert check(motion).problems == []
    (problem,) = check(motion, probe=True).problems
    assert "5.mp4: is cut short" in problem and (motion / "damaged_train.txt").is_file()


def test_the_official_counts_are_asked_of_a_set_that_was_not_made_here(motion):
    (motion / "composition.json").unlink()
    problems = check(motion).problems
    assert "train: 30 instead of the official 168913" in problems
    assert "classes: 4 instead of the official 174" in problems and len(problems) == 4


def test_an_absent_set_says_what_to_request(tmp_path, capsys, monkeypatch):
    words = ("--kind", "ssv2", "--root", str(tmp_path))
    assert f"scripts/download_ssv2.sh {tmp_path}" in run(monkeypatch, *words)
    run(monkeypatch, *words, "--download", "--dry-run")
    printed = capsys.readouterr().out
    assert "accept the license" in printed and f"scripts/download_ssv2.sh {tmp_path}" in printed


def test_a_synthetic_set_asked_for_twice_is_written_once(tmp_path, capsys):
    for state in ("written", "complete already"):
        write_synthetic(Arguments(preset="tiny", root=tmp_path / "m", synthetic=SMALL, workers=1))
        assert f"38 clips in 4 classes, {state}" in capsys.readouterr().out


@pytest.fixture
def mirror(tmp_path) -> Iterator[tuple[str, Path]]:
    """A mirror of two training archives, one of validation and the replacements, as the real one is laid out."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    with serving(folder) as url:
        write_video_to = tmp_path / "v.mp4"
        write_video(write_video_to, np.zeros((3, 32, 32, 3), np.uint8), 10)

        def archive(path: Path, names: list[str]) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w:gz") as bundle:
                for name in names:
                    info = tarfile.TarInfo(f"{name}.mp4")
                    info.size = write_video_to.stat().st_size
                    bundle.addfile(info, io.BytesIO(write_video_to.read_bytes()))

        archive(folder / "train" / "part_0.tar.gz", ["./a_000001_000011"])
        archive(folder / "train" / "part_1.tar.gz", ["./b_000002_000012"])
        archive(folder / "val" / "part_0.tar.gz", ["c_000003_000013"])
        archive(folder / "replacement_for_corrupted_k400.tgz", ["b_000002_000012"])
        (folder / "annotations").mkdir()
        for split, rows in (("train", ["x,a,1,11", "y,b,2,12"]), ("val", ["x,c,3,13"])):
            parts = sorted((folder / split).iterdir())
            (folder / split / f"k400_{split}_path.txt").write_text("\n".join(f"{url}/{split}/{p.name}" for p in parts))
            lines = ["label,youtube_id,time_start,time_end,split"] + [f"{row},{split}" for row in rows]
            (folder / "annotations" / f"{split}.csv").write_text("\n".join(lines))
        yield url, folder


def test_kinetics_is_fetched_unpacked_checked_and_not_fetched_again(mirror, tmp_path, monkeypatch):
    url, _ = mirror
    root = tmp_path / "k400"
    assert run(monkeypatch, "--kind", "kinetics", "--root", str(root), "--download", "--mirror", url) == 0
    entries = read_entries(Data(kind="kinetics", root=root, num_classes=2), "train")
    assert [entry.label for entry in entries] == [0, 1] and "replacement" in entries[1].path
    assert not list((root / "archives").iterdir())
    assert download_kinetics(root, mirror=url) == []


def test_an_interrupted_kinetics_download_goes_on_with_the_next_archive(mirror, tmp_path):
    url, folder = mirror
    hidden = folder / "train" / "part_1.tar.gz"
    hidden.rename(folder / "hidden")
    with pytest.raises(DownloadError, match="part_1.tar.gz: the server answers 404"):
        download_kinetics(tmp_path / "k400", mirror=url)
    (folder / "hidden").rename(hidden)
    handled = download_kinetics(tmp_path / "k400", mirror=url)
    assert next(iter(handled)).rsplit("/", 2)[-2:] == ["train", "part_1.tar.gz"] and len(handled) == 3


def test_a_dry_run_fetches_nothing(tmp_path, capsys, monkeypatch):
    words = ("--kind", "kinetics", "--root", str(tmp_path / "k"), "--mirror", "http://127.0.0.1:9")
    assert run(monkeypatch, *words, "--download", "--dry-run") == 0
    assert "would fetch http://127.0.0.1:9/annotations/train.csv" in capsys.readouterr().out
    assert not (tmp_path / "k").exists()


def test_the_ssv2_script_unpacks_cut_archives_and_names_labels(motion, tmp_path):
    root = tmp_path / "ssv2"
    archives = root / "archives"
    archives.mkdir(parents=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        bundle.add(motion / prepare.VIDEO_FOLDER, prepare.VIDEO_FOLDER)
    content = buffer.getvalue()
    for part, piece in enumerate((content[: len(content) // 2], content[len(content) // 2 :])):
        (archives / f"20bn-something-something-v2-0{part}").write_bytes(piece)
    import zipfile

    with zipfile.ZipFile(archives / "20bn-something-something-download-package-labels.zip", "w") as bundle:
        for name in ("train", "validation", "labels"):
            bundle.write(motion / f"something-something-v2-{name}.json", f"labels/{name}.json")
    done = script("download_ssv2.sh", str(root))
    # All steps work; only the official counts are not reached by this small set.
    assert "4 classes, 30 train, 8 validation, 38 videos" in done.stdout, done.stderr
    assert json.loads((root / "something-something-v2-labels.json").read_text())["Moving something up"] == "2"


def test_the_scripts_have_a_dry_run_and_refuse_unknown_options(tmp_path):
    done = script("download_ssv2.sh", str(tmp_path / "none"), "--dry-run")
    assert done.returncode == 0 and "accept the license" in done.stdout and "would run" in done.stdout, done.stderr
    for name in ("download_ssv2.sh", "download_kinetics400.sh"):
        assert script(name, "--frobnicate").returncode == 2
    assert not (tmp_path / "none").exists()


def test_checksums_name_what_no_decoder_sees(motion, tmp_path, capsys, monkeypatch):
    words = ("--kind", "ssv2", "--root", str(motion), "--workers", "1", "--checksums", str(tmp_path / "sums.txt"))
    assert "give that too" in run(monkeypatch, *words)
    assert run(monkeypatch, *words, "--probe") == 0 and (tmp_path / "sums.txt").read_text().count("\n") == 38
    video = sorted((motion / prepare.VIDEO_FOLDER).glob("*.mp4"))[3]
    video.write_bytes(video.read_bytes() + bytes(8))  # padding: the same frames
    capsys.readouterr()
    assert run(monkeypatch, *words, "--probe") == 1
    printed = capsys.readouterr().out
    assert f"{video.name}: is not the file of" in printed and "sums.txt, its sha256 is" in printed
