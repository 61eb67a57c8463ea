"""Check a data set, write a synthetic one, or download what can be downloaded.

    python -m action_recognition.prepare --preset tiny               # 10 motions, real mp4 files, in data/motion
    python -m action_recognition.prepare --kind ssv2 --probe         # count, name what is missing, open every file
    python -m action_recognition.prepare --kind kinetics --download

The exit status is 0 only if everything is there. Something-Something v2 needs a license: `--download` says what to
request.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from action_recognition.configs import ROWS, Data
from action_recognition.data import Subset, find_videos, read_class_names
from action_recognition.synthetic import VIDEO_FOLDER, Synthetic, write_contact_sheet, write_dataset
from engine import commands
from engine.data.archives import extract
from engine.data.check import Check
from engine.data.checksums import differing
from engine.data.damage import damaged_videos
from engine.data.download import download, free_bytes
from engine.data.workers import name_some
from engine.files import read_text
from engine.synthetic.write import STAMP, prepare_files

KINETICS_MIRROR = "https://s3.amazonaws.com/kinetics/400"  # of the Common Visual Data Foundation
KINETICS_BYTES = {"train": 400 << 30, "val": 48 << 30}  # about; the mirror publishes neither sizes nor checksums
SSV2_COUNTS = {"classes": 174, "train": 168_913, "validation": 24_777, "videos": 220_847}
SSV2_LICENSE = """\
Something-Something v2 (about 20 GB) is given out by Qualcomm under a license for research. What remains for you to do:
  1. Open https://www.qualcomm.com/developer/software/something-something-v-2-dataset, sign in, accept the license.
  2. Download 20bn-something-something-v2-00, 20bn-something-something-v2-01 and
     20bn-something-something-download-package-labels.zip into {root}/archives.
  3. Run: bash scripts/download_ssv2.sh {root}
     It unpacks them, brings the label files to their names, and checks the counts."""
ROOTS = {"kinetics": Path("data/kinetics400"), "ssv2": Path("data/ssv2")}


@dataclass(frozen=True)
class Arguments(commands.Preparation):
    """See the module's docstring."""

    kind: Literal["ssv2", "kinetics", "folder", "csv"] | None = None  # the layout to check or download
    synthetic: Synthetic = field(default_factory=Synthetic)  # with a preset: what to write
    mirror: str = KINETICS_MIRROR
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")  # of Kinetics-400 to download
    checksums: Path | None = None  # with --probe: a list of sha256 to compare the files with; written if not there


def place(arguments: Arguments) -> Path:
    """The data set's folder. ValueError if nobody says where it is."""
    root = arguments.root or ROOTS.get(arguments.kind or "")
    if root is None:
        raise ValueError(f"say where the videos are: --kind {arguments.kind} --root FOLDER")
    return root


def remedy(arguments: Arguments) -> str:
    """How to get a data set that is not there."""
    if arguments.kind == "ssv2":
        return f"Get it with: bash scripts/download_ssv2.sh {place(arguments)}"
    return (
        f"Get it with: bash scripts/download_kinetics400.sh {place(arguments)}" if arguments.kind == "kinetics" else ""
    )


