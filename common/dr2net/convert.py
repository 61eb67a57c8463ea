"""Turn a pretrained model into its reversible surrogate, in place, and back.

`convert` gives each nn.Sequential, nn.ModuleList or nn.ModuleDict (or subclass) that holds convertible blocks the class
`ReversibleSequence` beside its own. Containers and blocks stay the objects they were, so state_dict keys do not change,
checkpoints fit both ways, and what hooks do they go on doing. At (alpha, beta) = (1, 0), where it starts, the converted
model computes what the original computes. Not here: what the branches of a block are (`branches.py`).
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from dr2net.beside import refuse_unknown_arguments
from dr2net.branches import Branch, begins_run, blocks_of, find_branches, is_container, refuse_uncovered
from dr2net.description import KEY, Description, attach, detach, recorded, runs_again
from dr2net.entry import entry_of
from dr2net.module_state import StatisticsKept
from dr2net.options import Options
from dr2net.patches import refuse_checkpointing, refuse_patched
from dr2net.probe import Probe, Probed, advice_of, probe_blocks
from dr2net.report import Report
from dr2net.sequence import ReversibleSequence, make_plain, make_reversible, refuse_taken_names
from dr2net.whole import mark, unmark


class NoBlocksError(ValueError):
    """Nothing in a model can be made reversible."""


def convert(model: nn.Module, options: Options | None = None, *, probe: Probe | None = None, **changes: Any) -> Report:
    """Make the residual blocks of `model` reversible, in place.

    probe: for blocks of any type, a function that runs the model on a batch, as in
    `convert(model, probe=lambda model: model(batch))`. It is called once, without gradients, to see which blocks run
    one after another (`probe.py`); those that are not registered become one branch each. Run it in the mode and with
    the kind of input of the training.

    options: how, see `dr2net.Options`; None: the defaults. changes: single options by name, as in
    `convert(model, chunk_mib=256, recompute_rest=True)`. TypeError for a name that is none.

    The coefficients start at (1, 0), whatever the weights were trained with; but those of a transformers model whose
    config says with which it was saved (`model.config.dr2net`) start there, and the report says so. Hooks, and what is
    put on modules inside the blocks, are honored, now and later.

    Raises ValueError if nothing in the model can be converted, naming the blocks and the reasons; if the model is
    converted already; for what would make it compute something else (`patches.py`): a `forward` replaced on a block,
    backward hooks on it, the model's own gradient checkpointing. The model is then as it was.
    """
    chosen = replace(options or Options(), **changes)
    with probed(model, probe, chosen) as found:
        report = _convert(model, chosen, checkpointed=False)
    if found is None:
        return report
    notes = ((name or type(model).__name__, why) for name, why in found.notes.items())
    return replace(report, ordinary=(*report.ordinary, *notes), advice=advice_of(found.runs, model, chosen))


def convert_or_probe(model: nn.Module, probe: Probe, **changes: Any) -> Report:
    """By the registered blocks; a model that has none by those that a probe finds. Errors as `convert`."""
    try:
        return convert(model, **changes)
    except NoBlocksError:
        return convert(model, probe=probe, **changes)


@contextmanager
def probed(model: nn.Module, probe: Probe | None, options: Options) -> Iterator[Probed | None]:
    """Inside, what a probe found out stands on the blocks; it stays on those that became reversible."""
    if probe is None:
        yield None
        return
    _refuse_converted(model)
    known = probe_blocks(model, probe, chunks=options.chunk_mib is not None)
    for block, found in known.found.items():
        mark(block, found)
    try:
        yield known
    finally:
        for block in known.found:
            if entry_of(block) is None:
                unmark(block)


def _convert(model: nn.Module, options: Options, *, checkpointed: bool) -> Report:
    sequences: list[tuple[str, int, int]] = []
    ordinary: list[tuple[str, str]] = []
    inside: set[nn.Parameter] = set()
    found, elsewhere = _containers(model)
    for name, container in found.items():
        blocks = num_branches = 0
        for child, block in blocks_of(container).items():
            branches, reason = find_branches(block)
            if branches:
                blocks, num_branches = blocks + 1, num_branches + len(branches)
                inside.update(block.parameters())
            elif not any(block is other for other in found.values()):
                ordinary.append((_join(name, child), reason))
        sequences.append((name or type(model).__name__, blocks, num_branches))
    _check(found)
    known = None if checkpointed else recorded(model)
    if known is not None:
        known.refuse_unfit(options.inversion, f"{type(model).__name__}.config.{KEY}")
    for name, container in found.items():
        make_reversible(container, options, name or type(model).__name__, checkpointed=checkpointed)
    _keep_last(found.values(), options.keep)
    reversible = {block for c in found.values() for block in c.children() if find_branches(block)[0]}
    for module in dict.fromkeys(_rest(model, reversible)) if options.recompute_rest else ():
        _checkpoint(module)
    taken = _take(known, found)
    attach(model)
    return Report(
        tuple(sequences),
        (*ordinary, *elsewhere.items()),
        sum(p.numel() for p in inside),
        sum(p.numel() for p in model.parameters()),
        converted=tuple(weakref.ref(container) for container in found.values()),
        taken=taken,
    )


def _take(known: Description | None, containers: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Set the coefficients that the weights were saved with; by name, those that were."""
    if known is None:
        return ()
    fitting = known.found_in(containers)
    for name, described in fitting.items():
        containers[name].coefficients.take(described.coefficients.alpha, described.coefficients.beta)
    if len(fitting) < len(known.sequences):
        warnings.warn(
            f"config.{KEY} has coefficients of {', '.join(known.sequences)}, not all of which are among the reversible "
            f"sequences of this model, {', '.join(containers)}, with the same number of branches; set them with "
            "dr2net.set_coefficients, if these weights were trained in such sequences",
            stacklevel=4,
        )
    return tuple((name, str(described.coefficients)) for name, described in fitting.items())


