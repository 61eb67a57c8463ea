"""S3DIS's files: class orders, known faults repaired and named, bad files refused with one clear line, the cache."""

import os
import warnings
from dataclasses import replace

import numpy as np
import pytest

from pointcloud.configs import Data
from pointcloud.s3dis import (
    AREA_5,
    CLASSES,
    FROM_POINTNET,
    POINTNET_CLASSES,
    Room,
    class_of,
    colors_of,
    expected_rooms,
    find_rooms,
    load_room,
    load_voxels,
    read_points,
    voxelize,
)
from pointcloud.tests.toy_rooms import label_of, tiny_config, write_room, write_rooms


def data_of(root, **changes):
    return replace(Data(root=root, rooms="any", unit="room"), **changes)


def one_room(tmp_path, **how):
    write_room(tmp_path / "Area_1" / "office_1", **how)
    return find_rooms(data_of(tmp_path), [1])[0]


def test_the_two_orders_of_classes_differ_in_four_names_and_are_permuted_by_name():
    assert CLASSES[7:11] == ("chair", "table", "bookcase", "sofa")
    assert POINTNET_CLASSES[7:11] == ("table", "chair", "sofa", "bookcase")
    assert [CLASSES[k] for k in FROM_POINTNET] == list(POINTNET_CLASSES)
    assert sorted(FROM_POINTNET.tolist()) == list(range(13))


def test_a_room_is_read_with_its_labels(tmp_path):
    points = load_room(one_room(tmp_path, count=20))
    assert len(points) == 60 and points["xyz"].dtype == np.float32 and points["rgb"].dtype == np.uint8
    counts = np.bincount(points["label"], minlength=13)
    assert {CLASSES[k]: int(n) for k, n in enumerate(counts) if n} == {"floor": 20, "wall": 20, "chair": 20}


@pytest.mark.parametrize(
    "written, meant",  # the damaged numbers of the official files: one bit, 0x20, is cleared
    [
        (b"1 2 3 4 185\x00187", b"1 2 3 4 185 187"),
        (b"1 2 -9.1\x160 4 5 6", b"1 2 -9.160 4 5 6"),
        (b"1 2 3 103.0\x100000 5 6", b"1 2 3 103.000000 5 6"),
        (b"1 2 3 56.00\x10000 5 6", b"1 2 3 56.000000 5 6"),
        (b"1 2 3 2\x111.000000 5 6", b"1 2 3 211.000000 5 6"),
        (b"1 2 3 167.\x1000000 5 6", b"1 2 3 167.000000 5 6"),
    ],
)
def test_each_known_damage_is_repaired_in_memory_and_told_with_its_line(tmp_path, written, meant):
    path = tmp_path / "ceiling_1.txt"
    content = b"0 0 0 1 2 3\n" + written + b"\n0 0 0 1 2 3\n"
    path.write_bytes(content)
    values, notes = read_points(path)
    assert values[1].tolist() == [float(word) for word in meant.split()]
    assert len(notes) == 1 and "ceiling_1.txt: line 2" in notes[0]
    assert path.read_bytes() == content, "the user's file is as it was"


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "has no points"),
        (b"\n \n", "has no points"),
        (b"1 2 3 4 5\n", "5 columns"),
        (b"1 2 3 4 5 6 7\n", "7 columns"),
        (b"1 2 3 4 5 6\n1 2 3\n", "cannot be read as numbers"),
        (b"1 2 3 4 5 red\n", "cannot be read as numbers"),
        (b"1 2 nan 4 5 6\n", "point 1 has a value that is not finite"),
        (b"0 0 0 0 0 0\n1 inf 3 4 5 6\n", "point 2 has a value that is not finite"),
        (b"\x00\x01\x02\x03" * 40, "is not text"),
        ("é 2 3 4 5 6\n".encode(), "cannot be read as numbers"),
    ],
)
def test_a_bad_annotation_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "wall_1.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        read_points(path)
    assert "wall_1.txt" in str(error.value)


