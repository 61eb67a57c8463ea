"""A user's own clouds: read or refused by name, labeled, written and drawn."""

import io
import os
import pickle
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pointcloud import clouds, predict
from pointcloud.model import build_model
from pointcloud.s3dis import CLASSES
from pointcloud.tests.toy_rooms import tiny_config


def points(count=200, seed=0):
    rng = np.random.default_rng(seed)
    xyz = np.round(rng.random((count, 3)) * [3, 2, 2.5], 3)
    return xyz, rng.integers(0, 256, (count, 3)).astype(np.uint8)


def write(path: Path, xyz, rgb=None) -> Path:
    if path.suffix == ".npy":
        np.save(path, xyz if rgb is None else np.concatenate([xyz, rgb], axis=1))
    elif path.suffix in (".txt", ".xyz"):
        np.savetxt(path, xyz if rgb is None else np.concatenate([xyz, rgb], axis=1), fmt="%.3f")
    else:
        import open3d

        cloud = open3d.t.geometry.PointCloud()
        cloud.point.positions = open3d.core.Tensor(xyz.astype(np.float32))
        if rgb is not None:
            cloud.point.colors = open3d.core.Tensor(rgb)
        assert open3d.t.io.write_point_cloud(str(path), cloud)
    return path


@pytest.mark.parametrize("suffix", clouds.SUFFIXES)
@pytest.mark.parametrize("colored", [True, False])
def test_a_cloud_of_each_kind_is_what_was_written(tmp_path, suffix, colored):
    xyz, rgb = points()
    found = clouds.read_cloud(write(tmp_path / f"scan{suffix}", xyz, rgb if colored else None))
    assert np.allclose(found.xyz, xyz, atol=1e-3)
    if colored:
        assert np.array_equal(found.rgb, rgb)
    else:
        assert found.rgb is None


@pytest.mark.parametrize("suffix", [".ply", ".pcd"])
@pytest.mark.parametrize("kind", ["binary", "ascii"])
def test_a_cut_file_is_refused_where_open3d_makes_points_up(tmp_path, suffix, kind):
    import open3d

    xyz, rgb = points()
    cloud = open3d.t.geometry.PointCloud(open3d.core.Tensor(xyz.astype(np.float32)))
    cloud.point.colors = open3d.core.Tensor(rgb)
    path = tmp_path / f"scan{suffix}"
    assert open3d.t.io.write_point_cloud(str(path), cloud, write_ascii=kind == "ascii")
    assert clouds.read_header(path).num_points == 200
    found = clouds.read_cloud(path)
    assert np.allclose(found.xyz, xyz, atol=1e-6) and np.array_equal(found.rgb, rgb)
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 3])
    with pytest.raises(ValueError, match="scan.*is cut off"):
        clouds.read_cloud(path)


def test_a_compressed_pcd_is_read_and_a_cut_one_refused(tmp_path):
    import open3d

    xyz, _ = points()
    path = tmp_path / "scan.pcd"
    cloud = open3d.t.geometry.PointCloud(open3d.core.Tensor(xyz.astype(np.float32)))
    assert open3d.t.io.write_point_cloud(str(path), cloud, compressed=True)
    assert len(clouds.read_cloud(path).xyz) == 200
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="scan.pcd: is cut off"):
        clouds.read_cloud(path)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


