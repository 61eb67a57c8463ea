"""A clip set names the files it is made of, so that a run notices when they change."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from action_recognition.configs import Data
from action_recognition.data import build_dataset
from engine.data.fingerprint import inputs_of


def fingerprint(data: Data) -> str:
    config = SimpleNamespace(data=data)
    return inputs_of(data, {split: build_dataset(config, split) for split in ("train", "val")})["train"]


def write(path: Path, content: str = "not opened here") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize("kind", ["csv", "folder"])
def test_labels_and_missing_videos_change_the_fingerprint(tmp_path, kind):
    videos = [f"{split}/{label}/{k}.mp4" for split in ("train", "val") for label in "ab" for k in range(3)]
    for name in videos:
        write(tmp_path / name)
    for split in ("train", "val"):
        lines = [f"{name},{name.split('/')[1]}" for name in videos if name.startswith(split)]
        write(tmp_path / f"{split}.csv", "\n".join(lines) + "\n")
    data = Data(kind=kind, root=tmp_path, num_classes=2, on_broken="skip")
    first = fingerprint(data)
    assert first.startswith("6 samples, ") and fingerprint(data) == first
    if kind == "csv":
        text = (tmp_path / "train.csv").read_text()
        write(tmp_path / "train.csv", text.replace("2.mp4,a", "2.mp4,b", 1))
    else:
        (tmp_path / "train/a/2.mp4").rename(tmp_path / "train/b/9.mp4")
    relabeled = fingerprint(data)
    assert relabeled.startswith("6 samples, ") and relabeled != first
    (tmp_path / "train/b/0.mp4").unlink()
    if kind == "csv":
        with pytest.warns(UserWarning, match="1 of 6 videos are not below"):
            assert fingerprint(data).startswith("5 samples, ")
    else:
        assert fingerprint(data).startswith("5 samples, ")
