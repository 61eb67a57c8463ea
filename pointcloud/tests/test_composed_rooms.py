"""Composed rooms: S3DIS's form on disk, planted faults, determinism, and the furniture of the laptop preset."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_mirror import script, serving

from engine.commands import Preparation
from engine.data.check import Check
from pointcloud import furniture, prepare, pretrain
from pointcloud.configs import ROOMS_TINY, Data
from pointcloud.model import build_model
from pointcloud.s3dis import CLASSES, find_rooms, load_room
from pointcloud.synthetic import Synthetic, Thing, compose_room, furnish_with_boxes, write_dataset
from pointcloud.tests.toy_rooms import write_room, write_rooms

SMALL = Synthetic(train_rooms=1, test_rooms=2, density=8.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("rooms")
    assert write_dataset(root, SMALL)
    return root


def test_rooms_are_written_once_and_never_over_others(root, tmp_path):
    assert not write_dataset(root, SMALL), "there already"
    with pytest.raises(ValueError, match="another synthetic data set"):
        write_dataset(root, replace(SMALL, seed=1))
    (tmp_path / "Area_1").mkdir()
    with pytest.raises(ValueError, match="not made here"):
        write_dataset(tmp_path, SMALL)


def test_an_interrupted_writing_is_completed(root, tmp_path):
    write_dataset(tmp_path, SMALL)
    path = tmp_path / "Area_3" / "office_1" / "office_1.txt"
    content = path.read_bytes()
    path.unlink()
    assert write_dataset(tmp_path, SMALL) and path.read_bytes() == content
    assert content == (root / "Area_3" / "office_1" / "office_1.txt").read_bytes()


def test_the_official_faults_are_planted_and_read(root):
    data = replace(Data(root=root), rooms="composed", unit="room")
    (room, *_) = find_rooms(data, [1])
    folder = root / "Area_1" / room.name / "Annotations"
    assert b"\x00" in (folder / "ceiling_1.txt").read_bytes() and (folder / ".DS_Store").is_file()
    with pytest.warns(UserWarning, match="ceiling_1.txt: line .* was read as"):
        points = load_room(room)
    assert {"ceiling", "floor", "wall"} <= {CLASSES[k] for k in np.unique(points["label"])}
    lines = (root / "Area_1" / room.name / f"{room.name}.txt").read_text().count("\n")
    assert len(points) == lines


def test_all_classes_are_in_a_handful_of_rooms():
    seen = set()
    for k in range(8):
        things = compose_room((0, 1, k), "office", 10.0, furnish_with_boxes)
        seen |= {thing.name for thing in things}
        assert all(t.rgb.min() >= 0 and t.rgb.max() <= 255 and np.isfinite(t.xyz).all() for t in things)
    assert seen == set(CLASSES)


def test_a_room_is_a_function_of_its_seed():
    one, two = (compose_room((0, 2, 1), "lobby", 20.0, furnish_with_boxes) for _ in range(2))
    assert all(np.array_equal(a.xyz, b.xyz) for a, b in zip(one, two, strict=True))


def arguments(**changes):
    return prepare.Arguments(**changes)


def test_a_probe_counts_points_and_names_what_it_repaired(root, capsys):
    found = prepare.check(arguments(kind="s3dis", root=root, probe=True))
    assert isinstance(found, Check) and not found.failed("raise"), found.problems
    assert found.counts["rooms of Area_5"] == 2 and found.counts["of floor"] > 0
    (root / ".dr2net" / "rooms").exists()


def test_a_probe_names_the_room_that_cannot_be_read_and_the_one_that_is_missing(tmp_path):
    write_dataset(tmp_path, SMALL)
    (tmp_path / "Area_2" / "office_1" / "Annotations" / "floor_1.txt").write_text("1 2\n")
    (tmp_path / "Area_5" / "conferenceRoom_1").rename(tmp_path / "elsewhere")
    found = prepare.check(arguments(kind="s3dis", root=tmp_path, probe=True, lists=tmp_path / "lists"))
    told = "\n".join(found.problems)
    assert "Area_5 lacks 1 rooms: conferenceRoom_1" in told and "floor_1.txt" in told
    assert "floor_1.txt" in (tmp_path / "lists" / "broken_rooms.txt").read_text()
    assert found.failed("raise") and not found.failed("skip")


def test_the_official_counts_and_the_aligned_version_are_told(root, tmp_path):
    for area in range(1, 7):
        (tmp_path / f"Area_{area}" / "office_1" / "Annotations").mkdir(parents=True)
    told = "\n".join(prepare.check(arguments(kind="s3dis", root=tmp_path)).problems)
    assert "Area_5 lacks 67 rooms" in told and "Area_1 has 1 rooms instead of the official 44" in told
    assert "aligned version" in told
    with pytest.raises(FileNotFoundError, match="download_s3dis.sh"):
        prepare.check(arguments(kind="s3dis", root=tmp_path / "none"))


def test_a_look_names_rooms_without_annotations_and_unknown_classes_and_goes_on(tmp_path):
    for area in range(1, 7):
        write_room(tmp_path / f"Area_{area}" / "office_1")
    (tmp_path / "Area_1" / "empty_1").mkdir()
    folder = tmp_path / "Area_2" / "office_1" / "Annotations"
    (folder / "wall_1.txt").rename(folder / "lamp_1.txt")
    (folder / "chair_1.txt").rename(folder / "chair 1.txt")
    found = prepare.check(arguments(kind="s3dis", root=tmp_path, rooms="any"))
    told = "\n".join(found.problems)
    assert "Area_1/empty_1: has no Annotations" in told and "lamp_1.txt: 'lamp' is not a class" in told
    assert "left out: Area_2/office_1/Annotations/chair 1.txt" in told and "lacks" not in told
    assert "2 rooms cannot be read" in told and found.failed("raise")
    again = prepare.check(arguments(kind="s3dis", root=tmp_path, rooms="any", probe=True))
    assert "Area_1/empty_1: has no Annotations" in "\n".join(again.problems)
    (tmp_path / "Area_1" / "hall").mkdir()
    missing = prepare.check(arguments(kind="pointcept", root=tmp_path, rooms="any"))
    assert "Area_1/hall/coord.npy: no such file" in "\n".join(missing.problems)


def test_repairs_are_named_by_each_probe(root, capsys):
    for _ in range(2):
        prepare.check(arguments(kind="s3dis", root=root, probe=True))
        assert "ceiling_1.txt: line" in capsys.readouterr().out


def test_the_script_fetches_checks_the_size_unpacks_and_goes_on(tmp_path):
    served, root, name = tmp_path / "served", tmp_path / "s3dis", "Stanford3dDataset_v1.2"
    write_rooms(served / name, count=3)
    with zipfile.ZipFile(served / f"{name}.zip", "w") as archive:
        for path in sorted((served / name).rglob("*.txt")):
            archive.write(path, path.relative_to(served))
    refused = script("download_s3dis.sh", str(root))
    assert refused.returncode == 1 and "agree to the terms" in refused.stdout and not root.exists()
    with serving(served) as address:
        size = str((served / f"{name}.zip").stat().st_size)
        words = {"URL": f"{address}/{name}.zip", "BYTES": size}
        cut = script("download_s3dis.sh", str(root), "--accept-license", **{**words, "BYTES": "5149528258"})
        assert cut.returncode == 1 and f"has {size} bytes, not 5149528258" in cut.stderr
        (root / "Area_1").mkdir()  # as after an interruption while areas were moved
        done = script("download_s3dis.sh", str(root), "--accept-license", **words)
    assert done.returncode == 1 and "Area_5 lacks 66 rooms" in done.stdout, "as the toy has two of them"
    assert sorted(path.name for path in root.glob("Area_*")) == [f"Area_{k}" for k in range(1, 7)]
    assert not (root / "unpacked").exists()
    again = script("download_s3dis.sh", str(root), "--accept-license", "--dry-run", **words)
    assert again.returncode == 0 and "download.py fetch" not in again.stdout, again.stderr


def test_the_license_step_is_said(capsys):
    prepare.fetch(arguments(kind="s3dis"))
    said = capsys.readouterr().out
    assert "agree" in said and "--accept-license" in said and "not the aligned version" in said
    with pytest.raises(ValueError, match="nothing to download"):
        prepare.fetch(arguments(kind="npy"))


def test_the_tiny_preset_is_written_where_its_rows_look(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "ROOMS_TINY", replace(ROOMS_TINY, root=tmp_path / "rooms"))
    given = arguments(preset="tiny", synthetic=SMALL, sheet=tmp_path / "sheet.png")
    assert isinstance(given, Preparation)
    prepare.write_synthetic(given)
    given.sheet.unlink()
    prepare.write_synthetic(given)
    told = capsys.readouterr()
    assert "7 rooms, complete already" in told.out and "0/7" not in told.err.splitlines()[-1]
    assert given.sheet.is_file()


CUBE = (
    "mtllib a.mtl\nusemtl red\n"
    + "".join(f"v {x} {y} {z}\n" for x in (0, 2) for y in (0, 4) for z in (0, 1))
    + "f 1 2 4 3\nf 5 6 8 7\nf 1 2 6 5\nf 3 4 8 7\nf 1 3 7 5\nf -7 -5 -1 -3\n"
)


def write_library(path, names):
    lines = []
    for k, name in enumerate(names, start=1):
        lines += [f"name#{k}={name}", f"model#{k}=/m{k}/m.obj", f"width#{k}=100", f"depth#{k}=50", f"height#{k}=80"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines) + "\n")
        for k in range(1, len(names) + 1):
            archive.writestr(f"m{k}/m.obj", CUBE)
            archive.writestr(f"m{k}/a.mtl", "newmtl red\nKd 1 0 0\n")
    return path


def test_a_model_becomes_points_on_its_surface_in_meters_with_z_up(tmp_path):
    (model,) = furniture.models_of(write_library(tmp_path / "a.sh3f", ["Oak chair", "Ford Focus", "Deck chair"]))
    assert model.name == "chair"
    assert np.allclose(model.xyz.min(0), 0, atol=0.01) and np.allclose(model.xyz.max(0), [1.0, 0.5, 0.8], atol=0.01)
    ends = np.isclose(model.xyz, 0, atol=1e-6) | np.isclose(model.xyz, [1.0, 0.5, 0.8], atol=1e-6)
    assert ends.any(axis=1).all(), "each point lies on a face"
    assert (model.rgb == [255, 0, 0]).all() and model.area == pytest.approx(2 * (0.5 + 0.4 + 0.8))


def test_test_models_are_in_no_other_group_and_a_room_holds_only_its_own(tmp_path):
    names = [n for n in ("Table", "Chair", "Sofa", "Bookcase", "White board", "Lamp") for _ in range(8)]
    groups = furniture.split_models(furniture.models_of(write_library(tmp_path / "a.sh3f", names)))
    titles = {group: {m.title for own in by_class.values() for m in own} for group, by_class in groups.items()}
    assert titles.keys() == {"train", "test", "pretrain"} and sum(map(len, titles.values())) == 48
    assert not titles["test"] & titles["train"] and not titles["test"] & titles["pretrain"]
    rng = np.random.default_rng(0)
    things = compose_room((0, 5, 0), "office", 50.0, lambda room, rng: furniture.furnish(room, groups["test"], rng))
    furnished = [thing for thing in things if thing.name in furniture.WEIGHTS]
    assert all(isinstance(thing, Thing) for thing in furnished) and len(furnished) > 3
    assert rng is not None
    with pytest.raises(ValueError, match="too few models of"):
        furniture.split_models([])


def test_a_damaged_library_is_named(tmp_path):
    (tmp_path / "a.sh3f").write_bytes(b"PK\x03\x04nothing")
    with pytest.raises(ValueError, match="a.sh3f: cannot be read as a furniture library"):
        furniture.models_of(tmp_path / "a.sh3f")


def test_pretraining_keeps_all_but_the_blocks_and_is_loaded_back(tmp_path):
    config = pretrain.config_of(3, tmp_path, tmp_path)
    assert config.finetuning.method == "frozen" and config.data.samples_per_epoch == 24
    small = replace(config.model, name="tiny", weights=None, depth=None, channels=(8, 16), decoder_width=16)
    config = replace(config, model=small)
    first = build_model(config)
    pretrain.write_around(first, tmp_path / "around.safetensors")
    torch.manual_seed(5)
    second = build_model(replace(config, model=replace(small, around=tmp_path / "around.safetensors")))
    for key, value in second.state_dict().items():
        is_block = key.startswith("backbone.")
        assert torch.allclose(value, first.state_dict()[key], atol=1e-3) != is_block or value.std() == 0, key
    wrong = replace(config, model=replace(small, channels=(8, 24), around=tmp_path / "around.safetensors"))
    with pytest.raises(ValueError, match="does not fit the model"):
        build_model(wrong)