RGB = b"property uchar red\nproperty uchar green\nproperty uchar blue\n"
XYZ = b"ply\nformat %s 1.0\nelement vertex 2\n" + b"".join(b"property float %c\n" % c for c in b"xyz")
XYZ += b"%send_header\n"
PCD = b"VERSION 0.7\nFIELDS x y z\nSIZE %s\nTYPE %s\nCOUNT 1 1 1\nPOINTS 1\nDATA %s\n"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.ply", b"", "has no PLY header"),
        ("a.ply", b"<html>", "has no PLY header"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nend_header\n", "has no points"),
        ("a.ply", b"ply\nformat zip 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n", "supported: zip"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement\nend_header\n1\n", "lacks words"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 1\nproperty\nend_header\n1\n", "lacks words"),
        # no number of a point: open3d counted to 300 milliards
        ("a.ply", b"ply\nformat binary_little_endian 1.0\nelement vertex 300000000000\nend_header\n", "have no x"),
        ("a.ply", XYZ % (b"ascii", b"") + b"1 2 3\n", "is cut off"),
        ("a.ply", XYZ % (b"ascii", b"") + b"a b c\n4 5 6\n", "cannot be read as numbers"),
        ("a.ply", XYZ % (b"ascii", b"") + b"1 2\n4 5 6\n7\n", "cannot be read as numbers"),
        ("a.ply", XYZ % (b"ascii", b"") + b"1 2 3 4\n4 5 6 7\n", "have 4 numbers, by its header 3"),
        ("a.ply", XYZ.replace(b"float z", b"float y") % (b"ascii", b"") + b"1 2 3\n4 5 6\n", "have no z|have 2 y"),
        ("a.ply", XYZ % (b"ascii", b"property uchar red\n") + b"1 2 3 4\n4 5 6 7\n", "have 1 red, 0 green, 0 blue"),
        ("a.ply", XYZ % (b"ascii", RGB) + b"1 2 3 4 5 300\n4 5 6 7 8 9\n", "that are no uint8"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement face 1\nproperty float x\nend_header\n1\n", "first element"),
        (
            "a.ply",
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty list uchar int x\nend_header\n1\n",
            "not supported",
        ),
        ("a.pcd", b"not a cloud", "has no PCD header"),
        ("a.pcd", b"FIELDS x\nSIZE four\nPOINTS 1\nDATA ascii\n1\n", "header is damaged"),
        ("a.pcd", PCD % (b"4 4", b"F F F", b"ascii") + b"1 2 3\n", "do not belong together"),
        ("a.pcd", PCD % (b"3 3 3", b"F F F", b"ascii") + b"1 2 3\n", "numbers of type f3"),
        ("a.pcd", PCD % (b"4 4 4", b"F F F", b"zip") + b"1" * 12, "supported: zip"),
        ("a.pcd", PCD % (b"4 4 4", b"F F F", b"binary_compressed") + bytes(8), "0 bytes are not 1 points"),
        ("a.pcd", PCD.replace(b"y z", b"y rgb") % (b"4 4 4", b"F F F", b"ascii") + b"1 2 3\n", "have no z"),
        ("a.txt", b"", "has no points"),
        ("a.txt", b"1 2\n", "at least x y z"),
        ("a.txt", b"1 2 nan\n", "not finite"),
        ("a.txt", b"1 2 3 4 5 600\n", "colors from"),
        ("a.txt", b"x y z\n1 2 3\n", "numbers x y z"),
        ("a.txt", b"1,2,3\n", "separated by blanks"),
        ("a.xyz", "1 2 3\n".encode("utf-16"), "is not text|numbers"),
        ("a.npy", b"\x93NUMPY", "cannot be read as npy"),
        ("a.npy", npy(np.zeros((3, 200))), "a row per point"),
        ("a.npy", npy(np.zeros((9, 6), complex)), "not an array of numbers"),
        ("a.npy", npy(np.zeros((9, 6)))[:-8], "cannot be read as npy"),
        ("a.npy", npy(np.zeros((9, 6))).replace(b"(9, 6), }       ", b"(900000000, 6)}"), "cannot be read as npy"),
        ("a.npy", npy(np.zeros((9, 6))).replace(b"(9, 6)", b"(9, 6 "), "cannot be read as npy"),
        ("a.obj", b"v 1 2 3", "is none of"),
    ],
)
def test_a_bad_cloud_is_refused_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        clouds.read_cloud(tmp_path / name)
    assert name in str(error.value) and "official zip" not in str(error.value)


