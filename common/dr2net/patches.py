"""What people put on modules from outside: hooks, a `forward` replaced on the instance, the model's own checkpointing.

A reversible block is called as the module it is, so hooks on it fire, once per forward pass; what is put on a module
inside it takes part in the branch that calls the module. What can be neither is refused here, by name and with the
remedy, when a model is converted and again at each pass. Not here: which modules a branch calls (`adapters/`).
"""

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from dr2net.entry import Entry

CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "with_cp")  # of timm, transformers,
# Microsoft's and OpenMMLab's Swin: true when a module runs again in backward by its own means

CONVERT_AGAIN = "call dr2net.deconvert(model), change the model, and dr2net.convert(model) again"


def is_plain(module: nn.Module) -> bool:
    """Nothing is put on `module`: a call of it and its class's forward are the same."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not has_own_forward(module) and not any(hooks)


def has_own_forward(module: nn.Module) -> bool:
    """`forward` was replaced on the instance (accelerate leaves the class's own there when it takes its hooks off)."""
    forward = module.__dict__.get("forward")
    return forward is not None and forward != types.MethodType(type(module).forward, module)


def all_plain(modules: Iterable[nn.Module]) -> bool:
    """Nothing is put on any of the modules or on what is inside them; a reversible block that is a part of its own
    branch counts as plain, since what is put on it runs around the branch."""
    inside = (inner for module in modules for inner in module.modules())
    return all(is_plain(module) for module in inside if not isinstance(module.__dict__.get("forward"), Entry))


@contextmanager
def hooks_asleep(modules: Iterable[nn.Module]) -> Iterator[bool]:
    """Inside, forward hooks on the modules and on what is inside them do not fire. Yields whether there are any."""
    hooks = [
        held for m in modules for inner in m.modules() for held in (inner._forward_hooks, inner._forward_pre_hooks)
    ]
    before = [(held, dict(held)) for held in hooks if held]
    try:
        for held, _ in before:
            held.clear()
        yield bool(before)
    finally:
        for held, entries in before:
            held.update(entries)


def own_checkpointing(module: nn.Module) -> str | None:
    """The attribute that says that the model's own gradient checkpointing is on; None if it is off."""
    values = {name: getattr(module, name, False) for name in CHECKPOINTING}
    return next((name for name, value in values.items() if isinstance(value, int) and value), None)


def refuse_checkpointing(module: nn.Module, name: str) -> None:
    if attribute := own_checkpointing(module):
        raise ValueError(
            f"{name} has its own gradient checkpointing on ({attribute}=True), which would run a reversible block "
            "twice or be ignored; turn it off (transformers: model.gradient_checkpointing_disable(), timm: "
            "model.set_grad_checkpointing(False)): a reversible block keeps nothing to save"
        )


def refuse_backward_hooks(block: nn.Module, name: str) -> None:
    if block._backward_hooks or block._backward_pre_hooks:
        raise ValueError(
            f"{name} ({type(block).__name__}) has backward hooks, and a reversible block has no gradients of its own: "
            "one stream passes it by. Put them on a module inside the block, or on the container of the blocks"
        )


def refuse_replaced_forward(block: nn.Module, name: str) -> None:
    """ValueError for a block of a sequence whose `forward` is not the one it got on conversion, nor a wrapper of it."""
    if not has_own_forward(block):
        raise ValueError(
            f"{name} ({type(block).__name__}) came into its container after the conversion, or lost the forward that "
            f"it got there; {CONVERT_AGAIN}"
        )
    raise ValueError(
        f"the forward of {name} ({type(block).__name__}) was replaced on the instance, and its branches do not know "
        f"what it does; {_remedy(block)}"
    )


def refuse_patched(block: nn.Module, name: str) -> None:
    """ValueError for what a block must not carry when it is converted."""
    refuse_backward_hooks(block, name)
    refuse_checkpointing(block, name)
    if has_own_forward(block):
        raise ValueError(
            f"the forward of {name} ({type(block).__name__}) is replaced on the instance, and its branches do not know "
            f"what it does; {_remedy(block)}"
        )


def _remedy(block: nn.Module) -> str:
    if hasattr(block, "_hf_hook"):
        return (
            "accelerate did this: call accelerate.hooks.remove_hook_from_module(model, recurse=True), convert, and "
            "dispatch the model after that"
        )
    return (
        "undo it (del block.forward) and patch a module inside the block instead, or make it a subclass and register "
        "that with dr2net.branches_of; a wrapper put on after the conversion must name what it calls (functools.wraps)"
    )
