"""Kill toy runs at random moments and inside their saves, resume them, compare with the undisturbed run bit for bit.

    python -m scripts.kill_campaign [--kills 60]

prints a table and writes results/kill_campaign.md. A run is the toy of the tests: 60 steps, a checkpoint every third,
dropout, moving coefficients, averages. It is killed again and again until it ends by itself. The kinds of kills:

    moment    SIGKILL at a random moment after a random number of checkpoints, or after a random time
    call      SIGKILL before, after or in the middle of a random call by which a checkpoint or Record reaches the disk
    signals   SIGTERM twice, as schedulers send it: the run saves and says so
    pair      two processes train the same folder, and both are killed at such a moment

After each kill the checkpoint must load; at the end weights, optimizer, averages, curve, gradient checks and metrics
must be those of the undisturbed run, and no file must be left over. The hooks are put into the killed process by this
script: the code that trains knows nothing of them. Runs are forked from one process that has imported everything.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.files import write_text

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"moment": 0.4, "call": 0.4, "signals": 0.1, "pair": 0.1}  # of the kills
KINDS = tuple(SHARES)
CALLS = ("open", "fsync", "replace", "unlink", "mkdir")  # of `os`
TIMES = ("seconds", "durations", "memory")  # what no two runs share
PATIENCE_SECONDS = 120


def train(output: Path) -> None:
    """One run of the toy, or what is left of it."""
    from toy_processes import LONG
    from toy_training import toy_config
    from toy_training import train as train_toy

    train_toy(toy_config(output, LONG))


def folder_of(output: Path) -> Path:
    """The run's folder below `output`."""
    from toy_processes import LONG, folder_of

    return folder_of(output, LONG).parent


