"""From a video and sentences to masks, pictures and JSON; and what can be wrong with them."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from engine.command_line import parse
from engine.data.video import BrokenVideo, probe, read_frames, write_video
from vos.configs import ROWS, Config
from vos.head import Frames, MTTRHead
from vos.metric import region_similarity
from vos.predict import Arguments, mask_folders, predict, windows

COLORS = ("red", "green", "blue")
HEIGHT, WIDTH = 80, 120
Work = tuple[Config, torch.nn.Module]


class Lights(torch.nn.Module):
    """A network whose three queries find what is red, green and blue; sure of the one whose name is in the sentence."""

    scores, segment_frames = MTTRHead.scores, MTTRHead.segment_frames

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.looks = 0

    @property
    def head(self) -> "Lights":
        return self

    def backbone(self, video: Tensor) -> Tensor:
        self.looks += 1
        return video

    def forward(self, video: Tensor, padding: Tensor, text: Tensor, text_padding: Tensor, frames: Frames) -> Any:
        images = video.transpose(1, 2).flatten(0, 1)[frames.place]
        masks = F.avg_pool2d(images, 4)[None] * 10
        said = [zlib.crc32(color.encode()) % 2048 + 1 in text[0].tolist() for color in COLORS]
        logits = torch.zeros(1, len(images), 3, 2)
        logits[..., 0] = torch.tensor([2.0 if one else -2.0 for one in said])
        return {"logits": logits, "masks": masks}


@pytest.fixture
def world() -> Work:
    base = ROWS["referring_tiny_dr2net"]()
    data = replace(base.data, window=4, image_size=80, max_size=120, mean=(0.5,) * 3, std=(0.25,) * 3)
    return replace(base, data=data), Lights()


def squares(count: int) -> np.ndarray:
    """A square of each color, moving right by four pixels a frame; (T, 3, H, W) boolean."""
    masks = np.zeros((count, 3, HEIGHT, WIDTH), bool)
    for t in range(count):
        for k in range(3):
            masks[t, k, 4 + 26 * k : 24 + 26 * k, 4 * t + 4 : 4 * t + 24] = True
    return masks


def write_squares(path: Path, count: int) -> np.ndarray:
    masks = squares(count)
    write_video(path, (255 * masks).astype(np.uint8).transpose(0, 2, 3, 1), fps=8, crf=10)
    return masks


def asked(given: Path, output: Path, *queries: str, **more: Any) -> Arguments:
    return Arguments(run=Path(), input=given, output=output, query=queries, **more)


def read_masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_each_sentence_has_its_masks_its_color_and_its_scores(world, tmp_path, capsys):
    masks = write_squares(tmp_path / "film.mp4", 10)
    copy, sheet, table, folder = predict(*world, asked(tmp_path / "film.mp4", tmp_path / "out", "The  Blue one", "red"))
    assert sorted(path.name for path in copy.parent.iterdir()) == ["film.json", "film.mp4", "film.png", "film_masks"]
    assert sorted(path.name for path in folder.iterdir()) == ["0_the_blue_one", "1_red"]
    for name, channel in (("0_the_blue_one", 2), ("1_red", 0)):
        found = read_masks(folder / name)
        assert list(found) == [f"{k:05d}" for k in range(10)]
        for k, mask in enumerate(found.values()):
            assert mask.shape == (HEIGHT, WIDTH) and set(np.unique(mask)) == {0, 255}
            assert region_similarity(mask > 0, masks[k, channel]) > 0.8
    content = json.loads(table.read_text())
    assert content["video"] == "film.mp4" and content["frames"] == list(range(10))
    first = content["found"][0]
    assert (first["query"], first["masks"]) == ("the blue one", "film_masks/0_the_blue_one")
    sure = 1 / (1 + np.exp(-2.0))
    assert first["scores"] == pytest.approx([sure] * 10)
    assert capsys.readouterr().out.splitlines() == [f" {sure:.1%}  the blue one", f" {sure:.1%}  red"]
    info = probe(copy)
    assert (info.num_frames, info.width, info.height) == (10, 480, 320 + 56) and info.fps == pytest.approx(8)
    assert Image.open(sheet).size == (8 * 192 + 7 * 2, 3 * (128 + 20))
    assert world[1].looks == 3, "once a window, for all sentences"


def test_windows_follow_each_other_and_the_last_reaches_back():
    assert windows(8, 4) == [([0, 1, 2, 3], [0, 1, 2, 3]), ([4, 5, 6, 7], [0, 1, 2, 3])]
    assert windows(6, 4) == [([0, 1, 2, 3], [0, 1, 2, 3]), ([2, 3, 4, 5], [2, 3])]
    assert windows(2, 4) == [([0, 1, 1, 1], [0, 1])]
    for count in range(1, 20):
        seen = [window[place] for window, new in windows(count, 5) for place in new]
        assert seen == list(range(count)) and all(len(window) == 5 for window, _ in windows(count, 5))


def test_a_video_shorter_than_the_window_has_a_mask_per_frame(world, tmp_path):
    masks = write_squares(tmp_path / "short.mp4", 2)
    *_, folder = predict(*world, asked(tmp_path / "short.mp4", tmp_path, "green"))
    found = read_masks(folder / "0_green")
    assert len(found) == 2 and region_similarity(found["00001"] > 0, masks[1, 1]) > 0.8
    assert probe(tmp_path / "short_annotated.mp4").num_frames == 2, "not onto the video itself"


def test_every_second_frame_is_looked_at_and_shown(world, tmp_path):
    masks = write_squares(tmp_path / "film.mp4", 9)
    copy, _, table, folder = predict(*world, asked(tmp_path / "film.mp4", tmp_path / "out", "red", every=2))
    found = read_masks(folder / "0_red")
    assert list(found) == ["00000", "00002", "00004", "00006", "00008"]
    assert region_similarity(found["00006"] > 0, masks[6, 0]) > 0.8
    assert json.loads(table.read_text())["frames"] == [0, 2, 4, 6, 8]
    assert probe(copy).num_frames == 5 and probe(copy).fps == pytest.approx(4)


def test_below_the_minimal_score_masks_are_empty(world, tmp_path):
    write_squares(tmp_path / "film.mp4", 4)
    *_, folder = predict(*world, asked(tmp_path / "film.mp4", tmp_path / "out", "the star", "blue", min_score=0.5))
    assert not any(mask.any() for mask in read_masks(folder / "0_the_star").values())
    assert all(mask.any() for mask in read_masks(folder / "1_blue").values())


def test_masks_of_an_earlier_call_leave_other_files_stay(world, tmp_path):
    write_squares(tmp_path / "film.mp4", 4)
    folder = tmp_path / "out" / "film_masks" / "0_red"
    folder.mkdir(parents=True)
    (folder / "00077.png").touch()
    (folder / "notes.txt").touch()
    predict(*world, asked(tmp_path / "film.mp4", tmp_path / "out", "red"))
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{k:05d}.png" for k in range(4)), "notes.txt"]


def test_folders_of_the_sentences_of_an_earlier_call_are_gone_and_those_of_others_stay(world, tmp_path):
    write_squares(tmp_path / "film.mp4", 4)
    root = tmp_path / "out" / "film_masks"
    for folder, file in (("mine", "00000.png"), ("0_green", "notes.txt"), ("1_red", "00000.png")):
        (root / folder).mkdir(parents=True)
        (root / folder / file).touch()
    predict(*world, asked(tmp_path / "film.mp4", tmp_path / "out", "red", "green", "blue"))
    predict(*world, asked(tmp_path / "film.mp4", tmp_path / "out", "blue"))
    assert sorted(path.name for path in root.iterdir()) == ["0_blue", "0_green", "mine"]
    assert [path.name for path in (root / "0_green").iterdir()] == ["notes.txt"]
    lines = (tmp_path / "out" / "film.json").read_text().splitlines()
    assert len(lines) == 5 and lines[1] == '"frames": [0, 1, 2, 3],', "a line for each sentence, not for each frame"


def test_sentences_in_other_scripts_or_of_many_words_have_a_folder(world, tmp_path):
    write_squares(tmp_path / "film.mp4", 4)
    queries = ("красная звезда", "../../x", "red " * 300)
    with pytest.warns(UserWarning, match="is cut to 64"):
        *_, folder = predict(*world, asked(tmp_path / "film.mp4", tmp_path / "out", *queries))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0", "1_x", "2_red_red_red_red_red_red_red_red_red_red"]
    assert mask_folders(tmp_path / "m", ["a"]) == [tmp_path / "m" / "0_a"]


def test_letters_that_the_pictures_cannot_show_are_told(world, tmp_path):
    write_squares(tmp_path / "film.mp4", 4)
    with pytest.warns(UserWarning, match="has boxes for '\u661f'; their masks are in film_masks/<number>"):
        predict(*world, asked(tmp_path / "film.mp4", tmp_path / "out", "\u661f", "red"))


def test_without_a_sentence_or_with_a_broken_video_there_is_one_line(world, tmp_path):
    write_squares(tmp_path / "film.mp4", 4)
    for queries in ((), ("red", " \n")):
        with pytest.raises(ValueError, match="say what to look for: --query"):
            predict(*world, asked(tmp_path / "film.mp4", tmp_path / "out", *queries))
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "film.mp4").read_bytes()[:700])
    with pytest.raises(BrokenVideo, match=r"broken.mp4"):
        predict(*world, asked(tmp_path / "broken.mp4", tmp_path / "out", "red"))
    assert not (tmp_path / "out").exists()


def test_scores_that_are_not_finite_name_the_window(world, tmp_path, monkeypatch):
    write_squares(tmp_path / "film.mp4", 4)
    config, model = world

    def broken(outputs: Any, batch: Any) -> list[Tensor]:
        return [torch.full((4, 3), torch.nan)]

    monkeypatch.setattr(model, "scores", broken)
    with pytest.raises(ValueError, match="film.mp4, frames 0 to 3: the network's scores are not finite"):
        predict(config, model, asked(tmp_path / "film.mp4", tmp_path / "out", "red"))
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_a_sentence_after_each_flag_is_one_of_several() -> None:
    words: Sequence[str] = ["run", "film.mp4", "--query", "the red star", "--query", "a disc", "--every", "5"]
    arguments = parse(Arguments, words)
    assert arguments.query == ("the red star", "a disc") and arguments.every == 5


def test_the_drawn_copy_shows_the_color_of_the_sentence(world, tmp_path):
    masks = write_squares(tmp_path / "film.mp4", 4)
    copy, *_ = predict(*world, asked(tmp_path / "film.mp4", tmp_path / "out", "blue"))
    plain = read_frames(tmp_path / "film.mp4", [0])[0].astype(int)
    drawn = read_frames(copy, [0])[0][:320:4, ::4].astype(int)
    inside = masks[0, 2]
    assert np.abs(drawn - plain)[inside].mean() > 60 and np.abs(drawn - plain)[masks[0, 0]].mean() < 20
