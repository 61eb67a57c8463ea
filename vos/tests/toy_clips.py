"""A small A2D-Sentences and a small Ref-YouTube-VOS without pictures: annotations and masks alone, not square."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

SIZE = (40, 60)
# video, instance, sentence, frames; the object is a rectangle that depends on all of them
SENTENCES = [
    ("aa", 1, "the left one", (3, 7)),
    ("aa", 2, "the right one, or what is left of it", (3,)),
    ("bb", 1, "a bird", (2,)),
]
EXPRESSIONS = {"vv": {"0": "1", "1": "2"}, "ww": {"0": "1"}}  # video -> expression -> object
FRAMES = {"vv": ("00000", "00005", "00010"), "ww": ("00000", "00005")}


def rectangle(video: str, instance: int, frame: int) -> np.ndarray:
    """The mask of an object, bool SIZE."""
    mask = np.zeros(SIZE, bool)
    top, left = 5 + ord(video[0]) % 3, 20 * instance - 15
    mask[top : top + 20, left + frame : left + frame + 12] = True
    return mask


def masks_of_sentences() -> dict[str, np.ndarray]:
    """By the sample's name."""
    return {f"{v} {f} {i}": rectangle(v, i, f) for v, i, _, frames in SENTENCES for f in frames}


def write_a2d(root: Path) -> Path:
    """The test split of such a data set; its videos are empty files."""
    texts, clips = root / "text_annotations", root / "Release" / "clips320H"
    clips.mkdir(parents=True)
    texts.mkdir()
    videos = list(dict.fromkeys(video for video, *_ in SENTENCES))
    lines = [f"{video},11,0,1,{SIZE[0]},{SIZE[1]},9,3,1" for video in videos]
    (root / "Release" / "videoset.csv").write_text("\n".join(lines) + "\n")
    with (texts / "a2d_annotation.txt").open("w", newline="") as file:
        csv.writer(file).writerows([("video_id", "instance_id", "query"), *((v, i, s) for v, i, s, _ in SENTENCES)])
    for video in videos:
        (clips / f"{video}.mp4").touch()
        own = [(i, frames) for v, i, _, frames in SENTENCES if v == video]
        for frame in sorted({frame for _, frames in own for frame in frames}):
            ids = [i for i, frames in own if frame in frames]
            masks = np.stack([rectangle(video, i, frame).T for i in ids]).astype(np.uint8)
            path = texts / "a2d_annotation_with_instances" / video / f"{frame:05d}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                file["instance"] = np.array(ids)
                file["reMask"] = masks if len(ids) > 1 else masks[0]
    return root


def write_refytvos(root: Path, *, with_objects: bool = True) -> Path:
    """The valid split of such a data set, with or without its masks; pictures are empty files."""
    videos = {}
    for video, expressions in EXPRESSIONS.items():
        entries = {key: {"exp": f"the {own} of {video}", "obj_id": own} for key, own in expressions.items()}
        if not with_objects:
            entries = {key: {"exp": entry["exp"]} for key, entry in entries.items()}
        videos[video] = {"expressions": entries, "frames": list(FRAMES[video])}
        for k, frame in enumerate(FRAMES[video]):
            picture = root / "valid" / "JPEGImages" / video / f"{frame}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.touch()
            if with_objects:
                path = root / "valid" / "Annotations" / video / f"{frame}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(objects_of(video, k), "P")
                image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
                image.save(path)
    for name, content in (("valid", videos), ("test", {})):
        file = root / "meta_expressions" / name / "meta_expressions.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"videos": content}))
    return root


def objects_of(video: str, place: int) -> np.ndarray:
    """The ids of the objects in a frame, uint8 SIZE; in the last frame there is none."""
    ids = np.zeros(SIZE, np.uint8)
    if place < len(FRAMES[video]) - 1:
        for own in (1, 2):
            ids[rectangle(video, own, place)] = own
    return ids
