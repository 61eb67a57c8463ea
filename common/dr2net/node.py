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

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from dr2net import coupling, exact, rng
from dr2net.branches import Branch
from dr2net.chunks import Chunks, differentiate, evaluate
from dr2net.grid import Rows, coarser
from dr2net.module_state import StatisticsKept, buffer_versions, refuse_changed_buffers


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
    f: Tensor


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
    chunks: Chunks | None = None  # the branch is run and differentiated in these
    versions: list[int] = field(default_factory=list)
    needs: tuple[bool, ...] = ()  # whether x, and each tensor of the side, wants a gradient
    autocast: dict[str, Any] = field(default_factory=dict)
    random: rng.States | None = None

    def call(self, x: Tensor, side: list[Tensor]) -> Tensor:
        """F(x, *arguments) under the autocast of the forward pass."""
        arguments = list(self.arguments)
        for position, tensor in zip(self.tensor_at, side, strict=True):
            arguments[position] = tensor
        args, named = tree_unflatten(arguments, self.structure)
        version = version_of(x)
        with self.surroundings():
            if self.chunks is not None:
                f = evaluate(self.chunks, x, self.dtype, keep_graph=self.stored)
            else:
                # a view, because module hooks that watch the backward (FLOP counters) cannot stand leaves inside one
                f = self.branch(x.view_as(x).to(self.dtype), *args, **named)
        if f.shape != x.shape:
            raise ValueError(
                f"branch {self.name} turned {tuple(x.shape)} into {tuple(f.shape)}; it must keep the shape"
            )
        if version_of(x) != version:
            raise ValueError(f"branch {self.name} changes its input in place; use an out-of-place operation there")
        return f

    def recompute(self, x: Tensor, side: list[Tensor]) -> Recomputed:
        """What `call` computed in forward, to be differentiated. Called without gradients."""
        self.refuse_changed_parameters()
        inputs = [t.detach().requires_grad_(need) for t, need in zip((x, *side), self.needs, strict=True)]
        with torch.enable_grad(), rng.replay(self.random, x), StatisticsKept(self.branch.modules):
            return Recomputed(inputs[0], inputs[1:], self.call(inputs[0], [t.view_as(t) for t in inputs[1:]]))

    def first(
        self, run: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, n: Tensor, grid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """F_1 of x on its grid, and that stream; where F_1 outgrows the grid, n and grid become coarser, in place.

        `run` gives F_1 and the stream for the decoded n; x is what entered the run of branches, without a graph. A
        first attempt leaves no trace in random generators and statistics.
        """
        states, statistics = rng.record(x), StatisticsKept(self.branch.modules).__enter__()
        f, stream = run(exact.decode(n, grid))
        new = coarser(grid, f.detach(), self.rows)
        if new is not None:
            del f, stream
            grid.copy_(new)
            n.copy_(exact.encode(x, grid)[0])
            rng.restore(states)
            statistics.put_back()
            f, stream = run(exact.decode(n, grid))
        return f, stream

    def refuse_changed_parameters(self) -> None:
        for parameter, version in zip(self.parameters, self.versions, strict=True):
            if parameter._version != version:
                raise RuntimeError(
                    f"a parameter of branch {self.name}, shape {tuple(parameter.shape)}, was changed in place between "
                    "forward and backward, so the branch cannot be recomputed; step the optimizer after backward"
                )

    def surroundings(self) -> ExitStack:
        """The contexts in which the branch is computed, the first time and again."""
        with ExitStack() as stack:
            if not self.stored:
                # what the branch saves lives for one branch only: the caller's own hooks (offloading, counting) are not
                # for it
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_without_graph, _without_graph))
            if self.autocast:
                # the cache would hand a weight cast under no_grad to the recomputation, which then finds no gradient
                stack.enter_context(torch.autocast(**self.autocast, cache_enabled=False))
            return stack.pop_all()


