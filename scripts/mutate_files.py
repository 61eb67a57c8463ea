"""Damaged videos and annotation files: is each read right, or named? Writes results/mutations.md.

    python -m scripts.mutate_files                              # 1,000 of each, two minutes
    python -m scripts.mutate_files --videos 30 --annotations 30 --output /tmp/mutations

Each frame of the videos carries its number as black and white columns, so that a frame lost, repeated or out of place
is seen. Of each damaged file the outcome is one of:

    right     all 40 frames in order, each the same when asked for alone (lists: the content of the whole file)
    named     an error of the kinds that a command tells in one line, with the file's name
    probed    read without an error as other frames, but `prepare --probe` names the file, as above
    unnamed   any other error
    silent    other frames or another content without an error
    hung      no answer in 30 seconds

Not here: damage to pixels that leaves the numbers legible. Decoders see it where it breaks the rules of the codec, and
Matroska's checksums wherever there are some; a bit that makes another valid stream shows only in a checksum of the file
(`prepare --probe --checksums FILE`).
"""

import argparse
import json
import multiprocessing
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from engine.command_line import USER_ERRORS
from engine.data.damage import damage
from engine.data.video import BrokenVideo, probe, read_frames
from engine.files import write_text
from engine.records.tables import markdown_table

NUM_FRAMES, BITS, LIMIT = 40, 6, 30.0
OUTCOMES = ("right", "named", "probed", "unnamed", "silent", "hung")
SOURCES = {
    "mp4": ("libx264", {"bf": "2", "g": "12"}),
    "webm": ("libvpx-vp9", {"deadline": "realtime", "g": "8"}),
    "mkv": ("libx264", {"g": "12"}),
}
INTRO = " ".join(
    (
        "Written by `python -m scripts.mutate_files`, which says what the columns mean. `probed` files are those that",
        "decoders show by concealing the damage, in training too, and only `prepare --probe` names. What no decoder",
        "sees, a bit that makes another valid stream of an mp4 or webm, shows with `--checksums`; mkv has its own",
        "checksums.",
    )
)
Damage = Callable[[bytes, np.random.Generator], bytes]


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content)))]


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(len(content), size=int(rng.integers(1, 9))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _damage_head(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(min(len(content), 300), size=4):
        changed[place] = int(rng.integers(256))
    return bytes(changed)


def _zero(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    return content[:start] + bytes(len(content[start : start + 64])) + content[start + 64 :]


def _insert(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    return content[:start] + rng.bytes(int(rng.integers(1, 50))) + content[start:]


def _delete(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    return content[:start] + content[start + int(rng.integers(1, 50)) :]


def _append(content: bytes, rng: np.random.Generator) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 200)))


DAMAGES: dict[str, Damage] = {
    "cut": _cut,
    "flipped bits": _flip,
    "damaged header": _damage_head,
    "zeros": _zero,
    "inserted": _insert,
    "deleted": _delete,
    "appended": _append,
}


VALUES = (None, [], {}, "", "x", -1, 0, 1e300, 10**290, True, [[1]], [0.5, "1"], [3.0, 1.0, 2.0], "NaN", 5_000_000)


def _change_a_value(content: bytes, rng: np.random.Generator) -> bytes:
    """Another value, or none, somewhere in the tree: syntax stays right."""
    tree = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node) if isinstance(node, list) else 0):
            places.append((node, key))
            visit(node[key])

    visit(tree)
    node, key = places[int(rng.integers(len(places)))]
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = VALUES[int(rng.integers(len(VALUES)))]
    return json.dumps(tree).encode()


def _repeat_a_key(content: bytes, rng: np.random.Generator) -> bytes:
    key = (b'"v0":', b'"duration":', b'"database":')[int(rng.integers(3))]
    return content.replace(key, key + b" 1, " + key, 1)


def _encode_otherwise(content: bytes, rng: np.random.Generator) -> bytes:
    return (
        content.decode()
        .replace("class 0", "clas\u00e9")
        .encode(("utf-8-sig", "utf-16", "latin-1")[int(rng.integers(3))])
    )


LIST_DAMAGES = DAMAGES | {
    "another value": _change_a_value,
    "a key twice": _repeat_a_key,
    "another encoding": _encode_otherwise,
}


def write_numbered(path: Path, codec: str, options: dict[str, str]) -> None:
    """A video of 96 x 64 whose frames carry their numbers."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for t in range(NUM_FRAMES):
            columns = np.repeat([255 * (t >> bit & 1) for bit in range(BITS)], 96 // BITS).astype(np.uint8)
            picture = np.broadcast_to(columns[None, :, None], (64, 96, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames (T, 64, 96, 3) carry."""
    if frames.shape[1:] != (64, 96, 3):
        return [-1] * len(frames)
    bits = frames[:, 32, 8::16].mean(axis=-1) > 128
    return [int(row @ (1 << np.arange(BITS))) for row in bits]


