"""Rooms with real furniture: the models of Debian's sweethome3d-furniture, in the shell of `synthetic.py`.

    python -m pointcloud.prepare --preset laptop          # writes data/rooms: 60 rooms, and 16 in Area_5

The package (119,782,356 bytes; libraries under CC0 and CC-BY 3.0, whose notices are copied beside the rooms) is not
installed: it is found where apt puts it, or fetched with `apt-get download` and unpacked into the cache folder; or give
the .deb with $SWEETHOME3D_DEB. A model (OBJ, y up) becomes points, evenly over its triangles, in the colors of its
materials, and its class comes from its name. Models are shared out: those of the test rooms occur nowhere in training,
and those of pretraining (`pretrain.py`) in neither. Not here: walls, doors, windows, beams, columns.
"""

import os
import re
import shutil
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.backbones.img_focus import cache_folder
from engine.files import publish, write_text
from engine.synthetic.write import prepare_files
from pointcloud.synthetic import Furnish, Room, Synthetic, Thing, write_dataset

PACKAGE = "sweethome3d-furniture"
INSTALLED = Path("/usr/share/sweethome3d/furniture")
LIBRARIES = ("KatorLegaz", "BlendSwap-CC-0", "BlendSwap-CC-BY", "Scopia")
POINTS_PER_MODEL = 6000
MAX_OBJ_BYTES = 8 << 20  # the few larger ones have more detail than 6000 points show
ROOMS = Synthetic(seed=1, train_rooms=12, test_rooms=16, density=200.0)
GROUPS = (
    "test",
    "train",
    "pretrain",
    "train",
    "test",
    "pretrain",
    "train",
    "train",
)  # of the models of a class, in turn
# The first that matches the end or the whole of a name; others are no furniture of a room.
CLASS_OF_NAME = (
    ("bookcase", r"bookcase|shelves|vertical shelves|full bookcase"),
    ("board", r"white board|frame .*|calendar|wall flat tv"),
    ("sofa", r".*\bsofa|.*\bcouch|sofa \d seats|futon"),
    ("chair", r".*\bchair|chair .*|.*armchair|.*\bstool"),
    ("table", r".*\btable|table .*|.*\bdesk|workbench"),
    ("clutter", r".*\bplant|.*\blamp|.*cabinet|cupboard|wardrobe|fridge|printer.*|.*box|.*basket|.*trash ?can|dustbin"),
    ("clutter", r"vase|box|crate|suitcase|radiator|speaker|tv.*|apple imac.*|laptop|drawers.*|dresser.*|keyboard"),
)
EXCLUDED = r"deck chair|beach chair|bathroom|.*tennis.*|.*mailbox.*|changing table|baby high chair|wheelchair"
WEIGHTS = {"table": 4, "chair": 6, "sofa": 2, "bookcase": 3, "board": 1, "clutter": 5}


class Model(NamedTuple):
    """A piece of furniture: its class, (N, 3) meters from the corner of its box, z up, and (N, 3) colors to 255."""

    title: str
    name: str
    xyz: np.ndarray
    rgb: np.ndarray
    area: float  # square meters of its surface
    elevation: float  # meters above the floor


@dataclass(frozen=True)
class FurnishAreas:
    """What puts furniture into the rooms of an area: models of the group `test` into Area_5, of `group` elsewhere."""

    group: str = "train"
    test: str = "test"

    @property
    def title(self) -> str:
        """What the rooms are furnished with, for their stamp."""
        return f"sweethome3d-furniture 1.8, models of {self.group}, in Area_5 of {self.test}"

    def __call__(self, area: str) -> Furnish:
        models = load_models()[self.test if area == "Area_5" else self.group]
        return lambda room, rng: furnish(room, models, rng)


def write_furnished(
    root: Path, synthetic: Synthetic = ROOMS, furnish: "FurnishAreas | None" = None, *, workers: int = 1
) -> None:
    """Write the laptop rooms, or others, and the licenses of their furniture. Errors as `load_models`."""
    load_models()
    total = sum(map(len, synthetic.rooms().values()))
    areas = furnish or FurnishAreas()
    prepare_files(
        root, total, "rooms", lambda done: write_dataset(root, synthetic, areas, workers=workers, on_done=done)
    )
    write_text(root / "FURNITURE-LICENSES.txt", licenses())


