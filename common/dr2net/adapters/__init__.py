"""The branches of blocks of other libraries: one file per library, read when a block of it is first met.

Each file has `register`, which tells `branches_of` about the blocks of its library. Not here: what a branch is, and how
to register one's own (`branches.py`).
"""

import functools
import importlib

LIBRARIES = ("timm", "torchvision", "transformers", "pytorchvideo")


@functools.cache
def register(library: str) -> None:
    """Make the blocks of `library` known, if we know any; once."""
    if library in LIBRARIES:
        importlib.import_module(f"{__name__}.{library}").register()
