"""mAP, P@K and IoU of referring segmentation against numbers known beforehand, and against plain loops."""

import math
from typing import Any

import numpy as np
import pytest

from vos.metric import best_only, decode_mask, encode_masks, referring_scores, score_samples

SIDE = 100
EXACT = 1e-9  # percent; the official precision has an epsilon of 2e-16 below its fraction line
KS = (0.5, 0.6, 0.7, 0.8, 0.9)
ONE_OF_TWO = 100 * 51 / 101  # of 101 recalls 0 to 50 are reached
WITH_A_WRONG_ONE_BETWEEN = 100 * (51 + 50 * 2 / 3) / 101


def square(top: int = 20, left: int = 20, height: int = 20, width: int = 20) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def sample(truth: np.ndarray, *found: tuple[np.ndarray, float]) -> dict[str, Any]:
    masks = np.stack([mask for mask, _ in found]) if found else np.zeros((0, *truth.shape), bool)
    return {"truth": truth, "masks": masks, "scores": np.array([score for _, score in found])}


def counted(shared: int, joined: int) -> dict[str, Any]:
    """A sample whose only mask shares so many of so many pixels with the truth."""
    flat = np.zeros((2, SIDE * SIDE), bool)
    flat[0, :joined], flat[1, :shared] = True, True
    truth, found = flat.reshape(2, SIDE, SIDE)
    return sample(truth, (found, 0.5))


def test_exact_masks_give_a_hundred_everywhere_and_the_names_are_those_of_the_field():
    scores = referring_scores([sample(square(), (square(), 0.9))])
    names = ["mAP", "mAP_best", "AP50", "AP75", "P@0.5", "P@0.6", "P@0.7", "P@0.8", "P@0.9", "IoU_overall", "IoU_mean"]
    assert list(scores) == names
    assert scores == pytest.approx(dict.fromkeys(names, 100), abs=EXACT)


def test_a_mask_shifted_by_a_pixel():
    scores = referring_scores([sample(square(), (square(left=21), 0.9))])
    assert scores["IoU_overall"] == pytest.approx(100 * 380 / 420, abs=EXACT)
    assert scores["IoU_mean"] == pytest.approx(90.4762, abs=1e-4)
    assert scores["mAP"] == pytest.approx(90, abs=EXACT)  # nine of the ten thresholds
    assert scores["P@0.9"] == 100


def test_half_a_mask_is_a_hit_for_coco_and_none_for_precision_at_half():
    scores = referring_scores([sample(square(), (square(height=10), 0.9))])
    assert scores["AP50"] == pytest.approx(100, abs=EXACT) and scores["mAP"] == pytest.approx(10, abs=EXACT)
    assert scores["P@0.5"] == 0 and scores["IoU_mean"] == 50


def test_precision_at_k_has_the_rounding_of_float32():
    assert referring_scores([counted(200, 400)])["P@0.5"] == 0  # .5
    assert referring_scores([counted(20, 40)])["P@0.5"] == 100  # .50000006
    hits = {k: referring_scores([counted(round(100 * k), 100)])[f"P@{k}"] for k in KS}
    assert hits == {k: 100.0 * (float(np.float32(k)) > k) for k in KS} == {0.5: 0, 0.6: 100, 0.7: 0, 0.8: 100, 0.9: 0}


def test_a_right_second_mask_counts_for_map_and_for_nothing_else():
    scores = referring_scores([sample(square(), (square(top=70), 0.9), (square(), 0.1))])
    assert scores["mAP"] == pytest.approx(50, abs=EXACT) and scores["AP50"] == pytest.approx(50, abs=EXACT)
    assert [scores[f"P@{k}"] for k in KS] == [0] * 5 and scores["mAP_best"] == 0 and scores["IoU_mean"] < 1e-5


def test_wrong_masks_between_right_ones_of_two_samples():
    wrong = square(top=70)
    scores = referring_scores([sample(square(), (square(), 0.9)), sample(square(), (wrong, 0.8), (square(), 0.1))])
    assert scores["mAP"] == pytest.approx(WITH_A_WRONG_ONE_BETWEEN, abs=EXACT)
    assert scores["mAP"] == pytest.approx(83.4983, abs=1e-4)
    assert scores["P@0.5"] == 50 and scores["mAP_best"] == pytest.approx(ONE_OF_TWO, abs=EXACT)


