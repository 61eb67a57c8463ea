"""Composed scenes have exact boxes and are functions of their seed; the small data set is COCO's form, odd files and
all.
"""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection import scenes, synthetic
from detection.annotations import read_annotations
from detection.configs import SHAPES
from detection.objects import CLASSES, KINDS, noise, place, things_of
from detection.scenes import (
    COUNT,
    EXTENT,
    FOREST,
    FOREST_EXTENT,
    LEAST_SEEN,
    SOLID,
    compose,
    compose_forest,
    write_sheet,
)
from detection.synthetic import CATEGORIES, ODDITIES, SPLITS, Synthetic, annotation_file, outline, run_lengths

SCENES = [compose(number) for number in range(40)]
SMALL = Synthetic(num_train=10, num_validation=8)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    assert synthetic.write_dataset(root, SMALL, workers=1)
    return root


def content(root: Path, split: str) -> dict:
    return json.loads(annotation_file(root, split).read_text())


def entries(root: Path, split: str, oddity: str) -> tuple[dict, list[dict]]:
    """The image entry of an odd picture, and its annotations."""
    found = content(root, split)
    image = found["images"][ODDITIES[split].index(oddity)]
    return image, [item for item in found["annotations"] if item["image_id"] == image["id"]]


def test_a_box_is_that_of_the_pixels_in_which_the_thing_is_seen():
    for scene in SCENES:
        assert scene.image.shape == (256, 256, 3) and scene.image.dtype == np.uint8
        assert len(scene.boxes) == len(scene.labels) == scene.owner.max() + 1
        for index, box in enumerate(scene.boxes):
            y, x = np.nonzero(scene.owner == index)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_a_thing_changes_the_picture_where_its_mask_says_and_only_there():
    rng = np.random.default_rng(0)
    plan = scenes._plan(rng, (64, 64), 4, np.arange(len(CLASSES)), EXTENT)
    layers, owner = scenes._arrange(rng, (64, 64), 4, plan, "train", EXTENT)
    canvas = np.full((64, 64, 3), -1000, np.float32)
    for layer in layers:
        scenes._paint(rng, canvas, layer, plan)
    solid = owner >= 0
    assert solid.any() and canvas[solid].min() > -1000 * (1 - SOLID / 255) - 1
    assert (canvas[~solid] < -1000 * (1 - SOLID / 255) + 300).all()


def test_at_least_half_of_every_thing_is_seen():
    hidden = 0
    for number in range(30):
        scene = compose([number, 1])
        for index, label in enumerate(scene.labels):
            seen = (scene.owner == index).sum()
            x0, y0, x1, y1 = scene.boxes[index]
            assert seen >= 12 and label < len(CLASSES)
            hidden += (scene.owner[int(y0) : int(y1), int(x0) : int(x1)] > index).any()
    assert hidden > 20  # things do hide others
    assert LEAST_SEEN == 0.5


def test_things_are_mostly_small_of_the_promised_number_and_size():
    sides = np.concatenate([scene.boxes[:, 2:] - scene.boxes[:, :2] for scene in SCENES])
    assert sides.max() <= EXTENT[1] + 4 and (sides.prod(1) < 32**2).mean() > 0.6
    numbers = [len(scene.labels) for scene in SCENES]
    assert min(numbers) >= 1 and max(numbers) <= COUNT[1] and max(numbers) > 18
    assert set(np.concatenate([compose(k).labels for k in range(60)]).tolist()) == set(range(len(CLASSES)))


def test_a_scene_is_a_function_of_its_seed_and_of_nothing_before():
    np.random.seed(0)
    again = compose(7)
    compose(8)
    np.random.seed(1)
    for one in (compose(7), SCENES[7]):
        assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(compose([7, 1]).image, again.image)


def test_the_groups_share_no_example_and_no_pair_of_shape_and_texture():
    pictures = {group: set() for group in ("train", "validation")}
    for group, seen in pictures.items():
        for examples in things_of(group):
            seen |= {np.asarray(thing.pyramid[0]).tobytes() for thing in examples}
    assert not pictures["train"] & pictures["validation"] and len(pictures["train"]) > 400
    assert len(CLASSES) == 20 and things_of("train")[-1][0].kind == KINDS[-1]


