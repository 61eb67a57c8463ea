"""Files of clouds and rooms with bytes changed, removed and put in: read, or refused in one line naming the file."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from engine.command_line import USER_ERRORS
from pointcloud.clouds import read_cloud
from pointcloud.configs import Data
from pointcloud.s3dis import find_rooms, load_room, load_voxels

TIMES = 120
DIGITS = list(b"0123456789 \n-.xeE{}[]")


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes, most of them near the head."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(0, min(len(changed), 300) if rng.random() < 0.7 else len(changed)))
        kind = rng.integers(0, 3)
        if kind == 0:
            changed[place] = int(rng.integers(0, 256))
        elif kind == 1:
            del changed[place : place + int(rng.integers(1, 12))]
        else:
            changed[place:place] = bytes(rng.choice(DIGITS, int(rng.integers(1, 6))).tolist())
    return bytes(changed)


def clouds_of_all_kinds(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    table = np.concatenate([rng.random((20, 3)).round(3), rng.integers(0, 256, (20, 3))], axis=1)
    np.save(folder / "a.npy", table)
    np.savetxt(folder / "a.txt", table, fmt="%.3f")
    kinds = [("x", "float"), ("y", "float"), ("z", "float"), ("red", "uchar"), ("green", "uchar"), ("blue", "uchar")]
    properties = "".join(f"property {kind} {name}\n" for name, kind in kinds)
    rows = "".join(" ".join(f"{value:g}" for value in row) + "\n" for row in table).encode()
    packed = np.zeros(20, [(name, ">f4" if kind == "float" else "u1") for name, kind in kinds])
    for column, (name, _) in enumerate(kinds):
        packed[name] = table[:, column]
    for name, form, body in (("ascii", "ascii", rows), ("big", "binary_big_endian", packed.tobytes())):
        head = f"ply\nformat {form} 1.0\nelement vertex 20\n{properties}end_header\n"
        (folder / f"{name}.ply").write_bytes(head.encode() + body)
    head = "VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 20\nHEIGHT 1\nPOINTS 20\nDATA {}\n"
    (folder / "a.pcd").write_bytes(head.format("binary").encode() + table[:, :3].astype("<f4").tobytes())
    np.savetxt(folder / "b.pcd", table[:, :3], header=head.format("ascii").strip(), comments="")
    return sorted(folder.iterdir())


def test_a_mutated_cloud_is_read_or_refused_by_name(tmp_path):
    rng, refused, every = np.random.default_rng(1), 0, clouds_of_all_kinds(tmp_path)
    assert len(every) == 6 and all(len(read_cloud(path).xyz) == 20 for path in every)
    for path in every:
        content = path.read_bytes()
        for _ in range(TIMES):
            path.write_bytes(mutated(content, rng))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of control bytes put right, which is told
                    found = read_cloud(path)
            except USER_ERRORS as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error).strip()
                continue
            assert np.isfinite(found.xyz).all() and found.xyz.shape[1] == 3
            assert found.rgb is None or found.rgb.shape == found.xyz.shape
    assert TIMES < refused < 5.5 * TIMES


@pytest.mark.parametrize("part", ["files", "cache"])
@pytest.mark.parametrize("kind", ["s3dis", "npy", "pointcept"])
def test_a_mutated_room_is_read_or_refused_by_name_and_its_cache_believed_only_whole(tmp_path, kind, part):
    rng = np.random.default_rng(2)
    xyz, rgb, label = rng.random((20, 3)), rng.integers(0, 256, (20, 3)), rng.integers(0, 13, (20, 1))
    place = tmp_path / "Area_1" / "office_1"
    (place / "Annotations").mkdir(parents=True)
    if kind == "npy":
        np.save(tmp_path / "Area_1_office_1.npy", np.concatenate([xyz, rgb, label], axis=1))
    elif kind == "pointcept":
        for name, values in (("coord", xyz), ("color", rgb), ("segment", label)):
            np.save(place / f"{name}.npy", values)
    else:
        np.savetxt(place / "Annotations" / "wall_1.txt", np.concatenate([xyz, rgb], axis=1), fmt="%.4f")
    (room,) = find_rooms(Data(kind=kind, root=tmp_path, rooms="any", unit="room"), [1])
    voxels, points = load_voxels(room, 0.1), load_room(room)
    for _ in range(TIMES):
        files = room.files if part == "files" else [p for p in (tmp_path / ".dr2net").rglob("*") if p.is_file()]
        path = files[int(rng.integers(len(files)))]
        content = path.read_bytes()
        path.write_bytes(mutated(content, rng))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = load_voxels(room, 0.1), load_room(room)
            assert part == "files" or (np.array_equal(found[0], voxels) and np.array_equal(found[1], points))
            assert np.isfinite(found[1]["xyz"]).all() and found[1]["label"].max() < 13
        except USER_ERRORS as error:
            assert part == "files" and "office_1" in str(error), error
        path.write_bytes(content)
