"""ReversibleSequence: a container of pretrained blocks that keeps no activations between them.

It replaces the model's own container and has its children's names, so a checkpoint fits both. Each residual branch is one
node of the autograd graph,

    forward   x_i = F_i(x_{i-1}) + alpha x_{i-1} + beta x_{i-2}
    backward  recompute F_i at x_{i-1}, differentiate it, rebuild x_{i-2}, hand (x_{i-1}, x_{i-2}) to node i - 1

and only the last node of a run (plus anchors, plus the exact inversion's remainders) saves tensors. The chain of nodes is
strictly sequential: x_{i-1} is an input of nodes i and i + 1, so node i - 1 runs after both.

    inversion   streams             kept besides the last two streams           gradient
    "exact"     integers on a grid  ceil(log2(1/beta)) bits per element, branch  that of stored activations
    "anchored"  floats              both streams every k branches                within a tolerance
    "float"     floats              nothing                                      noise at small beta (error_law.py)

At beta = 0 nothing can be inverted and every node keeps its input: plain checkpointing. `store=True` runs the same arithmetic
under plain autograd with all activations kept: the reference of the tests and of `gradient_error`.

Not supported: double backward (an error), functorch transforms, reading the second stream.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dr2net import coupling, exact, rng
from dr2net.branches import Branch, find_branches
from dr2net.error_law import TOLERANCE, anchor_spacing, predicted_error

Inversion = Literal["exact", "anchored", "float"]


@dataclass
class _Tape:
    """What the backward of one run hands from node to node."""

    index: int | None = None  # of the node the streams below are for
    streams: tuple[Tensor, ...] = ()  # float: (x_i, x_{i-1}); exact: (n_i, n_{i-1}, grid)
    side: list[Tensor] = field(default_factory=list)
    checks: list[tuple[str, Tensor]] = field(default_factory=list)  # did each branch recompute the same?


@dataclass
class _Node:
    """What one branch's forward hands to its backward besides tensors."""

    tape: _Tape
    branch: Branch
    name: str
    index: int
    alpha: float
    beta: float | Fraction
    exact: bool
    recording: bool  # False under no_grad: nothing is kept
    keeps: bool  # this node saves (x_i, x_{i-1})
    inverts: bool  # the node before it needs streams from this one
    arguments: list[Any]  # of the block after x, flattened; tensors replaced by None
    tensor_at: list[int]  # where they were
    structure: TreeSpec
    dtype: torch.dtype  # of F's input
    parameters: list[nn.Parameter]
    versions: list[int] = field(default_factory=list)
    autocast: dict[str, Any] = field(default_factory=dict)
    random: rng.States | None = None

    def call(self, x: Tensor, side: list[Tensor]) -> Tensor:
        """F(x, *arguments) under the autocast of the forward pass."""
        arguments = list(self.arguments)
        for position, tensor in zip(self.tensor_at, side, strict=True):
            arguments[position] = tensor
        args, named = tree_unflatten(arguments, self.structure)
        version = x._version
        with ExitStack() as stack:
            # what the branch saves lives for one branch only: the caller's own hooks (offloading, counting) are not for it
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
            if self.autocast:
                # the cache would hand a weight cast under no_grad to the recomputation, which then finds no gradient
                stack.enter_context(torch.autocast(**self.autocast, cache_enabled=False))
            f = self.branch.function(x.to(self.dtype), *args, **named)
        if f.shape != x.shape:
            raise ValueError(f"branch {self.name} turned {tuple(x.shape)} into {tuple(f.shape)}; it must keep the shape")
        if x._version != version:
            raise ValueError(f"branch {self.name} changes its input in place; use an out-of-place operation there")
        return f


