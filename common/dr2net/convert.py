"""Turn a pretrained model into its reversible surrogate, in place, and back.

`convert` replaces each nn.Sequential or nn.ModuleList that holds convertible blocks by a `ReversibleSequence` with the
same children, so state_dict keys do not change and checkpoints fit both ways. At (alpha, beta) = (1, 0), where it
starts, the converted model computes what the original computes. Not here: what the branches of a block are
(`branches.py`).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from dr2net.branches import find_branches
from dr2net.module_state import StatisticsKept
from dr2net.options import Options
from dr2net.reversible import ReversibleSequence, refuse_hooks


@dataclass(frozen=True)
class Report:
    """What became reversible, what did not, and why."""

    sequences: tuple[tuple[str, int, int], ...]  # name of the container, reversible blocks, branches
    ordinary: tuple[tuple[str, str], ...]  # name of a block that runs as it is, reason
    reversible_parameters: int
    all_parameters: int

    def __str__(self) -> str:
        lines = [
            f"reversible: {name}: {blocks} blocks, {branches} branches" for name, blocks, branches in self.sequences
        ]
        lines += [f"as it was:  {name}: {reason}" for name, reason in self.ordinary]
        share = self.reversible_parameters / max(1, self.all_parameters)
        return "\n".join([*lines, f"{share:.0%} of {self.all_parameters:,} parameters are in reversible blocks"])


def convert(model: nn.Module, options: Options | None = None, **changes: Any) -> Report:
    """Make the residual blocks of `model` reversible, in place.

    options: how, see `dr2net.Options`; None: the defaults. changes: single options by name, as in
    `convert(model, chunk_mib=256, recompute_rest=True)`. TypeError for a name that is none.

    Raises ValueError if nothing in the model can be converted, naming the blocks and the reasons; if the model is
    converted already; if a block carries forward hooks (they would not fire) or the model's own gradient checkpointing
    is on.
    """
    options = replace(options or Options(), **changes)
    sequences, ordinary, inside = [], [], set()
    found = list(_containers(model))
    containers = {}
    for parent, attribute, name, container in found:
        refuse_hooks(container, name)
        sequence = ReversibleSequence(container, options)
        blocks = 0
        for child, block in container._modules.items():
            branches, reason = find_branches(block)
            if not branches:
                ordinary.append((f"{name}.{child}", reason))
                continue
            _check(block, f"{name}.{child}", [p for branch in branches for m in branch.modules for p in m.parameters()])
            blocks += 1
            inside.update(block.parameters())
        sequences.append((name, blocks, sequence.num_branches()))
        containers[parent, attribute] = sequence
    for (parent, attribute), sequence in containers.items():  # only now, so that an error leaves the model as it was
        parent._modules[attribute] = sequence
    for module in dict.fromkeys(_rest(model)) if options.recompute_rest else ():
        _checkpoint(module)
    return Report(
        tuple(sequences), tuple(ordinary), sum(p.numel() for p in inside), sum(p.numel() for p in model.parameters())
    )


def deconvert(model: nn.Module) -> None:
    """Give the plain model back, in place: the blocks with their present weights, in the containers they came in.

    Undoes `checkpoint_blocks` too. Raises ValueError if there is nothing to undo.
    """
    undone = 0
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, ReversibleSequence):
                container = child.container_type()
                for block_name, block in child._modules.items():
                    container.add_module(block_name, block)
                container.training = child.training
                module._modules[name] = container
                undone += 1
        if getattr(module.__dict__.get("forward"), "func", None) is checkpoint:
            del module.forward
            undone += 1
    if not undone:
        raise ValueError(f"{type(model).__name__} has no reversible or checkpointed blocks to undo")


def checkpoint_blocks(model: nn.Module) -> int:
    """The baseline: gradient checkpointing (torch.utils.checkpoint) of each block in the containers `convert` takes.

    Also of blocks that change the shape. In place, keys unchanged; returns the number of blocks. Raises ValueError as
    `convert` does.
    """
    blocks = {block: None for _, _, _, container in _containers(model) for block in container.children()}
    blocks = [block for block in blocks if find_branches(block)[0] or _can_run_again(block)]
    for block in blocks:
        _checkpoint(block)
    return len(blocks)


def sequences(model: nn.Module) -> list[ReversibleSequence]:
    """All reversible sequences of a converted model; ValueError if there is none."""
    found = [module for module in model.modules() if isinstance(module, ReversibleSequence)]
    if not found:
        raise ValueError(f"{type(model).__name__} is not converted; call dr2net.convert(model) first")
    return found


def set_coefficients(model: nn.Module, alpha: float, beta: float | Fraction) -> None:
    """Set (alpha, beta) of all reversible sequences from the next forward pass on, in training and evaluation alike."""
    for sequence in sequences(model):
        sequence.set_coefficients(alpha, beta)


def _containers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """(parent, attribute, full name, container) of each container with a convertible block, before any change."""
    found, refused = [], []
    for module_name, module in model.named_modules():
        if (
            isinstance(module, ReversibleSequence)
            or getattr(module.__dict__.get("forward"), "func", None) is checkpoint
        ):
            raise ValueError(
                f"{module_name or type(model).__name__} is converted already; call dr2net.deconvert(model) first"
            )
        if getattr(module, "grad_checkpointing", False) or getattr(module, "gradient_checkpointing", False):
            raise ValueError(
                f"{module_name or type(model).__name__} has its own gradient checkpointing on; turn it off first"
            )
        for attribute, container in module._modules.items():
            if type(container) not in (nn.Sequential, nn.ModuleList):
                continue
            name = f"{module_name}.{attribute}".lstrip(".")
            results = [(f"{name}.{child}", find_branches(block)) for child, block in container.named_children()]
            if any(branches for _, (branches, _) in results):
                found.append((module, attribute, name, container))
            else:
                refused += [f"{child}: {reason}" for child, (_, reason) in results]
    if not found:
        listed = "\n  ".join(refused[:12]) or "it holds no nn.Sequential or nn.ModuleList of blocks"
        raise ValueError(
            f"nothing in {type(model).__name__} can be made reversible:\n  {listed}\n"
            "Register the branches of your block type with dr2net.branches_of.register; the blocks must stand in an "
            "nn.Sequential or nn.ModuleList inside the model"
        )
    return iter(found)


def _checkpoint(module: nn.Module) -> None:
    """From now on `module` runs again in backward instead of keeping what it computes."""
    again, contexts = functools.partial(_call, module.forward), functools.partial(_contexts, module)
    module.forward = functools.partial(checkpoint, again, use_reentrant=False, context_fn=contexts)


def _call(forward: Callable, *args: Any, **named: Any) -> Any:
    """`forward` with lists and dicts of its own: pytorchvideo's blocks change the list of pathways that they get."""
    args, named = tree_map(lambda value: value, (args, named))
    return forward(*args, **named)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """In which a checkpointed module runs, the first time and again."""
    return nullcontext(), StatisticsKept((module,))


def _rest(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules that are not reversible and can run again."""
    inside = isinstance(module, ReversibleSequence)
    if inside or any(isinstance(m, ReversibleSequence) for m in module.modules()):
        for child in module.children():
            if not (inside and find_branches(child)[0]):
                yield from _rest(child)
    elif _can_run_again(module):
        yield module


def _can_run_again(module: nn.Module) -> bool:
    """It has parameters, and no buffers but batch norm's: others may be state that must not move twice."""
    holders = [m for m in module.modules() if m._buffers]
    return next(module.parameters(), None) is not None and all(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in holders
    )


def _check(block: nn.Module, name: str, covered: list[nn.Parameter]) -> None:
    refuse_hooks(block, name)
    missing = {id(p) for p in block.parameters()} - {id(p) for p in covered}
    names = [key for key, p in block.named_parameters() if id(p) in missing]
    if names:
        raise ValueError(
            f"the branches of {name} ({type(block).__name__}) do not name the modules that hold {', '.join(names)}"
        )
