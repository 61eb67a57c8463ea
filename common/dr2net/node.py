"""One residual branch as a node of the autograd graph: what it keeps, and how its backward rebuilds what it did not
keep.

    forward   x_i = F_i(x_{i-1}) + alpha x_{i-1} + beta x_{i-2}
    backward  recompute F_i at x_{i-1}, differentiate it, rebuild x_{i-2}, hand (x_{i-1}, x_{i-2}) to node i - 1
              (in chunks, if the branch allows it and the sequence asks for it: `chunks.py`)

Only the last node of a run, anchors, and with exact inversion the remainders and checksums are saved, all of it through
`ctx.save_for_backward`. The chain of nodes is strictly sequential: x_{i-1} is an input of nodes i and i + 1, so node i
- 1 runs after both. Randomness is replayed, BatchNorm's statistics move once, other state in a branch is refused.

Not here: which node keeps what, and the choice of coefficients (`reversible.py`); the arithmetic (`coupling.py`,
`exact.py`).
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from dr2net import coupling, exact, rng
from dr2net.branches import Branch
from dr2net.chunks import Chunks, differentiate, edge_of, evaluate
from dr2net.first_branch import on_grid
from dr2net.foreign import Reached, caught, hooks_suspended, refuse_changed_arguments
from dr2net.grid import Rows
from dr2net.module_state import StatisticsKept, buffer_versions, modes_of, refuse_changed_buffers
from dr2net.sharding import refuse_sharded


class RecomputationError(RuntimeError):
    """A branch did not compute in backward what it computed in forward."""


@dataclass
class Tape:
    """What the backward of one run hands from node to node."""

    index: int | None = None  # of the node the streams below are for
    streams: tuple[Tensor, ...] = ()  # float: (x_i, x_{i-1}); exact: (n_i, n_{i-1}, grid)
    owned: bool = False  # the first of them is nobody else's and may be overwritten
    side: list[Tensor] = field(default_factory=list)
    checks: list[tuple[str, Tensor]] = field(default_factory=list)  # did each branch recompute the same?


@dataclass
class Recomputed:
    """F at x_{i-1} once more, with its graph."""

    x: Tensor
    side: list[Tensor]
    f: Any  # a Tensor; None once it is differentiated


@dataclass
class Taken:
    """What a node's backward begins with; its parts are let go of as soon as they are used."""

    streams: tuple[Tensor, ...]
    owned: bool  # the first stream is nobody else's
    x: Any  # x_{i-1}, a Tensor; None once it is used
    side: list[Tensor]
    check: Any  # a Tensor or None
    words: Tensor | None  # exact: the remainders