def kill_at(number: int, phase: str, output: Path, report: int) -> Callable[[], None]:
    """In this process, count the calls that write below `output` and die at the given one, before it, after it, or
    (where something is written) in its middle. report: a descriptor that gets the name of the call. What is returned
    writes the number of calls there, for a run that outlives it.
    """
    from engine.training import checkpoint

    made = 0

    def die(moment: str, name: str) -> None:
        os.write(report, f"{moment} {name}".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(module: Any, name: str, path_of: Callable[..., Any], half: Callable[..., None] | None = None) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            path = str(path_of(*arguments))
            elsewhere = not path.startswith(str(output)) or "tensorboard" in path
            if elsewhere or (phase == "amid" and half is None):
                return real(*arguments, **options)
            made += 1
            if made == number and phase == "before":
                die("before", name)
            if made == number and phase == "amid" and half is not None:
                half(*arguments)
                die("amid", name)
            result = real(*arguments, **options)
            if made == number:
                die("after", name)
            return result

        setattr(module, name, call)

    def half_of_tensors(tensors: Any, path: Path) -> None:
        write_tensors(tensors, path)
        content = path.read_bytes()
        path.unlink()
        (path.parent / ".tmpAkhd4J").write_bytes(content[: len(content) // 2])  # as safetensors leaves it

    write_tensors, write_text = checkpoint.write_tensors, Path.write_text
    for name in CALLS:
        hook(os, name, (lambda fd: os.readlink(f"/proc/self/fd/{fd}")) if name == "fsync" else lambda path, *_: path)
    hook(checkpoint, "write_tensors", lambda tensors, path: path, half_of_tensors)
    hook(Path, "write_text", lambda path, *_: path, lambda path, text, **_: write_text(path, text[: len(text) // 2]))
    return lambda: os.write(report, str(made).encode())


def fork(output: Path, prepare: Callable[[], Callable[[], Any]] | None = None) -> int:
    """Train in a child process; returns its number. What it says goes to `<output>.log`. prepare: called in the child
    before; what it returns, after.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        after = prepare() if prepare is not None else None
        train(output)
        if after is not None:
            after()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except ValueError as refused:  # by the lock, in a pair
        print(f"error: {refused}", flush=True)
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit status of a child, negative for a signal. TimeoutError when it hangs."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    raise TimeoutError(f"run {child} hung for {PATIENCE_SECONDS} s")


def wait_for_saves(output: Path, number: int) -> None:
    """Until so many checkpoints more are there, or the run has ended."""
    state, record = folder_of(output) / "checkpoint" / "state.json", folder_of(output) / "record.json"
    deadline, seen = time.monotonic() + PATIENCE_SECONDS, state.stat().st_mtime_ns if state.exists() else 0
    while number and not record.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
        found = state.stat().st_mtime_ns if state.exists() else 0
        number, seen = number - (found != seen), found


def disturb(kind: str, output: Path, draw: random.Random, seconds: float, calls: int) -> tuple[bool, str]:
    """Start the run and kill it once as `kind` says; (whether it was killed before its end, where)."""
    if kind == "call":
        reader, writer = os.pipe()
        phase = draw.choice(("before", "amid", "after")) if calls else "before"
        number = draw.randint(1, calls // (24 if phase == "amid" else 3)) if calls else 0  # 0: never, to count them
        status = wait(fork(output, lambda: kill_at(number, phase, output, writer)))
        os.close(writer)
        name = os.read(reader, 100).decode()
        os.close(reader)
        return status == -signal.SIGKILL, name
    children = [fork(output) for _ in range(2 if kind == "pair" else 1)]
    if draw.random() < 0.8:  # a busy machine would be killed while it still imports
        wait_for_saves(output, draw.randint(1, 6))
        time.sleep(draw.uniform(0, 0.1))
    else:
        time.sleep(draw.uniform(0, seconds))
    for number in [signal.SIGTERM, signal.SIGTERM] if kind == "signals" else [signal.SIGKILL]:
        for child in children:
            os.kill(child, number)  # a child that has ended waits to be counted, so its number is still its own
        time.sleep(0.001)
    statuses = [wait(child) for child in children]
    expected = {"signals": (143, -signal.SIGTERM)}.get(kind, (-signal.SIGKILL,))
    return any(status in expected for status in statuses), f"exit {statuses[0]}"


def result_of(output: Path) -> dict[str, Any]:
    """All that two runs must share: tensors by name, the state, the Record's numbers, the files that are there."""
    from engine.records.record import read_record
    from engine.training import checkpoint

    folder = folder_of(output)
    found = checkpoint.load(folder / "checkpoint")
    record = asdict(read_record(folder / "record.json"))
    record["config"]["run"].pop("output")
    state = {name: value for name, value in found.state.items() if name not in (*TIMES, "config")}
    files = sorted(path.name.split("-")[0] for path in folder.rglob("*") if "tensorboard" not in str(path))
    numbers = {
        name: record[name] for name in ("metrics", "curve", "gradient_checks", "config", "sources", "inputs", "device")
    }
    return {"tensors": found.tensors, "state": state, "record": numbers, "files": files}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs between two results."""
    import torch

    found = [name for name in ("state", "record", "files") if one[name] != other[name]]
    for kind in one["tensors"].keys() | other["tensors"].keys():
        own, theirs = one["tensors"].get(kind, {}), other["tensors"].get(kind, {})
        same = own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
        found += [] if same else [kind]
    return found


def campaign(kills: int, seed: int, scratch: Path, kinds: Sequence[str] = KINDS) -> dict[str, Counter]:
    """The counts of each kind of kill; a run that ends is compared, and a new one begun."""
    from engine.training import checkpoint

    draw = random.Random(seed)
    started = time.monotonic()
    assert wait(fork(scratch / "undisturbed")) == 0, (scratch / "undisturbed.log").read_text()
    seconds = time.monotonic() - started
    expected = result_of(scratch / "undisturbed")
    _, number = disturb("call", scratch / "counted", draw, seconds, calls=0)
    calls = int(number)
    counts = {kind: Counter() for kind in kinds}
    whole = sum(SHARES[kind] for kind in kinds)
    for kind in kinds:
        count, wanted, number = counts[kind], max(round(kills * SHARES[kind] / whole), 1), 0
        while count["kills"] < wanted:
            number += 1
            output = scratch / f"{kind}{number}"
            killed = True
            while killed and count["kills"] < wanted:
                killed, where = disturb(kind, output, draw, seconds, calls)
                if killed:
                    count["kills"] += 1
                    count[f"at {where}"] += 1
                    saved = folder_of(output) / "checkpoint"
                    if checkpoint.exists(saved):
                        try:
                            checkpoint.load(saved)
                        except ValueError:
                            count["unreadable"] += 1
                    else:
                        count["before the first checkpoint"] += 1
            status = wait(fork(output))
            count["runs"] += 1
            if status != 0:
                count["failed"] += 1
                print(Path(f"{output}.log").read_text(), file=sys.stderr)
                continue
            other = differences(expected, result_of(output))
            count["different"] += bool(other)
            if other:
                print(f"{output.name}: {', '.join(other)} differ", file=sys.stderr)
            shutil.rmtree(output)
    return counts


def table(counts: dict[str, Counter], seed: int) -> str:
    """The counts as a page in Markdown."""
    columns = ("kills", "before the first checkpoint", "runs", "unreadable", "failed", "different")
    lines = [
        "# Kill campaign",
        "",
        f"`python -m scripts.kill_campaign --kills {sum(count['kills'] for count in counts.values())} --seed {seed}`:",
        "the toy run of the tests (60 steps, a checkpoint every third), killed until it ends, against the undisturbed",
        "run: weights, optimizer, averages, curve, gradient checks and metrics bit for bit, no checkpoint unreadable,",
        "no file left over.",
        "",
        f"| kind | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for kind, count in counts.items():
        lines.append(f"| {kind} | {' | '.join(str(count[name]) for name in columns)} |")
    total = sum(counts.values(), Counter())
    lines.append(f"| all | {' | '.join(str(total[name]) for name in columns)} |")
    calls = counts.get("call", Counter())
    where = sorted((name.removeprefix("at "), n) for name, n in calls.items() if name.startswith("at "))
    lines += ["", "Kills of the kind `call`: " + ", ".join(f"{name} {n}" for name, n in where) + "."] * bool(where)
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> int:
    """Command line; exit code 1 if a run was lost or came out different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "kill_campaign.md")
    arguments = parser.parse_args(words)
    sys.path.insert(0, str(ROOT / "common" / "tests"))
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        counts = campaign(arguments.kills, arguments.seed, Path(scratch), arguments.kinds)
    text = table(counts, arguments.seed)
    print(text)
    write_text(arguments.output, text)
    return int(any(count[name] for count in counts.values() for name in ("unreadable", "failed", "different")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
