"""Masks over frames, legends and strips: where pixels change and where they do not."""

import numpy as np
import pytest

from engine.visual import LIGHT
from vos.drawing import (
    OPACITY,
    colors_of,
    draw_legend,
    draw_masks,
    draw_strip,
    enlarge,
    lacking_letters,
    outline,
    spread,
    thumbnail_width,
)


def halves(height: int = 40, width: int = 60) -> np.ndarray:
    """Left and right, overlapping by ten columns."""
    masks = np.zeros((2, height, width), bool)
    masks[0, :, :35], masks[1, :, 25:] = True, True
    return masks


def test_inside_a_mask_pixels_are_mixed_at_its_edge_they_have_its_color_elsewhere_they_stay():
    frame, masks, (color, _) = np.full((40, 60, 3), 100, np.uint8), halves()[:1], colors_of(2)
    drawn = draw_masks(frame, masks, [color], 60, 40)
    mixed = [round((1 - OPACITY) * 100 + OPACITY * one) for one in color]
    assert drawn[20, 10].tolist() == mixed and drawn[0, 0].tolist() == mixed  # the frame's border is no edge
    assert drawn[20, 34].tolist() == list(color) and drawn[20, 35].tolist() == [100] * 3
    assert np.array_equal(draw_masks(frame, masks[:0], [], 60, 40), frame)
    assert frame.max() == 100


def test_of_masks_that_overlap_the_first_is_on_top_and_both_outlines_are_seen():
    frame, colors = np.zeros((40, 60, 3), np.uint8), colors_of(2)
    drawn = draw_masks(frame, halves(), colors, 60, 40)
    first, second = ([round(OPACITY * one) for one in color] for color in colors)
    assert drawn[20, 30].tolist() == drawn[20, 10].tolist() == first and drawn[20, 50].tolist() == second
    assert drawn[20, 34].tolist() == list(colors[0]) and drawn[20, 25].tolist() == list(colors[1])


def test_masks_grow_with_the_picture():
    for width, height in ((120, 80), (61, 43), (30, 20), (7, 5)):
        large = enlarge(halves()[0], width, height)
        assert large.shape == (height, width) and large.dtype == bool
        assert large.mean() == pytest.approx(35 / 60, abs=0.6 / width)
    assert draw_masks(np.zeros((40, 60, 3), np.uint8), halves(), colors_of(2), 480, 320).shape == (320, 480, 3)


def test_an_outline_is_as_thick_as_asked():
    assert outline(halves()[0], 1).sum() == 40 and outline(halves()[0], 3).sum() == 120
    assert not outline(np.ones((5, 5), bool), 2).any()


def test_a_legend_has_a_line_per_sentence_and_shortens_what_does_not_fit():
    sentences = ["the red star", "word " * 60, "красная звезда"]
    legend = np.asarray(draw_legend(sentences, [0.5, 1.0, 0.0], colors_of(3), 200))
    assert legend.shape == (3 * 24 + 8, 200, 3)
    assert (legend[:, -3:] == legend[0, 0]).all(), "nothing reaches the border"
    colors = {tuple(pixel) for pixel in legend.reshape(-1, 3).tolist()}
    assert colors_of(2)[0] in colors and colors_of(2)[1] in colors


def test_colors_differ_and_repeat_after_ten():
    colors = colors_of(12)
    assert len(set(colors[:10])) == 10 and colors[10:] == colors[:2]


def test_letters_that_the_font_lacks_are_known_each_once():
    assert lacking_letters(["\u661f the star \u661f", "\u0437\u0432\u0435\u0437\u0434\u0430"]) == "\u661f"


def test_a_strip_has_its_frames_below_a_title():
    strip = np.asarray(draw_strip([np.zeros((40, 60, 3), np.uint8)] * 3, "50%  the star", (1, 2, 3)))
    white = strip[20:].all((0, 2))
    assert np.flatnonzero(white).tolist() == [60, 61, 122, 123], "frames of one color can be told apart"
    assert strip.shape == (60, 184, 3) and not strip[20:, ~white].any() and strip[0, 0].tolist() == list(LIGHT)
    assert strip[10, 8].tolist() == [1, 2, 3]


def test_frames_of_a_sheet_are_spread_evenly():
    assert spread(1) == [0] and spread(3) == [0, 1, 2] and spread(15, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert spread(1000, 3) == [0, 500, 999]
    assert thumbnail_width(1920, 1080, 8) == 200 and thumbnail_width(96, 96, 8) == 192
