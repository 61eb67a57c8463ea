"""What a module keeps besides parameters: a branch that runs twice must not move it twice.

BatchNorm's running statistics move in the first run and are put back around the second. Any other buffer that changes
in forward is refused, since the branch would then not compute the same twice, but for a table made anew for another
size of input: a buffer outside the state dict that is replaced by one of another shape. If that is none, but a cache
that grows, the recomputation differs and is an error (`node.py`). Not here: randomness (`rng.py`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BufferVersions = list[tuple[nn.Module, str, Tensor, int]]  # module, name of the buffer, the buffer, its version


def _modules_with_buffers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for part in modules for module in part.modules() if module._buffers]


def modes_of(modules: Iterable[nn.Module]) -> list[bool]:
    """Training or evaluation mode, of each module and those inside it."""
    return [module.training for part in modules for module in part.modules()]


def buffer_versions(modules: Iterable[nn.Module]) -> BufferVersions:
    found = []
    for module in _modules_with_buffers(modules):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            found += [(module, name, b, b._version) for name, b in module._buffers.items() if b is not None]
    return found


def refuse_changed_buffers(name: str, before: BufferVersions) -> None:
    """Only BatchNorm may change its buffers: its output in training does not depend on them, so it can be run again."""
    for module, key, buffer, version in before:
        now = module._buffers.get(key)
        table = key in module._non_persistent_buffers_set and now is not None and now.shape != buffer.shape
        if not table and (now is not buffer or buffer._version != version):
            raise ValueError(
                f"{type(module).__name__} in branch {name} changes its buffer {key!r} in forward, which would "
                "happen again when the branch is recomputed; put it in eval mode or leave its block out"
            )


class StatisticsKept:
    """Around a recomputation of `modules`: BatchNorm's running statistics, which have moved already, are put back."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = modules

    def __enter__(self) -> "StatisticsKept":
        norms = [m for m in _modules_with_buffers(self.modules) if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.values = [(b, b.clone()) for m in norms if m.training for b in m._buffers.values() if b is not None]
        return self

    def __exit__(self, *_: object) -> None:
        self.put_back()

    def put_back(self) -> None:
        with torch.no_grad():
            for buffer, value in self.values:
                buffer.copy_(value)