def test_a_missing_file_and_a_folder_in_its_place_are_told(tmp_path):
    for path in (tmp_path / "no.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_points(path)


def test_stairs_are_clutter_other_names_are_refused_and_copies_left_out(tmp_path):
    assert class_of(tmp_path / "stairs_1.txt") == label_of("clutter")
    assert class_of(tmp_path / "wall_3 (1).txt") is None
    with pytest.raises(ValueError, match="'lamp' is not a class"):
        class_of(tmp_path / "lamp_1.txt")
    room = one_room(tmp_path)
    folder = tmp_path / "Area_1" / "office_1" / "Annotations"
    (folder / "wall_1 (1).txt").write_text((folder / "wall_1.txt").read_text())
    (folder / ".DS_Store").write_bytes(b"\x00\x01")
    (folder / "._wall_1.txt").write_bytes(b"\x00\x01")
    room = find_rooms(data_of(tmp_path), [1])[0]
    with pytest.warns(UserWarning, match=r"wall_1 \(1\).txt: is not named"):
        assert len(load_room(room)) == 180


def test_a_room_without_annotations_is_named(tmp_path):
    (tmp_path / "Area_1" / "office_1").mkdir(parents=True)
    (room,) = find_rooms(data_of(tmp_path), [1])
    with pytest.raises(FileNotFoundError, match="Area_1/office_1: has no Annotations"):
        load_room(room)
    with pytest.raises(FileNotFoundError, match="no rooms of Area_2"):
        find_rooms(data_of(tmp_path), [2])


def test_colors_may_be_bytes_or_shares_and_nothing_else(tmp_path):
    path = tmp_path / "room"
    assert colors_of(path, np.array([[0.0, 128.0, 255.0]])).tolist() == [[0, 128, 255]]
    assert colors_of(path, np.array([[0.0, 0.5, 1.0]])).tolist() == [[0, 128, 255]]
    assert colors_of(path, np.array([[0, 1, 1]], np.uint8)).tolist() == [[0, 1, 1]]
    for wrong in ([[-1.0, 0, 0]], [[0, 0, 256.0]]):
        with pytest.raises(ValueError, match="colors from"):
            colors_of(path, np.array(wrong))


def test_area_5_must_be_complete(tmp_path):
    assert sum(AREA_5.values()) == len(expected_rooms(Data(root=tmp_path), 5)) == 68
    for name in expected_rooms(Data(root=tmp_path), 5) - {"hallway_6"}:
        (tmp_path / "Area_5" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="Area_5 lacks 1 rooms: hallway_6"):
        find_rooms(data_of(tmp_path, rooms="official"), [5])
    assert len(find_rooms(data_of(tmp_path), [5])) == 67
    for name in ("hallway_6", "office_1 (copy)"):
        (tmp_path / "Area_5" / name).mkdir()
    with pytest.raises(ValueError, match=r"Area_5 has, beside its own, 1 rooms: office_1 \(copy\)"):
        find_rooms(data_of(tmp_path, rooms="official"), [5])


def test_an_official_training_area_has_its_number_of_rooms(tmp_path):
    for k in range(44):
        (tmp_path / "Area_1" / f"room_{k}").mkdir(parents=True)
    assert len(find_rooms(data_of(tmp_path, rooms="official"), [1])) == 44
    (tmp_path / "Area_1" / "room_7").rmdir()
    with pytest.raises(ValueError, match="Area_1 has 43 rooms instead of the official 44"):
        find_rooms(data_of(tmp_path, rooms="official"), [1])


@pytest.mark.parametrize("changes", [{"test_area": 1}, {"train_areas": (1, 2, 2)}, {"scale": (1.1, 0.9)}])
def test_areas_that_overlap_and_ranges_that_are_reversed_are_refused(changes):
    with pytest.raises(
        ValueError, match="name each area once, and not --data.test-area|the smaller factor comes first"
    ):
        Data(**changes)


def test_what_is_kept_is_used_until_the_files_change(tmp_path, monkeypatch):
    room = one_room(tmp_path)
    first = load_room(room)
    kept = tmp_path / ".dr2net" / "rooms" / "Area_1_office_1.npy"
    assert kept.is_file()
    with monkeypatch.context() as patch:
        patch.setattr("pointcloud.s3dis.read_points", lambda *_: pytest.fail("it was kept"))
        assert np.array_equal(load_room(room), first)
    kept.write_bytes(kept.read_bytes()[:-5] + b"other")  # damaged: made anew
    assert np.array_equal(load_room(room), first)
    path = room.files[0]
    path.write_text(path.read_text() + "0 0 0 1 2 3\n")
    assert len(load_room(room)) == len(first) + 1


def test_a_file_written_again_in_the_same_size_is_read_again(tmp_path):
    table = np.array([[0, 0, 0, 1, 2, 3, 7.0], [1, 1, 1, 1, 2, 3, 8.0]])
    path = tmp_path / "Area_1_office_1.npy"
    for labels in ([7, 8], [8, 7]):  # as who notices that the classes were in the other order
        table[:, 6] = labels
        np.save(path, table)
        (room,) = find_rooms(data_of(tmp_path, kind="npy"), [1])
        assert load_room(room)["label"].tolist() == FROM_POINTNET[labels].tolist()
        assert sorted(load_voxels(room, 0.1)["label"]) == sorted(FROM_POINTNET[labels])


def test_what_was_repaired_is_told_each_time_and_not_only_the_first(tmp_path):
    room = one_room(tmp_path)
    path = tmp_path / "Area_1" / "office_1" / "Annotations" / "wall_1.txt"
    path.write_bytes(path.read_bytes() + b"1 1 1 185\x00187 3\n")
    for _ in range(2):
        with pytest.warns(UserWarning, match="wall_1.txt: line 61"):
            assert len(load_room(room)) == 181


def test_a_cache_that_says_something_else_is_made_anew(tmp_path):
    room = one_room(tmp_path)
    first = load_room(room)
    note = tmp_path / ".dr2net" / "rooms" / "Area_1_office_1.json"
    for said in ("[]", "{}", "{", '{"notes": 3}'):
        note.write_text(said)
        assert np.array_equal(load_room(room), first)
    np.savez(note.with_suffix(".npz"), first)
    os.replace(note.with_suffix(".npz"), note.with_suffix(".npy"))
    assert np.array_equal(load_room(room), first)


def test_a_folder_that_cannot_be_written_is_said_and_done_without(tmp_path, monkeypatch):
    room = one_room(tmp_path)

    def refuse(folder):
        raise PermissionError("read-only")

    monkeypatch.setattr("pointcloud.s3dis.make_folder", refuse)
    with pytest.warns(UserWarning, match="rooms cannot be kept there"):
        assert len(load_room(room)) == 180


def test_rooms_of_pointnet_and_pointcept_are_the_same_rooms(tmp_path):
    write_rooms(tmp_path / "text")
    original = load_room(find_rooms(data_of(tmp_path / "text"), [3])[0])
    theirs = np.argsort(FROM_POINTNET)[original["label"]]  # ours -> PointNet's
    table = np.concatenate([original["xyz"], original["rgb"], theirs[:, None]], axis=1).astype(np.float64)
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "Area_3_office_1.npy", table)
    folder = tmp_path / "pointcept" / "Area_3" / "office_1"
    folder.mkdir(parents=True)
    for name, values in (("coord", original["xyz"]), ("color", original["rgb"]), ("segment", theirs[:, None])):
        np.save(folder / f"{name}.npy", values)
    for kind in ("npy", "pointcept"):
        (room,) = find_rooms(data_of(tmp_path / kind, kind=kind), [3])
        assert room.name == "office_1"
        assert np.array_equal(load_room(room), original)


