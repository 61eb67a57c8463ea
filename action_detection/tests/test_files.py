"""A set of windows names the files it is made of, so that a run notices when they change."""

from types import SimpleNamespace

from action_detection.configs import Data
from action_detection.data import build_dataset
from action_detection.tests.toy_videos import DATABASE, annotate
from engine.data.fingerprint import inputs_of


def fingerprint(data: Data) -> dict[str, str]:
    config = SimpleNamespace(data=data)
    return inputs_of(data, {split: build_dataset(config, split) for split in ("train", "val")})


def test_segments_class_names_and_videos_change_the_fingerprint(tmp_path):
    annotate(tmp_path, DATABASE)
    (tmp_path / "videos").mkdir()
    for name in DATABASE:
        (tmp_path / "videos" / f"v_{name}.mp4").write_text("not opened here")
    data = Data(kind="activitynet", root=tmp_path, num_classes=2, on_broken="skip")
    seen = [fingerprint(data)]
    assert seen[0]["train"].startswith("3 samples, ")
    moved = {**DATABASE["a"], "annotations": [{"label": "jump", "segment": [1.0, 2.0]}]}
    annotate(tmp_path, {**DATABASE, "a": moved})
    seen.append(fingerprint(data))
    (tmp_path / "category_idx.txt").write_text("run\njump\n")
    seen.append(fingerprint(data))
    (tmp_path / "videos" / "v_a.mp4").write_text("another video")
    seen.append(fingerprint(data))
    assert len({one["train"] for one in seen}) == len(seen)