def check(arguments: Arguments) -> Check:
    """Count classes, entries and videos; for Something-Something v2 compare with the official numbers.

    Full lists of what is missing or damaged go to missing_<split>.txt and damaged_<split>.txt in the root.
    """
    root = place(arguments)
    assert arguments.kind is not None, "preparation checks a layout that was named"
    if arguments.checksums is not None and not arguments.probe:
        raise ValueError("--checksums: the files are read with --probe; give that too")
    data = Data(kind=arguments.kind, root=root)
    try:
        _, names = read_class_names(data)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {remedy(arguments)}") from error
    counts, empty = {"classes": len(names)}, []
    problems: list[str] = []
    data = replace(data, num_classes=len(names))
    found = {split: find_videos(data, split) for split in get_args(Subset)}
    damaged: dict[str, str] = {}
    if arguments.probe:
        paths = [entry.path for _, entries, _ in found.values() for entry in entries]
        damaged = damaged_videos(paths, workers=arguments.workers, title="decoding videos")
        if arguments.checksums is not None:
            sound = [path for path in paths if path not in damaged]
            damaged |= differing(arguments.checksums, root, sound, workers=arguments.workers)
    for split, (source, entries, missing) in found.items():
        counts[split] = len(entries) + len(missing)
        name_some(
            problems, missing, root / f"missing_{split}.txt", f"{source.name}: of {counts[split]} videos are missing"
        )
        unusable = [damaged[entry.path] for entry in entries if entry.path in damaged]
        if arguments.probe:
            name_some(problems, unusable, root / f"damaged_{split}.txt", f"{source.name}: files are damaged")
        if len(unusable) == len(entries):
            empty.append(split)
    if data.kind == "ssv2":
        videos = root / VIDEO_FOLDER
        counts["videos"] = sum(path.suffix in (".webm", ".mp4") for path in videos.iterdir()) if videos.is_dir() else 0
        if not (root / STAMP).is_file():
            for name, expected in SSV2_COUNTS.items():
                if counts[name] != expected:
                    problems.append(f"{name}: {counts[name]} instead of the official {expected}")
    return Check(str(root), counts, problems, empty)


def download_kinetics(
    root: Path, *, mirror: str = KINETICS_MIRROR, splits: Iterable[str] = ("train", "val"), dry_run: bool = False
) -> list[str]:
    """Annotations, then every archive of the mirror's lists, unpacked into <root>/<split>; what is done is skipped.

    An archive is removed once unpacked; an empty file in <root>/.done remembers it. Integrity rests on the length that
    the server announces and on gzip's own checksum, since the mirror publishes none. Returns the addresses handled
    now.
    """
    root, done, handled = Path(root), Path(root) / ".done", []
    for split in splits:
        listing = f"k400_{split}_path.txt"
        if dry_run:
            print(f"would fetch {mirror}/annotations/{split}.csv and the archives of {mirror}/{split}/{listing}")
            print(f"  about {KINETICS_BYTES[split] >> 30} GiB; {free_bytes(root) >> 30} GiB are free at {root}")
            continue
        download(f"{mirror}/annotations/{split}.csv", root / f"{split}.csv")
        urls = read_text(download(f"{mirror}/{split}/{listing}", root / listing), "remove it").split()
        targets = [(url, root / split) for url in urls]
        if split == "train":
            targets.append((f"{mirror}/replacement_for_corrupted_k400.tgz", root / "replacement"))
        for number, (url, folder) in enumerate(targets, start=1):
            name = url.rsplit("/", 1)[-1]
            mark = done / f"{folder.name}-{name}"
            if mark.exists():
                continue
            archive = download(url, root / "archives" / f"{folder.name}-{name}")
            print(f"{split} {number}/{len(targets)}: {len(extract(archive, folder))} files from {name}")
            done.mkdir(exist_ok=True)
            mark.touch()
            archive.unlink()
            handled.append(url)
    return handled


def fetch(arguments: Arguments) -> None:
    """Kinetics-400: download it; Something-Something v2: say what to request. ValueError for other layouts."""
    root = place(arguments)
    if arguments.kind == "kinetics":
        download_kinetics(root, mirror=arguments.mirror, splits=arguments.splits, dry_run=arguments.dry_run)
    elif arguments.kind == "ssv2":
        print(SSV2_LICENSE.format(root=root))
    else:
        raise ValueError(f"--download: there is nothing to download for --kind {arguments.kind}")


def write_synthetic(arguments: Arguments) -> None:
    """Write the synthetic data set with a progress bar; says so and returns at once if it is complete already."""
    root, synthetic = arguments.root or Data().root, arguments.synthetic
    total, what = synthetic.num_train + synthetic.num_validation, f"clips in {len(synthetic.templates())} classes"
    workers = arguments.workers
    prepare_files(root, total, what, lambda done: write_dataset(root, synthetic, workers=workers, on_done=done))
    if arguments.sheet is not None:
        write_contact_sheet(arguments.sheet, synthetic)


if __name__ == "__main__":
    commands.prepare(Arguments, ROWS, synthetic=write_synthetic, check=check, download=fetch)