PROPERTIES = {"x": "float", "y": "float", "z": "float", "red": "uchar", "green": "uchar", "blue": "uchar"}


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"x": "double", "y": "float64", "z": "double"},
        {"nx": "float", "label": "int", "alpha": "uchar"},
        {"red": "float", "green": "float", "blue": "float"},  # in 0 to 1
        {"x": "short", "y": "short", "z": "int32"},
        {"red": "ushort", "green": "int", "blue": "uint"},
    ],
)
@pytest.mark.parametrize("names", ["xyz", "XYZ", "diffuse"])
def test_a_ply_of_any_writer_is_read(tmp_path, form, changes, names):
    xyz, rgb = points(20)
    types = {**dict.fromkeys(("red", "green", "blue"), "uchar"), **PROPERTIES, **changes}  # colors first
    xyz = np.round(xyz) if types["x"] == "short" else xyz
    values = dict(zip("xyz", xyz.T, strict=True)) | dict(zip(("red", "green", "blue"), rgb.T, strict=True))
    if types["red"] == "float":
        values |= {name: values[name] / 255 for name in ("red", "green", "blue")}
    order = ">" if "big" in form else "<"
    table = np.zeros(20, [(name, order + clouds.PLY_TYPES[kind]) for name, kind in types.items()])
    for name, column in values.items():
        table[name] = column
    called = {name: name.upper() if names == "XYZ" else name for name in types}
    if names == "diffuse":
        called |= {name: f"diffuse_{name}" for name in ("red", "green", "blue")}
    lines = [f"property {kind} {called[name]}" for name, kind in types.items()]
    head = ["ply", f"format {form} 1.0", "comment end_header", "element vertex 20", *lines]
    head += ["element face 1", "property list uchar int vertex_indices", "end_header\n"]
    text = "\n".join(" ".join(str(value) for value in row.tolist()) for row in table) + "\n\n3 0 1 2\n"
    path = tmp_path / "a.ply"
    path.write_bytes("\n".join(head).encode() + (text.encode() if form == "ascii" else table.tobytes()))
    found = clouds.read_cloud(path)
    assert np.allclose(found.xyz, xyz, atol=1e-12 if types["x"] == "double" else 1e-6)
    assert np.array_equal(found.rgb, rgb)


@pytest.mark.parametrize("kind, form", [("F", "binary"), ("U", "binary"), ("F", "ascii"), ("U", "ascii")])
def test_packed_colors_and_padding_of_a_pcd_are_read(tmp_path, kind, form):
    xyz, rgb = points(20)
    fields = [("x", "<f8"), ("_", "<u1", 4), ("y", "<f8"), ("z", "<f8"), ("rgb", "<u4"), ("_2", "<u1", 3)]
    table = np.zeros(20, fields)
    table["x"], table["y"], table["z"] = xyz.T
    table["rgb"] = rgb.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    head = (
        "FIELDS x _ y z rgb _\nSIZE 8 1 8 8 4 1\nTYPE F U F F %s U\nCOUNT 1 4 1 1 1 3\nWIDTH 20\nPOINTS 20\nDATA %s\n"
    )
    codes = (table["rgb"].copy().view(np.float32) if kind == "F" else table["rgb"]).tolist()
    rows = [f"{x!r} 0 0 0 0 {y!r} {z!r} {code} 0 0 0" for (x, y, z), code in zip(xyz.tolist(), codes, strict=True)]
    path = tmp_path / "a.pcd"
    body = "\n".join(rows).encode() if form == "ascii" else table.tobytes()
    path.write_bytes((head % (kind, form)).encode() + body)
    found = clouds.read_cloud(path)
    assert np.array_equal(found.xyz, xyz) and np.array_equal(found.rgb, rgb)
    path.write_bytes(path.read_bytes().replace(str(codes[3]).encode() + b" 0", b"nan 0"))
    if form == "ascii":
        with pytest.raises(ValueError, match="not finite|no uint32"):
            clouds.read_cloud(path)