def furnish(room: Room, models: dict[str, list[Model]], rng: np.random.Generator) -> list[Thing]:
    """Models at places where they do not meet, turned by right angles; cases and sofas stand along walls."""
    things: list[Thing] = []
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    names, weights = list(WEIGHTS), np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
    for name in rng.choice(names, {"hallway": 4, "storage": 10}.get(room.kind, 14), p=weights):
        model = models[name][int(rng.integers(len(models[name])))]
        xyz, turns = model.xyz, int(rng.integers(4))
        for _ in range(turns):
            xyz = np.stack([xyz[:, 1].max() - xyz[:, 1], xyz[:, 0], xyz[:, 2]], axis=1)
        extent = xyz.max(axis=0)
        free = room.size - extent - 0.05
        if (free <= 0).any():
            continue
        for _ in range(8):
            at = np.array([*(rng.random(2) * free[:2]), min(model.elevation, free[2])])
            if name in ("bookcase", "sofa", "board"):
                axis = int(rng.integers(2))
                at[axis] = rng.choice([0.03, free[axis]])
            if all((at > high).any() or (at + extent < low).any() for low, high in taken):
                taken.append((at, at + extent))
                count = min(len(xyz), rng.poisson(model.area * room.density))
                chosen = rng.permutation(len(xyz))[:count]
                places = xyz[chosen] + at + rng.normal(0, 0.004, (count, 3))
                colors = np.clip(model.rgb[chosen] * room.light + rng.normal(0, 8, (count, 3)), 0, 255)
                things.append(Thing(str(name), places, colors))
                break
    return things


@cache
def load_models() -> dict[str, dict[str, list[Model]]]:
    """Models by group and class; from the cache, or made from the package, which takes half a minute.

    ValueError with the remedies where the package is not to be had.
    """
    cached = cache_folder() / "sweethome3d_furniture_points.npz"
    if not cached.is_file():
        models = [model for library in LIBRARIES for model in models_of(library_file(library))]
        content: dict[str, np.ndarray] = {}
        for k, model in enumerate(models):
            content |= {f"xyz_{k}": model.xyz.astype(np.float32), f"rgb_{k}": model.rgb.astype(np.uint8)}
        content["titles"] = np.array([model.title for model in models])
        content["names"] = np.array([model.name for model in models])
        content["sizes"] = np.array([(model.area, model.elevation) for model in models])
        temporary = cached.with_suffix(f".{os.getpid()}.tmp.npz")
        try:
            np.savez(temporary, allow_pickle=False, **content)
            publish(temporary, cached)
        finally:
            temporary.unlink(missing_ok=True)
    with np.load(cached, allow_pickle=False) as file:
        found = [
            Model(
                str(title), str(name), file[f"xyz_{k}"].astype(np.float64), file[f"rgb_{k}"].astype(np.float64), *size
            )
            for k, (title, name, size) in enumerate(zip(file["titles"], file["names"], file["sizes"], strict=True))
        ]
    return split_models(found)


def split_models(models: list[Model]) -> dict[str, dict[str, list[Model]]]:
    """Each model in one of the groups, within a class in turn, in an order that the titles fix."""
    groups: dict[str, dict[str, list[Model]]] = {group: {name: [] for name in WEIGHTS} for group in set(GROUPS)}
    for name in WEIGHTS:
        own = sorted((m for m in models if m.name == name), key=lambda m: zlib.crc32(m.title.encode()))
        for k, model in enumerate(own):
            groups[GROUPS[k % len(GROUPS)]][name].append(model)
    for group, by_class in groups.items():
        lacking = [name for name, own in by_class.items() if not own]
        if lacking:
            raise ValueError(f"the furniture has too few models of {', '.join(lacking)} for the group {group}")
    return groups


def models_of(library: Path) -> list[Model]:
    """The models of a .sh3f library whose names are furniture of a room. ValueError if it cannot be read."""
    found = []
    try:
        with zipfile.ZipFile(library) as archive:
            catalog = archive.read("PluginFurnitureCatalog.properties").decode("latin1")
            fields: dict[str, dict[str, str]] = {}
            for key, number, value in re.findall(r"(?m)^(\w+)#(\d+)=(.*)$", catalog):
                fields.setdefault(number, {})[key] = value.strip()
            for own in fields.values():
                name = class_of_name(own.get("name", ""))
                if name is None or "model" not in own or archive.getinfo(own["model"][1:]).file_size > MAX_OBJ_BYTES:
                    continue
                size = np.array([float(own[key]) for key in ("width", "depth", "height")]) / 100
                xyz, rgb, area = sample_model(archive, own["model"][1:], size)
                elevation = float(own.get("elevation", 0)) / 100 if name != "board" else 1.0
                found.append(Model(f"{library.stem}/{own['model'][1:]}", name, xyz, rgb, area, max(elevation, 0.0)))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{library}: cannot be read as a furniture library ({error}); fetch {PACKAGE} again"
        ) from error
    return found


def class_of_name(title: str) -> str | None:
    """The class of a piece of furniture by its name in the catalog; None for what does not stand in a room."""
    title = title.lower()
    if re.fullmatch(EXCLUDED, title):
        return None
    return next((name for name, pattern in CLASS_OF_NAME if re.fullmatch(pattern, title)), None)


