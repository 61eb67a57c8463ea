"""ReversibleSequence: a container of pretrained blocks that keeps no activations between them.

It replaces the model's own container and has its children's names, so a checkpoint fits both. Each residual branch of
each block is one node of the autograd graph (`node.py`).

    inversion   streams             kept besides the last two streams            gradient
    "exact"     integers on a grid  ceil(log2(1/beta)) bits per element, branch  that of stored activations
    "anchored"  floats              both streams every k branches                within a tolerance
    "float"     floats              nothing                                      noise at small beta (error_law.py)

At beta = 0 nothing can be inverted and every node keeps its input: plain checkpointing. `store=True` runs the same
arithmetic under plain autograd with all activations kept: the reference of the tests and of `gradient_error`. With
`chunk_mib` the branches that allow it run in chunks (`chunks.py`), else each as a whole.

Not supported: double backward (an error), functorch transforms, reading the second stream.
"""

import math
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten

from dr2net import coupling, exact
from dr2net.branches import Branch, find_branches
from dr2net.error_law import anchor_spacing, predicted_error
from dr2net.node import DualResidual, Node, Tape, autocast_is_on, version_of
from dr2net.options import Options


class ReversibleSequence(nn.Module):
    """The container of blocks of a converted model; `dr2net.convert` puts it in place.

    Called like nn.Sequential: `sequence(x, *arguments)` runs x through all blocks, each given the arguments too;
    tensors among them get gradients. Iterated like nn.ModuleList: `for block in sequence: x = block(x)` does the same,
    and each x is the block's output, differentiable, so intermediate features may be collected; between blocks x must
    not be changed. `sequence[i]` is the i-th block itself.

    x: (B, ...) with at least two dimensions. Blocks without branches run as they are; the reversible blocks between two
    of them are one run. alpha and beta are set by `dr2net.set_coefficients` or a `dr2net.Schedule`, and are (1, 0) at
    first.
    """

    def __init__(self, container: nn.Sequential | nn.ModuleList, options: Options) -> None:
        super().__init__()
        for name, block in container._modules.items():  # a block that stands there twice runs twice
            self.add_module(name, block)
        self.container_type = type(container)
        self.inversion = options.inversion
        self.anchor_every = options.anchor_every
        self.tolerance = options.tolerance
        self.store = options.store
        self.chunk_mib = options.chunk_mib
        self.alpha, self.beta = 1.0, 0.0
        self.training = container.training  # of the container alone: blocks may be frozen in eval mode

    @torch.compiler.disable  # one graph break; what is compiled inside the branches stays compiled
    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        for block in self:
            x = block(x, *args, **named)
        return x

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            if range(len(self))[index] != range(len(self)):
                raise ValueError(
                    f"a reversible sequence of {len(self)} blocks runs as a whole; cut it before converting"
                )
            return self
        return list(self._modules.values())[index]

    @torch.compiler.disable
    def __iter__(self) -> "Iterator[_Step]":
        sequence_pass = _Pass(self)
        return iter([_Step(sequence_pass, index) for index in range(len(self))])

    def set_coefficients(self, alpha: float, beta: float | Fraction) -> None:
        """From the next forward pass on. Raises ValueError for what the inversion cannot do."""
        if self.inversion == "exact":
            exact.rational(beta)
        if not abs(alpha) < float("inf") or not abs(beta) < float("inf"):
            raise ValueError(f"alpha = {alpha}, beta = {beta}: both must be finite")
        self.alpha, self.beta = alpha, beta

    def num_branches(self) -> int:
        """Branches of all blocks together."""
        return sum(len(find_branches(block)[0]) for block in self._modules.values())

    def extra_repr(self) -> str:
        return f"inversion={self.inversion!r}, alpha={float(self.alpha):.4g}, beta={float(self.beta):.4g}"