def test_a_sample_without_proposals_is_missed():
    scores = referring_scores([sample(square(), (square(), 0.9)), sample(square())])
    assert scores["mAP"] == pytest.approx(ONE_OF_TWO, abs=EXACT)
    assert scores["mAP"] == pytest.approx(50.4950, abs=1e-4)
    assert scores["P@0.5"] == 50 and scores["IoU_overall"] == 50
    assert max(referring_scores([sample(square())]).values()) < 1e-6  # of the epsilon


def test_a_mask_given_twice_is_a_wrong_one_the_second_time():
    twice = sample(square(), (square(), 0.9), (square(), 0.9))
    scores = referring_scores([twice, sample(square(), (square(), 0.5))])
    assert scores["mAP"] == pytest.approx(WITH_A_WRONG_ONE_BETWEEN, abs=EXACT)
    assert scores["mAP_best"] == pytest.approx(100, abs=EXACT) and scores["P@0.9"] == 100


def test_an_empty_truth_cannot_be_hit_but_an_empty_best_mask_is_right_there():
    empty = np.zeros((SIDE, SIDE), bool)
    scores = referring_scores([sample(empty, (square(), 0.9)), sample(square(), (square(), 0.5))])
    assert scores["mAP"] == pytest.approx(100 * 51 / 2 / 101, abs=EXACT)  # at half the recall half the precision
    for found in ([], [(empty, 0.9)]):
        scores = referring_scores([sample(empty, *found)])
        assert scores["mAP"] == 0 and scores["P@0.9"] == scores["IoU_mean"] == scores["IoU_overall"] == 100


def test_of_equal_scores_the_first_mask_is_the_best_for_every_metric():
    right, wrong = (square(), 0.5), (square(top=70), 0.5)
    assert referring_scores([sample(square(), right, wrong)])["P@0.9"] == 100
    scores = referring_scores([sample(square(), wrong, right)])
    assert scores["P@0.9"] == scores["mAP_best"] == 0 and scores["mAP"] == pytest.approx(50, abs=EXACT)
    assert best_only({"truth": {}, "masks": [1, 2, 3], "scores": np.array([1, 2, 2])})["masks"] == [2]


def test_of_more_than_a_hundred_proposals_the_hundred_best_count():
    wrong = [(square(top=70), 0.9)] * 100
    assert referring_scores([sample(square(), *wrong, (square(), 0.1))])["mAP"] == 0
    assert referring_scores([sample(square(), *wrong[1:], (square(), 0.1))])["mAP"] == pytest.approx(1, abs=EXACT)


def plain_map(samples: list[dict[str, Any]]) -> float:
    """COCO's mAP in loops, in percent: each threshold, each proposal in the order of scores, each recall."""
    total = 0.0
    for threshold in np.linspace(0.5, 0.95, 10):
        marks = []
        for one in samples:
            taken = False
            for k in sorted(range(len(one["scores"])), key=lambda k: -one["scores"][k]):  # stable
                shared, joined = (one["truth"] & one["masks"][k]).sum(), (one["truth"] | one["masks"][k]).sum()
                hit = not taken and joined > 0 and shared / joined >= threshold - 1e-10
                taken |= hit
                marks.append((-one["scores"][k], hit))
        marks.sort(key=lambda mark: mark[0])
        points, right = [], 0
        for number, (_, hit) in enumerate(marks, 1):
            right += hit
            points.append((right / len(samples), right / number))
        for recall in np.linspace(0, 1, 101):
            total += max((precision for reached, precision in points if reached >= recall - 1e-12), default=0.0)
    return 100 * total / 1010