def _keep_last(containers: Collection[Any], keep: int) -> None:
    """Deal out, from the model's end, which branches keep their insides; containers in the order they run."""
    for sequence in reversed(list(containers)):
        sequence.keep = min(keep, sequence.num_branches())
        keep -= sequence.keep


def deconvert(model: nn.Module) -> None:
    """Give the plain model back, in place: the blocks with their present weights, in the containers they came in.

    Undoes `checkpoint_blocks` too. Warns at coefficients other than (1, 0), where the plain model computes something
    else. Raises ValueError if there is nothing to undo.
    """
    undone = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, ReversibleSequence):
            if (module.alpha, module.beta) != (1, 0):
                warnings.warn(
                    f"{name or type(model).__name__} ran at (alpha, beta) = {module.coefficients}; its plain blocks "
                    "compute what (1, 0) computes, another function with the same weights. To evaluate what was "
                    "trained, convert and set the coefficients again; call dr2net.set_coefficients(model, 1, 0) first "
                    "if this is meant",
                    stacklevel=2,
                )
            make_plain(module, name or type(model).__name__)
            undone += 1
        if runs_again(module):
            plain = module.forward.args[0].args[0]  # see _checkpoint
            del module.forward
            if plain != module.forward:  # it was replaced on the instance before
                module.forward = plain
            undone += 1
    if not undone:
        raise ValueError(f"{type(model).__name__} has no reversible or checkpointed blocks to undo")
    detach(model)


