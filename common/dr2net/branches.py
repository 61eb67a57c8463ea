"""What the residual branches of a block are: one small function per block type, found by `functools.singledispatch`.

A pre-norm transformer block x + attention(norm1(x)), then x + mlp(norm2(x)), is two branches. A block whose activation
comes after the sum, relu(x + f(x)) (ResNet, SlowFast), is one: what it adds to x, max(f(x), -x). A block without
residual connection can be one whose alpha is fixed at 0, as the paper remarks (`residual=False`). A block that changes
the shape has none and runs as it is.

A block of any type can be found by running the model once, `dr2net.convert(model, probe=lambda model: model(batch))`,
and is then one branch (`whole.py`). Its own branches need less memory. To teach it your own block:

    @dr2net.branches_of.register(MyBlock)
    def _(block):
        return (
            dr2net.Branch("attention", lambda x: block.attn(block.norm1(x)), (block.norm1, block.attn)),
            dr2net.Branch("mlp", lambda x: block.mlp(block.norm2(x)), (block.norm2, block.mlp), independent="tokens"),
        )

What F uses is named module by module; a parameter of the block itself (a layer scale) as it is: (mlp, block.gamma).
`independent` says that the branch may be run in chunks, and along what (`chunks.py`); `beside`, what the tensors are
that the block gets beside x (`beside.py`), as in beside={"mask": "samples", "rotary": "shared"} or beside="unused".

Not here: the blocks of timm, torchvision, transformers and pytorchvideo (`adapters/`), which are known already.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dr2net.beside import Beside, RunsWhole, check_words, words_of
from dr2net.chunks import Chunks, Groups
from dr2net.handed_out import hand_out
from dr2net.patches import all_plain

FOUND = "_dr2net_found"  # the attribute of a block that holds what a probe found out about it, see `whole.py`
SMALL = "it is smaller than a chunk"
# Containers that call their children in order, and blocks that return more than a tensor; adapters add to both.
CONTAINERS: set[type[nn.Module]] = {nn.Sequential, nn.ModuleList, nn.ModuleDict}
RETURN_MORE: set[type[nn.Module]] = set()


@dataclass(frozen=True)
class Branch:
    """One residual branch F of a block.

    function: F(x, *arguments of the block after x) -> tensor of x's shape, the residual connection left out.
    modules: all modules whose parameters and buffers F uses, and parameters of the block itself (a layer scale held as
        nn.Parameter), which stand in `own_parameters` afterwards.
    residual: False if the block has no clean residual connection: F is the whole block and alpha is 0.
    drop_path: multiplies `function`'s result by a random factor per sample; the last part of F, and not in `function`.
    independent: F treats each token (all dimensions but the last) or each sample by itself; or a function that makes
        the groups of an input x. None: unknown.
    beside: what the tensors among the block's arguments are to F: "rows" of x, one for each of the "samples", "shared"
        by all, "unused"; or a word for each argument by its name (`beside.py`). None: unknown, and with such a tensor F
        runs as a whole.
    hands_out: `function` returns a tuple: F, and what the block hands out behind its output, as in `return x, weights`.
    whole: F is block(x) - x, in float32 even where the block's output has the lower precision of x.
    """

    name: str
    function: Callable[..., Tensor]
    modules: tuple[Any, ...]
    residual: bool = True
    drop_path: nn.Module | None = None
    independent: Literal["tokens", "samples"] | Callable[[Tensor], Groups] | None = None
    beside: Beside | None = None
    hands_out: bool = False
    whole: bool = False

    own_parameters: tuple[nn.Parameter, ...] = field(init=False)

    def __post_init__(self) -> None:
        check_words(self.beside, self.name)
        for part in self.modules:
            if not isinstance(part, (nn.Module, nn.Parameter)):
                raise ValueError(
                    f"modules of branch {self.name!r} must be modules, or parameters of the block, not "
                    f"{type(part).__name__}; of a parametrized tensor name block.parametrizations"
                )
        own = tuple(part for part in self.modules if isinstance(part, nn.Parameter))
        object.__setattr__(self, "own_parameters", own)
        object.__setattr__(self, "modules", tuple(part for part in self.modules if isinstance(part, nn.Module)))

    def __call__(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        """F(x), drop path included."""
        f = self._alone(self.function(x, *args, **named))
        return f if self.drop_path is None else self.drop_path(f)

    def _alone(self, returned: Any) -> Tensor:
        """F without what is handed out beside it."""
        if not self.hands_out:
            return returned
        f, *rest = returned
        hand_out(rest)
        return f

    def chunks(
        self, x: Tensor, args: Sequence[Any], named: dict[str, Any], mib: float, positional: Sequence[str] = ()
    ) -> Chunks | str:
        """How F(x, *args, **named) is run in chunks of about `mib` MiB; why not, if it has to run on x as a whole.

        positional: names of `args` in the block's forward, see `beside.positional_names`.
        """
        if self.independent is None:
            return "it does not say that tokens or samples are independent (Branch.independent)"
        if not all_plain((*self.modules, *([] if self.drop_path is None else [self.drop_path]))):
            warnings.warn(
                f"branches {self.name!r} with hooks or a replaced forward on a module inside run as a whole, not in "
                "chunks, since what those do may not be independent; take them off to save the memory",
                stacklevel=2,
            )
            return "hooks or a replaced forward are on a module inside"
        norms = [m for part in self.modules for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if any(norm.training or norm.running_mean is None for norm in norms):
            return "its batch statistics are over all samples"
        try:
            words = words_of(self.beside, x, args, named, positional)
        except RunsWhole as reason:
            return str(reason)
        if not isinstance(self.independent, str) and set(words) - {"unused"}:
            return "its own groups know no tensors beside x but unused ones"
        leaves, structure = tree_flatten((args, named))
        beside = [i for i, value in enumerate(leaves) if isinstance(value, Tensor)]
        kept = [None if i in beside else value for i, value in enumerate(leaves)]  # the pass holds tensors, not this
        used = [i for i, word in zip(beside, words, strict=True) if word != "unused"]

        def function(chunk: Tensor, *own: Tensor) -> Tensor:
            given = list(kept)
            for position, tensor in zip(used, own, strict=True):
                given[position] = tensor
            own_args, own_named = tree_unflatten(given, structure)
            return self._alone(self.function(chunk, *own_args, **own_named))

        if not isinstance(self.independent, str):
            groups = self.independent(x)
        elif self.independent == "tokens" and not set(words) - {"rows", "unused"}:
            groups = Groups(function, x.shape, x.dim() - 1)
        else:
            groups = Groups(function, x.shape, 1)
        chunks = Chunks(groups, self.modules, self.drop_path, mib * 2**20, beside=words)
        # all in one: the branch as it is, which needs no buffers to collect the results in
        return SMALL if chunks.size == groups.count and isinstance(self.independent, str) else chunks

    def all_parameters(self) -> list[nn.Parameter]:
        """Each once."""
        held = [p for module in self.modules for p in module.parameters()]
        return list({id(p): p for p in (*held, *self.own_parameters)}.values())

    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones."""
        return [p for p in self.all_parameters() if p.requires_grad]


