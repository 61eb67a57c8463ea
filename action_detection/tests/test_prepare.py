"""Counting, naming what is missing, damaged or without scores, synthetic sets; both download scripts, on 127.0.0.1."""

import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toy_mirror import script, serving

from action_detection import prepare
from action_detection.configs import ROWS, Data
from action_detection.data import read_annotations
from action_detection.prepare import Arguments, fetch, write_synthetic, write_thumos_annotations
from action_detection.synthetic import ANNOTATIONS, Synthetic, write_dataset
from engine import commands
from engine.data.check import Check
from engine.data.video import write_video
from engine.synthetic.write import STAMP

SMALL = Synthetic(num_training=2, num_validation=2, size=32, seconds=(9.0, 10.0), action_seconds=(1.5, 3.0))
ROOT = Path(__file__).parents[2]


def check(root: Path, **asked) -> Check:
    return prepare.check(Arguments(**{"kind": "activitynet", "root": root, "workers": 1} | asked))


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int | str:
    """The exit status of the command line, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        commands.prepare(Arguments, ROWS, synthetic=write_synthetic, check=prepare.check, download=fetch)
    return stop.value.code or 0


@pytest.fixture
def untrimmed(tmp_path) -> Path:
    write_dataset(tmp_path / "untrimmed", SMALL, workers=1)
    return tmp_path / "untrimmed"


def change(root: Path, name: str, **fields) -> None:
    content = json.loads((root / ANNOTATIONS).read_text())
    content["database"][name] |= fields
    (root / ANNOTATIONS).write_text(json.dumps(content))


def snapshot(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_complete_synthetic_set_passes_and_a_check_writes_nothing(untrimmed, capsys, monkeypatch):
    before = snapshot(untrimmed)
    found = check(untrimmed, probe=True)
    assert found.problems == [] and found.empty == []
    assert (found.counts["classes"], found.counts["training"], found.counts["validation"]) == (10, 2, 2)
    assert run(monkeypatch, "--kind", "activitynet", "--root", untrimmed) == 0 and "complete" in capsys.readouterr().out
    assert snapshot(untrimmed) == before


def test_missing_videos_are_named_and_the_exit_status_is_as_configured(untrimmed, tmp_path, capsys, monkeypatch):
    words = ("--kind", "activitynet", "--root", untrimmed)
    (untrimmed / "videos" / "v_composed0002.mp4").unlink()
    assert run(monkeypatch, *words, "--lists", tmp_path / "lists") == 1
    assert "1 of 2 training videos are missing" in capsys.readouterr().out
    assert (tmp_path / "lists" / "missing_training.txt").read_text() == "composed0002\n"
    assert run(monkeypatch, *words, "--on-broken", "skip") == 0
    (untrimmed / "videos" / "v_composed0001.mp4").unlink()
    assert run(monkeypatch, *words, "--on-broken", "skip") == 1
    assert "nothing usable in: training" in capsys.readouterr().out


def test_damage_and_wrong_durations_are_found_by_opening(untrimmed):
    path = untrimmed / "videos" / "v_composed0003.mp4"
    path.write_bytes(path.read_bytes()[:-300])
    change(untrimmed, "composed0004", duration=30.0)
    assert check(untrimmed).problems == []
    damaged, off = check(untrimmed, probe=True).problems
    assert "1 validation files are damaged" in damaged and "v_composed0003.mp4: is cut short" in damaged
    assert "v_composed0004.mp4: lasts 9." in off and "annotated are 30.0 s" in off


def test_a_duration_in_milliseconds_makes_a_video_unusable_in_the_eyes_of_a_probe_too(untrimmed):
    for name, seconds in (("composed0003", 9600.0), ("composed0004", 86_000.0)):
        change(untrimmed, name, duration=seconds)
    assert check(untrimmed).problems == []
    found = check(untrimmed, probe=True)
    assert found.empty == ["validation"] and found.failed("skip")
    (problem,) = found.problems
    assert "2 validation files are damaged" in problem and "\n" not in problem
    assert "v_composed0003.mp4: lasts 9." in problem and "seconds, annotated are 9600; annotate in seconds" in problem
    assert "annotated are 86000" in problem


def test_odd_repeated_and_absent_annotations_are_named(untrimmed):
    good, past = ({"label": "bouncing", "segment": s} for s in ([1.0, 2.0], [8.0, 20.0]))
    change(untrimmed, "composed0001", annotations=[good, good, past])
    change(untrimmed, "composed0004", annotations=[])
    odd, repeated, without = check(untrimmed).problems
    assert "composed0001 [8.0, 20.0] (bouncing): clipped" in odd
    assert "1 training videos repeat an annotation" in repeated and "composed0001" in repeated
    assert "1 validation videos have no annotation, they are tested all the same: composed0004" in without


def test_the_announced_counts_are_asked_of_a_set_that_was_not_made_here(untrimmed):
    (untrimmed / STAMP).unlink()
    problems = check(untrimmed).problems
    assert problems[0] == "classes: 10 instead of the announced 200" and len(problems) == 3


def test_test_videos_without_outside_scores_are_named(untrimmed, tmp_path):
    annotations = read_annotations(Data(root=untrimmed))
    names = list(annotations.class_names)
    scores = tmp_path / "scores.json"
    tested = ["composed0003", "composed0004"]

    def problems(content: object) -> list[str]:
        scores.write_text(json.dumps(content))
        return check(untrimmed, class_scores=scores).problems

    assert problems({"class": names, "results": dict.fromkeys(tested, [0.1] * 10)}) == []
    (absent,) = problems({"class": names, "results": {"composed0003": [0.1] * 10}})
    assert "no scores for 1 of 2 test videos, among them composed0004" in absent
    (unknown,) = problems({"class": names[1:], "results": dict.fromkeys(tested, [0.1] * 9)})
    assert f"no scores for 1 classes, among them {names[0]}" in unknown
    scores.unlink()
    (nowhere,) = check(untrimmed, class_scores=scores).problems
    assert "scores.json: no class scores" in nowhere


def test_a_synthetic_set_asked_for_twice_is_written_once(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    arguments = Arguments(preset="tiny", root=tmp_path / "set", synthetic=SMALL, workers=1, sheet=sheet)
    for state in ("written", "complete already"):
        write_synthetic(arguments)
        assert f"4 videos, {state}" in capsys.readouterr().out
    assert sheet.is_file()


THUMOS = {
    "Diving_val.txt": "video_validation_0000001  0.5 1.5\n\nvideo_validation_0000001 2.0 3.0\n",
    "CliffDiving_val.txt": "video_validation_0000001  0.5 1.5\n",
    "Ambiguous_val.txt": "video_validation_0000001 3.0 3.5\nvideo_validation_0000009 1.0 2.0\n",
    "Diving_test.txt": "video_test_0000002 1.0 2.5\nvideo_test_0000270 1.0 2.0\n",
    "Ambiguous_test.txt": "video_test_0001292 1.0 2.0\n",
}


def write_thumos(root: Path) -> Path:
    """The official text files and the two videos that are annotated."""
    texts = root / "official_annotations" / "annotation"
    texts.mkdir(parents=True)
    for name, text in THUMOS.items():
        (texts / name).write_text(text)
    (root / "videos").mkdir()
    for name in ("video_validation_0000001", "video_test_0000002"):
        write_video(root / "videos" / f"{name}.mp4", np.full((40, 32, 32, 3), 90, np.uint8), 10)
    return root


def test_the_thumos_file_is_made_of_the_official_texts_and_durations(tmp_path, monkeypatch):
    root = write_thumos(tmp_path)
    words = ("--kind", "thumos", "--root", root, "--thumos-annotations", root / "official_annotations")
    assert run(monkeypatch, *words) == 1  # all there, but not the announced 200 videos
    annotations = read_annotations(Data(kind="thumos", root=root, num_classes=2))
    assert annotations.class_names == ("CliffDiving", "Diving")
    assert {name: video.subset for name, video in annotations.videos.items()} == {
        "video_test_0000002": "validation",
        "video_validation_0000001": "training",
    }
    video = annotations.videos["video_validation_0000001"]
    assert video.duration == 4.0 and video.segments.tolist() == [[0.5, 1.5], [0.5, 1.5], [2.0, 3.0]]


def test_thumos_videos_that_are_missing_or_broken_stop_or_are_left_out_by_name(tmp_path, capsys):
    root = write_thumos(tmp_path)
    texts = root / "official_annotations"
    (root / "videos" / "video_test_0000002.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="video_test_0000002.mp4"):
        write_thumos_annotations(texts, root)
    (root / "videos" / "video_validation_0000001.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 videos are missing .*: video_validation_0000001; .*skip"):
        write_thumos_annotations(texts, root)
    write_thumos_annotations(texts, root, "skip")
    assert capsys.readouterr().out.count("left out: ") == 2
    (texts / "annotation" / "Diving_val.txt").write_text("video_validation_0000001 0.5\n")
    with pytest.raises(ValueError, match="Diving_val.txt: line 1 is not"):
        write_thumos_annotations(texts, root, "skip")
    with pytest.raises(FileNotFoundError, match="unpack the official annotations"):
        write_thumos_annotations(root / "videos", root)


@pytest.fixture
def mirror(tmp_path) -> Iterator[tuple[str, Path]]:
    """A web server on 127.0.0.1 and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    with serving(folder) as address:
        yield address, folder


