"""A user's own clouds: read or refused by name, labeled, written and drawn."""

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

    xyz, _ = points()
    cloud = open3d.t.geometry.PointCloud(open3d.core.Tensor(xyz.astype(np.float32)))
    path = tmp_path / f"scan{suffix}"
    assert open3d.t.io.write_point_cloud(str(path), cloud, write_ascii=kind == "ascii")
    assert clouds.promised_points(path) == 200
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


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.ply", b"", "has no PLY header"),
        ("a.ply", b"<html>", "has no PLY header"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nend_header\n", "has no points"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement face 1\nproperty float x\nend_header\n1\n", "first element"),
        (
            "a.ply",
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty list uchar int x\nend_header\n1\n",
            "not supported",
        ),
        ("a.pcd", b"not a cloud", "has no PCD header"),
        ("a.pcd", b"FIELDS x\nSIZE four\nPOINTS 1\nDATA ascii\n1\n", "PCD header is damaged"),
        ("a.txt", b"", "has no points"),
        ("a.txt", b"1 2\n", "at least x y z"),
        ("a.txt", b"1 2 nan\n", "not finite"),
        ("a.txt", b"1 2 3 4 5 600\n", "colors from"),
        ("a.npy", b"\x93NUMPY", "cannot be read as npy"),
        ("a.obj", b"v 1 2 3", "is none of"),
    ],
)
def test_a_bad_cloud_is_refused_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        clouds.read_cloud(tmp_path / name)
    assert name in str(error.value)


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
