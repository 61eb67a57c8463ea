"""Checkpoints: exact, atomic, and suspicious of files."""

import errno
import json
import os
import pickle
import re
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from toy_task.model import Toy

from engine.files import write_text
from engine.training import checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a toy model at step 1."""
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "checkpoint", {"model": Toy().state_dict()}, {"step": 1, "loss": 0.1})
    return tmp_path / "checkpoint"


def weights_file(folder: Path) -> Path:
    return next(folder.glob("model-*.safetensors"))


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    tensors = {
        "half": torch.randn(3, 4).to(torch.bfloat16),
        "view": torch.randn(6, 6).t()[1:3],
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
    }
    checkpoint.save(tmp_path, {"model": tensors}, {"step": 3, "coefficient": 1 / 3})
    found = checkpoint.load(tmp_path)
    assert found.state["step"] == 3 and found.state["coefficient"] == 1 / 3
    assert found.tensors["model"].keys() == tensors.keys()
    for name, value in tensors.items():
        assert found.tensors["model"][name].dtype == value.dtype
        assert torch.equal(found.tensors["model"][name], value)


def test_tied_weights_are_saved_under_both_names(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    checkpoint.save(tmp_path, {"model": model.state_dict()}, {})
    assert checkpoint.load_weights(model, tmp_path).loaded == 4


def test_only_the_newest_files_stay(folder):
    (folder / ".model.1.tmp").write_text("left by a killed process")
    checkpoint.save(folder, {"model": Toy().state_dict()}, {"step": 2})
    assert len(list(folder.iterdir())) == 2
    assert checkpoint.load(folder).state["step"] == 2


def test_what_a_kill_inside_a_save_left_goes_with_the_next_save_or_start(folder):
    code = (
        "import os, signal, sys, torch, safetensors.torch as st; from pathlib import Path\n"
        "from engine.training import checkpoint\n"
        "def killed(tensors, path):\n"
        "    Path(path).parent.joinpath('.tmpAkhd4J').write_bytes(b'0' * 1000)  # safetensors' own temporary file\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.write_tensors = killed\n"
        "checkpoint.save(Path(sys.argv[1]), {'model': {'a': torch.ones(3)}}, {'step': 2})"
    )
    (folder / ".tmpAkhd4J").write_text("left by an earlier version")
    (folder / "model-0123456789abcdef.safetensors").write_text("replaced, but not yet deleted")
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == -signal.SIGKILL
    assert len(list(folder.iterdir())) > 2
    checkpoint.delete_unnamed(folder)
    assert len(list(folder.iterdir())) == 2 and checkpoint.load(folder).state["step"] == 1


def test_nothing_is_deleted_beside_a_state_that_cannot_be_read(folder):
    path = weights_file(folder)
    (folder / "state.json").write_text("{")
    checkpoint.delete_unnamed(folder)
    assert path.exists()


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_every_file_of_a_checkpoint_is_readable_to_whom_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        checkpoint.save(tmp_path / "new", {"model": Toy().state_dict()}, {"step": 1})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert set(modes.values()) == {mode}, modes


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(folder, monkeypatch):
    real = checkpoint.read_state
    states = [real(folder)]
    checkpoint.save(folder, {"model": Toy().state_dict()}, {"step": 2})
    monkeypatch.setattr(checkpoint, "read_state", lambda folder: states.pop() if states else real(folder))
    assert checkpoint.load(folder).state["step"] == 2


def test_each_file_is_synced_before_its_name_and_its_folder_after(tmp_path, monkeypatch):
    calls = []
    replace, fsync = os.replace, os.fsync

    def name_of(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("sync", name_of(fd))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("name", Path(a), Path(b))), replace(a, b)))
    checkpoint.save(tmp_path / "checkpoint", {"model": Toy().state_dict()}, {"step": 1})
    write_text(tmp_path / "record.json", "{}")
    names = [k for k, call in enumerate(calls) if call[0] == "name"]
    assert [calls[k][2].name.split("-")[0] for k in names] == ["model", "state.json", "record.json"]
    for k in names:
        assert calls[k - 1] == ("sync", calls[k][1]) and calls[k + 1] == ("sync", calls[k][2].parent)


@pytest.mark.parametrize(
    "error, remedy",
    [
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "Free disk space",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "Make the folder writable"),
        (SafetensorError("Permission denied (os error 13)"), "Make the folder writable"),
    ],
)
def test_the_remedy_is_that_of_the_error(folder, monkeypatch, error, remedy):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(checkpoint, "write_tensors", fail)
    with pytest.raises(OSError, match=remedy) as caught:
        checkpoint.save(folder, {"model": Toy().state_dict()}, {"step": 2})
    assert caught.value.errno in (errno.ENOSPC, errno.EACCES)


@pytest.mark.parametrize("moment", ["write", "sync", "rename", "state"])
def test_a_full_disk_leaves_the_previous_checkpoint(folder, monkeypatch, moment):
    before = checkpoint.load(folder)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*arguments, **options):
        raise full

    if moment == "write":
        monkeypatch.setattr(checkpoint, "write_tensors", fail)
    elif moment == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    elif moment == "rename":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left.*previous checkpoint is intact.*Free disk space") as caught:
        checkpoint.save(folder, {"model": Toy().state_dict()}, {"step": 2})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    after = checkpoint.load(folder)
    assert after.state == before.state
    assert all(torch.equal(after.tensors["model"][key], value) for key, value in before.tensors["model"].items())
    assert len(list(folder.iterdir())) == 2


def test_a_real_file_size_limit_is_reported_like_a_full_disk(folder):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(OSError, match="could not save a checkpoint.*previous checkpoint is intact"):
            checkpoint.save(folder, {"model": Toy().state_dict()}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.load(folder).state["step"] == 1


def test_weights_that_are_not_finite_are_not_saved(folder):
    model = Toy()
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite values in head.bias"):
        checkpoint.save(folder, {"model": model.state_dict()}, {"step": 2})
    assert checkpoint.load(folder).state["step"] == 1


def test_another_class_count_is_explained(folder):
    with pytest.raises(ValueError, match="checkpoint has 3 classes, the model 174; set the number of classes to 3"):
        checkpoint.load_weights(Toy(num_classes=174), folder)


def test_a_deeper_model_names_what_is_missing_and_changes_nothing(folder):
    model = Toy(depth=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"12 missing: backbone.blocks.2"):
        checkpoint.load_weights(model, folder)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_shallower_model_names_what_is_unused(folder):
    with pytest.raises(ValueError, match=r"12 unused: backbone.blocks.1"):
        checkpoint.load_weights(Toy(depth=1), folder)


def test_the_checkpoint_of_another_model_is_called_so(folder):
    with pytest.raises(ValueError, match="no key in common: this is the checkpoint of another model"):
        checkpoint.load_weights(nn.Sequential(nn.Linear(2, 2)), folder)


def test_nan_in_a_weight_file_is_named(tmp_path):
    weights = {key: value.clone() for key, value in Toy().state_dict().items()}
    weights["head.weight"][0, 0] = torch.inf
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="weights.safetensors: NaN or infinite values in head.weight"):
        checkpoint.load_weights(Toy(), tmp_path / "weights.safetensors")


class Payload:
    """Would leave a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", ["pickle", "torch.save"])
