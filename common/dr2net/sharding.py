"""Blocks that PyTorch's FSDP2 has sharded by themselves: `fully_shard(block)` for each, then `fully_shard(model)`.

    door = door_of(block)            None unless the block is sharded by itself
    door.given(x)                    what the block was called with, before FSDP put x in its place
    door.open(result, x, opened)     opened(x) is called with the x that leaves the block, after FSDP's own hooks
    refuse_sharded(modules, ...)     parameters that are sharded while a branch runs

FSDP gathers a block's parameters in a hook before it is called and lets go of them in one after it; a hook on the
gradient of its output gathers them again, and a node behind its input lets go of them and reduces their gradients. A
reversible block's first node has that input and its last node makes that output, so all four are where they have to
be, the recomputation included. Only two things differ from a block alone: what the block is handed is another tensor
than was given to it (a view; or a copy, cast as a MixedPrecisionPolicy says), and its parameters are other objects
inside a call than outside. So a pass is found by what was given, in hooks before and behind FSDP's; the streams stay as
they are, whatever FSDP casts between blocks; and branches are looked up inside the call.

Nothing here or elsewhere in this library is told what FSDP does in its private parts. Not here: how a pass is found
(`sequence.py`).
"""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dr2net.entry import first_argument

_DOORS: "WeakKeyDictionary[nn.Module, Door]" = WeakKeyDictionary()


class Door:
    """Notes what enters a sharded block before FSDP's hooks, and what leaves it after them."""

    def __init__(self, block: nn.Module) -> None:
        self._entering: Any = None
        self._leaving: tuple[int, Callable[[Tensor], None]] | None = None
        self.shards: list[Tensor] = []  # of trainable parameters, as the block held them at its last call
        self._handles = (
            block.register_forward_pre_hook(self._enters, prepend=True, with_kwargs=True),
            block.register_forward_hook(self._leaves),
        )

    def _enters(self, block: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        self._entering, self._leaving = first_argument(block, args, named)[0], None
        self.shards = [p for p in block.parameters() if p.requires_grad and is_dtensor(p)]

    def _leaves(self, block: nn.Module, args: tuple, output: Any) -> None:
        leaving, self._leaving, self._entering = self._leaving, None, None
        if leaving is not None:
            position, opened = leaving
            opened(tree_leaves(output)[position])

    def given(self, x: Tensor) -> Tensor:
        """What was given to the block that is now handed x; x itself in the call in which the door was put there, and
        where x is neither a view of that nor a cast copy, since then somebody else's hook has changed it.
        """
        given, self._entering = self._entering, None
        if not isinstance(given, Tensor) or given.shape != x.shape:
            return x
        same = x.untyped_storage()._cdata == given.untyped_storage()._cdata
        return given if same or x.dtype != given.dtype else x

    def open(self, result: Any, x: Tensor, opened: Callable[[Tensor], None]) -> None:
        """This call of the block makes `result`, in which x is; `opened` gets what its caller will find in that place,
        which FSDP may have cast.
        """
        self._leaving = next(n for n, leaf in enumerate(tree_leaves(result)) if leaf is x), opened

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def is_sharded(block: nn.Module) -> bool:
    """`fully_shard(block)` was called, or `fully_shard` with a list that has it."""
    return any(cls.__name__ == "FSDPModule" for cls in type(block).__mro__)


def put_door(block: nn.Module) -> None:
    """On a sharded block, once; from then on it is the first and the last to see what passes."""
    if is_sharded(block) and block not in _DOORS:
        _DOORS[block] = Door(block)


def take_door(block: nn.Module) -> None:
    """Undo `put_door`."""
    if (door := _DOORS.pop(block, None)) is not None:
        door.remove()


def door_of(block: nn.Module) -> Door | None:
    return _DOORS.get(block)


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "_local_tensor")


def refuse_sharded(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter], name: str) -> None:
    """RuntimeError for parameters that are sharded when branch `name` runs: what it uses is then something else.

    modules: those of the branch; parameters: its trainable ones.
    """
    parameters = list(parameters)
    if any(is_dtensor(parameter) for parameter in parameters):
        # a block that is a part of its own branch has a door
        inner = next((m for part in modules for m in part.modules() if is_sharded(m) and door_of(m) is None), None)
        if inner is not None:
            raise RuntimeError(
                f"{type(inner).__name__} inside branch {name} is sharded by itself, so the branch's parameters are "
                "sharded (DTensor) while it runs and its gradients would be lost: call fully_shard on the block itself "
                "and then on the model, not on the modules inside a block"
            )
        raise RuntimeError(
            f"parameters of branch {name} are sharded (DTensor) while it runs, so its gradients would be lost. With "
            "fully_shard: call it on each block and then on the model, and train by calling the model, which gathers "
            "them. Tensor parallelism (parallelize_module) inside reversible blocks is not supported: leave them out "
            "of its plan, and shard them with fully_shard"
        )
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise RuntimeError(
            f"parameters of branch {name} are partitioned by DeepSpeed ZeRO-3, which empties them between forward and "
            "backward: use ZeRO-1 or ZeRO-2, or PyTorch's fully_shard on whole blocks"
        )