def checkpoint_blocks(
    model: nn.Module,
    *,
    keep: int = 0,
    chunk_mib: float | None = None,
    recompute_rest: bool = False,
    probe: Probe | None = None,
) -> int:
    """Gradient checkpointing of each block in the containers `convert` takes: the network computes what it computed.

    Also of blocks that change the shape. In place, keys unchanged; returns the number of blocks. Raises ValueError as
    `convert` does.
    chunk_mib: keep the input of each branch, and recompute and differentiate it in chunks of about so many MiB, where
    it can be cut (`Options.chunk_mib`): 256 for hierarchical networks, whose inner activations are larger than their
    streams. None: keep the input of each block, torch.utils.checkpoint around it; half the kept inputs, but a block's
    inner activations as a whole. recompute_rest: also what is not a block (`Options.recompute_rest`).
    keep: leave the last blocks, that have so many branches together, as they are (`Options.keep`).
    probe: for blocks of any type, a function that runs the model once, as in `convert`.
    """
    options = Options(inversion="float", keep=keep, chunk_mib=chunk_mib)
    with probed(model, probe, options):
        return _checkpoint_blocks(model, options, recompute_rest)


def _checkpoint_blocks(model: nn.Module, options: Options, recompute_rest: bool) -> int:
    keep, chunk_mib = options.keep, options.chunk_mib
    found, _ = _containers(model)
    _leave_saved_coefficients(model)
    children = {block: None for container in found.values() for block in container.children()}
    children = {block: None for block in children if not any(block is container for container in found.values())}
    cut = [block for block in children if chunk_mib is not None and find_branches(block)[0]]
    whole = [block for block in children if block not in cut and (find_branches(block)[0] or _can_run_again(block))]
    while whole and not cut and (num_branches := max(1, len(find_branches(whole[-1])[0]))) <= keep:
        keep -= num_branches
        whole.pop()
    if cut:
        _convert(model, options, checkpointed=True)
    rest = dict.fromkeys(_rest(model, set(children))) if recompute_rest else {}
    for module in dict.fromkeys([*whole, *rest]):
        _checkpoint(module)
    return len(cut) + len(whole)


def _leave_saved_coefficients(model: nn.Module) -> None:
    """Warn if the weights were saved at others than (1, 0), which is what checkpointed blocks compute."""
    known = recorded(model)
    others = {} if known is None else {name: d.coefficients for name, d in known.sequences.items()}
    others = {name: at for name, at in others.items() if (at.alpha, at.beta) != (1, 0)}
    if others:
        warnings.warn(
            f"the weights were saved at (alpha, beta) = {next(iter(others.values()))} in {', '.join(others)}, and "
            "checkpointed blocks compute the plain network, (1, 0), another function; dr2net.convert(model) computes "
            "what was trained",
            stacklevel=4,
        )
    detach(model)


def recompute(module: nn.Module) -> None:
    """From now on `module` runs again in backward instead of keeping what it computes; batch statistics move once.

    In place; for what stands around the blocks; `deconvert` undoes it. ValueError for buffers other than batch norm's,
    which a second run could change, and for a module without parameters.
    """
    if not _can_run_again(module):
        raise ValueError(f"a {type(module).__name__} without parameters, or with buffers, is not run a second time")
    _checkpoint(module)


def sequences(model: nn.Module) -> list[ReversibleSequence]:
    """All reversible sequences of a converted model; ValueError if there is none."""
    found = [module for module in model.modules() if isinstance(module, ReversibleSequence)]
    if not found:
        raise ValueError(f"{type(model).__name__} is not converted; call dr2net.convert(model) first")
    return found


