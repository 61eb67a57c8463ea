"""A small A2D-Sentences, JHMDB-Sentences and Ref-YouTube-VOS, not square: what is masked is bright."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

from engine.data.video import write_video

SIZE = (40, 60)
# video, instance, sentence, frames; the object is a rectangle that depends on all of them
SENTENCES = [
    ("aa", 1, "the left one", (3, 7)),
    ("aa", 2, "the right one, or what is left of it", (3,)),
    ("bb", 1, "a bird", (2,)),
]
EXPRESSIONS = {"vv": {"0": "1", "1": "2"}, "ww": {"0": "1"}}  # video -> expression -> object
LENGTH = 9  # frames of a video of A2D
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
    """The test split of such a data set."""
    texts, clips = root / "text_annotations", root / "Release" / "clips320H"
    clips.mkdir(parents=True)
    texts.mkdir()
    videos = list(dict.fromkeys(video for video, *_ in SENTENCES))
    lines = [f"{video},11,0,1,{SIZE[0]},{SIZE[1]},9,3,1" for video in videos]
    (root / "Release" / "videoset.csv").write_text("\n".join(lines) + "\n")
    with (texts / "a2d_annotation.txt").open("w", newline="") as file:
        csv.writer(file).writerows([("video_id", "instance_id", "query"), *((v, i, s) for v, i, s, _ in SENTENCES)])
    for video in videos:
        own = [(i, frames) for v, i, _, frames in SENTENCES if v == video]
        frames = [np.any([rectangle(video, i, frame) for i, _ in own], axis=0) for frame in range(1, LENGTH + 1)]
        write_video(clips / f"{video}.mp4", picture_of(np.stack(frames)), fps=6)
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
    """The valid split of such a data set, with or without its masks."""
    videos = {}
    for video, expressions in EXPRESSIONS.items():
        entries = {key: {"exp": f"the {own} of {video}", "obj_id": own} for key, own in expressions.items()}
        if not with_objects:
            entries = {key: {"exp": entry["exp"]} for key, entry in entries.items()}
        videos[video] = {"expressions": entries, "frames": list(FRAMES[video])}
        for k, frame in enumerate(FRAMES[video]):
            picture = root / "valid" / "JPEGImages" / video / f"{frame}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture_of(objects_of(video, k) > 0)).save(picture)
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


def write_jhmdb(root: Path) -> Path:
    """One video of six frames, of which the last has no mask; two frames are to be evaluated."""
    masks = np.stack([rectangle("rr", 1, frame) for frame in range(1, 6)])
    pictures, puppets = (root / name / "run" / "rr" for name in ("Rename_Images", "puppet_mask"))
    for folder in (pictures, puppets):
        folder.mkdir(parents=True)
    for frame in range(1, 7):
        Image.fromarray(picture_of(masks[min(frame, 5) - 1])).save(pictures / f"{frame:05d}.png")
    savemat(puppets / "puppet_mask.mat", {"part_mask": masks.transpose(1, 2, 0).astype(np.uint8)})
    listed = [
        ["rr", f"./x/Rename_Images/run/rr/{frame:05d}.png", "./x/puppet_mask/run/rr/puppet_mask.mat", 5, "The runner"]
        for frame in (2, 5)
    ]
    (root / "jhmdb_sentences_samples_metadata.json").write_text(json.dumps(listed))
    return root


def picture_of(masks: np.ndarray) -> np.ndarray:
    """Masks (..., H, W) as gray pictures, uint8 (..., H, W, 3)."""
    return np.repeat(np.where(masks, 220, 60).astype(np.uint8)[..., None], 3, axis=-1)
