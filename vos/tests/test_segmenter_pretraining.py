"""The weights of the laptop preset: what is aligned, what are targets, and a killed training that goes on."""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.weights import write_half
from vos import data, pretrain
from vos.head import Frames
from vos.pretrain import CLIPS, PARTS, THINGS, Clips, Training, alignment, evaluate, run_head
from vos.synthetic import write_dataset

PART_STEPS = [1, 1, 1]


class ToyText:
    """Features of words, drawn from their checksums."""

    width = 384

    def features(self, sentence: str) -> Tensor:
        rows = [
            np.random.default_rng(zlib.crc32(word.encode())).standard_normal(self.width) for word in sentence.split()
        ]
        return torch.from_numpy(np.stack(rows)).float()

    def prepare(self, sentences: object) -> None:
        pass


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(data, "build_text", lambda *args, **named: ToyText())
    write_dataset(tmp_path / "clips", replace(CLIPS, num_train=6, num_test=4), workers=1)
    return tmp_path / "clips"


def train(root: Path, folder: Path, stop_after: int | None = None) -> Training:
    parts = tuple(part._replace(steps=steps, clips=2) for part, steps in zip(PARTS, PART_STEPS, strict=True))
    training = Training(root, folder, parts)
    if stop_after is not None:
        place = training._place
        training._place = lambda: place() if training.step < stop_after else None
    training.run(save_minutes=1e9, log_every=1)
    training.save()
    return training


def test_a_killed_training_goes_on_to_the_same_weights(root: Path, tmp_path: Path, capsys) -> None:
    whole = train(root, tmp_path / "whole")
    train(root, tmp_path / "killed", stop_after=2)
    again = train(root, tmp_path / "killed")
    assert "going on from step 2" in capsys.readouterr().out
    state, other = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)
    with pytest.raises(ValueError, match="give the same, or delete it"):
        Training(root, tmp_path / "killed", PARTS)
    write_half(again.model.state_dict(), tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < 10e6
    found = evaluate(again.model, Clips(again.config, "test"), 2)
    assert set(found) == {"right thing", "mean IoU"} and all(0 <= value <= 100 for value in found.values())


def test_alignment_is_the_cosine_of_a_sentence_and_what_lies_under_a_mask(root: Path) -> None:
    config = pretrain.config_of(root)
    model = pretrain.build_model(config).eval()
    batch = Clips(config, "train").batch(np.random.default_rng(0), 2)
    assert len(batch["masks"]) == 2 and len(batch["text"]) == len(batch["meant"]) == 2 * THINGS
    with torch.no_grad():
        maps = model.backbone(batch["video"])[-1].transpose(1, 2).flatten(0, 1)
        maps = maps.index_select(0, Frames.of(batch).place)
        found = alignment(model, maps, batch)
        cells = F.normalize(model.head.vid_embed_proj(maps), dim=1).double()
        first = 0
        for clip, masks in enumerate(batch["masks"]):
            side = masks.shape[-1] // maps.shape[-1]
            for sentence in range(clip * THINGS, (clip + 1) * THINGS):
                kept = ~batch["text_padding"][sentence]
                words = model.head.transformer.txt_proj(batch["text"][sentence, kept]).double().mean(0)
                for thing in range(THINGS):
                    total = torch.zeros(cells.shape[1], dtype=torch.float64)
                    for t, y, x in np.ndindex(masks.shape[1], *maps.shape[-2:]):
                        block = masks[thing, t, y * side : (y + 1) * side, x * side : (x + 1) * side]
                        total += block.double().mean() * cells[first + t, :, y, x]
                    expected = pretrain.SHARPNESS * float(F.cosine_similarity(total, words, dim=0))
                    assert float(found[sentence, thing]) == pytest.approx(expected, abs=1e-3)
            first += masks.shape[1]


@pytest.mark.parametrize("all_things", [False, True])
def test_targets_are_the_meant_thing_or_all_of_them(root: Path, all_things: bool) -> None:
    config = pretrain.config_of(root)
    model = pretrain.build_model(config).eval()
    batch = Clips(config, "train").batch(np.random.default_rng(0), 2)
    with torch.no_grad():
        outputs, wanted = run_head(model, model.backbone(batch["video"]), batch, all_things=all_things)
        losses = model.head.losses(outputs, wanted)
    frames = sum(Frames.of(batch).counts)
    assert outputs["logits"].shape[1] == frames * THINGS
    assert all(value.isfinite() for value in losses.values())
    for sentence, (masks, referred) in enumerate(zip(wanted["masks"], wanted["referred"], strict=True)):
        clip, meant = sentence // THINGS, int(batch["meant"][sentence])
        assert len(masks) == (THINGS if all_things else 1)
        assert torch.equal(masks[referred], batch["masks"][clip][meant])
    assert wanted["num_targets"] == sum(masks.shape[0] * masks.shape[1] for masks in wanted["masks"])


def test_sentences_of_the_clips_are_about_looks_alone(root: Path) -> None:
    clips = data.build_dataset(pretrain.config_of(root), "train").clips
    for word in ("moving", "turning", "left", "right", "above", "below", "still"):
        assert not any(word in clip.sentence.split() for clip in clips)