def all_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of an unconverted model, those that run as they are included: the units of `fully_shard`.

    ValueError if there is none to convert.
    """
    found, _ = _containers(model)
    return [b for c in found.values() for b in dict.fromkeys(c.children()) if b not in found.values()]


def set_coefficients(model: nn.Module, alpha: float, beta: float | Fraction) -> None:
    """Set (alpha, beta) of all reversible sequences from the next forward pass on, in training and evaluation alike."""
    for sequence in sequences(model):
        sequence.set_coefficients(alpha, beta)


def _containers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Containers with a convertible block by name ("" is the model itself), and why other blocks stay as they are.

    Changes nothing. ValueError if there is no such container.
    """
    _refuse_converted(model)
    found: dict[str, nn.Module] = {}
    refused: list[str] = []
    elsewhere: dict[str, str] = {}
    inside: set[nn.Module] = set()
    for module_name, module in model.named_modules():
        name = module_name or type(model).__name__
        refuse_checkpointing(module, name)
        if module in inside:  # of a reversible block: runs as part of its branches
            continue
        children = {_join(module_name, child): block for child, block in module.named_children()}
        reasons = {child: find_branches(block) for child, block in children.items()}
        blocks = [child for child, (branches, _) in reasons.items() if branches]
        if is_container(module):
            if blocks:
                found[module_name] = module
                inside.update(inner for child in blocks for inner in children[child].modules())
            else:
                refused += [f"{child}: {reason}" for child, (_, reason) in reasons.items()]
        else:
            for child in blocks:
                elsewhere[child] = (
                    f"it is an attribute of {type(module).__name__}, which does not say in which order its parts are "
                    "called; put the blocks into an nn.Sequential, nn.ModuleList or nn.ModuleDict"
                )
    if not found:
        refused = [f"{name}: {reason}" for name, reason in elsewhere.items()] + refused
        if find_branches(model)[0]:
            refused.insert(0, f"{type(model).__name__} is a block itself; put it into an nn.Sequential")
        refused.sort(key=lambda line: ": no branches are known for blocks of type" in line)  # the least telling last
        listed = "\n  ".join(refused[:12]) or "it holds no nn.Sequential or nn.ModuleList of blocks"
        raise NoBlocksError(
            f"nothing in {type(model).__name__} can be made reversible:\n  {listed}\n"
            "For blocks of any type give a batch to try, dr2net.convert(model, probe=lambda model: model(batch)), or "
            "register the branches of your block type with dr2net.branches_of.register (an example: "
            "help('dr2net.branches')); the blocks must stand in an nn.Sequential, nn.ModuleList or nn.ModuleDict"
        )
    return found, elsewhere


def _refuse_converted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, ReversibleSequence) or runs_again(module):
            raise ValueError(f"{name or type(model).__name__} is converted already; call dr2net.deconvert(model) first")


def _join(name: str, child: str) -> str:
    return f"{name}.{child}".lstrip(".")


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


def _rest(module: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules that hold none of `blocks`, nor are one, and can run again."""
    if module in blocks:
        return
    if any(m in blocks for m in module.modules()):
        for child in module.children():
            yield from _rest(child, blocks)
    elif _can_run_again(module):
        yield module


def _can_run_again(module: nn.Module) -> bool:
    """It has parameters, and no buffers but batch norm's: others may be state that must not move twice."""
    holders = [m for m in module.modules() if m._buffers]
    return next(module.parameters(), None) is not None and all(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in holders
    )


def _check(containers: dict[str, nn.Module]) -> None:
    """ValueError for blocks that would not compute what they compute now, before anything is changed."""
    home: dict[nn.Module, str] = {}
    for container_name, container in containers.items():
        refuse_taken_names(container, container_name or type(container).__name__)
        starts: set[nn.Module] = set()
        before: tuple[Branch, ...] = ()
        for child, block in blocks_of(container).items():
            branches, _ = find_branches(block)
            name = _join(container_name, child)
            if branches:
                _check_block(block, name, branches)
                if home.setdefault(block, container_name) != container_name:
                    raise ValueError(
                        f"{name} also stands in {home[block]}, so it is not known which blocks come after it; keep it "
                        "in one container"
                    )
                first = not before or begins_run(block)
                if first and block in starts:
                    raise ValueError(
                        f"{name} begins two runs of blocks in {container_name}, so it is not known which blocks come "
                        "after it; use a copy for the second"
                    )
                if first:
                    starts.add(block)
            before = branches


def _check_block(block: nn.Module, name: str, branches: tuple[Branch, ...]) -> None:
    refuse_patched(block, name)
    for branch in branches:
        refuse_unknown_arguments(block, f"branch {name}.{branch.name}", branch.beside)
    refuse_uncovered(block, name, branches)
