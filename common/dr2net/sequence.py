"""ReversibleSequence: the container of pretrained blocks that runs them as reversible passes.

A container keeps its object and gets a class that is both its own and a ReversibleSequence, as torch's parametrizations
do it. A pass is found by the tensor that it returned last, so blocks may be called in any way (`entry.py`). Not here:
the arithmetic of a pass (`reversible.py`), and which containers are converted (`convert.py`).
"""

import functools
from collections import OrderedDict
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dr2net import exact
from dr2net.branches import FOUND, RETURN_MORE, blocks_of, find_branches, is_adapted
from dr2net.coefficients import KEY, Coefficients
from dr2net.entry import Entry, entry_of, parts_of
from dr2net.foreign import remembers
from dr2net.handed_out import caught
from dr2net.options import Options
from dr2net.returns import Returned, kind_of, returned
from dr2net.reversible import Pass
from dr2net.sharding import door_of, take_door

# Passes that are not at their end, by the tensor each returned last. A pass holds no reference to that tensor, so one
# that is left early dies with it.
_OPEN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class ReversibleSequence(nn.Module):
    """The container of blocks of a converted model: `dr2net.convert` gives this class to the model's own container.

    The container stays the object it was, with its names, attributes, hooks, and its way of being called, iterated,
    indexed and sliced; each reversible block in it is still the block itself, and takes part in a pass however it is
    called (`entry.py`). In addition `sequence(x, *arguments)` runs x through all blocks, each given the arguments too.
    Tensors among the arguments get gradients. What a block returns is differentiable, so intermediate features may be
    collected; between blocks of a run x must not be changed.

    x: (B, ...) with at least two dimensions. Blocks without branches run as they are; the reversible blocks between two
    of them are one run. alpha and beta are set by `dr2net.set_coefficients` or a `dr2net.Schedule`, and are (1, 0) at
    first. `ran` is the number of branches that ran in the last pass, 0 before the first: if it stays below
    `num_branches()`, the model does not call its blocks. `whole` says which of them `chunk_mib` did not cut, and why.
    `computed_in` is the dtype they computed in.
    """

    container_type: type[nn.Module]  # the class that the container had

    def _become(self, options: Options, place: str, checkpointed: bool) -> None:
        """What __init__ would set; the container exists already."""
        self.inversion = options.inversion
        self.anchor_every = options.anchor_every
        self.tolerance = options.tolerance
        self.store = options.store
        self.keep = 0  # `convert` deals out what the model is to keep
        self.chunk_mib = options.chunk_mib
        self.place = place  # name in the model
        self.coefficients = Coefficients(fixed=checkpointed)
        self.ran = 0
        self.whole: dict[str, str] = {}
        self.computed_in = torch.float32
        self.plain = False
        self.returns: dict[str, Returned | None] = {}
        for block in blocks_of(self).values():
            if find_branches(block)[0]:
                block.forward = Entry(block, self, parts_of(block))

    def _become_plain(self) -> None:
        for block in blocks_of(self).values():
            take_door(block)
            block.__dict__.pop(FOUND, None)
            if isinstance(block.__dict__.get("forward"), Entry):
                del block.forward
            elif (entry := entry_of(block)) is not None:  # inside a wrapper that was put on later
                entry.sequence = None
        cast(Any, self).__class__ = self.container_type
        for name in STATE:
            del self.__dict__[name]

    @torch.compiler.disable  # one graph break; what is compiled inside the branches stays compiled
    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        for block in blocks_of(self).values():
            x = block(x, *args, **named)
        return x

    def __getitem__(self, index: Any) -> Any:
        """As before; a slice of blocks is a plain container of them, and each goes on with the pass it is called in."""
        if not isinstance(index, slice):
            return cast(Any, super()).__getitem__(index)  # of the class the container had
        blocks = blocks_of(self)
        names = list(blocks)[index]
        if names == list(blocks):
            return self
        if issubclass(self.container_type, nn.ModuleList):
            return nn.ModuleList(blocks[name] for name in names)
        return nn.Sequential(OrderedDict((name, blocks[name]) for name in names))

    def call_block(self, block: nn.Module, x: Tensor, args: tuple, named: dict[str, Any]) -> Any:
        """One step of the pass that `x` belongs to, or the first of a new one."""
        door = door_of(block)
        given = x if door is None else door.given(x)
        current = _OPEN.get(given)
        if current is not None and current.expects(self, block):
            del _OPEN[given]
        else:
            current = Pass(self, block)
        hands_out = any(branch.hands_out for branch in find_branches(block)[0])  # then they say what it returns
        how = None if hands_out else self._returned(block, x, args, named)
        with caught(stored=self.store) as more:
            output = current.step(x, args, named, given)
        result = output if how is None else how.put(output, args, named, more.values(output))
        if hands_out:
            result = (output, *more.values(output))
        if not current.ended:
            if (door := door_of(block)) is None:
                _keep_open(current, output)
            else:
                door.open(result, output, functools.partial(_keep_open, current))
        return result

    def _returned(self, block: nn.Module, x: Tensor, args: tuple, named: dict[str, Any]) -> Returned | None:
        """See `returns.py`; asked once per kind of block and of arguments."""
        if is_adapted(block) and not isinstance(block, tuple(RETURN_MORE)):  # it is known to return a tensor
            return None
        found = block.__dict__.get(FOUND)
        known = self.returns if found is None else found.returns  # or those seen in a probe
        how: Returned | None = None
        for numbers in (False, True):
            kind = kind_of(args, named, numbers=numbers)
            key = kind if found is not None else f"{type(block)} {kind}"
            if key not in known:
                known[key] = returned(block, x, args, named, more=found is not None and not found.registered)
            how = known[key]
            if how is None or not how.has_numbers:
                break
        return how

    def generates(self, arguments: Any) -> bool:
        """Whether a block that is called with `arguments` runs as the plain block: at (1, 0), without gradients, and
        with a cache, which wants each of its calls once and in the order of the plain network."""
        plain = (self.alpha, self.beta) == (1, 0) and not torch.is_grad_enabled()
        return plain and remembers(arguments)

    @property
    def checkpointed(self) -> bool:
        """Inputs of branches are kept, not rebuilt: `dr2net.checkpoint_blocks` in chunks."""
        return self.coefficients.fixed

    @property
    def alpha(self) -> float:
        return self.coefficients.alpha

    @property
    def beta(self) -> float | Fraction:
        return self.coefficients.beta

    def set_coefficients(self, alpha: float, beta: float | Fraction) -> None:
        """From the next forward pass on. Raises ValueError for what the inversion cannot do, and for other than (1, 0)
        where blocks are checkpointed.
        """
        if self.checkpointed and (alpha, beta) != (1, 0):
            raise ValueError(
                f"{self.place} is checkpointed in chunks, which computes the plain network, alpha = 1 and beta = 0; "
                f"for ({float(alpha):.4g}, {float(beta):.4g}) call dr2net.deconvert(model), then dr2net.convert(model)"
            )
        if self.inversion == "exact":
            exact.rational(beta)
        if not abs(alpha) < float("inf") or not abs(float(beta)) < float("inf"):
            raise ValueError(f"alpha = {alpha}, beta = {beta}: both must be finite")
        self.coefficients.choose(alpha, beta)

    def num_branches(self) -> int:
        """Branches of all blocks together."""
        return sum(len(find_branches(block)[0]) for block in blocks_of(self).values())

    def extra_repr(self) -> str:
        how = f"inversion={self.inversion!r}, (alpha, beta)={self.coefficients}"
        if self.checkpointed:
            how = f"checkpointed in chunks of {self.chunk_mib:g} MiB"
        how += f", the last {self.keep} branches keep their insides" if self.keep else ""
        return f"{how}, {self.ran} of {self.num_branches()} branches ran in the last pass"

    __repr__ = nn.Module.__repr__  # ModuleList's own leaves it out

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][KEY] = self.coefficients.save()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict, *rest: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            self.coefficients.load(local_metadata, self.place)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return _blank, (self.container_type,), self.__dict__  # the class itself has no name to be found by

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise ValueError(
            "torch.nn.DataParallel copies the modules without their parameters, so the blocks would get no gradients; "
            "use torch.nn.parallel.DistributedDataParallel, one process per device"
        )


