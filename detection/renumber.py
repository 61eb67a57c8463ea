"""Predictions that name their pictures and classes, brought to the ids of a ground truth.

    predictions = with_ids_of(content, truth.files, truth.names, "detections.json")

YOLO's files have no ids, so ours count pictures from 1 and classes from 0, as does `predict` on a folder. The same
pictures in COCO's form have other ids: compared number by number, right boxes would be wrong, in silence where the
numbers happen to be there. So detections of such runs carry "file_name" and "category", and where these disagree with
the ground truth's they decide. Files of others, which carry neither, pass as they are. Not here: what is checked
(metric.py).
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def with_ids_of(content: Any, files: Mapping[int, str], names: Mapping[int, str], where: str) -> Any:
    """The entries with the ids of the ground truth; what names nothing, or agrees, or is no such list, as it is.

    files, names: of the pictures and classes of the ground truth, by id; `where` begins the messages. A warning where
    names decided. ValueError where a name is not there, or there twice, although its number is.
    """
    for key, name, known in (("image_id", "file_name", files), ("category_id", "category", names)):
        content = _renumbered(content, key, name, known, where)
    return content


def _renumbered(content: Any, key: str, name: str, known: Mapping[int, str], where: str) -> Any:
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        return content
    given = {(entry.get(key), entry.get(name)) for entry in content if isinstance(entry.get(name), str)}
    if not known or not content or not all(isinstance(entry.get(name), str) for entry in content):
        return content
    own = {number: _last(text) for number, text in known.items()}
    different = sorted((str(number), text) for number, text in given if own.get(number) != _last(text))
    if not different:
        return content
    counts = Counter(own.values())
    numbers = {text: number for number, text in own.items() if counts[text] == 1}
    lacking = sorted(text for _, text in given if _last(text) not in numbers)
    ours = Counter(_last(text) for _, text in given)  # one name under two numbers is not one picture
    lacking += sorted(text for text, count in ours.items() if count > 1)
    if lacking:
        if any(number not in own for number, _ in given):
            return content  # unknown ids have an error of their own
        number, text = different[0]
        raise ValueError(
            f"{where}: {key} {number} is {text[:60]!r} there and {own[int(number)][:60]!r} in the ground truth, which "
            f"has not exactly one {lacking[0][:60]!r}; give the ground truth of these predictions"
        )
    number, text = different[0]
    there = numbers[_last(text)]
    warnings.warn(
        f"{where}: its {key} are others than the ground truth's ({text[:60]!r} is {number} there, {there} in the "
        f"ground truth): {name} decides",
        stacklevel=4,
    )
    return [{**entry, key: numbers[_last(entry[name])]} for entry in content]


def _last(text: str) -> str:
    """A file's name without its folders; a class has none."""
    return PurePath(text).name or text