class DualResidual(torch.autograd.Function):
    """One branch of a dual-residual sequence: the repository's only autograd.Function.

    Inputs: node, x = x_{i-1}, previous = x_{i-2}, then for exact inversion n_{i-1}, n_{i-2} and grid (else None), then the
    tensors among the block's side arguments, then the branch's trainable parameters, so that their gradients reach autograd
    (and DDP) as soon as this node is done. Outputs x_i, and for exact inversion n_i and the largest |q_i|.
    """

    @staticmethod
    def forward(ctx, node: _Node, x, previous, n, n_previous, grid, *tensors):
        side = list(tensors[: len(node.tensor_at)])
        if node.exact and node.index == 0:
            x = exact.decode(n, grid)  # the caller's x is not on the grid yet
        device = x.device.type
        if _autocast(x):
            node.autocast = {"device_type": device, "dtype": torch.get_autocast_dtype(device)}
        states = rng.record(x) if node.recording else {}
        buffers = _buffer_versions(node.branch)
        if node.exact and node.recording:
            # under grad, like the recomputation, because other kernels may be chosen without; the graph is dropped at once
            with torch.enable_grad():
                f = node.call(x.detach().requires_grad_(), side).detach()
        else:
            f = node.call(x.detach(), side)
        _refuse_stateful(node, buffers)
        if node.recording:
            node.random = rng.drawn(states, x)
            node.versions = [parameter._version for parameter in node.parameters]
            ctx.node = node
        if not node.exact:
            following = coupling.step(f, x, previous, node.alpha, node.beta)
            if node.recording and node.keeps:
                ctx.save_for_backward(following, x, *side)
            return following
        q, size = exact.quantise(f, x, node.alpha, grid)
        del f, x
        check = exact.checksum(q) if node.recording else None
        following, remainder = exact.step(q, n_previous, node.beta)
        if node.recording:
            packed = None
            if remainder is not None and node.inverts:
                packed = exact.pack(remainder, exact.remainder_bits(node.beta))
            ctx.save_for_backward(check, packed, *((following, n, grid, *side) if node.keeps else ()))
        ctx.mark_non_differentiable(following, size)
        return exact.decode(following, grid), following, size

    @staticmethod
    def backward(ctx, grad, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible sequence has no second derivative: its backward is not differentiable. "
                "Call without create_graph=True, or convert with store=True"
            )
        node: _Node = ctx.node
        tape = node.tape
        saved = list(ctx.saved_tensors)
        check, packed = (saved.pop(0), saved.pop(0)) if node.exact else (None, None)
        num_streams = 3 if node.exact else 2
        if node.keeps:
            streams, tape.side, owned = tuple(saved[:num_streams]), saved[num_streams:], False
        elif tape.index == node.index:
            streams, owned = tape.streams, True
        else:
            raise RuntimeError(
                f"backward entered a reversible sequence at branch {node.name}, behind its end, where no streams are kept; "
                "let the loss depend on the sequence's output, or convert with store=True"
            )
        tape.index, tape.streams = None, ()
        for parameter, version in zip(node.parameters, node.versions, strict=True):
            if parameter._version != version:
                raise RuntimeError(
                    f"a parameter of branch {node.name}, shape {tuple(parameter.shape)}, was changed in place between forward "
                    "and backward, so the branch cannot be recomputed; step the optimizer after backward"
                )
        needs = ctx.needs_input_grad[6:]
        x = exact.decode(streams[1], streams[2]) if node.exact else streams[1]
        x_in = x.detach().requires_grad_(ctx.needs_input_grad[1])
        side = [t.detach().requires_grad_(need) for t, need in zip(tape.side, needs, strict=False)]
        with torch.enable_grad(), rng.replay(node.random, x), _buffers_kept(node.branch):
            f = node.call(x_in, side)

        if node.exact:
            q, _ = exact.quantise(f.detach(), x, node.alpha, streams[2])
            if not isinstance(q, FakeTensor):
                tape.checks.append((node.name, torch.eq(exact.checksum(q), check).all()))
        if node.inverts and node.exact:
            remainder = exact.unpack(packed, exact.remainder_bits(node.beta), q) if packed is not None else None
            tape.streams = (streams[1], exact.invert(q, streams[0], remainder, node.beta), streams[2])
        elif node.inverts:
            out = streams[0] if owned else None
            tape.streams = (x, coupling.invert(f.detach(), x, streams[0], node.alpha, node.beta, out))
        if node.inverts:
            tape.index = node.index - 1
        else:
            _verify(tape)
        del streams, saved, packed

        wanted = [t for t in (x_in, *side, *node.parameters) if t.requires_grad]
        found = iter(torch.autograd.grad(f, wanted, grad.to(f.dtype), allow_unused=True) if f.requires_grad else ())
        del f
        results = [next(found, None) if t.requires_grad else None for t in (x_in, *side, *node.parameters)]
        grad_x, grad_previous = results[0], None
        if x_in.requires_grad:
            if node.alpha != 0:
                grad_x = grad * node.alpha if grad_x is None else torch.add(grad_x, grad, alpha=node.alpha)
            grad_previous = grad * float(node.beta) if ctx.needs_input_grad[2] and node.beta != 0 else None
        return None, grad_x, grad_previous, None, None, None, *results[1:]


