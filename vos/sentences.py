"""What a mirrored frame does to its sentence: whole words left and right change places, and the two ways to turn.

MTTR replaces parts of words, so that "bright" becomes "bleft" and "upright" "upleft". Not here: encoders.
"""

import re

_PAIRS = (
    ("left", "right"),
    ("leftmost", "rightmost"),
    ("leftward", "rightward"),
    ("leftwards", "rightwards"),
    ("lefthand", "righthand"),
    ("clockwise", "counter-clockwise"),
)
_MIRRORED = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}
_MIRRORED |= dict.fromkeys(("counterclockwise", "counter clockwise", "anticlockwise", "anti-clockwise"), "clockwise")
# Longer ones first, so that counter-clockwise is not found as clockwise.
_WORD = re.compile(r"\b(" + "|".join(sorted(map(re.escape, _MIRRORED), key=len, reverse=True)) + r")\b")


def mirror_sentence(sentence: str) -> str:
    """The lower-cased sentence as it holds of the mirrored frames."""
    return _WORD.sub(lambda found: _MIRRORED[found[1]], sentence)