def test_what_is_taken_of_a_table_with_other_columns_is_told(tmp_path):
    xyz, rgb = points(9)
    for columns, told in (
        (3, ""),
        (4, "of its 4 columns the first 3 are taken, as x y z"),
        (6, ""),
        (7, "the first 6"),
    ):
        np.save(tmp_path / "a.npy", np.concatenate([xyz, rgb, np.full((9, 1), np.nan)], axis=1)[:, :columns])
        found = clouds.read_cloud(tmp_path / "a.npy")
        assert np.array_equal(found.xyz, xyz) and (found.rgb is None) == (columns < 6)
        assert told in found.note and bool(told) == bool(found.note)


@pytest.mark.parametrize("kind", ["<f8", ">f8", "<f4", "<f2", "i4", "u1", "F"])
def test_arrays_of_any_kind_of_number_and_order_are_read(tmp_path, kind):
    values = np.concatenate(points(30), axis=1)
    values = np.asfortranarray(values) if kind == "F" else values.astype(kind)
    np.save(tmp_path / "a.npy", values)
    found = clouds.read_cloud(tmp_path / "a.npy")
    assert np.array_equal(found.xyz, values[:, :3]) and np.array_equal(found.rgb, values[:, 3:])


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrap", [lambda evil: pickle.dumps(evil), lambda evil: npy(np.array([[evil] * 6], object))])
def test_nothing_in_an_array_is_run(tmp_path, wrap):
    (tmp_path / "a.npy").write_bytes(wrap(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match="a.npy: cannot be read as npy"):
        clouds.read_cloud(tmp_path / "a.npy")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file_is_told_and_a_link_followed(tmp_path):
    (tmp_path / "folder.ply").mkdir()
    os.mkfifo(tmp_path / "pipe.ply")
    for name, said in (("folder.ply", "is a folder"), ("pipe.ply", "is a named pipe")):
        with pytest.raises(ValueError, match=said):
            clouds.read_cloud(tmp_path / name)
    (tmp_path / "link.npy").symlink_to(write(tmp_path / "Raum ü 1.npy", points()[0]))
    assert len(clouds.read_cloud(tmp_path / "link.npy").xyz) == 200


def test_coordinates_far_away_keep_their_digits_and_rough_ones_are_warned_of(tmp_path):
    import open3d

    far = points(50)[0] + [500_000.123, 5_400_000.5, 300]
    found = clouds.read_cloud(write(tmp_path / "a.npy", far))
    assert np.array_equal(found.xyz, far)
    predict.warn_of_units(tmp_path / "a.npy", found.xyz, found.resolution)
    rough = clouds.read_cloud(write(tmp_path / "b.npy", far.astype(np.float32)))
    with pytest.warns(UserWarning, match="numbers are 0.5 apart; subtract an offset"):
        predict.warn_of_units(tmp_path / "b.npy", rough.xyz, rough.resolution)
    label = np.zeros(50, np.int64)
    clouds.write_cloud(tmp_path / "out.ply", far, np.zeros((50, 3), np.uint8), label, label)
    assert np.array_equal(open3d.t.io.read_point_cloud(str(tmp_path / "out.ply")).point.positions.numpy(), far)


def test_a_missing_cloud_and_points_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.ply: no such file"):
        clouds.read_cloud(tmp_path / "none.ply")
    head = "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    (tmp_path / "scan.ply").write_text(head + "0 0 0\n1 nan 2\n")
    with pytest.raises(ValueError, match="scan.ply: point 2 has a value that is not finite"):
        clouds.read_cloud(tmp_path / "scan.ply")


def test_a_machine_without_open3d_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open3d", None)
    with pytest.raises(ImportError, match="libusb-1.0-0"):
        clouds.import_open3d()


@dataclass(frozen=True)
class Asked:
    input: Path
    output: Path


def test_neither_a_files_name_nor_an_offset_changes_a_label(tmp_path):
    config = tiny_config(tmp_path)
    torch.manual_seed(0)
    model = build_model(config, pretrained=False).eval()
    xyz = np.round(points(300)[0] * 64) / 64  # with an offset they are still exact
    for k, name in enumerate(("a.npy", "b $x_{1$ 中.npy")):  # what between $ is no formula was an error of the picture
        predict.predict(config, model, Asked(write(tmp_path / name, xyz + k * 4096.0), tmp_path / "out"))
    one, two = (clouds.read_header(tmp_path / "out" / f"{name}_classes.ply") for name in ("a", "b $x_{1$ 中"))
    assert one.num_points == two.num_points == 300
    labels = [predict.classify(config, model, xyz + offset, None)[0] for offset in (0.0, 4096.0)]
    assert np.array_equal(*labels)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_points_than_a_crop_and_equal_ones_are_labeled(tmp_path, count):
    config = tiny_config(tmp_path)
    model = build_model(config, pretrained=False).eval()
    for xyz in (points(count)[0], np.zeros((count * 50, 3))):
        label, confidence = predict.classify(config, model, xyz, None)
        assert len(label) == len(xyz) and np.isfinite(confidence).all()


class Floor(torch.nn.Module):
    """Says floor of every point, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        logits = torch.zeros(*batch["position"].shape[:2], len(CLASSES)) + self.bias
        logits[..., CLASSES.index("floor")] += 1
        return {"logits": logits}


def test_a_large_cloud_takes_its_arrays_and_little_more(tmp_path):
    # a point has 24 bytes of coordinates, and at most five arrays as large while it is numbered; a building of 20
    # million points thus fits into 3 GB, whatever its crops are
    count = 400_000
    xyz = np.random.default_rng(0).random((count, 3)) * [20, 20, 2.5]
    config = tiny_config(tmp_path, num_points=1024, voxel=0.5)
    tracemalloc.start()
    try:
        with torch.no_grad():
            label, _ = predict.classify(config, Floor(), xyz, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (label == CLASSES.index("floor")).all()
    assert peak < 150 * count


def test_a_folder_that_cannot_be_made_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "classify", lambda *_: pytest.fail("the work began"))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match="out"):
        asked = Asked(write(tmp_path / "a.npy", points()[0]), tmp_path / "out")
        predict.predict(tiny_config(tmp_path), torch.nn.Identity(), asked)


@pytest.mark.parametrize("colored", [True, False])
def test_every_point_gets_a_label_a_color_and_a_confidence(tmp_path, capsys, colored):
    import open3d

    xyz, rgb = points(700)
    path = write(tmp_path / "scan.ply", xyz + 100.0, rgb if colored else None)
    config = tiny_config(tmp_path)
    torch.manual_seed(0)
    model = build_model(config, pretrained=False).eval()
    labeled, picture = predict.predict(config, model, Asked(path, tmp_path / "out"))
    said = capsys.readouterr().out
    assert ("has no colors" in said) == (not colored) and any(name in said for name in CLASSES)
    cloud = open3d.t.io.read_point_cloud(str(labeled))
    label = cloud.point["label"].numpy().ravel()
    assert np.allclose(cloud.point.positions.numpy(), xyz + 100, atol=1e-3)
    assert np.array_equal(cloud.point.colors.numpy(), predict.COLORS[label])
    confidence = cloud.point["confidence"].numpy()
    assert confidence.min() > 1 / 14 and confidence.max() <= 1
    assert picture.stat().st_size > 10_000


def test_points_in_other_units_are_warned_of():
    with pytest.warns(UserWarning, match="are these meters"):
        predict.warn_of_units(Path("a"), np.array([[0, 0, 0], [5000.0, 1, 1]]))
    with pytest.warns(UserWarning, match="is z up"):
        predict.warn_of_units(Path("a"), np.array([[0, 0, 0], [1.0, 1, 9]]))


def test_colors_of_the_classes_are_all_different():
    assert len(np.unique(predict.COLORS, axis=0)) == len(CLASSES) == len(predict.COLORS)