class ReversibleSequence(nn.Module):
    """The container of blocks of a converted model; `dr2net.convert` puts it in place.

    Called like nn.Sequential: `sequence(x, *arguments)` runs x through all blocks, each given the arguments too; tensors among
    them get gradients. Iterated like nn.ModuleList: `for block in sequence: x = block(x)` does the same, and each x is the
    block's output, differentiable, so intermediate features may be collected; between blocks x must not be changed.
    `sequence[i]` is the i-th block itself.

    x: (B, ...) with at least two dimensions. Blocks without branches run as they are; the reversible blocks between two of
    them are one run. alpha and beta are set by `dr2net.set_coefficients` or a `dr2net.Schedule`, and are (1, 0) at first.
    """

    def __init__(
        self,
        container: nn.Sequential | nn.ModuleList,
        *,
        inversion: Inversion = "exact",
        anchor_every: int | None = None,
        tolerance: float = TOLERANCE,
        store: bool = False,
    ) -> None:
        super().__init__()
        if inversion not in get_args(Inversion):
            raise ValueError(f"inversion must be one of {get_args(Inversion)}, not {inversion!r}")
        if anchor_every is not None and (inversion != "anchored" or anchor_every < 1):
            raise ValueError(f"anchor_every={anchor_every} needs inversion='anchored' and a value of at least 1")
        for name, block in container.named_children():
            self.add_module(name, block)
        self.container_type = type(container)
        self.inversion = inversion
        self.anchor_every = anchor_every
        self.tolerance = tolerance
        self.store = store
        self.alpha, self.beta = 1.0, 0.0
        self.train(container.training)

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        for block in self:
            x = block(x, *args, **named)
        return x

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            if range(len(self))[index] != range(len(self)):
                raise ValueError(f"a reversible sequence of {len(self)} blocks runs as a whole; cut it before converting")
            return self
        return list(self.children())[index]

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
        return sum(len(find_branches(block)[0]) for block in self.children())

    def extra_repr(self) -> str:
        return f"inversion={self.inversion!r}, alpha={float(self.alpha):.4g}, beta={float(self.beta):.4g}"


