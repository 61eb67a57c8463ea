"""Counting, naming what is odd, missing, damaged or empty in both forms; the download script, on 127.0.0.1."""

import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from toy_mirror import script, serving

from detection import prepare
from detection.configs import ROWS
from detection.prepare import Arguments, fetch, write_synthetic
from detection.synthetic import Synthetic
from detection.tests.toy_pictures import coco_of, write_coco
from engine import commands
from engine.data.check import Check

ROOT = Path(__file__).parents[2]


def check(root: Path, **asked) -> Check:
    return prepare.check(Arguments(**{"kind": "coco", "root": root, "workers": 1} | asked))


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int | str:
    """The exit status of the command line, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        commands.prepare(Arguments, ROWS, synthetic=write_synthetic, check=prepare.check, download=fetch)
    return stop.value.code or 0


@pytest.fixture
def root(tmp_path) -> Path:
    return write_coco(tmp_path / "coco").root


def snapshot(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_complete_set_passes_and_a_check_writes_nothing(root, capsys, monkeypatch):
    before = snapshot(root)
    assert run(monkeypatch, "--kind", "coco", "--root", root, "--probe", "--workers", 1) == 0
    said = capsys.readouterr().out
    assert "2 classes, 3 train2017, 3 boxes in train2017, 3 val2017, 3 boxes in val2017" in said
    assert "val2017: 0 small, 3 medium, 0 large boxes, 0 of crowds" in said
    assert "1 train2017 pictures have no box, they are trained on, unless --data.no-keep-empty: c.jpg" in said
    assert "1 val2017 pictures have no box, they are tested: c.jpg" in said and "  complete" in said
    assert snapshot(root) == before


def test_missing_pictures_are_named_and_the_exit_status_is_as_configured(root, tmp_path, capsys, monkeypatch):
    words = ("--kind", "coco", "--root", root)
    (root / "train2017" / "b.png").unlink()
    assert run(monkeypatch, *words, "--lists", tmp_path / "lists") == 1
    assert "1 of 3 train2017 pictures are missing" in capsys.readouterr().out
    assert (tmp_path / "lists" / "missing_train2017.txt").read_text() == f"{root}/train2017/b.png\n"
    assert run(monkeypatch, *words, "--on-broken", "skip") == 0
    for path in (root / "train2017").iterdir():
        path.unlink()
    capsys.readouterr()
    assert run(monkeypatch, *words, "--on-broken", "skip") == 1
    assert "nothing usable in: train2017" in capsys.readouterr().out


def test_damage_and_wrong_sizes_are_found_by_opening(root):
    path = root / "val2017" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    Image.new("RGB", (50, 60)).save(root / "val2017" / "b.png")
    assert check(root).problems == []
    (damaged,) = check(root, probe=True).problems
    assert "2 val2017 pictures are damaged" in damaged and "a.jpg: is damaged" in damaged
    assert "b.png: has 50 x 60 pixels (width x height), its boxes were drawn in 100 x 140" in damaged


def test_turns_that_a_size_does_not_tell_are_noted(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (160, 120)).save(root / "val2017" / "a.jpg", exif=exif)
    exif[0x0112] = 6
    Image.new("RGB", (140, 100)).save(root / "val2017" / "b.png", exif=exif)  # its size tells
    Image.new("RGB", (120, 120)).save(root / "val2017" / "c.jpg", exif=exif)
    found = check(root, probe=True)
    (note,) = [note for note in found.notes if "EXIF" in note]
    assert note.startswith("2 val2017 pictures are turned by EXIF") and "a.jpg" in note and "c.jpg" in note
    assert found.problems == []


def test_odd_entries_are_problems_and_dropped_boxes_notes(tmp_path):
    content = coco_of()
    content["annotations"][0]["category_id"] = 7
    content["annotations"][1]["bbox"] = [10, 10, 20, 0]
    content["annotations"][2]["iscrowd"] = 1
    found = check(write_coco(tmp_path, content).root)
    assert len(found.problems) == 2 and "1 train2017 entries cannot be used: annotation 1 has the" in found.problems[0]
    notes = "\n".join(found.notes)
    assert "1 train2017 boxes are dropped or clipped: annotation 2 of image 7" in notes and "1 of crowds" in notes
    assert found.failed("raise") and not found.failed("skip")


def test_classes_without_a_box_and_boxes_that_are_there_twice_are_noted(tmp_path):
    content = coco_of()
    first = content["annotations"][0]  # a car in a.jpg
    content["annotations"] = [first, {**first, "id": 9}, {**first, "id": 10, "bbox": [60, 30, 50, 40]}]
    notes = "\n".join(check(write_coco(tmp_path / "odd", content).root).notes)
    assert "1 classes have no box in train2017, they cannot be learned: cup" in notes
    assert "1 classes have no box in val2017, they cannot be scored: cup" in notes
    assert "1 train2017 boxes are there twice, of the same class: nothing can find both: a.jpg: [20.0, 30.0, " in notes


def test_splits_with_other_classes_are_a_problem(root):
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"cup"', '"glass"'))
    (problem,) = check(root).problems
    assert "have other classes" in problem


def test_the_announced_counts_are_asked_of_eighty_classes(root):
    for split in ("train2017", "val2017"):
        file = root / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["categories"] = [{"id": k, "name": str(k)} for k in (3, 44, *range(100, 178))]
        file.write_text(json.dumps(content))
    train, val = check(root).problems
    assert train == "train2017: 3 instead of the announced 118287" and val.startswith("val2017: 3 instead of")


def test_ones_own_data_are_checked_by_two_flags(tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(tmp_path / "images" / split / "a.png")
        (tmp_path / "labels" / split / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("names: [cat]\n")
    words = ("--kind", "yolo", "--root", tmp_path, "--probe", "--workers", 1)
    assert run(monkeypatch, *words) == 0
    assert "1 classes, 1 train, 1 boxes in train, 1 val, 1 boxes in val" in capsys.readouterr().out
    (tmp_path / "labels" / "val" / "a.txt").write_text("0 32 24 12 12\n")
    assert run(monkeypatch, *words) == 1
    assert "a.txt: line 1 has 32 24 12 12, not shares of the picture" in capsys.readouterr().out
    (tmp_path / "images" / "val" / "a.png").write_bytes(b"")
    assert "no picture of the split 'val' can be used" in str(run(monkeypatch, *words))
    assert "say where the pictures are: --kind yolo --root FOLDER" in str(run(monkeypatch, "--kind", "yolo"))


def test_splits_may_have_other_names(tmp_path):
    root = write_coco(tmp_path).root
    for old, new in (("train2017", "train"), ("val2017", "dev")):
        (root / old).rename(root / new)
        (root / "annotations" / f"instances_{old}.json").rename(root / "annotations" / f"instances_{new}.json")
    found = check(root, train_split="train", test_split="dev")
    assert found.counts["dev"] == 3 and found.problems == []


def test_files_that_are_not_there_or_of_another_task_end_in_one_line(root, monkeypatch):
    file = root / "annotations" / "instances_val2017.json"
    file.write_text('{"images": [], "annotations": [{"caption": "a cup"}]}')
    assert "holds captions, not boxes" in str(run(monkeypatch, "--kind", "coco", "--root", root))
    file.unlink()
    said = str(run(monkeypatch, "--kind", "coco", "--root", root))
    assert "instances_val2017.json: no such file" in said and "download_coco.sh" in said and "\n" not in said


def test_a_download_names_the_script(monkeypatch):
    assert "bash scripts/download_coco.sh data/coco" in str(run(monkeypatch, "--kind", "coco", "--download"))
    said = str(run(monkeypatch, "--kind", "yolo", "--root", "x", "--download"))
    assert "nothing to download for --kind yolo" in said


download_coco = partial(script, "download_coco.sh")


@pytest.fixture
def mirror(root, tmp_path) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """A web server on 127.0.0.1 with the three archives, its folder, and what the script has to be told of them."""
    folder = tmp_path / "served"
    variables = {}
    for name, path, inside in (
        ("ANNOTATIONS", "annotations/annotations_trainval2017.zip", "annotations"),
        ("VAL", "zips/val2017.zip", "val2017"),
        ("TRAIN", "zips/train2017.zip", "train2017"),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / path, "w") as bundle:
            for file in sorted((root / inside).iterdir()):
                bundle.write(file, f"{inside}/{file.name}")
        data = (folder / path).read_bytes()
        variables[name] = f"{len(data)} {hashlib.md5(data).hexdigest()}"
    with serving(folder) as address:
        yield address, folder, variables


@pytest.mark.slow
def test_the_script_fetches_checks_and_unpacks_and_goes_on_where_it_stopped(root, mirror, tmp_path):
    address, served, variables = mirror
    own = tmp_path / "own"
    wrong = download_coco(str(own), SITE=address, **variables | {"VAL": variables["VAL"][:-4] + "0000"})
    assert wrong.returncode == 1 and "instead of" in wrong.stderr and "val2017.zip" in wrong.stderr
    assert (own / "annotations" / "instances_val2017.json").is_file() and not (own / "val2017").exists()
    (served / "annotations" / "annotations_trainval2017.zip").unlink()  # is not asked for again
    done = download_coco(str(own), SITE=address, **variables)
    assert done.returncode == 0 and "  complete" in done.stdout, done.stdout + done.stderr
    for part in ("annotations", "train2017", "val2017"):
        assert snapshot(own / part).keys() == {own / path.relative_to(root) for path in snapshot(root / part)}
        assert sorted(snapshot(own / part).values()) == sorted(snapshot(root / part).values())
    for archive in (own / "archives").glob("*.zip"):
        archive.unlink()
    again = download_coco(str(own), "--dry-run", SITE=address, **variables)
    assert again.returncode == 0 and "download.py fetch" not in again.stdout and "detection.prepare" in again.stdout


def test_the_script_has_a_dry_run_with_the_true_addresses_and_refuses_unknown_words(tmp_path):
    done = download_coco(str(tmp_path / "none"), "--dry-run")
    assert done.returncode == 0 and not (tmp_path / "none").exists(), done.stderr
    for words in (
        "http://images.cocodataset.org/zips/train2017.zip",
        "train2017.zip 19336861798 cced6f7f71b7629ddf16f17bbcfab6b2",
        "http://images.cocodataset.org/zips/val2017.zip",
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "detection.prepare --kind coco",
    ):
        assert words in done.stdout
    said = download_coco(str(tmp_path), "--dry-run", PARTS="val annotations").stdout
    assert "train2017" not in said.replace("trainval", "")
    assert download_coco("--frobnicate").returncode == 2
    assert download_coco(str(tmp_path), PARTS="test").returncode == 2


def test_a_synthetic_set_asked_for_twice_is_written_once_and_passes(tmp_path, capsys, monkeypatch):
    sheet = tmp_path / "sheet.png"
    small = Synthetic(num_train=8, num_validation=8, height=80, width=96)
    arguments = Arguments(preset="tiny", root=tmp_path / "set", synthetic=small, workers=1, sheet=sheet)
    for state in ("written", "complete already"):
        write_synthetic(arguments)
        assert f"16 pictures, {state}" in capsys.readouterr().out
    assert sheet.is_file()
    assert run(monkeypatch, "--kind", "coco", "--root", tmp_path / "set", "--probe", "--workers", 1) == 0
    said = capsys.readouterr().out
    assert "5 classes, 8 train2017" in said and "boxes are dropped or clipped" in said and "1 of crowds" in said


def test_the_laptops_photographs_come_from_a_wheel_that_may_be_named(tmp_path, monkeypatch):
    wheel = tmp_path / "none.whl"
    said = str(run(monkeypatch, "--preset", "laptop", "--root", tmp_path / "trees", "--wheel", wheel))
    assert "none.whl: no such file" in said and "\n" not in said