@functools.singledispatch
def branches_of(block: nn.Module) -> tuple[Branch, ...]:
    """The branches of `block` in the order they run; empty if it has to run as it is. Extend with `.register`."""
    return ()


def find_branches(block: nn.Module) -> tuple[tuple[Branch, ...], str]:
    """Branches and, where there are none, the reason in words.

    A subclass that overrides `forward` computes something else than the block it inherits from, so it is not converted
    unless it is registered itself. What is not registered may have been found out (`probe.py`).
    """
    branches, reason = _registered(block)
    found = block.__dict__.get(FOUND)
    if branches or found is None:
        return branches, reason
    return found.branches(block), found.reason


def is_container(module: nn.Module) -> bool:
    """It may hold a chain of blocks."""
    return isinstance(module, tuple(CONTAINERS))


def begins_run(block: nn.Module) -> bool:
    """A probe has found that its input is not the output of the block that stands before it."""
    found = block.__dict__.get(FOUND)
    return found is not None and found.begins


def _registered(block: nn.Module) -> tuple[tuple[Branch, ...], str]:
    known = _known(type(block))
    if known is None:
        return (), f"no branches are known for blocks of type {type(block).__name__}"
    if inspect.unwrap(type(block).forward) is not inspect.unwrap(known.forward):
        return (), f"{type(block).__name__} overrides the forward of {known.__name__}; register it with branches_of"
    if is_adapted(block) and forward_was_replaced(known):
        return (), f"the forward of the class {known.__name__} was replaced; register what it does now with branches_of"
    branches = branches_of(block)
    return branches, "" if branches else "it changes the shape of its input, or adds nothing to it"


def refuse_uncovered(block: nn.Module, name: str, branches: Sequence[Branch]) -> None:
    """ValueError for parameters of the block that no branch names: they would get no gradient."""
    covered = {id(p) for branch in branches for p in branch.all_parameters()}
    missing = {key: p for key, p in block.named_parameters() if id(p) not in covered}
    if missing:
        raise ValueError(
            f"the branches of {name} ({type(block).__name__}) do not name the modules that hold {', '.join(missing)}; "
            "name them in Branch(modules=...), a parameter of the block itself as it is: modules=(block.norm, "
            "block.gamma)"
        )


def blocks_of(container: nn.Module) -> dict[str, nn.Module]:
    """What stands in a container, by name; a block that stands there twice is there twice."""
    return {name: block for name, block in container._modules.items() if block is not None}


def is_adapted(block: nn.Module) -> bool:
    """Its branches are those of this library, not registered by the user. Of a block that has branches."""
    return branches_of.dispatch(type(block)).__module__.startswith("dr2net.adapters.")


def forward_was_replaced(cls: type[nn.Module]) -> bool:
    """Somebody assigned another function to `cls.forward`."""
    forward = inspect.unwrap(cls.forward)
    return not any(forward.__qualname__ == f"{base.__qualname__}.forward" for base in cls.__mro__)


def _known(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class in the mro of `cls` whose branches are registered."""
    from dr2net import adapters  # it registers with `branches_of`, so it stands above this file

    for base in cls.__mro__:
        adapters.register(base)
    return next((base for base in cls.__mro__ if base in branches_of.registry and base is not object), None)