def check_video(path: Path) -> str:
    """The outcome of one file, but for `hung`."""
    try:
        count = probe(path).num_frames
        together = numbers(read_frames(path, range(count)))
        alone = [numbers(read_frames(path, [i]))[0] for i in (0, count // 3, count - 1)]
    except (BrokenVideo, OSError) as error:
        return _told(error, path)
    except Exception:
        return "unnamed"
    fine = together == list(range(NUM_FRAMES)) and alone == [together[i] for i in (0, count // 3, count - 1)]
    if fine:
        return "right"
    said = damage(str(path))
    return "silent" if not said else "probed" if _told(ValueError(said), path) == "named" else "unnamed"


def check_annotations(path: Path) -> str:
    """The outcome of one annotation file: what is read must be what a plain parser finds in it."""
    from action_detection.annotations import read_database

    try:
        names, database = read_database(path)
    except USER_ERRORS as error:
        return _told(error, path)
    except Exception:
        return "unnamed"
    plain = json.loads(path.read_text(encoding="utf-8-sig"))["database"]
    labels = {item["label"] for entry in plain.values() for item in entry["annotations"]}
    return "right" if database == plain and set(names) == labels else "silent"


def _told(error: Exception, path: Path) -> str:
    return "named" if path.name in str(error) and "\n" not in str(error) else "unnamed"


class Reader:
    """A process that checks files, replaced when it hangs or dies."""

    def __init__(self) -> None:
        self.process: Any = None

    def outcome(self, check: Callable[[Path], str], path: Path) -> str:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
        self.pipe.send((check, path))
        try:
            if self.pipe.poll(LIMIT):
                return self.pipe.recv()
            found = "hung"
        except EOFError:  # the process has died
            found = "unnamed"
        self.close()
        return found

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(pipe: Any) -> None:
    import av

    av.logging.set_level(None)
    warnings.simplefilter("ignore")
    while True:
        check, path = pipe.recv()
        pipe.send(check(path))


def annotations() -> bytes:
    """A small annotation file in ActivityNet's form."""
    entries = {
        f"v{k}": {
            "duration": 10.5 + k,
            "subset": "training" if k % 2 else "validation",
            "annotations": [{"label": f"class {k % 3}", "segment": [0.5, 3.25 + k / 8]}],
        }
        for k in range(6)
    }
    return json.dumps({"database": entries}).encode()


def run(num_videos: int, num_annotations: int, seed: int = 0) -> dict[str, Counter]:
    """Counts of outcomes by kind of file and damage."""
    rng, table, reader = np.random.default_rng(seed), {}, Reader()
    try:
        with tempfile.TemporaryDirectory() as folder:
            root, whole = Path(folder), {}
            for suffix, (codec, options) in SOURCES.items():
                path = root / f"whole.{suffix}"
                write_numbered(path, codec, options)
                whole[suffix] = path.read_bytes()
                assert check_video(path) == "right"
            cases = [(s, "30 cut places", whole[s][: len(whole[s]) * k // 31]) for s in SOURCES for k in range(1, 31)]
            for k in range(max(num_videos - len(cases), 0)):
                suffix, damage = list(SOURCES)[k % 3], list(DAMAGES)[k // 3 % len(DAMAGES)]
                cases.append((suffix, damage, DAMAGES[damage](whole[suffix], rng)))
            for k in range(num_annotations):
                damage = list(LIST_DAMAGES)[k % len(LIST_DAMAGES)]
                cases.append(("json", damage, LIST_DAMAGES[damage](annotations(), rng)))
            for number, (suffix, damage, content) in enumerate(cases):
                path = root / f"{number}.{suffix}"
                path.write_bytes(content)
                outcome = reader.outcome(check_annotations if suffix == "json" else check_video, path)
                table.setdefault(f"{suffix}, {damage}", Counter())[outcome] += 1
                path.unlink()
    finally:
        reader.close()
    return table


def markdown(table: dict[str, Counter]) -> str:
    """The text of results/mutations.md."""
    rows = [[name, str(counts.total()), *(str(counts[o]) for o in OUTCOMES)] for name, counts in sorted(table.items())]
    total = sum(table.values(), Counter())
    rows.append(["all", str(total.total()), *(str(total[o]) for o in OUTCOMES)])
    return f"# Damaged files\n\n{INTRO}\n\n" + markdown_table(["file and damage", "files", *OUTCOMES], rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=1000)
    parser.add_argument("--annotations", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    write_text(options.output / "mutations.md", markdown(run(options.videos, options.annotations)))
    print((options.output / "mutations.md").read_text())


if __name__ == "__main__":
    main()