def test_the_activitynet_script_fetches_annotations_checks_and_unpacks_archives(untrimmed, mirror, tmp_path):
    address, served = mirror
    (served / "anet.json").write_bytes((untrimmed / ANNOTATIONS).read_bytes())
    root, url = tmp_path / "anet", {"ANNOTATIONS_URL": f"{address}/anet.json"}
    first = script("download_activitynet.sh", str(root), **url)
    assert first.returncode == 1 and "fill in the form" in first.stdout, first.stderr
    assert f"v1-2_val.tar.gz and v1-3_train_val.tar.gz into {root}/archives" in first.stdout
    (root / "archives").mkdir()
    videos = sorted((untrimmed / "videos").iterdir())
    for name, inside, files in (
        ("v1-2_train.tar.gz", "v1-2/train", videos[:1]),
        ("v1-2_val.tar.gz", "v1-2/val", videos[1:2]),
        ("v1-3_train_val.tar.gz", "v1-3/train_val", videos[2:]),
    ):
        with tarfile.open(root / "archives" / name, "w:gz") as bundle:
            for file in files:
                bundle.add(file, f"{inside}/{file.name}")
    wrong = script("download_activitynet.sh", str(root), **url)
    assert wrong.returncode == 1 and "instead of 8510ed0d8ae399b1bda399fd117e7406" in wrong.stderr
    done = script("download_activitynet.sh", str(root), CHECK="0", **url)
    assert "2 training" in done.stdout and "videos are missing" not in done.stdout, done.stdout + done.stderr
    assert sorted(path.name for path in (root / "videos").iterdir()) == [path.name for path in videos]
    for archive in (root / "archives").glob("*.gz"):
        archive.unlink()  # what is unpacked is not asked for again
    again = script("download_activitynet.sh", str(root), "--dry-run", **url)
    assert "fill in the form" not in again.stdout and "unpack" not in again.stdout, again.stdout + again.stderr
    (root / ANNOTATIONS).unlink()
    (served / "anet.json").write_text("{}")
    changed = script("download_activitynet.sh", str(root), **url)
    assert changed.returncode == 1 and "the source has changed" in changed.stderr