@pytest.mark.parametrize(
    "values, said",
    [
        (np.zeros((3, 6)), r"\(3, 6\) instead of \(N, 7\)"),
        (np.zeros((0, 7)), "has no points"),
        (np.full((2, 7), np.nan), "not finite"),
        (np.array([[0, 0, 0, 1, 2, 3, 13.0]]), "labels from 13 to 13"),
        (np.array([[0, 0, 0, 1, 2, 3, 0.5]]), "labels from 0.5"),
        (np.array([[0, 0, 0, 1, 2, 300, 1.0]]), "colors from"),
    ],
)
def test_a_bad_array_is_refused_by_name(tmp_path, values, said):
    path = tmp_path / "Area_1_office_1.npy"
    np.save(path, values)
    with pytest.raises(ValueError, match=said) as error:
        load_room(Room(tmp_path, "npy", 1, "office_1", (path,)))
    assert path.name in str(error.value)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("coord", np.zeros((4, 2))),
        ("coord", np.zeros(())),
        ("color", np.zeros((4, 4))),
        ("color", np.zeros((3, 3))),
        ("segment", np.zeros((4, 2))),
        ("segment", np.zeros((4, 1), "U3")),
        ("segment", np.full((4, 1), -1)),
        ("coord", np.zeros((4, 3), complex)),
    ],
)
def test_pointcepts_arrays_of_other_shapes_and_kinds_are_refused_by_name(tmp_path, name, wrong):
    arrays = {"coord": np.zeros((4, 3)), "color": np.zeros((4, 3)), "segment": np.zeros((4, 1)), name: wrong}
    folder = tmp_path / "Area_1" / "office_1"
    folder.mkdir(parents=True)
    for key, values in arrays.items():
        np.save(folder / f"{key}.npy", values)
    (room,) = find_rooms(data_of(tmp_path, kind="pointcept"), [1])
    with pytest.raises(ValueError, match="office_1"):
        load_room(room)