class _Step:
    """One block inside one pass; everything but calling it is the block's own."""

    def __init__(self, sequence_pass: "_Pass", index: int) -> None:
        self._pass, self._index = sequence_pass, index

    def __call__(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        return self._pass.step(self._index, x, args, named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pass.sequence[self._index], name)


class _Pass:
    """One forward pass through a sequence: the two streams, carried from block to block."""

    def __init__(self, sequence: ReversibleSequence) -> None:
        self.sequence = sequence
        self.blocks = list(sequence.named_children())
        self.branches = [find_branches(block)[0] for _, block in self.blocks]
        self.output: Tensor | None = None  # what the last step returned

    def step(self, index: int, x: Tensor, args: tuple, named: dict[str, Any]) -> Tensor:
        name, block = self.blocks[index]
        if not self.branches[index]:
            return block(x, *args, **named)
        if index == 0 or not self.branches[index - 1]:
            self._start(index, x)
        elif x is not self.output:
            raise ValueError(f"the input of block {name} is not the output of the block before it; a reversible run of blocks "
                             "cannot be interrupted, repeated or entered in the middle")
        for branch in self.branches[index]:
            self._advance(branch, f"{name}.{branch.name}", args, named)
        self.output = self.x.to(self.dtype)
        output = self.output
        if self.index == self.length:
            self._finish()
        return output

    def _start(self, index: int, x: Tensor) -> None:
        sequence = self.sequence
        following = self.branches[index:]
        self.length = sum(map(len, following[: next((i for i, b in enumerate(following) if not b), len(following))]))
        self.index, self.tape, self.sizes = 0, _Tape(), []
        self.dtype = x.dtype
        self.x = self.previous = x if x.dtype == torch.float64 else x.float()
        self.n = self.n_previous = self.grid = None
        self.exact = sequence.inversion == "exact"
        self.beta = exact.rational(sequence.beta) if self.exact else sequence.beta
        computed_in = torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype
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
                    f"float inversion of {self.length} branches at (alpha, beta) = ({sequence.alpha:.4g}, {self.beta:.4g}) in "
                    f"{computed_in} has a predicted relative gradient error of {error:.1e}; use inversion='exact' or 'anchored'",
                    stacklevel=4,
                )
        if self.exact:
            self.n, self.grid, size = exact.encode(self.x)
            self.n_previous = self.n
            self.sizes.append(("the input", size))

    def _advance(self, branch: Branch, name: str, args: tuple, named: dict[str, Any]) -> None:
        flat, structure = tree_flatten((args, named))
        tensor_at = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
        side = [flat[i] for i in tensor_at]
        parameters = branch.parameters()
        differentiable = any(t.requires_grad for t in (self.x, self.previous, *side, *parameters))
        position = self.index
        node = _Node(
            tape=self.tape,
            branch=branch,
            name=name,
            index=position,
            alpha=self.sequence.alpha if branch.residual else 0.0,
            beta=self.beta,
            exact=self.exact,
            recording=torch.is_grad_enabled() and differentiable and not self.sequence.store,
            keeps=(position + 1) % self.every == 0 or position + 1 == self.length,
            inverts=position > 0 and position % self.every != 0 and self.x.requires_grad,
            arguments=[None if isinstance(value, Tensor) else value for value in flat],
            tensor_at=tensor_at,
            structure=structure,
            dtype=self.dtype,
            parameters=parameters,
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

    def _stored(self, node: _Node, side: list[Tensor]) -> Any:
        """The same arithmetic under plain autograd; on the grid, the gradient passes straight through the rounding."""
        if not self.exact:
            return coupling.step(node.call(self.x, side), self.x, self.previous, node.alpha, node.beta)
        x = self.x
        if node.index == 0:
            x = exact.decode(self.n, self.grid) + (x - x.detach())
        f = node.call(x, side)
        smooth = coupling.step(f, x, self.previous, node.alpha, float(node.beta))
        q, size = exact.quantise(f.detach(), x.detach(), node.alpha, self.grid)
        n, _ = exact.step(q, self.n_previous, node.beta)
        return exact.decode(n, self.grid) + (smooth - smooth.detach()), n, size

    def _finish(self) -> None:
        """Let go of the streams, then look for an overflow: once per pass, since looking waits for the device."""
        sizes, length = self.sizes, self.length
        dtype = self.x.dtype
        self.x = self.previous = self.n = self.n_previous = self.grid = self.output = None
        if not sizes or isinstance(sizes[0][1], FakeTensor):
            return
        largest = exact.limit(self.beta, length, dtype)
        for (name, _), size in zip(sizes, torch.stack([size for _, size in sizes]).tolist(), strict=True):
            if not math.isfinite(size):
                raise FloatingPointError(f"{name} of a reversible sequence is not finite (NaN or infinite)")
            if size > largest:
                raise OverflowError(
                    f"{name} of a reversible sequence reached {size:.3g} grid units, more than the {largest:.3g} that "
                    f"{length} branches allow at (alpha, beta) = ({self.sequence.alpha:.4g}, {float(self.beta):.4g}); choose "
                    "alpha + beta <= 1, or convert with inversion='anchored'"
                )


def _verify(tape: _Tape) -> None:
    """At the start of a run (or of an anchor's segment): did every branch recompute what it computed?"""
    checks, tape.checks = tape.checks, []
    if not checks:
        return
    same = torch.stack([equal for _, equal in checks]).tolist()
    if not all(same):
        raise RuntimeError(
            f"branch {checks[same.index(False)][0]} did not compute the same twice, so the streams cannot be rebuilt; "
            "make it deterministic (torch.use_deterministic_algorithms(True), no state of its own), or convert with "
            "inversion='anchored'"
        )


def _autocast(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _modules_with_buffers(branch: Branch) -> list[nn.Module]:
    return [module for part in branch.modules for module in part.modules() if module._buffers]


def _buffer_versions(branch: Branch) -> list[tuple[nn.Module, str, Tensor, int]]:
    found = []
    for module in _modules_with_buffers(branch):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            found += [(module, name, b, b._version) for name, b in module._buffers.items() if b is not None]
    return found


def _refuse_stateful(node: _Node, before: list[tuple[nn.Module, str, Tensor, int]]) -> None:
    """Only BatchNorm may change its buffers: its output in training does not depend on them, so it can be run again."""
    for module, name, buffer, version in before:
        if module._buffers[name] is not buffer or buffer._version != version:
            raise ValueError(
                f"{type(module).__name__} in branch {node.name} changes its buffer {name!r} in forward, which would happen "
                "again when the branch is recomputed; put it in eval mode or leave its block out of the conversion"
            )


class _buffers_kept:
    """Puts BatchNorm's running statistics back after the recomputation: they move once per step."""

    def __init__(self, branch: Branch) -> None:
        self.modules = [
            m for m in _modules_with_buffers(branch) if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
        ]

    def __enter__(self) -> None:
        self.values = [(b, b.clone()) for m in self.modules for b in m._buffers.values() if b is not None]

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for buffer, value in self.values:
                buffer.copy_(value)