def test_other_sizes_labels_and_numbers_are_kept():
    for number in range(10):
        scene = compose(number, (100, 180), labels=[3, 15], count=(2, 4), extent=(8, 20))
        assert scene.image.shape == (100, 180, 3) and set(scene.labels.tolist()) <= {3, 15}
        assert len(scene.labels) <= 4 and (scene.boxes[:, 2:] - scene.boxes[:, :2]).max(initial=0) < 25
        assert (scene.boxes >= 0).all() and (scene.boxes[:, 2:] <= (180, 100)).all()
    assert compose(0, count=(0, 0)).boxes.shape == (0, 4)


def test_photographs_are_the_ground_of_about_half_of_the_scenes():
    photograph = np.zeros((90, 300, 3), np.uint8)  # smaller than a scene in one direction
    photograph[..., 0] = 255
    red = 0
    for number in range(20):
        image = compose(number, photographs=[photograph], count=(0, 0)).image.astype(int)
        red += bool(np.median(image[..., 0] - image[..., 1:].max(-1)) > 100)
    assert 5 <= red <= 15


def test_a_placed_thing_is_premultiplied_and_has_its_size():
    thing = things_of("train")[0][0]  # a disc
    patch = place(thing, (20.0, 10.0), 0.0)
    assert patch.shape == (43, 43, 4) and (patch[..., :3] <= patch[..., 3:] + 1).all()
    rows, columns = np.flatnonzero((patch[..., 3] >= SOLID).any(1)), np.flatnonzero((patch[..., 3] >= SOLID).any(0))
    assert len(columns) == pytest.approx(36, abs=1.5) and len(rows) == pytest.approx(18, abs=1.5)
    turned = place(thing, (20.0, 10.0), np.pi / 2)
    np.testing.assert_allclose(turned[..., 3], patch[..., 3].T, atol=40)  # a disc is the same from all sides


def test_noise_has_the_octaves_asked_for():
    field = noise(np.random.default_rng(0), 128, 200, ((64, 1.0),))
    fine = noise(np.random.default_rng(0), 128, 200, ((3, 1.0),))
    assert field.shape == (128, 200) and abs(np.diff(field)).mean() < 0.1 * abs(np.diff(fine)).mean()


def test_a_scene_takes_few_milliseconds():
    # 11 ms of an idle core; the bound is what a busy machine may need
    times = []
    for number in range(20):
        start = time.process_time()
        compose(number)
        times.append(time.process_time() - start)
    assert np.median(times) < 0.05


def test_the_files_are_read_as_the_scenes_they_are(written):
    for split, part in zip(SPLITS, ("train", "test"), strict=True):
        data = replace(SHAPES, root=written)
        if part == "train":
            with pytest.warns(UserWarning, match="2 boxes dropped or clipped"):
                annotations = read_annotations(data, part)
        else:
            annotations = read_annotations(data, part)
        assert [(c.id, c.name) for c in annotations.categories] == list(CATEGORIES.items())
        for number, picture in enumerate(annotations.pictures.values()):
            drawn = synthetic.draw(SMALL, split, number)
            assert picture.path.name == drawn.file_name and picture.id == drawn.image_id
            assert (picture.height, picture.width) == drawn.scene.image.shape[:2]
            assert len(picture.labels) == len(drawn.scene.labels) or drawn.oddity == "crowd"
            if drawn.oddity not in ("crowd", "empty", "beyond"):
                corners = picture.boxes + np.pad(picture.boxes[:, :2], ((0, 0), (2, 0)))
                np.testing.assert_array_equal(corners, drawn.scene.boxes)
                areas = np.bincount(drawn.scene.owner[drawn.scene.owner >= 0], minlength=len(corners))
                assert picture.areas.tolist() == areas.tolist()


def test_the_form_is_that_of_coco(written):
    for split in SPLITS:
        found = content(written, split)
        assert set(found) == {"info", "licenses", "images", "annotations", "categories"}
        assert [item["id"] for item in found["annotations"]] == list(range(1, len(found["annotations"]) + 1))
        keys = {"segmentation", "area", "iscrowd", "image_id", "bbox", "category_id", "id"}
        assert all(set(item) == keys for item in found["annotations"])
        assert all(len(Path(image["file_name"]).stem) == 12 for image in found["images"])
    ids = [{image["id"] for image in content(written, split)["images"]} for split in SPLITS]
    assert not ids[0] & ids[1]


