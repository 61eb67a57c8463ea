"""The clips on which the tiny weights are trained: what they are said to show is what they show."""

import torch

from engine.synthetic.clips import draw_clips


def test_the_flow_moves_the_object_to_where_it_is_next():
    # Many frames, so that a difference of two frames is the velocity between them.
    clips = draw_clips(24, 64, 48, torch.Generator().manual_seed(0))
    edges = torch.cat([clips.mask[..., [0, -1], :].flatten(2), clips.mask[..., [0, -1]].flatten(2)], dim=-1)
    whole = edges.amax(-1)[:, 1:-1] < 0.01  # (B, T - 2), no part of the object is cut off
    axis = torch.linspace(-1, 1, 48)
    area = clips.mask.sum((-2, -1))
    for flow, weight in ((clips.flow[:, 0], axis[None, :]), (clips.flow[:, 1], axis[:, None])):
        center = (clips.mask * weight).sum((-2, -1)) / area
        moved = (center[:, 2:] - center[:, :-2]) / 2
        told = (flow.sum((-2, -1)) / area)[:, 1:-1]
        assert whole.sum() > 100 and told[whole].abs().max() > 0.02
        assert (moved - told)[whole].abs().max() < 0.004  # growth moves the center of an odd shape a little otherwise


def test_the_same_seed_draws_the_same_clips_and_rates_are_seen():
    one, two = (draw_clips(64, 4, 32, torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one.video.shape == (64, 3, 4, 32, 32) and one.rates.abs().max() <= 1
    grown = one.mask.sum((-2, -1))
    still = (one.rates[:, :2] == 0).all(1) & (one.rates[:, 2].abs() > 0.4)
    ratio = (grown[:, -1] / grown[:, 0]).log()[still]
    assert len(ratio) > 3 and (ratio.sign() == one.rates[still, 2].sign()).float().mean() > 0.8  # some leave the frame
