"""Dr2Net inside other people's training loops: one file per library, read when it is first named.

    dr2net.integrations.hf.Dr2Net           a callback of transformers' Trainer
    dr2net.integrations.lightning.Dr2Net    a callback of Lightning's Trainer

Both convert the model before it is wrapped, move alpha and beta, and write them into checkpoints. Not here: a loop of
one's own, which needs `dr2net.convert` and `dr2net.Schedule.apply` alone.
"""

import importlib
from types import ModuleType

LIBRARIES = ("hf", "lightning")


def __getattr__(name: str) -> ModuleType:
    if name not in LIBRARIES:
        raise AttributeError(f"dr2net.integrations has no {name!r}; it has {', '.join(LIBRARIES)}")
    return importlib.import_module(f"{__name__}.{name}")