def test_the_thumos_script_asks_for_the_password_and_unpacks_only_annotated_videos(mirror, tmp_path):
    address, served = mirror
    (served / "Validation_set").mkdir()
    (served / "test_set").mkdir()
    source = write_thumos(tmp_path / "source")
    for suffix, path in (
        ("val", "Validation_set/TH14_Temporal_annotations_validation.zip"),
        ("test", "test_set/TH14_Temporal_annotations_test.zip"),
    ):
        with zipfile.ZipFile(served / path, "w") as bundle:
            for name in THUMOS:
                if name.endswith(f"_{suffix}.txt"):
                    bundle.write(source / "official_annotations" / "annotation" / name, f"annotation/{name}")
    for archive, name in (
        ("TH14_validation_set_mp4.zip", "video_validation_0000001"),
        ("TH14_Test_set_mp4.zip", "video_test_0000002"),
    ):
        with zipfile.ZipFile(served / archive, "w") as bundle:
            bundle.write(source / "videos" / f"{name}.mp4", f"somewhere/{name}.mp4")
            bundle.writestr("somewhere/video_test_0000003.mp4", b"not annotated")
    root, variables = tmp_path / "thumos", {"SITE": address, "VIDEOS": address}
    asked = script("download_thumos14.sh", str(root), THUMOS14_PASSWORD="", **variables)
    assert asked.returncode == 1 and "fill in the request form" in asked.stdout and not root.exists()
    done = script("download_thumos14.sh", str(root), THUMOS14_PASSWORD="x", **variables)
    assert "thumos_14_anno.json: written" in done.stdout and "1 training" in done.stdout, done.stdout + done.stderr
    assert len(list((root / "videos").iterdir())) == 2 and len(list((root / "archives").glob("*.sha256"))) == 4


def test_the_scripts_have_a_dry_run_and_refuse_unknown_options(tmp_path):
    for name in ("download_activitynet.sh", "download_thumos14.sh"):
        done = script(name, str(tmp_path / "none"), "--dry-run")
        assert done.returncode == 0 and "would run" in done.stdout and "fill in the" in done.stdout, done.stderr
        assert script(name, "--frobnicate").returncode == 2
    assert not (tmp_path / "none").exists()


def test_blocked_videos_are_not_counted(untrimmed, tmp_path):
    (tmp_path / "blocked.json").write_text('["composed0004"]')
    found = check(untrimmed, blocked=tmp_path / "blocked.json")
    assert found.counts["validation"] == 1