def refuse_hooks(module: nn.Module, name: str) -> None:
    """ValueError if `module`, which is not called as a module in a reversible sequence, carries hooks."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(
            f"{name} ({type(module).__name__}) has hooks, which do not fire in a reversible sequence; remove them, or "
            "put them on a module inside the block"
        )


class _Step:
    """One block inside one pass; everything but calling it is the block's own."""

    def __init__(self, sequence_pass: "_Pass", index: int) -> None:
        self.__dict__.update(_pass=sequence_pass, _index=index)

    def __call__(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        return self._pass.step(self._index, x, args, named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pass.sequence[self._index], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._pass.sequence[self._index], name, value)


class _Pass:
    """One forward pass through a sequence: the two streams, carried from block to block."""

    def __init__(self, sequence: ReversibleSequence) -> None:
        self.sequence = sequence
        self.blocks = list(sequence._modules.items())
        self.branches = [find_branches(block)[0] for _, block in self.blocks]
        for (name, block), branches in zip(self.blocks, self.branches, strict=True):
            if branches:
                refuse_hooks(block, f"block {name}")
        self.output: Tensor | None = None  # what the last step returned

    @torch.compiler.disable
    def step(self, index: int, x: Tensor, args: tuple, named: dict[str, Any]) -> Tensor:
        name, block = self.blocks[index]
        if not self.branches[index]:
            return block(x, *args, **named)
        if index == 0 or not self.branches[index - 1]:
            self._start(index, x)
        elif x is not self.output or index != self.expected or version_of(x) != self.version:
            raise ValueError(
                f"the input of block {name} is not the output of the block before it; a reversible run of blocks "
                "cannot be interrupted, repeated or entered in the middle"
            )
        for branch in self.branches[index]:
            self._advance(branch, f"{name}.{branch.name}", args, named)
        self.output = self.x.to(self.dtype)
        self.expected, self.version = index + 1, version_of(self.output)
        output = self.output
        if self.index == self.length:
            self._finish()
        return output

    def _start(self, index: int, x: Tensor) -> None:
        sequence = self.sequence
        following = self.branches[index:]
        self.length = sum(map(len, following[: next((i for i, b in enumerate(following) if not b), len(following))]))
        self.index, self.tape, self.sizes = 0, Tape(), []
        self.side: list[Tensor] | None = None  # of the first block
        self.dtype = x.dtype
        self.x = self.previous = x if x.dtype == torch.float64 else x.float()
        self.n = self.n_previous = self.grid = None
        self.exact, self.largest = sequence.inversion == "exact", 0
        self.beta = exact.rational(sequence.beta) if self.exact else float(sequence.beta)
        computed_in = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) else x.dtype
        self.every = self.length
        if self.beta == 0:
            self.every = 1
        elif sequence.inversion == "anchored":
            spacing = anchor_spacing(sequence.alpha, self.beta, computed_in, sequence.tolerance)
            self.every = sequence.anchor_every or spacing or self.length
        elif sequence.inversion == "float" and torch.is_grad_enabled() and not sequence.store:
            error = predicted_error(sequence.alpha, self.beta, self.length, computed_in)
            if error > sequence.tolerance:
                warnings.warn(
                    # no coefficients: they may move at each step, and Python shows each text once
                    f"float inversion of {self.length} branches in {computed_in} has a predicted relative gradient "
                    f"error of {error:.0e} at the present coefficients; use inversion='exact' or 'anchored'",
                    stacklevel=4,
                )
        if self.exact:
            self.largest = exact.limit(self.beta, self.length, self.x.dtype)
            self.n, grid, size = exact.encode(self.x)
            self.grid = exact.checked(grid, size, self.largest)
            self.n_previous = self.n
            self.sizes.append(("the input", size))

    def _advance(self, branch: Branch, name: str, args: tuple, named: dict[str, Any]) -> None:
        flat, structure = tree_flatten((args, named))
        tensor_at = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
        side = [flat[i] for i in tensor_at]
        if self.side is None:
            self.side = side
        common = len(side) == len(self.side) and all(a is b for a, b in zip(side, self.side, strict=True))
        parameters = branch.parameters()
        differentiable = any(t.requires_grad for t in (self.x, self.previous, *side, *parameters))
        position = self.index
        keeps = (position + 1) % self.every == 0 or position + 1 == self.length
        node = Node(
            tape=self.tape,
            branch=branch,
            name=name,
            index=position,
            alpha=self.sequence.alpha if branch.residual else 0.0,
            beta=self.beta,
            exact=self.exact,
            largest=self.largest,
            stored=self.sequence.store,
            recording=torch.is_grad_enabled() and differentiable and not self.sequence.store,
            keeps=keeps,
            inverts=position > 0 and position % self.every != 0 and self.x.requires_grad,
            arguments=[None if isinstance(value, Tensor) else value for value in flat],
            tensor_at=tensor_at,
            own_side=not common,
            common_side=self.side if keeps else [],
            structure=structure,
            dtype=self.dtype,
            parameters=parameters,
            chunks=branch.chunks(self.x, args, named, self.sequence.chunk_mib),
        )
        if self.sequence.store:
            result = self._stored(node, side)
        else:
            result = DualResidual.apply(
                node, self.x, self.previous, self.n, self.n_previous, self.grid, *side, *parameters
            )
        if self.exact:
            following, n, size = result
            self.n, self.n_previous = n, self.n
            self.sizes.append((f"branch {name}", size))
        else:
            following = result
        self.x, self.previous = following, self.x
        self.index += 1

    def _stored(self, node: Node, side: list[Tensor]) -> Any:
        """The same arithmetic under plain autograd; on the grid, the gradient passes straight through the rounding."""
        x, previous = self.x, self.previous
        if node.index == 0:
            previous = x.view_as(x)
            if self.exact:
                x = exact.decode(self.n, self.grid) + (x - x.detach())
        x = x.view_as(x)  # with the view above: gradients are summed in the order in which nodes return theirs
        if not self.exact:
            return coupling.step(node.call(x, side), x, previous, node.alpha, node.beta)
        f = node.call(x, side)
        smooth = coupling.step(f, x, previous, node.alpha, float(node.beta))
        q, size = exact.quantise(f.detach(), x.detach(), node.alpha, self.grid)
        n, _ = exact.step(q, self.n_previous, node.beta, keep=False)
        value = exact.decode(n, exact.checked(self.grid, size, self.largest))
        return value + (smooth - smooth.detach()), n, size

    def _finish(self) -> None:
        """Let go of the streams, then look for an overflow: once per pass, since looking waits for the device."""
        sizes, length, largest = self.sizes, self.length, self.largest
        self.x = self.previous = self.n = self.n_previous = self.grid = self.output = self.side = None
        if not sizes or isinstance(sizes[0][1], FakeTensor):
            return
        for (name, _), size in zip(sizes, torch.stack([size for _, size in sizes]).tolist(), strict=True):
            if not math.isfinite(size):
                raise FloatingPointError(f"{name} of a reversible sequence is not finite (NaN or infinite)")
            if size > largest:
                raise OverflowError(
                    f"{name} of a reversible sequence reached {size:.3g} grid units, more than the {largest:.3g} that "
                    f"{length} branches allow at (alpha, beta) = ({self.sequence.alpha:.4g}, {float(self.beta):.4g}); "
                    "choose alpha + beta <= 1, or convert with inversion='anchored'"
                )
