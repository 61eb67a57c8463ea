"""What blocks of several libraries have in common, as forms. A form makes one branch of a block from attribute names.

    samples("norm1 attn* gamma_1", "drop_path1")    F(x) = gamma_1 * attn(norm1(x), what the block gets beside x)
    tokens("norm2 mlp", "drop_path2")               F(x) = mlp(norm2(x)), each token by itself
    less("conv")                                    F(x) = conv(x) - x, of a part that holds its own residual connection
    added                                           F(x) = block(x) - x, of a block whose activation comes after the sum

A part that is a parameter multiplies (a layer scale), one that is None is left out. Drop path is the last part of F; it
is named apart. `forms(a, b)` are the branches of a block in their order. Not here: which block of which library has
which (the other files of this folder).
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from dr2net.beside import Beside, Word
from dr2net.branches import Branch, branches_of
from dr2net.chunks import Groups

Form = Callable[[Any], Branch | None]  # of a block; None: the block does not have this part
Branches = Callable[[Any], tuple[Branch, ...]]


def samples(parts: str, drop_path: str | None = None, name: str = "attention", beside: Beside | None = None) -> Form:
    """The named parts one after the other; the one with a star gets what the block gets beside x, and without it there
    is no branch.
    """
    names = [part.rstrip("*") for part in parts.split()]
    main = next((part.rstrip("*") for part in parts.split() if part.endswith("*")), None)
    beside = beside if main else "unused"

    def form(block: nn.Module) -> Branch | None:
        if main is not None and getattr(block, main) is None:
            return None

        def function(x: Tensor, *args: Any, **named: Any) -> Tensor:
            for part in names:
                value = getattr(block, part)
                if value is None:
                    continue
                if isinstance(value, Tensor):
                    x = value * x
                elif part == main:
                    x = value(x, *args, **named)
                else:
                    x = value(x)
            return x

        held = held_by(block, *names)
        return Branch(name, function, held, drop_path=_of(block, drop_path), independent="samples", beside=beside)

    return form


def tokens(parts: str, drop_path: str | None = None, name: str = "mlp") -> Form:
    """As `samples`, where each token (all dimensions of x but the last) is by itself and nothing beside x is used."""
    whole = samples(parts, drop_path, name)

    def form(block: nn.Module) -> Branch | None:
        found = whole(block)
        if found is None:
            return None
        return Branch(name, found.function, held_by(block, *parts.split()), True, found.drop_path, "tokens", "unused")

    return form


def less(part: str) -> Form:
    """What a part adds to its input; it holds its own residual connection, drop path included."""

    def form(block: nn.Module) -> Branch | None:
        module = getattr(block, part)
        if module is None or isinstance(module, nn.Identity):
            return None
        return Branch(part, lambda x, *args, **named: getattr(block, part)(x) - x, (module,), independent="samples")

    return form


def forms(*of_branches: Form) -> Branches:
    """The branches of a block, in the order they run."""
    return lambda block: tuple(branch for form in of_branches if (branch := form(block)) is not None)


def only_if(condition: Callable[[Any], bool], branches: Branches) -> Branches:
    """No branches where the block changes the shape, or has no residual connection."""
    return lambda block: branches(block) if condition(block) else ()


def attention_mlp(
    attention: Callable[..., Tensor],
    mlp: Callable[..., Tensor],
    parts: tuple[nn.Module, ...],
    rest: tuple[nn.Module, ...],
    drop_paths: tuple[nn.Module | None, nn.Module | None] = (None, None),
    windows: Callable[[Tensor], Groups] | None = None,
) -> tuple[Branch, ...]:
    """A transformer block's two: global attention sees a sample, window attention a window, the MLP a token."""
    return (
        Branch("attention", attention, parts, drop_path=drop_paths[0], independent=windows or "samples"),
        Branch("mlp", mlp, rest, drop_path=drop_paths[1], independent="tokens", beside="unused"),
    )


def by_rank(tensor: Tensor) -> Word:
    """What stands beside (B, heads, N, D): with four dimensions it has a batch, as masks and rotary tables of a batch
    of unequal images do; with fewer it has none.
    """
    return "samples" if tensor.dim() == 4 else "shared"


def added(block: nn.Module) -> tuple[Branch, ...]:
    """What a block whose activation comes after the sum adds to its input.

    The whole block as a branch without residual connection (alpha 0) would be nearer to the paper's remark, but then
    the streams of 23 blocks of SlowFast grew a hundredfold at (.9, .1) and a millionfold at (0, 1).
    """
    forward = type(block).forward

    def function(x: Tensor, *args: Any, **named: Any) -> Tensor:
        return forward(block, x, *args, **named) - x

    return (Branch("block", function, held_by(block), independent="samples"),)


def of_resnet(block: Any) -> tuple[Branch, ...]:
    """timm's and torchvision's residual blocks."""
    return added(block) if block.downsample is None and block.stride == 1 else ()


def held_by(block: nn.Module, *names: str) -> tuple[Any, ...]:
    """Those of the named attributes that are modules or parameters; without names, all that the block has.

    Not the block itself, whose forward is another once it is reversible.
    """
    held: list[Any] = []
    for name in [name.rstrip("*") for name in names] or [*block._modules, *block._parameters]:
        if parametrize.is_parametrized(block, name):
            held.append(block.parametrizations[name])  # type: ignore[index]
        elif isinstance(value := getattr(block, name), (nn.Module, nn.Parameter)):
            held.append(value)
    return tuple(held)


def register_table(library: str, table: Mapping[str, Branches]) -> None:
    """Register the branches of "module.Class" of a library's models; a version that lacks one has no such block."""
    for path, branches in table.items():
        for cls in classes_of(library, path):
            branches_of.register(cls, branches)


def classes_of(library: str, *paths: str) -> list[type[nn.Module]]:
    """Those of the classes "module.Class" that this version of a library has."""
    places = [path.rpartition(".") for path in paths]
    found = [getattr(sys.modules.get(f"{library}.{module}"), name, None) for module, _, name in places]
    return [cls for cls in found if cls is not None]


def _of(block: nn.Module, name: str | None) -> nn.Module | None:
    return None if name is None else getattr(block, name)