def sample_model(archive: zipfile.ZipFile, path: str, size: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(N, 3) points in a box of `size` meters (width, depth, height) at the origin, z up, (N, 3) colors, the area."""
    corners, colors = triangles_of(archive, path)
    corners = corners[..., [0, 2, 1]] * np.array([1.0, -1.0, 1.0])  # y up -> z up
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    corners = (corners - low) * (size / np.maximum(high - low, 1e-9))
    u, v = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    areas = np.linalg.norm(np.cross(u, v), axis=1) / 2
    # much of a detailed model is inside: no more than twice its box counts
    box = 2 * (size[0] * size[1] + size[1] * size[2] + size[0] * size[2])
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    chosen = rng.choice(len(areas), POINTS_PER_MODEL, p=areas / areas.sum())
    a, b = rng.random((2, POINTS_PER_MODEL, 1))
    a, b = np.where(a + b > 1, 1 - a, a), np.where(a + b > 1, 1 - b, b)
    return corners[chosen, 0] + a * u[chosen] + b * v[chosen], colors[chosen], float(min(areas.sum(), 2 * box))


def triangles_of(archive: zipfile.ZipFile, path: str) -> tuple[np.ndarray, np.ndarray]:
    """(T, 3, 3) corners and (T, 3) colors to 255 of an OBJ file with its materials."""
    places: list[tuple[float, ...]] = []
    faces: list[tuple[int, int, int]] = []
    tints: list[tuple[float, ...]] = []
    materials: dict[str, tuple[float, ...]] = {}
    tint: tuple[float, ...] = (0.6, 0.6, 0.6)
    for line in archive.read(path).decode("latin1").splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "v":
            places.append(tuple(map(float, words[1:4])))
        elif words[0] == "f":
            corners = [int(word.split("/")[0]) for word in words[1:]]
            corners = [k - 1 if k > 0 else len(places) + k for k in corners]
            faces += [(corners[0], corners[i], corners[i + 1]) for i in range(1, len(corners) - 1)]
            tints += [tint] * (len(corners) - 2)
        elif words[0] == "mtllib":
            materials |= materials_of(archive, str(Path(path).parent / line.split(maxsplit=1)[1].strip()))
        elif words[0] == "usemtl":
            tint = materials.get(words[-1], (0.6, 0.6, 0.6))
    if not faces:
        raise ValueError(f"{path} has no faces")
    return np.array(places)[np.array(faces)], np.array(tints) * 255


def materials_of(archive: zipfile.ZipFile, path: str) -> dict[str, tuple[float, ...]]:
    """Diffuse color of each material; nothing where the file is not in the archive."""
    if path not in archive.namelist():
        return {}
    found: dict[str, tuple[float, ...]] = {}
    name = ""
    for line in archive.read(path).decode("latin1").splitlines():
        words = line.split()
        if words[:1] == ["newmtl"]:
            name = words[-1]
        elif words[:1] == ["Kd"]:
            found[name] = tuple(map(float, words[1:4]))
    return found


def library_file(library: str) -> Path:
    """A .sh3f file of the package: where apt puts it, or in the cache, fetched now. ValueError with the remedies."""
    installed, kept = INSTALLED / f"{library}.sh3f", cache_folder() / PACKAGE / f"{library}.sh3f"
    if installed.is_file():
        return installed
    if not kept.is_file():
        _fetch(kept.parent)
    return kept


def _fetch(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        given = os.environ.get("SWEETHOME3D_DEB")
        commands = [] if given else [["apt-get", "download", PACKAGE]]
        run: Callable[[list[str]], subprocess.CompletedProcess] = lambda c: subprocess.run(  # noqa: E731
            c, cwd=scratch, capture_output=True, text=True
        )
        try:
            for command in commands:
                run(command).check_returncode()
            package = Path(given).resolve() if given else next(Path(scratch).glob("*.deb"))
            run(["dpkg-deb", "-x", str(package), "unpacked"]).check_returncode()
            unpacked = Path(scratch) / "unpacked" / INSTALLED.relative_to("/")
            shutil.copy(unpacked.parents[1] / "doc" / PACKAGE / "copyright", unpacked / "copyright")
            shutil.rmtree(folder, ignore_errors=True)
            unpacked.rename(folder)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise ValueError(
                f"the furniture of the laptop rooms could not be fetched ({error}). Remedies: apt-get install "
                f"{PACKAGE}, or download its .deb (120 MB) by hand and name it: SWEETHOME3D_DEB=FILE"
            ) from error


def licenses() -> str:
    """The package's own notice of authors and licenses."""
    for path in (cache_folder() / PACKAGE / "copyright", Path("/usr/share/doc") / PACKAGE / "copyright"):
        if path.is_file():
            return path.read_text()
    return f"Furniture from Debian's {PACKAGE}: CC0 and CC-BY 3.0; its file `copyright` names the authors.\n"
