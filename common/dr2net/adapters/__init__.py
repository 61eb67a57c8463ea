"""The branches of blocks of other libraries: one file per library, read when a block of it is first met.

Each file has `register`, which tells `branches_of` about the blocks of its library. Not here: what a branch is, and how
to register one's own (`branches.py`).
"""

import functools
import importlib

from torch import nn

LIBRARIES = ("timm", "torchvision", "pytorchvideo")


def register(cls: type[nn.Module]) -> None:
    """Make blocks of class `cls` known, if they are of a library that we know; of transformers this class alone."""
    library = cls.__module__.split(".")[0]
    if library == "transformers":
        from dr2net.adapters import transformers

        transformers.register(cls)
    elif library in LIBRARIES:
        _register_all(library)


@functools.cache
def _register_all(library: str) -> None:
    importlib.import_module(f"{__name__}.{library}").register()
