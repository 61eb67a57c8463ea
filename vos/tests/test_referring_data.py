"""Windows, masks, mirrored samples and batches, against what the toy videos hold; and what happens to bad files."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.backbones.text import HashedWords, build_text
from engine.data.loader import build_loader
from engine.data.video import BrokenVideo, write_video
from vos.annotations import read_annotations
from vos.configs import ROWS
from vos.data import (
    Samples,
    build_dataset,
    centered_window,
    class_names,
    collate,
    make_sample,
    sample_of_frames,
)
from vos.sentences import mirror_sentence
from vos.synthetic import write_masks
from vos.tests.toy_referring import A, B, block, frames_of, write_a2d, write_jhmdb, write_refytvos

pytestmark = pytest.mark.filterwarnings("ignore:.*left out, as the instance is no number")


@pytest.fixture
def a2d(tmp_path):
    return write_a2d(tmp_path / "a2d")


def samples(data, split: str) -> Samples:
    return Samples(data, read_annotations(data, split), HashedWords(data.max_words), train=split == "train")


def grays(sample) -> list[int]:
    """The gray value of each frame, from which its number can be told: 20 + 10 k."""
    return (sample["video"][0, :, 20, 50] * 255).round().int().tolist()


def numbers(sample) -> list[int]:
    """The places, from 0, of the frames in the video."""
    return [round((value - 20) / 10) for value in grays(sample)]


def published_window(frame: int, length: int, count: int) -> list[int]:
    """MTTR's: places from 0, held inside the video, the annotated one at length // 2."""
    start = frame - 1 - length // 2
    end = frame - 1 + (length + 1) // 2
    return [min(max(i, 0), count - 1) for i in range(start, end)]


