"""Pretraining of the small Video Swin: targets are what the clips show, two steps train it, and its file loads."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from action_detection import pretrain
from action_detection.pretrain import IGNORED, PHASES, Phase, draw_scenes, render_strips, targets_of
from engine.backbones.video_swin import build_video_swin
from engine.synthetic.clips import draw_clips
from engine.synthetic.motion import MOTIONS


def test_in_a_pause_the_object_rests_and_every_clip_moves_at_its_pace():
    clips = draw_clips(48, 32, 32, torch.Generator().manual_seed(0), pauses=True)
    rests = clips.pace == 0
    change = (clips.mask[:, 1:] - clips.mask[:, :-1]).abs().amax((2, 3))  # (B, T - 1)
    both = rests[:, 1:] & rests[:, :-1] & (rests[:, 1:].cumsum(1) > 1)
    after = both & (clips.pace[:, :-1].cumsum(1) > 0)  # the last moment of the motion may fall between two frames
    settled = after[:, 1:] & after[:, :-1]
    assert settled.sum() > 100 and change[:, 1:][settled].max() < 1e-5
    assert clips.flow.abs().amax((1, 3, 4))[rests].max() == 0
    assert (clips.pace.mean(1) - 1).abs().max() < 0.2  # so that the whole motion is shown: a frame more or less


def test_targets_fit_the_tokens_and_the_still_object_is_none():
    phase = Phase(4, 4, 8)
    clips = draw_scenes(phase, 56, torch.Generator().manual_seed(1))
    targets = targets_of(clips)
    backbone = build_video_swin("small", weights=None)
    outputs = pretrain.Pretrainer(backbone)(clips.video)
    assert [x[:, 1:].shape for x in outputs.dense] == [x.shape for x in targets.flow]
    assert outputs.rates.shape == targets.rates.shape
    share = torch.nn.functional.avg_pool3d(clips.mask[:, None], (2, 8, 8))
    torch.testing.assert_close(targets.share[0], share)
    moved = draw_clips(4, 8, 56, torch.Generator().manual_seed(1), pauses=True)
    assert torch.equal(moved.mask, clips.mask) and torch.equal(moved.video[1::2], clips.video[1::2])
    inside = moved.mask[::2, None].expand_as(moved.video[::2]) > 0.999
    assert (moved.video[::2] - clips.video[::2])[inside].abs().max() < 0.4  # noise
    assert (moved.video[::2] - clips.video[::2])[~inside].abs().max() > 1


def test_strips_are_a_function_of_their_numbers_and_say_the_class_of_each_step():
    video, labels = render_strips([3, 4], 32, 32, "train")
    again, same = render_strips([4], 32, 32, "train")
    assert video.shape == (2, 3, 32, 32, 32) and labels.shape == (2, 16)
    assert torch.equal(video[1:], again) and torch.equal(labels[1:], same)
    _, many = render_strips(list(range(30)), 32, 16, "train")
    assert set(many.unique().tolist()) == {IGNORED, *range(len(MOTIONS))}


def test_two_steps_train_every_parameter_and_the_file_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(pretrain, "PHASES", tuple(Phase(2, min(p.strips, 2), 8) for p in PHASES))
    file = tmp_path / "small.safetensors"
    monkeypatch.setattr(sys, "argv", ["pretrain", "--steps", "2", "--validation", "1", "--output", str(file)])
    pretrain.main()
    assert str(file) in capsys.readouterr().out and file.stat().st_size < 10e6
    trained = build_video_swin("small", weights=str(file))
    torch.manual_seed(0)
    start = dict(build_video_swin("small", weights=None).named_parameters())
    assert all(not torch.equal(value.detach(), start[name]) for name, value in trained.named_parameters())


def test_the_committed_weights_load_and_are_small():
    file = Path(__file__).parents[2] / pretrain.SMALL_WEIGHTS
    assert file.stat().st_size < 10e6
    build_video_swin("small", weights=str(file))