def plain_best(samples: list[dict[str, Any]]) -> dict[str, float]:
    """P@K and IoU in loops over pixels' counts, in percent."""
    ious, shared, joined = [], 0, 0
    for one in samples:
        best = one["masks"][max(range(len(one["scores"])), key=lambda k: one["scores"][k])]
        i, u = int((one["truth"] & best).sum()), int((one["truth"] | best).sum())
        shared, joined = shared + i, joined + u
        ious.append(float((np.float32(i) + np.float32(1e-6)) / (np.float32(u) + np.float32(1e-6))))
    precisions = {f"P@{k}": 100 * sum(iou > k for iou in ious) / len(ious) for k in KS}
    return {**precisions, "IoU_overall": 100 * shared / joined, "IoU_mean": 100 * math.fsum(ious) / len(ious)}


def drawn_samples(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Samples of several sizes, some proposals near the truth, scores with ties."""
    samples = []
    for _ in range(rng.integers(1, 9)):
        height, width = rng.integers(6, 20, 2)
        truth = np.zeros((height, width), bool)
        top, left = rng.integers(0, height - 3), rng.integers(0, width - 3)
        truth[top : top + rng.integers(2, height), left : left + rng.integers(2, width)] = True
        masks = []
        for _ in range(rng.integers(1, 6)):
            kind = rng.integers(4)  # far off, noisy, shifted, exact
            moved = np.roll(truth, rng.integers(-2, 3, 2) if kind < 3 else 0, (0, 1))
            noise = rng.random(truth.shape) < (0.3, 0.05, 0, 0)[kind]
            masks.append(moved ^ noise if kind else noise)
        samples.append({"truth": truth, "masks": np.stack(masks), "scores": rng.integers(0, 5, len(masks)) / 4})
    return samples


def test_random_samples_give_the_numbers_of_plain_loops():
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(40):
        samples = drawn_samples(rng)
        scores = referring_scores(samples)
        assert scores["mAP"] == pytest.approx(plain_map(samples), abs=1e-9)
        for name, value in plain_best(samples).items():
            assert scores[name] == pytest.approx(value, abs=1e-9), name
        seen.append(scores["mAP"])
    assert min(seen) < 20 and max(seen) > 60


def test_run_lengths_give_the_masks_back_and_the_same_numbers():
    rng = np.random.default_rng(1)
    samples = drawn_samples(rng)
    runs = [
        {
            "truth": encode_masks(one["truth"][None])[0],
            "masks": encode_masks(one["masks"]),
            "scores": one["scores"],
        }
        for one in samples
    ]
    assert np.array_equal(decode_mask(runs[0]["masks"][0]), samples[0]["masks"][0])
    assert score_samples(runs) == referring_scores(samples)


def test_zeros_and_ones_are_masks_too():
    wanted = referring_scores([sample(square(), (square(left=25), 0.9))])
    numbers = {"truth": square().astype(np.uint8), "masks": square(left=25)[None].astype(np.float32), "scores": [0.9]}
    assert referring_scores([numbers]) == wanted


@pytest.mark.parametrize(
    "change, said",
    [
        ({"scores": [0.5, 0.5]}, "sample 1: 1 masks, but scores of shape"),
        ({"scores": [math.nan]}, "sample 1: its scores are not all finite"),
        ({"masks": square()[None].astype(np.uint8) * 255}, "sample 1: masks has values other than 0 and 1, up to 255"),
        ({"masks": square()}, r"sample 1: masks has shape \(100, 100\), want \(Q, H, W\)"),
        ({"truth": square()[None]}, r"sample 1: truth has shape \(1, 100, 100\), want \(H, W\)"),
        ({"truth": square()[:50]}, "sample 1: a mask of 100 x 100 pixels, the truth has 50 x 100"),
    ],
)
def test_what_does_not_fit_names_the_sample(change, said):
    right = sample(square(), (square(), 0.9))
    with pytest.raises(ValueError, match=said):
        referring_scores([right, {**right, **change}])


def test_no_samples_and_missing_entries_are_refused():
    with pytest.raises(ValueError, match="no samples to score"):
        referring_scores([])
    with pytest.raises(ValueError, match="sample 0: 'scores' is missing"):
        referring_scores([{"truth": square(), "masks": square()[None]}])