def test_every_oddity_is_in_its_file(written):
    for split in SPLITS:

        def opened(oddity: str, split: str = split) -> Image.Image:
            return Image.open(written / split / entries(written, split, oddity)[0]["file_name"])

        assert opened("gray").mode == "L" and opened("cmyk").mode == "CMYK" and opened("deep").mode.startswith("I;16")
        assert np.asarray(opened("deep")).max() > 255
        image, _ = entries(written, split, "turned")
        turned = opened("turned")
        assert turned.getexif()[0x0112] == 6 and turned.size == (image["height"], image["width"])
        assert entries(written, split, "empty")[1] == []
        _, boxes = entries(written, split, "crowd")
        assert [item["iscrowd"] for item in boxes].count(1) == 1 and len(boxes) > 1
    _, boxes = entries(written, "train2017", "flat")
    assert boxes[-1]["bbox"][3] == 0 and boxes[-1]["area"] == 0
    image, boxes = entries(written, "train2017", "beyond")
    assert max(item["bbox"][0] + item["bbox"][2] for item in boxes) == image["width"] + 7


def test_masks_are_those_that_pycocotools_decodes(written):
    mask = pytest.importorskip("pycocotools.mask")
    image, boxes = entries(written, "train2017", "crowd")
    drawn = synthetic.draw(SMALL, "train2017", ODDITIES["train2017"].index("crowd"))
    (crowd,) = [item for item in boxes if item["iscrowd"]]
    size = image["height"], image["width"]
    decoded = mask.decode(mask.frPyObjects(crowd["segmentation"], *size)).astype(bool)
    assert decoded.sum() == crowd["area"] and not drawn.scene.owner[decoded].min() < 1
    y, x = np.nonzero(decoded)
    assert crowd["bbox"] == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
    blob = np.zeros((20, 30), bool)
    blob[4:9, 5:20] = blob[9:15, 8:11] = True
    polygon = mask.decode(mask.merge(mask.frPyObjects([outline(blob)], 20, 30)))
    np.testing.assert_array_equal(polygon.astype(bool), blob)
    blob[0, 0] = True
    np.testing.assert_array_equal(mask.decode(mask.frPyObjects(run_lengths(blob), 20, 30)).astype(bool), blob)


def test_the_same_seed_gives_the_same_files_in_any_number_of_processes(written, tmp_path):
    synthetic.write_dataset(tmp_path / "again", SMALL, workers=2)
    files = sorted(path for path in written.rglob("*") if path.is_file())
    assert len(files) == 10 + 8 + 2 + 1
    for path in files:
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(written)).read_bytes(), path
    other = synthetic.draw(replace(SMALL, seed=1), "train2017", 0)
    assert not np.array_equal(other.scene.image, synthetic.draw(SMALL, "train2017", 0).scene.image)


def test_an_interrupted_set_is_completed_and_other_data_is_never_overwritten(written, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(written, root)
    assert not synthetic.write_dataset(root, SMALL, workers=1)
    lost = next((root / "val2017").iterdir())
    before = lost.read_bytes()
    lost.unlink()
    assert synthetic.write_dataset(root, SMALL, workers=1) and lost.read_bytes() == before
    with pytest.raises(ValueError, match="another synthetic data set"):
        synthetic.write_dataset(root, Synthetic(), workers=1)
    (tmp_path / "train2017").mkdir()
    with pytest.raises(ValueError, match="not made here"):
        synthetic.write_dataset(tmp_path, SMALL, workers=1)


def test_a_forest_has_only_trees_of_their_size_whose_boxes_are_what_is_seen():
    for seed in range(4):
        scene = compose_forest([3, seed])
        assert {CLASSES[label] for label in scene.labels} <= set(FOREST)
        assert np.array_equal(scene.image, compose_forest([3, seed]).image)
        for index, (x0, y0, x1, y1) in enumerate(scene.boxes.astype(int)):
            rows, columns = np.nonzero(scene.owner == index)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
            assert max(x1 - x0, y1 - y0) <= 1.3 * FOREST_EXTENT[1]


def test_the_sheets_show_pictures_with_boxes(tmp_path):
    write_sheet(tmp_path / "scenes.png", SCENES[:5], columns=2)
    assert Image.open(tmp_path / "scenes.png").size == (512, 768)
    synthetic.write_contact_sheet(tmp_path / "tiny.png", SMALL, columns=4)
    assert Image.open(tmp_path / "tiny.png").size == (4 * 392, 2 * (14 + 315))  # twice the pictures' size, and gaps


@pytest.mark.parametrize("wrong", [{"num_train": 3}, {"num_validation": 0}, {"height": 20}, {"width": 10}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Synthetic(**wrong)