def test_a_window_is_that_of_mttr_also_at_the_ends_and_of_videos_shorter_than_it(a2d):
    for length in (1, 3, 4, 10, 30):
        own = samples(replace(a2d, window=length, flip=0.0), "test")
        assert len(own) == 5  # of two sentences, in three frames and in two
        for index, frame in enumerate((2, 6, 12)):
            sample = own[index, 0]
            assert numbers(sample) == published_window(frame, length, 12)
            assert sample["annotated"].nonzero().flatten().tolist() == [length // 2]
            assert sample["name"] == f"three {frame} 0" and sample["frame"] == 0
    assert centered_window(1, 4) == [-2, -1, 0, 1]


def test_only_the_frames_of_the_window_are_decoded(a2d, monkeypatch):
    asked = []
    own = samples(a2d, "test")
    read = own.cache.read_frames
    monkeypatch.setattr(own.cache, "read_frames", lambda path, wanted: asked.append(list(wanted)) or read(path, wanted))
    own[1, 0]
    assert asked == [[3, 4, 5, 6]]


def test_masks_of_all_objects_of_the_window_come_with_the_one_that_is_meant(a2d):
    sample = samples(a2d, "test")[3, 0]  # the cat in frame 2
    assert sample["referred"] == 1 and sample["visible"].tolist() == [True]
    assert sample["original_size"] == (40, 60) and sample["size"] == (40, 60)
    assert np.array_equal(sample["masks"][:, 0].numpy().astype(bool), np.stack([A, B]))
    wide = samples(replace(a2d, window=24, flip=0.0), "train")
    sample = wide[4, 0]  # the cat around its frame 6, in whose window are 2 and 12, too
    assert sample["annotated"].nonzero().flatten().tolist() == [8, 12, 18]
    assert sample["frame"] == 1 and sample["masks"].shape == (2, 3, 40, 60)
    assert sample["visible"].tolist() == [True, True, False] and not sample["masks"][1, 2].any()
    middle = samples(replace(a2d, window=24, flip=0.0, supervise="middle"), "train")[4, 0]
    assert middle["annotated"].nonzero().flatten().tolist() == [12] and middle["masks"].shape == (2, 1, 40, 60)


def test_sentences_as_samples_draw_their_frame_from_the_seed(a2d):
    own = samples(replace(a2d, samples="sentences", flip=0.0), "train")
    assert len(own) == 3 and len(samples(a2d, "train")) == 8
    names = {own[0, seed]["name"] for seed in range(20)}
    assert names == {"one 2 0", "one 6 0", "one 12 0"}
    assert torch.equal(own[0, 3]["video"], own[0, 3]["video"])


def test_a_mirrored_sample_is_mirrored_in_pixels_masks_and_words(a2d):
    plain, mirrored = (samples(replace(a2d, flip=flip), "train")[0, 5] for flip in (0.0, 1.0))
    assert torch.equal(mirrored["video"], plain["video"].flip(-1))
    assert torch.equal(mirrored["masks"], plain["masks"].flip(-1))
    words = HashedWords(64)
    assert torch.equal(plain["text"], words.features("the dog, on the left"))
    assert torch.equal(mirrored["text"], words.features("the dog, on the right"))


@pytest.mark.parametrize(
    "sentence, mirrored",
    [
        ("the man on the left is right of the leftmost dog", "the man on the right is left of the rightmost dog"),
        ("the bright upright piano, left-hand side", "the bright upright piano, right-hand side"),
        ("turning clockwise, turning counter-clockwise", "turning counter-clockwise, turning clockwise"),
        ("anticlockwise and counterclockwise", "clockwise and clockwise"),
        ("cleft brightly", "cleft brightly"),
        ("влево 左", "влево 左"),
    ],
)
def test_whole_words_change_places_and_parts_of_words_do_not(sentence, mirrored):
    assert mirror_sentence(sentence) == mirrored


def test_short_and_long_sides_are_resized_by_mttrs_rule_and_masks_with_them(a2d):
    sample = samples(replace(a2d, image_size=32, max_size=40, flip=0.0), "train")[0, 0]
    assert sample["size"] == (27, 40) and sample["masks"].shape[-2:] == (27, 40)  # round(40 * 40 / 60), 40
    small = sample["masks"][0, 0].bool().numpy()
    rows, columns = (np.arange(n) * full // n for n, full in ((27, 40), (40, 60)))
    assert np.array_equal(small, A[np.ix_(rows, columns)])


def test_a_batch_of_unequal_sizes_is_padded_at_right_and_bottom(a2d):
    text = HashedWords(64)
    clip = read_annotations(a2d, "test").clips[0]
    tall = make_sample(a2d, text, clip, frames_of(4).transpose(0, 2, 1, 3), [1, 2], [{"0": A.T}, {"4": B.T}], 0, "tall")
    wide = samples(a2d, "test")[0, 0]
    batch = collate([wide, tall | {"skipped": ["x"]}])
    assert batch["video"].shape == (2, 3, 4, 60, 60)
    assert torch.equal(batch["video"][0, :, :, :40], wide["video"]) and not batch["video"][0, :, :, 40:].any()
    assert batch["padding"][0].sum() == 20 * 60 and batch["padding"][1].sum() == 20 * 60
    assert not batch["padding"][0, :40].any() and not batch["padding"][1, :, :40].any()
    assert [mask.shape for mask in batch["masks"]] == [(2, 1, 60, 60), (2, 2, 60, 60)]
    assert batch["masks"][0].dtype == torch.uint8 and batch["num_targets"] == 6.0 and batch["frame"] == [0, 0]
    assert batch["referred"].tolist() == [0, 0] and batch["visible"][1].tolist() == [True, False]
    assert batch["text"].dtype == torch.int64 and batch["text"].shape == batch["text_padding"].shape == (2, 2)
    assert batch["skipped"] == ["x"] and batch["size"] == [(40, 60), (60, 40)]
    assert batch["annotated"].tolist() == [[False, False, True, False], [False, True, True, False]]


def test_shorter_sentences_are_padded_with_zeros(a2d):
    text = HashedWords(64)
    one, other = (sample_of_frames(a2d, text, frames_of(3), words, "v") for words in ("a red dog", "dog"))
    batch = collate([one, other])
    assert batch["text_padding"].tolist() == [[False, False, False], [False, True, True]]
    assert batch["text"][1, 1:].tolist() == [0, 0] and batch["text"][1, 0] == batch["text"][0, 2]
    assert batch["annotated"].all() and batch["frame"] == [-1, -1]
    with pytest.raises(ValueError, match="the sentence is empty"):
        sample_of_frames(a2d, text, frames_of(3), " ", "v")


def test_a_sentence_of_300_words_is_cut_with_a_warning_and_other_scripts_are_words(a2d):
    text = HashedWords(64)
    with pytest.warns(UserWarning, match="a sentence of 300 tokens is cut to 64: 'a a a"):
        assert text.features("a " * 300).shape == (64,)
    for sentence in ("красная звезда слева", "左边的红星", "!?", "🙂"):
        sample = sample_of_frames(a2d, text, frames_of(3), sentence, "v")
        assert 1 <= len(sample["text"]) <= 3 and sample["text"].min() > 0 and sample["text"].max() <= 2048


def test_a_frame_that_is_annotated_and_not_in_the_video_is_named(a2d):
    write_video(a2d.root / "Release" / "clips320H" / "three.mp4", frames_of(9), 6)
    own = samples(a2d, "test")
    assert own[0, 0]["name"] == "three 2 0"
    with pytest.raises(BrokenVideo, match="three.mp4: has 9 frames, annotated is frame 12; is it the right video"):
        own[2, 0]
    with pytest.warns(UserWarning, match="skipped: .*three.mp4: has 9 frames"):
        gray = samples(replace(a2d, on_broken="skip"), "test")[2, 0]
    assert gray["skipped"] == ["three 12 0"] and gray["name"] == "three 12 0"
    assert np.array_equal(gray["masks"][0, 0].numpy(), A) and gray["video"].std() < 1e-6


def test_a_mask_that_was_stored_upright_or_in_another_size_is_named(a2d):
    folder = a2d.root / "text_annotations" / "a2d_annotation_with_instances" / "three"
    write_masks(folder / "00002.h5", np.stack([A.T]), [0])
    with pytest.raises(
        BrokenVideo, match=r"three/00002.h5: has a mask of 40 x 60 for frames of 60 x 40 \(width x height\): were they"
    ):
        samples(a2d, "test")[0, 0]
    write_masks(folder / "00002.h5", np.zeros((1, 40, 40), bool), [0])
    with pytest.raises(BrokenVideo, match="three/00002.h5: has a mask of 40 x 40 for frames of 60 x 40"):
        samples(a2d, "test")[0, 0]


def test_a_mask_of_nearly_the_same_shape_is_resized_as_in_mttr(a2d):
    folder = a2d.root / "text_annotations" / "a2d_annotation_with_instances" / "three"
    large = A.repeat(2, 0).repeat(2, 1)
    write_masks(folder / "00002.h5", large[None, :, :-1], [0])
    sample = samples(a2d, "test")[0, 0]
    assert sample["original_size"] == (80, 119) and sample["size"] == (40, 60)
    assert (sample["masks"][0, 0].numpy() != A).sum() <= 20  # a column of ten at each side


def test_broken_files_are_replaced_in_training_and_gray_in_evaluation(a2d):
    for name in ("one", "three"):
        (a2d.root / "Release" / "clips320H" / f"{name}.mp4").write_bytes(b"no video")
    with pytest.raises(BrokenVideo, match="one.mp4"):
        samples(a2d, "train")[0, 0]
    skipping = replace(a2d, on_broken="skip")
    with pytest.warns(UserWarning, match="skipped: .*one.mp4"):
        sample = samples(skipping, "train")[0, 0]
    assert sample["name"] == "two 2 0" and sample["skipped"] == ["one 2 0"]
    with pytest.warns(UserWarning, match="skipped: .*one.mp4"):
        assert samples(skipping, "train")[4, 0]["skipped"] == ["one 6 3"]
    own = samples(skipping, "test")
    with pytest.warns(UserWarning, match="skipped: .*three.mp4"):
        names = [own[i, 0]["name"] for i in range(5)]
    assert names == ["three 2 0", "three 6 0", "three 12 0", "three 2 3", "three 6 3"]


def test_jhmdb_windows_stay_within_the_frames_that_have_masks(tmp_path):
    own = samples(write_jhmdb(tmp_path), "test")
    assert [numbers(own[i, 0]) for i in range(3)] == [[0, 0, 0, 1], [3, 4, 5, 6], [4, 5, 6, 6]]
    assert [own[i, 0]["name"] for i in range(3)] == ["v1 1 1", "v1 6 1", "v1 7 1"]
    assert np.array_equal(own[0, 0]["masks"][0, 0].numpy(), A) and np.array_equal(own[1, 0]["masks"][0, 0].numpy(), B)


def test_refytvos_trains_on_consecutive_windows_in_which_the_object_is_seen(tmp_path):
    own = samples(replace(write_refytvos(tmp_path), flip=0.0), "train")
    assert own.items == [(0, 0), (0, 3), (1, 0), (1, 3), (2, 0)]  # of 7 frames 0..3 and 3..6, the last one moved back
    cat, dog, bird = own[0, 0], own[2, 0], own[4, 0]
    assert numbers(cat) == [0, 1, 2, 3] and cat["annotated"].all() and cat["masks"].shape == (1, 4, 40, 60)
    assert numbers(dog) == [3, 4, 5, 6]  # in the first window there is no dog
    assert dog["referred"] == 1 and dog["visible"].tolist() == [False, False, True, True] and dog["name"] == "long 1"
    assert numbers(bird) == [0, 1, 1, 1] and bird["annotated"].tolist() == [True, True, False, False]
    assert bird["masks"].shape == (2, 2, 40, 60) and bird["frame"] == -1


def test_refytvos_is_evaluated_in_all_listed_frames_with_or_without_masks(tmp_path):
    own = samples(write_refytvos(tmp_path), "test")
    known, unknown = own[0, 0], own[1, 0]
    assert numbers(known) == [0, 1, 2, 3, 4] and known["name"] == "seen 0" and known["annotated"].all()
    assert known["visible"].tolist() == [False, False, False, True, True] and known["frame"] == -1
    assert unknown["masks"].shape == (1, 5, 40, 60) and not unknown["masks"].any() and not unknown["visible"].any()
    longer = sample_of_frames(own.data, own.text, frames_of(3), "a dog", "v")
    with pytest.raises(ValueError, match="videos of 3 to 5 frames in a batch; use --run.evaluation-batch 1"):
        collate([known, longer])


def test_a_frame_of_another_size_and_an_object_that_is_never_seen_are_named(tmp_path):
    data = write_refytvos(tmp_path)
    own = samples(data, "train")
    folder = tmp_path / "train" / "JPEGImages" / "long"
    Image.new("RGB", (30, 40)).save(folder / "00010.jpg")
    with pytest.raises(BrokenVideo, match="00010.jpg: is 30 x 40, the first frame 60 x 40"):
        own[0, 0]
    for name in ("00025", "00030"):
        Image.fromarray(block(0, 0).astype(np.uint8)).save(tmp_path / "train" / "Annotations" / "long" / f"{name}.png")
    with pytest.raises(BrokenVideo, match="long: has no frame with object 2, which 'the dog' is about"):
        own[2, 0]


def test_a_dataset_is_built_of_a_row_and_runs_through_a_loader_with_workers(a2d):
    base = ROWS["referring_tiny_dr2net"]()
    config = replace(base, data=replace(a2d, samples="sentences"))
    dataset = build_dataset(config, "train")
    assert class_names(config) == ["referred"]
    own = {"batch_size": 2, "seed": 0, "train": True, "collate": collate}
    batches = [[b["name"] for b in build_loader(dataset, num_workers=workers, **own)] for workers in (0, 1)]
    assert batches[0] == batches[1] and len(batches[0]) == 1


def test_the_files_of_a_dataset_are_its_annotations_videos_and_masks(a2d, tmp_path):
    files = samples(a2d, "test").files()
    assert {path.name for path in files.annotations} >= {"videoset.csv", "a2d_annotation.txt"}
    assert {path.name for path in files.samples} == {"three.mp4", "00002.h5", "00006.h5", "00012.h5"}
    assert all(path.is_file() for path in files.samples)
    refytvos = samples(write_refytvos(tmp_path / "r"), "test").files().samples
    assert {path.name for path in refytvos} == {"00000.jpg", "00020.jpg", "00000.png", "00020.png"}


def test_an_encoder_of_another_width_than_the_model_is_named(a2d, monkeypatch):
    other = SimpleNamespace(width=32, features=None, prepare=lambda sentences: None)
    monkeypatch.setattr("vos.data.build_text", lambda *arguments, **named: other)
    with pytest.raises(ValueError, match="--model.text-width 96: the encoder words has 32 channels; set it so"):
        build_dataset(replace(ROWS["referring_tiny_dr2net"](), data=a2d), "test")


def test_mirrored_sentences_are_prepared_for_training_alone(a2d):
    asked: list[str] = []
    text = SimpleNamespace(width=0, features=build_text("words", 64).features, prepare=asked.extend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for split in ("train", "test"):
            Samples(a2d, read_annotations(a2d, split), text, train=split == "train")
    assert "the dog, on the right" in asked and asked.count("the cat jumping") == 1