class DualResidual(torch.autograd.Function):
    """One branch of a dual-residual sequence: the repository's only autograd.Function.

    Inputs: node, x = x_{i-1}, previous = x_{i-2}, then for exact inversion n_{i-1}, n_{i-2} and grid (else None), then
    the tensors among the block's side arguments, then the branch's trainable parameters, so that their gradients reach
    autograd (and DDP) as soon as this node is done. Outputs x_i, and for exact inversion n_i and the largest |q_i|.
    """

    @staticmethod
    def forward(ctx, node: Node, x, previous, n, n_previous, grid, *tensors):
        side = list(tensors[: len(node.tensor_at)])
        own = side if node.own_side else []
        common, node.common_side = node.common_side, []
        device = x.device.type
        if torch.amp.is_autocast_available(device):  # off is restored too: backward may be called inside autocast
            node.autocast = {
                "device_type": device,
                "dtype": torch.get_autocast_dtype(device),
                "enabled": torch.is_autocast_enabled(device),
            }
        ctx.set_materialize_grads(False)  # else the integer stream gets a gradient of zeros, as large as itself
        states = rng.record(x) if node.recording else {}
        buffers = buffer_versions(node.branch.modules)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            # under grad, like the recomputation, because other kernels may be chosen without; the graph is dropped at
            # once
            graph = node.exact and node.recording
            with torch.set_grad_enabled(graph):
                return node.call(x.detach().requires_grad_(graph and ctx.needs_input_grad[1]), side).detach(), x

        if node.exact and node.index == 0:
            f, x = node.first(run, x.detach(), n, grid)  # the caller's x is not on the grid yet
        else:
            f, x = run(x)
        refuse_changed_buffers(node.name, buffers)
        if node.recording:
            node.random = rng.drawn(states, x)
            node.versions = [parameter._version for parameter in node.parameters]
            node.needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[6 : 6 + len(node.tensor_at)])
            ctx.node = node
        if not node.exact:
            following = coupling.step(f, x, previous, node.alpha, node.beta)
            if node.recording:
                ctx.save_for_backward(*own, *((following, x, *common) if node.keeps else ()))
            return following
        q, size = exact.quantise(f, x, node.alpha, grid, out=f if node.chunks is not None else None)
        del f, x
        check = exact.checksum(q) if node.recording else None
        following, words = exact.step(q, n_previous, node.beta, keep=node.recording and node.inverts)
        if node.recording:
            ctx.save_for_backward(check, words, *own, *((following, n, grid, *common) if node.keeps else ()))
        ctx.mark_non_differentiable(following, size)
        return exact.decode(following, exact.checked(grid, size, node.largest)), following, size

    @staticmethod
    def backward(ctx, grad, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible sequence has no second derivative: its backward is not differentiable. "
                "Call without create_graph=True, or convert with store=True"
            )
        node: Node = ctx.node
        tape = node.tape
        saved = list(ctx.saved_tensors)
        check, words = (saved.pop(0), saved.pop(0)) if node.exact else (None, None)
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
        grad = torch.zeros_like(x) if grad is None else grad
        if node.chunks is None:
            done = node.recompute(x, own if node.own_side else tape.side)
            x_in, side, f = done.x, done.side, done.f
            del done
        else:
            node.refuse_changed_parameters()
            x_in = x.detach().requires_grad_(node.needs[0])
            with torch.enable_grad(), rng.replay(node.random, x), StatisticsKept(node.branch.modules):
                f, grad_x, of_parameters = differentiate(
                    node.chunks, x_in, grad, node.dtype, node.alpha, node.parameters, node.surroundings
                )
            del x_in

        if node.exact:
            q, _ = exact.quantise(f.detach(), x, node.alpha, streams[2], out=f if node.chunks is not None else None)
            del x
            if not isinstance(q, FakeTensor):
                tape.checks.append((node.name, torch.eq(exact.checksum(q), check).all()))
            if node.inverts:
                tape.streams = (streams[1], exact.invert(q, streams[0], words, node.beta), streams[2])
            del q
        elif node.inverts:
            out = streams[0] if owned else f if node.chunks is not None else None
            tape.streams = (x, coupling.invert(f.detach(), x, streams[0], node.alpha, node.beta, out))
        if node.inverts:
            tape.index, tape.owned = node.index - 1, not node.keeps  # a node that keeps hands on its saved x
        else:
            _verify(tape)
        del streams, saved, words

        if node.chunks is None:
            wanted = [t for t in (x_in, *side, *node.parameters) if t.requires_grad]
            found = iter(())
            if f.requires_grad:
                edge, grad_f = torch.autograd.graph.get_gradient_edge(f), grad.to(f.dtype)
                del f  # its values are not needed to differentiate it
                found = iter(torch.autograd.grad(edge, wanted, grad_f, allow_unused=True))
                del edge, grad_f
            grad_x, *results = [next(found, None) if t.requires_grad else None for t in (x_in, *side, *node.parameters)]
            if x_in.requires_grad and node.alpha != 0:
                # rounded as plain autograd rounds, so that the gradient is bitwise that of `store=True`
                grad_x = grad * node.alpha if grad_x is None else (grad * node.alpha).add_(grad_x)
        else:
            del f
            results = [*[None] * len(node.tensor_at), *of_parameters]
        grad_previous = None
        if ctx.needs_input_grad[1] and ctx.needs_input_grad[2] and node.beta != 0:
            grad_previous = grad if node.beta == 1 else grad * float(node.beta)
        return None, grad_x, grad_previous, None, None, None, *results


def _verify(tape: Tape) -> None:
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


def version_of(tensor: Tensor) -> int | None:
    """Counts in-place changes; None under inference_mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def autocast_is_on(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def _without_graph(tensor: Tensor) -> Tensor:
    """An operator that saves its own output (attention does) would through that output keep itself alive, for ever."""
    return tensor.detach()