def _keep_open(current: Pass, output: Tensor) -> None:
    current.hand_out(output)
    _OPEN[output] = current


STATE: tuple[str, ...] = ("ran", "whole", "computed_in")  # in the last pass
STATE += ("inversion", "anchor_every", "tolerance", "store", "keep", "chunk_mib", "place", "coefficients", "returns")
STATE += ("plain",)  # blocks run as they did before the conversion, for `verify.py`


def make_reversible(
    container: nn.Module, options: Options, place: str, *, checkpointed: bool = False
) -> ReversibleSequence:
    """Give `container` the class of a sequence, in place, and its blocks the forward that takes part in its passes."""
    sequence: Any = container
    sequence.__class__ = _class_for(type(container))
    sequence._become(options, place, checkpointed)
    return sequence


def refuse_taken_names(container: nn.Module, place: str) -> None:
    """ValueError if `container` has attributes of its own with names that a sequence needs."""
    needed = [name for name in (*STATE, *vars(ReversibleSequence)) if not name.startswith("__")]
    clash = [name for name in needed if not hasattr(nn.Module, name) and hasattr(container, name)]
    if clash:
        raise ValueError(
            f"{place} ({type(container).__name__}) has attributes that a reversible sequence uses for itself: "
            f"{', '.join(clash)}; give them other names"
        )


def make_plain(sequence: ReversibleSequence, place: str) -> None:
    """Undo `make_reversible`, in place. ValueError if the class was changed again since (fully_shard, parametrize)."""
    if type(sequence) is not _class_for(sequence.container_type):
        raise ValueError(
            f"{place} became a {type(sequence).__name__} after it was converted; undo that before "
            "dr2net.deconvert(model)"
        )
    sequence._become_plain()


@functools.cache
def _reversible_class(container_type: type[nn.Module]) -> type[ReversibleSequence]:
    """A subclass of both; a container that defines `forward` keeps its own."""
    body: dict[str, Any] = {"container_type": container_type, "__module__": __name__}
    if container_type.forward not in (nn.Sequential.forward, nn.Module.forward):
        body["forward"] = container_type.forward
    return type(f"Reversible{container_type.__name__}", (ReversibleSequence, container_type), body)


def _class_for(container_type: Any) -> type[ReversibleSequence]:
    return _reversible_class(container_type)


def _blank(container_type: type[nn.Module]) -> ReversibleSequence:
    cls = _class_for(container_type)
    return cls.__new__(cls)