def test_a_pickle_in_disguise_is_refused_and_not_run(tmp_path, writer):
    path, trace = tmp_path / "model.safetensors", tmp_path / "executed"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Payload(trace)))
    else:
        torch.save({"weight": torch.ones(1), "payload": Payload(trace)}, path)
    with pytest.raises(ValueError, match="model.safetensors is a pickle or torch.save archive"):
        checkpoint.load_weights(Toy(), path)
    assert not trace.exists()


def hostile(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "empty file": b"",
    "shorter than its header length": b"\x01\x00",
    "header length of 2^63": hostile({}, length=2**63),
    "header of 200 MB announced": hostile({}, length=200_000_000),
    "header is not JSON": hostile(b"{{{{"),
    "header is not UTF-8": hostile(b'{"\xff\xfe": 1}'),
    "overlapping tensors": hostile({"a": ENTRY, "b": ENTRY}, b"\0" * 4),
    "offsets beyond the end": hostile({"a": {**ENTRY, "data_offsets": [0, 400]}}, b"\0" * 4),
    "offsets backwards": hostile({"a": {**ENTRY, "data_offsets": [4, 0]}}, b"\0" * 4),
    "hole between tensors": hostile({"a": {**ENTRY, "data_offsets": [4, 8]}}, b"\0" * 8),
    "shape larger than the data": hostile({"a": {**ENTRY, "shape": [2**40]}}, b"\0" * 4),
    "shape that overflows": hostile({"a": {**ENTRY, "shape": [2**62, 2**62]}}, b"\0" * 4),
    "negative shape": hostile({"a": {**ENTRY, "shape": [-1]}}, b"\0" * 4),
    "unknown dtype": hostile({"a": {**ENTRY, "dtype": "EVIL"}}, b"\0" * 4),
    "data behind the last tensor": hostile({"a": ENTRY}, b"\0" * 4096),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="hostile.safetensors: damaged or not a safetensors file"):
        checkpoint.load_weights(Toy(), path)


def test_a_truncated_weight_file_is_named(folder):
    path = weights_file(folder)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=re.escape(path.name) + ": damaged"):
        checkpoint.load(folder)


def test_a_flipped_bit_is_found(folder):
    path = weights_file(folder)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(path.name) + ".*SHA-256"):
        checkpoint.load(folder)


def test_a_missing_weight_file_is_named(folder):
    path = weights_file(folder)
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(path.name) + " is missing"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "changes",
    [{"step": "1"}, {"step": -1}, {"step": 1.5}, {"alpha": "a"}, {"beta": float("nan")}, {"beta": [1]}],
    ids=str,
)
def test_a_state_whose_numbers_are_none_is_named(folder, changes):
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=f"state.json: not the state of a checkpoint .*{next(iter(changes))} is"):
        checkpoint.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": 3}', '{"files": {"model": []}}', "[" * 100_000])
def test_a_damaged_state_is_named(folder, text):
    (folder / "state.json").write_text(text)
    with pytest.raises(ValueError, match="state.json: not the state of a checkpoint"):
        checkpoint.load(folder)


def test_a_state_that_points_outside_its_folder_is_refused(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    weights_file(folder).rename(outside)
    state = json.loads((folder / "state.json").read_text())
    state["files"]["model"]["name"] = "../outside.safetensors"
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="outside its folder"):
        checkpoint.load(folder)


def test_a_folder_without_a_checkpoint_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the folder of a run, or its `checkpoint`"):
        checkpoint.load(tmp_path)


def test_averaged_weights_are_preferred(tmp_path):
    model = Toy()
    ema = {"head.bias": torch.full((3,), 5.0)}
    checkpoint.save(tmp_path, {"model": model.state_dict(), "ema": ema}, {})
    checkpoint.load_weights(model, tmp_path, averaged=False)
    assert not torch.equal(model.head.bias, ema["head.bias"])
    checkpoint.load_weights(model, tmp_path)
    assert torch.equal(model.head.bias, ema["head.bias"])
