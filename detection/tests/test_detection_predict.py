"""From a picture, a folder or a video to drawn boxes and JSON; and what can be wrong with them."""

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detection import predict as module
from detection.annotations import read_categories
from detection.configs import ROWS, Config
from detection.data import build_dataset, collate
from detection.drawing import Box, color_of
from detection.evaluate import collect
from detection.images import BrokenImage
from detection.predict import Arguments, Results, annotate, detect, predict
from detection.tests.toy_pictures import PICTURES, draw, write_coco
from engine.data.video import BrokenVideo, probe, read_frames, write_frames
from engine.visual import even_size

Work = tuple[Config, torch.nn.Module]


class Detected(NamedTuple):
    """What the head gives for an image."""

    boxes: Tensor  # corners
    scores: Tensor
    labels: Tensor


class Lights(torch.nn.Module):
    """A network that finds what is bright in a channel: red is car at .9, green cup at .6, blue car at .2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.head, self.calls = self, 0

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        return batch

    def detect(
        self, outputs: dict[str, Any], original_size: list[tuple[int, int]], most: int, *, max_overlap: float | None
    ) -> list[Detected]:
        assert max_overlap is None
        found = []
        for image, padding, (height, width) in zip(outputs["image"], outputs["padding"], original_size, strict=True):
            own_height, own_width = int((~padding[:, 0]).sum()), int((~padding[0]).sum())
            boxes, scores, labels = [], [], []
            for channel in range(3):
                rows, columns = torch.nonzero(image[channel, :own_height, :own_width] > 0.3, as_tuple=True)
                if len(rows):
                    corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                    across, down = width / own_width, height / own_height
                    boxes.append([float(c) * s for c, s in zip(corners, (across, down) * 2, strict=True)])
                    scores.append((0.9, 0.6, 0.2)[channel])
                    labels.append(channel % 2)
            found.append(
                Detected(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels).long())
            )
        return found


@pytest.fixture
def world(tmp_path: Path) -> Work:
    data = write_coco(tmp_path / "data")
    base = ROWS["shapes_tiny_conventional"]()
    return replace(base, data=data), Lights()


def asked(given: Path, output: Path, **more: Any) -> Arguments:
    return Arguments(run=Path(), input=given, output=output, **more)


def save(path: Path, width: int, height: int, boxes: list[list[float]], **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(width, height, boxes)).save(path, **how)
    return path


def near(*numbers: float) -> Any:
    return pytest.approx(list(numbers), abs=2)  # pixels; resizing blurs the border


def test_a_picture_gives_a_drawn_copy_and_coco_results_with_names(world, tmp_path, capsys):
    given = save(tmp_path / "street.png", 300, 200, [[20, 30, 100, 80], [150, 20, 60, 150], [250, 10, 30, 30]])
    copy, results = predict(*world, asked(given, tmp_path / "out"))
    assert capsys.readouterr().out.splitlines() == ["street.png: 2 detections: 1 car, 1 cup"]
    first, second = json.loads(results.read_text())
    assert set(first) == {"image_id", "category_id", "bbox", "score", "category", "file_name"}
    assert (first["image_id"], first["category_id"], first["category"], first["file_name"]) == (
        *(1, 3, "car"),
        "street.png",
    )
    assert first["score"] == pytest.approx(0.9) and first["bbox"] == near(20, 30, 100, 80)
    assert second["category_id"] == 44 and second["bbox"] == near(150, 20, 60, 150)
    pixels = np.asarray(Image.open(copy))
    assert copy.name == "street.png" and pixels.shape == (320, 480, 3)
    scale = 480 / 300
    for (x, y, w, h), label in ((first["bbox"], 0), (second["bbox"], 1)):
        assert pixels[int(scale * (y + h / 2)), round(scale * x) + 1].tolist() == list(color_of(label))
        assert pixels[round(scale * (y + h)) - 1, int(scale * (x + w / 2))].tolist() == list(color_of(label))
    assert sorted(path.name for path in copy.parent.iterdir()) == ["street.json", "street.png"]


def test_detections_are_those_of_the_evaluation(world):
    config, model = world
    samples = build_dataset(config, "test")
    for place, (name, width, height, boxes) in enumerate(PICTURES):
        (row,) = collect(model, collate([samples[place, 0]]), config)
        image = np.asarray(Image.open(config.data.root / "val2017" / name))
        found = detect(config, model, image, name, 0.0)
        assert [box.label for box in found] == row["labels"].tolist()
        assert [list(box[2:]) for box in found] == row["boxes"].tolist()
        assert len(found) == len(boxes) and image.shape == (height, width, 3)


def test_scores_below_the_least_are_neither_drawn_nor_written(world, tmp_path):
    given = save(tmp_path / "a.png", 480, 300, [[20, 30, 100, 80], [150, 20, 60, 150], [250, 50, 30, 30]])
    for least, count in ((0.0, 3), (0.3, 2), (0.7, 1), (1.0, 0)):
        copy, results = predict(*world, asked(given, tmp_path / "out", min_score=least))
        assert len(json.loads(results.read_text())) == count
        same = np.asarray(Image.open(copy)) == np.asarray(Image.open(given))
        assert same.all() == (count == 0)
    with pytest.raises(ValueError, match="^--min-score must be at least 0 and at most 1, not 30"):
        asked(given, tmp_path, min_score=30.0)


def test_a_photo_that_lies_on_its_side_is_drawn_upright(world, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright = draw(300, 500, [[20, 30, 100, 80]])
    Image.fromarray(np.rot90(upright)).save(tmp_path / "phone.png", exif=exif)
    copy, results = predict(*world, asked(tmp_path / "phone.png", tmp_path / "out"))
    assert Image.open(copy).size == (300, 500)
    assert json.loads(results.read_text())[0]["bbox"] == near(20, 30, 100, 80)


def folder(root: Path) -> Path:
    save(root / "b.png", 120, 100, [[20, 30, 50, 40]])
    save(root / "a.JPG", 100, 120, [[20, 30, 50, 40]], format="JPEG")
    save(root / "a.png", 100, 120, [])
    (root / "broken.jpg").write_bytes((root / "a.JPG").read_bytes()[:400])
    (root / "notes.txt").write_text("nothing")
    (root / ".hidden.png").write_text("nothing")
    (root / "more").mkdir()
    return root


def test_a_folder_gives_one_json_and_names_what_cannot_be_read(world, tmp_path, capsys):
    results, copies = predict(*world, asked(folder(tmp_path / "in"), tmp_path / "out"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["1 files that are no pictures left out: notes.txt", "1 folders not looked into: more"]
    assert lines[2:5] == ["a.JPG: 1 detections: 1 car", "a.png: 0 detections", "b.png: 1 detections: 1 car"]
    assert lines[5].startswith("skipped: ") and "broken.jpg: " in lines[5]
    assert "--data." not in lines[5]  # a flag of training
    assert lines[6:] == ["1 of 4 pictures skipped: broken.jpg"]
    found = json.loads(results.read_text())
    assert [(one["image_id"], one["file_name"]) for one in found] == [(1, "a.JPG"), (3, "b.png")]
    names = sorted(path.name for path in copies.iterdir())
    assert names == ["a_JPG.png", "a_png.png", "b.png", "detections.json"]


def test_a_broken_picture_ends_a_folder_where_asked_and_leaves_no_json(world, tmp_path):
    with pytest.raises(BrokenImage, match=r"broken.jpg"):
        predict(*world, asked(folder(tmp_path / "in"), tmp_path / "out", on_broken="raise"))
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".png" or path.name.startswith(".")]


def test_a_folder_without_a_usable_picture_is_named(world, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"in: has no picture \(.jpg"):
        predict(*world, asked(tmp_path / "in", tmp_path / "out"))
    (tmp_path / "in" / "a.jpg").write_text("nothing")
    with pytest.raises(ValueError, match=r"in: has 1 pictures that cannot be read"):
        predict(*world, asked(tmp_path / "in", tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_pictures_and_videos_are_never_overwritten(world, tmp_path):
    own = folder(tmp_path / "in")
    (own / "broken.jpg").unlink()
    save(own / "b_annotated.png", 50, 50, [])
    before = {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()}
    predict(*world, asked(own, own))
    predict(*world, asked(own / "a.png", own))
    write_frames(own / "clip.mp4", (draw(64, 48, []) for _ in range(5)), 5.0)
    before["clip.mp4"] = (own / "clip.mp4").read_bytes()
    predict(*world, asked(own / "clip.mp4", own))
    assert {name: (own / name).read_bytes() for name in before} == before
    new = {path.name for path in own.iterdir()} - before.keys() - {"more"}
    assert new == {
        *("a_JPG.png", "a_png.png", "b_annotated_annotated.png", "b_annotated_annotated_annotated.png"),
        *("detections.json", "a_annotated.png", "a.json", "clip_annotated.mp4", "clip.json"),
    }


def moving(t: int) -> np.ndarray:
    return draw(160, 120, [[10 + 4 * t, 30, 50, 40]])


def test_a_video_gives_an_annotated_copy_and_the_boxes_of_each_frame(world, tmp_path, capsys):
    write_frames(tmp_path / "clip.mp4", map(moving, range(20)), 10.0)
    copy, results = predict(*world, asked(tmp_path / "clip.mp4", tmp_path / "out"))
    assert capsys.readouterr().out.splitlines()[-1] == "clip.mp4: 20 frames, 20 detections: 20 car"
    found = json.loads(results.read_text())
    assert [one["image_id"] for one in found] == list(range(20))
    # 4: compression, and resizing to 128 pixels
    assert [one["bbox"][0] for one in found] == pytest.approx([10 + 4 * t for t in range(20)], abs=4)
    info = probe(copy)
    assert (info.num_frames, info.width, info.height) == (20, 480, 360)
    assert info.seconds == pytest.approx(2.0)
    color = np.array(color_of(0))
    for t in (0, 10, 19):
        frame = read_frames(copy, [t])[0].astype(int)
        x = round(3 * found[t]["bbox"][0])
        assert min(abs(frame[150, x + k] - color).max() for k in (-1, 0, 1, 2)) < 100  # of 167: compressed
    assert sorted(path.name for path in copy.parent.iterdir()) == ["clip.json", "clip.mp4"]


def test_few_frames_are_in_memory_at_once(world, tmp_path, monkeypatch):
    sizes = []

    def counted(path: Path, indices: np.ndarray) -> np.ndarray:
        sizes.append(len(indices))
        return read_frames(path, indices)

    write_frames(tmp_path / "long.mp4", (draw(64, 48, []) for _ in range(100)), 10.0)
    monkeypatch.setattr(module, "read_frames", counted)
    monkeypatch.setattr(module, "MAX_PIECE_BYTES", 12 * 64 * 48 * 3)
    config, model = world
    with Results(tmp_path / "long.json", read_categories(config.data)) as results:
        frames = annotate(config, model, tmp_path / "long.mp4", probe(tmp_path / "long.mp4"), 0.3, results)
        next(frames)
        assert model.calls == 1 and len(sizes) == 1, "a frame is looked at when it is wanted"
        assert sum(1 for _ in frames) == 99
    assert max(sizes) <= 12 and sum(sizes) == 100


def test_each_frame_of_a_variable_rate_is_looked_at_once(world, tmp_path):
    with av.open(str(tmp_path / "variable.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 120, 160, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for t, time in enumerate([0, 1, 2, 3, 13, 14, 24, 30]):  # tenths of a second
            frame = av.VideoFrame.from_ndarray(moving(t), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    copy, results = predict(*world, asked(tmp_path / "variable.mp4", tmp_path / "out"))
    shown = [one["image_id"] for one in json.loads(results.read_text())]
    info = probe(tmp_path / "variable.mp4")
    assert shown == sorted(set(shown)) and world[1].calls == len(shown) <= 8
    assert probe(copy).num_frames == round(info.seconds * module.output_fps(info)) > 8


def test_files_that_cannot_be_used_are_named_and_leave_nothing(world, tmp_path):
    write_frames(tmp_path / "clip.mp4", map(moving, range(20)), 10.0)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes((tmp_path / "clip.mp4").read_bytes()[:2000])
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "no.jpg").write_text("nothing")
    for name, kind in (("cut.mp4", BrokenVideo), ("notes.txt", BrokenVideo), ("no.jpg", BrokenImage)):
        with pytest.raises(kind, match=name):
            predict(*world, asked(tmp_path / name, tmp_path / "out"))
        assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(FileNotFoundError, match="absent.jpg"):
        predict(*world, asked(tmp_path / "absent.jpg", tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="instances_none.json"):
        config = replace(world[0], data=replace(world[0].data, test_split="none"))
        predict(config, world[1], asked(tmp_path / "clip.mp4", tmp_path / "out"))


def test_a_network_that_fails_in_the_middle_of_a_video_leaves_nothing(world, tmp_path, monkeypatch):
    write_frames(tmp_path / "clip.mp4", map(moving, range(20)), 10.0)
    config, model = world
    whole: Callable = model.detect

    def failing(*words: Any, **named: Any) -> list:
        found = whole(*words, **named)
        return [one._replace(scores=one.scores * float("nan")) for one in found] if model.calls == 7 else found

    monkeypatch.setattr(model, "detect", failing)
    with pytest.raises(ValueError, match=r"clip.mp4, frame 6: the network's boxes or scores are not finite"):
        predict(config, model, asked(tmp_path / "clip.mp4", tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("size", [(20, 20), (3, 700), (10_000, 40), (1, 1)])
def test_pictures_of_any_size_are_taken(world, tmp_path, size):
    width, height = size
    given = save(tmp_path / "a.png", width, height, [[0, 0, max(width // 2, 1), max(height // 2, 1)]])
    copy, results = predict(*world, asked(given, tmp_path / "out", min_score=0.0))
    assert max(Image.open(copy).size) == max(480, *size)
    for one in json.loads(results.read_text()):
        x, y, w, h = one["bbox"]
        assert 0 <= x <= x + w <= width + 1e-3 and 0 <= y <= y + h <= height + 1e-3


def test_boxes_of_a_label_are_tuples_of_pixels():
    assert Box(1, 0.5, 2, 3, 4, 5)[2:] == (2, 3, 4, 5)


def test_a_link_to_itself_in_a_folder_is_named_and_left_out(world, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "good.png", 40, 30, [[0, 0, 20, 20]])
    (tmp_path / "in" / "loop.png").symlink_to(tmp_path / "in" / "loop.png")
    predict(*world, asked(tmp_path / "in", tmp_path / "out"))
    assert "1 of 2 pictures skipped: loop.png" in capsys.readouterr().out


def test_a_video_of_one_row_of_pixels_has_a_copy(world, tmp_path):
    frame = np.full((2, 2000, 3), 255, np.uint8)
    write_frames(tmp_path / "row.mp4", (frame for _ in range(2)), 5.0)
    copy, _ = predict(*world, asked(tmp_path / "row.mp4", tmp_path / "out"))
    assert probe(copy).width == 2000
    assert even_size(2000, 1, 480) == (2000, 2)