@dataclass
class Node:
    """What one branch's forward hands to its backward besides tensors."""

    tape: Tape
    branch: Branch
    name: str
    index: int
    alpha: float
    beta: float | Fraction
    exact: bool
    rows: Rows  # of the grid
    largest: int  # magnitude in grid units, see `exact.limit`
    stored: bool  # plain autograd keeps everything
    recording: bool  # False under no_grad: nothing is kept
    keeps: bool  # this node saves (x_i, x_{i-1})
    inverts: bool  # the node before it needs streams from this one
    arguments: list[Any]  # of the block after x, flattened; tensors replaced by None
    tensor_at: list[int]  # where they were
    own_side: bool  # they are not those of the run's first block, so this node saves them
    common_side: list[Tensor]  # those of the first block, for a node that keeps; let go of in forward
    structure: TreeSpec
    dtype: torch.dtype  # of F's input
    parameters: list[nn.Parameter]
    watched: list[Tensor]  # these, and the shards they were gathered from: may not change before backward
    coarse: float | None = None  # relative change of F that its recomputation may have, where streams are floats
    chunks: Chunks | None = None  # the branch is run and differentiated in these
    versions: list[int] = field(default_factory=list)
    modes: list[bool] = field(default_factory=list)  # training or evaluation, of each module
    reached: Reached = field(default_factory=Reached)  # the parameters that F uses
    needs: tuple[bool, ...] = ()  # whether x, and each tensor of the side, wants a gradient
    autocast: dict[str, Any] = field(default_factory=dict)
    random: rng.States | None = None

    def call(self, x: Tensor, side: list[Tensor], *, first: bool = False, plus: float | None = None) -> Tensor:
        """F(x, *arguments), with `plus` = alpha F + alpha x, under the autocast of the forward pass."""
        arguments = list(self.arguments)
        for position, tensor in zip(self.tensor_at, side, strict=True):
            arguments[position] = tensor
        args, named = tree_unflatten(arguments, self.structure)
        version = version_of(x)
        with self.surroundings(first=first):
            if self.chunks is not None:
                watch = self.reached.note if first else None
                f = evaluate(self.chunks, x, self.dtype, keep_graph=self.stored, beside=side, plus=plus, watch=watch)
            else:
                # a view, because module hooks that watch the backward (FLOP counters) cannot stand leaves inside one
                f = self.branch(x.view_as(x).to(self.dtype), *args, **named)
                refuse_changed_arguments((args, named), self.structure, arguments, self.name)
                if first:
                    self.reached.note(f)
        if f.shape != x.shape:
            raise ValueError(
                f"branch {self.name} turned {tuple(x.shape)} into {tuple(f.shape)}; it must keep the shape"
            )
        if version_of(x) != version:
            raise ValueError(f"branch {self.name} changes its input in place; use an out-of-place operation there")
        return torch.add(f, x, alpha=plus) if plus and self.chunks is None else f

    @contextmanager
    def first_run(self, ctx: Any, x: Tensor, needs: tuple[bool, ...]) -> Iterator[None]:
        """Around the first run of the branch: what its recomputation has to have again is noted, and the node put into
        ctx, if it is recorded.
        """
        device = x.device.type
        if torch.amp.is_autocast_available(device):  # off is restored too: backward may be called inside autocast
            self.autocast = {
                "device_type": device,
                "dtype": torch.get_autocast_dtype(device),
                "enabled": torch.is_autocast_enabled(device),
            }
        states, buffers = rng.record(x) if self.recording else {}, buffer_versions(self.branch.modules)
        yield
        refuse_changed_buffers(self.name, buffers)
        if self.recording:
            self.random, self.needs, ctx.node = rng.drawn(states, x), needs, self
            self.remember()

    def run(self, x: Tensor, side: list[Tensor], needs: Sequence[bool], *, plus: float | None = None) -> Tensor:
        """F for the first time; with `plus` = alpha, F(x) + alpha x. Where it is recorded, with gradients as in the
        recomputation, since other kernels may be chosen without; the graph is dropped at once, and whoever caught a
        tensor of it gets an error (`foreign.caught`).
        """
        if not self.recording:
            return self.call(x.detach(), side, plus=plus)
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(need) for t, need in zip((x, *side), needs, strict=True)]
            return self.call(inputs[0], [t.view_as(t) for t in inputs[1:]], first=True, plus=plus).detach()

    def recompute(self, x: Tensor, side: list[Tensor]) -> Recomputed:
        """What `run` computed, to be differentiated. Called without gradients."""
        self.refuse_changes()
        inputs = [t.detach().requires_grad_(need) for t, need in zip((x, *side), self.needs, strict=True)]
        with torch.enable_grad(), rng.replay(self.random, x), StatisticsKept(self.branch.modules):
            f = self.call(inputs[0], [t.view_as(t) for t in inputs[1:]])
        self.reached.compare(f, [*inputs, *self.parameters], self.name)
        self.reached.refuse_lost(self.parameters, self.name)
        return Recomputed(inputs[0], inputs[1:], f)

    def differentiate(self, done: Recomputed, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of <F(x) + alpha x, grad> for x, and those of the side tensors and parameters."""
        inputs, f, done.f = [done.x, *done.side, *self.parameters], done.f, None
        assert f is not None
        found: Iterator[Tensor | None] = iter(())
        if f.requires_grad:
            edge, grad_f = edge_of(f), grad.to(f.dtype)
            del f  # its values are not needed to differentiate it
            with hooks_suspended(self.parameters):
                wanted = [t for t in inputs if t.requires_grad]
                found = iter(torch.autograd.grad(edge, wanted, grad_f, allow_unused=True))
            del edge, grad_f
        grad_x, *rest = [next(found, None) if t.requires_grad else None for t in inputs]
        if done.x.requires_grad and self.alpha != 0:
            # rounded as plain autograd rounds, so that the gradient is bitwise that of `store=True`
            direct = (grad * self.alpha).to(done.x.dtype)
            grad_x = direct if grad_x is None else direct.add_(grad_x)
        return grad_x, rest

    def differentiate_in_chunks(
        self, x: Tensor, side: list[Tensor], grad: Tensor, *, keep_f: bool = True
    ) -> tuple[Any, Tensor | None, list[Tensor | None]]:
        """F(x), if it is to be kept, and the gradients as from `differentiate`. Called without gradients."""
        assert self.chunks is not None
        self.refuse_changes()
        x, *side = [t.detach().requires_grad_(need) for t, need in zip((x, *side), self.needs, strict=True)]
        watch = functools.partial(self.reached.compare, name=self.name)
        kept, suspended = StatisticsKept(self.branch.modules), hooks_suspended(self.parameters)
        with torch.enable_grad(), rng.replay(self.random, x), kept, suspended:
            own = (self.alpha, self.parameters, self.surroundings, watch, side)
            found = differentiate(self.chunks, x, grad, self.dtype, *own, keep_f=keep_f)
        self.reached.refuse_lost(self.parameters, self.name)
        return found

    def remember(self) -> None:
        """What must be the same when the branch is recomputed."""
        self.versions = [tensor._version for tensor in self.watched]
        self.modes = modes_of(self.branch.modules)

    def refuse_changes(self) -> None:
        """RuntimeError for what has changed since `remember`."""
        self.reached.refuse_frozen(self.parameters, self.name)
        refuse_sharded(self.branch.modules, self.branch.parameters(), self.name)
        for parameter, version in zip(self.watched, self.versions, strict=True):
            if parameter._version != version:
                raise RuntimeError(
                    f"a parameter of branch {self.name}, shape {tuple(parameter.shape)}, was changed in place between "
                    "forward and backward, so the branch cannot be recomputed; step the optimizer after backward"
                )
        if self.modes != modes_of(self.branch.modules):
            raise RuntimeError(
                f"modules of branch {self.name} were switched between training and evaluation mode after forward, so "
                "the branch would be recomputed as another function; call model.train() or model.eval() after backward"
            )

    def surroundings(self, *, first: bool = False) -> ExitStack:
        """The contexts in which the branch is computed, the first time and again."""
        with ExitStack() as stack:
            if not self.stored:
                # what the branch saves lives for one branch only: the caller's own hooks (offloading, counting) are not
                # for it
                unpack = functools.partial(caught, self.name) if first else _without_graph
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_without_graph, unpack))
            if self.autocast:
                # the cache would hand a weight cast under no_grad to the recomputation, which then finds no gradient
                stack.enter_context(torch.autocast(**self.autocast, cache_enabled=False))
            return stack.pop_all()


class DualResidual(torch.autograd.Function):
    """One branch of a dual-residual sequence.

    Inputs: node, x = x_{i-1}, previous = x_{i-2}, then for exact inversion n_{i-1}, n_{i-2} and grid (else None), then
    the tensors among the block's side arguments, then the branch's trainable parameters, so that their gradients reach
    autograd (and DDP) as soon as this node is done. Outputs x_i, and for exact inversion n_i and the largest |q_i|.
    """

    @staticmethod
    def forward(
        ctx: Any, node: Node, x: Tensor, previous: Tensor, n: Any, n_previous: Any, grid: Any, *tensors: Tensor
    ) -> Any:
        side = list(tensors[: len(node.tensor_at)])
        own = side if node.own_side else []
        common, node.common_side = node.common_side, []
        ctx.set_materialize_grads(False)  # else the integer stream gets a gradient of zeros, as large as itself
        needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[6 : 6 + len(node.tensor_at)])
        with node.first_run(ctx, x, needs):
            if node.exact and node.index == 0:  # the caller's x is not on the grid yet
                run = functools.partial(_with_stream, node, side, needs)
                f, x = on_grid(node.branch, node.rows, run, x.detach(), n, grid)
            else:
                f = node.run(x, side, needs)
        if not node.exact:
            check = coupling.sketch(f) if node.recording and node.coarse is not None else None
            following = coupling.step(f, x, previous, node.alpha, float(node.beta))
            if node.recording:
                ctx.save_for_backward(check, None, *own, *((following, x, *common) if node.keeps else ()))
            return following
        q, size = exact.quantise(f, x, node.alpha, grid, out=f if node.chunks is not None else None)
        del f, x
        check = exact.checksum(q) if node.recording else None
        following, words = exact.step(q, n_previous, exact.rational(node.beta), keep=node.recording and node.inverts)
        if node.recording:
            ctx.save_for_backward(check, words, *own, *((following, n, grid, *common) if node.keeps else ()))
        ctx.mark_non_differentiable(following, size)
        return exact.decode(following, exact.checked(grid, size, node.largest)), following, size

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible sequence has no second derivative: its backward is not differentiable. "
                "Call without create_graph=True, or convert with store=True"
            )
        node: Node = ctx.node
        taken = _take_streams(node, list(ctx.saved_tensors))
        grad = torch.zeros_like(taken.x) if grad is None else grad
        if node.chunks is None:
            done = node.recompute(taken.x, taken.side)
            _rebuild(node, taken, done.f.detach())
            grad_x, rest = node.differentiate(done, grad)
        else:
            f, grad_x, rest = node.differentiate_in_chunks(taken.x, taken.side, grad)
            _rebuild(node, taken, f, out=f)
            del f
        grad_previous = None
        if ctx.needs_input_grad[1] and ctx.needs_input_grad[2] and node.beta != 0:
            grad_previous = grad if node.beta == 1 else grad * float(node.beta)
        return None, grad_x, grad_previous, None, None, None, *rest


def _with_stream(node: Node, side: list[Tensor], needs: Sequence[bool], x: Tensor) -> tuple[Tensor, Tensor]:
    return node.run(x, side, needs), x


def _take_streams(node: Node, saved: list[Any]) -> Taken:
    """The streams at this node: its own, if it keeps them, else what the node behind it has handed on."""
    tape = node.tape
    check, words = saved.pop(0), saved.pop(0)
    own = [saved.pop(0) for _ in node.tensor_at] if node.own_side else []
    num_streams = 3 if node.exact else 2
    if node.keeps:
        streams, tape.side, owned = tuple(saved[:num_streams]), saved[num_streams:], False
    elif tape.index == node.index:
        streams, owned = tape.streams, tape.owned
    else:
        raise RuntimeError(
            f"backward entered a reversible sequence at branch {node.name}, before its end, where no streams are "
            "kept; let the loss depend on the sequence's output, or convert with store=True"
        )
    tape.index, tape.streams = None, ()
    x = exact.decode(streams[1], streams[2]) if node.exact else streams[1]
    return Taken(streams, owned, x, own if node.own_side else tape.side, check, words)


def _rebuild(node: Node, taken: Taken, f: Tensor, out: Tensor | None = None) -> None:
    """Compare F with what it was, rebuild x_{i-2} from it, and hand (x_{i-1}, x_{i-2}) on to node i - 1.

    `out`, of x's layout, may be overwritten.
    """
    tape, streams, x = node.tape, taken.streams, taken.x
    taken.streams, taken.x = (), None
    if node.exact:
        q, _ = exact.quantise(f, x, node.alpha, streams[2], out=out)
        del x
        if not isinstance(q, FakeTensor):
            tape.checks.append((node.name, torch.eq(exact.checksum(q), taken.check).all()))
        if node.inverts:
            tape.streams = (streams[1], exact.invert(q, streams[0], taken.words, exact.rational(node.beta)), streams[2])
    else:
        if taken.check is not None and node.coarse is not None and not isinstance(f, FakeTensor):
            sketch = coupling.sketch(f)
            change, size = (sketch - taken.check).norm(), torch.maximum(sketch.norm(), taken.check.norm())
            tape.checks.append((node.name, change <= node.coarse * size))
        if node.inverts:
            out = streams[0] if taken.owned else out
            tape.streams = (x, coupling.invert(f, x, streams[0], node.alpha, float(node.beta), out))
    if node.inverts:
        tape.index, tape.owned = node.index - 1, not node.keeps  # a node that keeps hands on its saved x
    else:
        _verify(tape)


def _verify(tape: Tape) -> None:
    """At the start of a run (or of an anchor's segment): did every branch recompute what it computed?"""
    checks, tape.checks = tape.checks, []
    if not checks:
        return
    same = torch.stack([equal for _, equal in checks]).tolist()
    if not all(same):
        raise RecomputationError(
            f"branch {checks[same.index(False)][0]} did not compute in backward what it computed in forward, so the "
            "streams, and with them the gradients, are wrong. Likely causes: an adapter was switched, a hook put on or "
            "taken off, or an attribute changed between forward and backward; a state of its own (a cache, a counter); "
            "kernels that are not deterministic (try torch.use_deterministic_algorithms(True)); with anchored and "
            "float inversion also coefficients at which streams grow and are rebuilt too roughly. Keep the model as "
            "it was until backward is done, or leave the block out of the conversion"
        )


def version_of(tensor: Tensor) -> int | None:
    """Counts in-place changes; None under inference_mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def autocast_is_on(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def _without_graph(tensor: Tensor) -> Tensor:
    """An operator that saves its own output (attention does) would through that output keep itself alive, for ever."""
    return tensor.detach()