def test_an_array_of_objects_and_a_cut_file_are_refused(tmp_path):
    path = tmp_path / "Area_1_office_1.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as npy"):
        load_room(Room(tmp_path, "npy", 1, "office_1", (path,)))
    np.save(path, np.zeros((9, 7)))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read as npy"):
        load_room(Room(tmp_path, "npy", 1, "office_1", (path,)))


def test_one_point_of_each_cube_is_kept_the_same_each_time(tmp_path):
    room = one_room(tmp_path, count=500)
    voxels, points = load_voxels(room, 0.5), load_room(room)
    cells = {tuple(cell) for cell in np.floor(points["xyz"].astype(np.float64) / 0.5).astype(int).tolist()}
    kept = [tuple(cell) for cell in np.floor(voxels["xyz"].astype(np.float64) / 0.5).astype(int).tolist()]
    assert len(kept) == len(set(kept)) and set(kept) == cells
    assert np.array_equal(load_voxels(room, 0.5), voxels)
    chosen = voxelize(np.zeros((100, 3)), 0.1, np.random.default_rng(0))
    assert len(chosen) == 1, "equal points are one voxel"


def test_coordinates_that_are_no_meters_are_refused():
    with pytest.raises(ValueError, match="1e.09 m, too far for cubes of 0.04 m: .* must be in meters"):
        voxelize(np.array([[0, 0, 0], [1e9, 0, 0]]), 0.04, np.random.default_rng(0))


def test_a_stray_point_far_away_does_not_merge_the_voxels_of_a_room():
    room = np.stack(np.meshgrid(*[np.arange(6) * 0.04 + 0.02] * 3), axis=-1).reshape(-1, 3)
    far = np.full((1, 3), 0.04 * 1e6)  # 10^18 cubes: more than floats can number one by one
    assert len(voxelize(np.concatenate([room, far]), 0.04, np.random.default_rng(0))) == 6**3 + 1


def test_a_room_far_from_the_origin_is_refused_and_one_in_millimeters_warned_of(tmp_path):
    folder = tmp_path / "Area_1" / "office_1" / "Annotations"
    folder.mkdir(parents=True)
    (room,) = find_rooms(data_of(tmp_path), [1])
    (folder / "wall_1.txt").write_text("500000.123 10 2 1 2 3\n")
    (room,) = find_rooms(data_of(tmp_path), [1])
    with pytest.raises(ValueError, match="office_1: coordinates up to 500000.12 m .* subtract the same offset"):
        load_room(room)
    (folder / "wall_1.txt").write_text("0 0 0 1 2 3\n5000 10 2 1 2 3\n")
    with pytest.warns(UserWarning, match="office_1: reaches over 5e.03; are these meters"):
        load_room(room)


def test_a_composed_set_without_a_stamp_says_how_to_write_it(tmp_path):
    write_rooms(tmp_path)
    with pytest.raises(FileNotFoundError, match="pointcloud.prepare --preset tiny"):
        find_rooms(tiny_config(tmp_path, rooms="composed").data, [5])


def test_a_good_room_says_nothing(tmp_path):
    room = one_room(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_room(room)
