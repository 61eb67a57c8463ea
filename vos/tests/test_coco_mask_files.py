"""Masks as JSON in COCO's form: what is written is read back, what is hostile is one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vos.coco_files import read_samples, read_truth_file, write_proposals, write_truth
from vos.metric import decode_mask, encode_masks, score_samples


def written(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    runs = encode_masks(rng.random((5, 30, 50)) < 0.3)
    write_truth(tmp_path / "truth.json", {"a 1 1": runs[0], "b 2 1": runs[1]})
    write_proposals(tmp_path / "found.json", {"a 1 1": (runs[2:4], [0.25, 0.5]), "b 2 1": (runs[1:2], [1 / 3])})
    return tmp_path / "truth.json", tmp_path / "found.json"


def test_what_is_written_is_read_back(tmp_path):
    rng = np.random.default_rng(0)
    masks = rng.random((5, 30, 50)) < 0.3
    samples = read_samples(*written(tmp_path))
    assert [one["scores"].tolist() for one in samples] == [[0.25, 0.5], [1 / 3]]
    assert np.array_equal(decode_mask(samples[0]["masks"][1]), masks[3])
    assert np.array_equal(decode_mask(samples[1]["truth"]), masks[1])
    assert score_samples(samples)["P@0.9"] == 50


def test_numbers_may_stand_for_images_as_in_files_of_others(tmp_path):
    truth, found = written(tmp_path)
    for path in (truth, found):
        path.write_text(path.read_text().replace('"a 1 1"', "7").replace('"b 2 1"', "12"))
    assert list(read_truth_file(truth)) == [7, 12] and len(read_samples(truth, found)) == 2


def test_empty_full_and_random_masks_pass_the_check_of_run_lengths(tmp_path):
    rng = np.random.default_rng(1)
    for size in ((1, 1), (7, 3), (40, 60), (500, 700)):
        for share in (0, 0.001, 0.5, 1):
            runs = encode_masks(rng.random((1, *size)) < share)
            write_truth(tmp_path / "truth.json", {"a": runs[0]})
            assert read_truth_file(tmp_path / "truth.json")["a"] == runs[0]


def change(path: Path, edit: Any) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "edit, said",
    [
        (
            lambda c: c[0].update(image_id="zz"),
            r"found.json: prediction 0: image_id 'zz' is not in .*truth.json, which",
        ),
        (lambda c: c[0].update(image_id=None), "prediction 0: image_id is None"),
        (lambda c: c[1].update(score="high"), "prediction 1: score is 'high', not a finite number"),
        (lambda c: c[1].pop("score"), "prediction 1: score is None"),
        (lambda c: c[0].update(segmentation=[[1, 2, 3, 4, 5, 6]]), r"prediction 0: segmentation is \[\[1, 2"),
        (lambda c: c[0]["segmentation"].update(size=[30, -50]), r"prediction 0: size is \[30, -50\]"),
        (lambda c: c[0]["segmentation"].update(size=[50, 30]), r"prediction 0: a mask of \[50, 30\] pixels, the truth"),
        (lambda c: c[0]["segmentation"].update(counts="1"), "do not add up to 30 x 50 pixels"),
        (lambda c: c[0]["segmentation"].update(counts="o" * 40), "letters that are no run lengths"),
        (lambda c: c[0]["segmentation"].update(counts="\u00fc"), "counts are no mask"),
        (lambda c: c[0]["segmentation"].update(counts="P"), "its last run is cut off"),
        (lambda c: c[0]["segmentation"].update(counts="O1"), "a run of negative length"),
    ],
)
def test_proposals_that_are_no_masks_are_one_line(tmp_path, edit, said):
    truth, found = written(tmp_path)
    change(found, edit)
    with pytest.raises(ValueError, match=said):
        read_samples(truth, found)


def test_images_without_predictions_are_told_and_count_as_missed(tmp_path):
    truth, found = written(tmp_path)
    change(found, lambda c: [c.remove(one) for one in [*c] if one["image_id"] == "b 2 1"])
    with pytest.warns(UserWarning, match="1 of 2 images have no predictions and count as missed: b 2 1"):
        assert [len(sample["masks"]) for sample in read_samples(truth, found)][1] == 0


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda c: c.pop("images"), "is not an object with"),
        (lambda c: c["annotations"].pop(), "1 images have no true mask, the first is 'b 2 1'"),
        (lambda c: c["annotations"][1].update(image_id="a 1 1"), "annotation 1: image 'a 1 1' has a true mask already"),
        (lambda c: (c["images"].clear(), c["annotations"].clear()), "has no true masks"),
    ],
)
def test_truth_of_another_form_is_one_line(tmp_path, edit, said):
    truth, found = written(tmp_path)
    change(truth, edit)
    with pytest.raises(ValueError, match=said):
        read_samples(truth, found)
    with pytest.raises(ValueError, match=r"is not a list of"):
        read_samples(written(tmp_path)[0], truth)
