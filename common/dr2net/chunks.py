"""Branches in chunks: a branch that treats tokens, windows or samples independently never exists as a whole.

    F(x) = [F(x_1), F(x_2), ...]        x cut into groups of rows that do not see each other

A branch declares along what it is independent, and from that makes the groups of an input (`Branch.chunks`).
`evaluate` runs F group by group, `differentiate` recomputes and differentiates it group by group: parameter gradients
are summed, F(x) and the gradient of x are written into one buffer each. A chunk is as many groups as a budget of bytes
allows, the same number forward and backward, so a recomputation is bitwise the first computation, dropout included.
Drop path, which is per sample, is drawn once per pass.

Against the branch as a whole: the same to rounding; with dropout in it, other masks of the same distribution.
Not here: which branches are independent (`branches.py`), windows (`window_attention.py`), streams (`node.py`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


class Groups:
    """Equal, independent groups of rows of x; a row is x's last dimension, and a sample's groups are consecutive.

    function: F for an input of some groups, (num_groups, *inner, C), and for the same groups of what is beside x.
    shape: x's; leading: the dimensions of x that number the groups. `window_attention.Windows` overrides what is not so
    simple.
    """

    def __init__(self, function: Callable[..., Tensor], shape: Sequence[int], leading: int) -> None:
        self.function = function
        self.count = math.prod(shape[:leading])
        self.inner = tuple(shape[leading:-1])
        self.rows = math.prod(self.inner)  # per group
        self.positions = math.prod(shape[leading + 1 :])  # per group, where its first dimension is channels

    def shared(self) -> tuple[Tensor, ...]:
        """What all groups use and is computed once per pass, differentiably, from the parameters."""
        return ()

    def where(self, start: int, stop: int, device: torch.device) -> Any:
        """Groups start to stop, as `take`, `put` and `call` want them; made once per chunk and pass."""
        return slice(start * self.rows, stop * self.rows)

    def take(self, rows: Tensor, where: Any) -> Tensor:
        """These groups of x or of a gradient, given as rows (num_rows, C): (num_groups, *inner, C)."""
        return rows[where].view(-1, *self.inner, rows.shape[-1])

    def put(self, rows: Tensor, values: Tensor, where: Any) -> None:
        """The inverse of `take`; `rows` has one row more than x, which may be written and is not read."""
        rows[where] = values.reshape(-1, rows.shape[-1])

    def call(self, chunk: Tensor, where: Any, *shared: Tensor) -> Tensor:
        """F of these groups; behind `shared`, of what is cut beside x."""
        return self.function(chunk, *shared)

    def floats(self, modules: Sequence[nn.Module]) -> int:
        """An estimate of the floats alive per group while it is differentiated: inputs and outputs of linear layers and
        convolutions (channels first), and their gradients."""
        layers = [m for part in modules for m in part.modules()]
        linear = sum(m.in_features + m.out_features for m in layers if isinstance(m, nn.Linear))
        convolved = sum(m.in_channels + m.out_channels for m in layers if isinstance(m, nn.modules.conv._ConvNd))
        return 2 * max(self.rows, self.rows * linear + self.positions * convolved)


class Chunks:
    """A branch cut for an input of one shape: its groups, how many of them at a time, its drop path, and what each
    tensor beside x is to it (`beside.py`); by "samples" is cut only what has as many as there are groups."""

    def __init__(
        self,
        groups: Groups,
        modules: Sequence[nn.Module],
        drop_path: nn.Module | None,
        budget: float,
        *,
        beside: Sequence[str] = (),
    ) -> None:
        self.groups = groups
        self.drop_path = drop_path
        self.beside = tuple(beside)
        self.size = int(max(1, min(groups.count, budget / (4 * groups.floats(modules)))))

    def spans(self, x: Tensor, *, all_of_them: bool = False) -> Iterator[tuple[int, int]]:
        """(start, stop) of each chunk. A fake x (`memory.predict`) has only the first two, unless all are asked for:
        the others need what the second needs, and the last not more.
        """
        starts = range(0, self.groups.count, self.size)
        if isinstance(x, FakeTensor) and not all_of_them:
            starts = starts[:2]
        for start in starts:
            yield start, min(start + self.size, self.groups.count)

    def factors(self, x: Tensor) -> Tensor | None:
        """Drop path's factor for each sample, (B, 1), drawn as for the whole branch; None if nothing is dropped."""
        if self.drop_path is None:
            return None
        ones = x.new_ones(len(x), 1)
        found = self.drop_path(ones)
        return None if found is ones else found

    def side(self, beside: Sequence[Tensor], start: int, stop: int, where: Any) -> list[Tensor]:
        """What these groups get of each tensor beside x that is used."""
        own = []
        for word, tensor in zip(self.beside, beside, strict=True):
            if word == "rows":
                own.append(self.groups.take(_rows(tensor), where))
            elif word != "unused":
                own.append(tensor[start:stop] if word == "samples" else tensor)
        return own

    def call(
        self, chunk: Tensor, start: int, stop: int, where: Any, factors: Tensor | None, shared: Sequence[Tensor]
    ) -> Tensor:
        f = self.groups.call(chunk, where, *shared)
        if f.shape != chunk.shape:
            raise ValueError(f"groups of shape {tuple(chunk.shape)} became {tuple(f.shape)}; they must keep the shape")
        if factors is None:
            return f
        sample = torch.arange(start, stop, device=f.device) * len(factors) // self.groups.count
        return f * factors[sample].view(-1, *[1] * (f.dim() - 1)).to(f.dtype)


def evaluate(
    chunks: Chunks,
    x: Tensor,
    dtype: torch.dtype,
    *,
    keep_graph: bool,
    beside: Sequence[Tensor] = (),
    plus: float | None = None,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """F(x) in x's dtype, (B, ..., C), computed in `dtype`; without a graph unless asked to keep it.

    beside: all tensors beside x. plus: alpha of F(x) + alpha x, which is then
    made in its place, in the dtype that the sum has, so that F(x) is never there as a whole; only without a graph.
    watch: sees the graph of what is shared and of each chunk.
    """
    assert plus is None or not keep_graph
    rows = _rows(x)
    out = _buffer(rows) if plus is None else None
    shared, factors = chunks.groups.shared(), chunks.factors(x)
    if watch is not None:
        for value in shared:
            watch(value)
    for start, stop in chunks.spans(x, all_of_them=keep_graph):
        where = chunks.groups.where(start, stop, x.device)
        chunk = chunks.groups.take(rows, where)
        side = chunks.side(beside, start, stop, where)
        if not keep_graph:
            chunk = chunk.detach().requires_grad_(x.requires_grad)
            side = [t.detach().requires_grad_(t.requires_grad) for t in side]
        given = [*shared, *(t.view_as(t) for t in side)]
        f = chunks.call(chunk.view_as(chunk).to(dtype), start, stop, where, factors, given)
        if watch is not None:
            watch(f)
        f = f if keep_graph else f.detach()
        if plus:
            f = torch.add(f, chunk.detach(), alpha=plus)
        if out is None:
            out = _buffer(rows, f.dtype)
        chunks.groups.put(out, f, where)
    assert out is not None, "x has groups"
    return out[:-1].view(x.shape)


def differentiate(
    chunks: Chunks,
    x: Tensor,
    grad: Tensor,
    dtype: torch.dtype,
    alpha: float,
    parameters: Sequence[nn.Parameter],
    surroundings: Callable[[], AbstractContextManager[Any]],
    watch: Callable[[Tensor, Sequence[Tensor]], None],
    beside: Sequence[Tensor] = (),
    *,
    keep_f: bool = True,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """F(x), the gradient of <F(x) + alpha x, grad> for x (None unless x requires it) and those of the tensors beside
    it, then of the parameters (None where unused or not required). keep_f: else F(x), which nobody needs, is None.

    Called with gradients enabled; F, not its derivative, runs in fresh `surroundings()` each time (autocast).
    `watch(f, known)` looks at the graph of what is shared and of each chunk, given what may be in it.
    F(x) and the gradient of x are fresh, contiguous, and in x's dtype.
    """
    rows, grad_rows = _rows(x.detach()), _rows(grad)
    out, grad_x = _buffer(rows) if keep_f else None, _buffer(rows) if x.requires_grad else None
    side = _Side(chunks, beside)
    with surroundings():
        shared, factors = chunks.groups.shared(), chunks.factors(x)
    for value in shared:
        watch(value, parameters)
    leaves = [s.detach().requires_grad_(s.requires_grad) for s in shared]
    inputs = [t for t in (*leaves, *side.shared, *parameters) if t.requires_grad]
    sums: list[Tensor | None] = [None] * len(inputs)
    for start, stop in chunks.spans(x):
        where = chunks.groups.where(start, stop, x.device)
        chunk = chunks.groups.take(rows, where).detach().requires_grad_(x.requires_grad)
        own = side.take(start, stop, where)
        grad_chunk = chunks.groups.take(grad_rows, where)
        with surroundings():
            given = [t.view_as(t) for t in (*leaves, *own)]
            f = chunks.call(chunk.view_as(chunk).to(dtype), start, stop, where, factors, given)
        watch(f, [chunk, *leaves, *own, *parameters])
        if out is not None:
            chunks.groups.put(out, f.detach(), where)
        wanted = [chunk] if grad_x is not None else []
        wanted += [*side.cut, *inputs]
        found: list[Tensor | None] = [None] * len(wanted)
        if f.requires_grad:
            edge, grad_f = edge_of(f), grad_chunk.to(f.dtype)
            del f  # its values are not needed to differentiate it
            found = list(torch.autograd.grad(edge, wanted, grad_f, allow_unused=True))
            del edge, grad_f
        if grad_x is not None:
            of_chunk = found.pop(0)
            if of_chunk is None:
                of_chunk = grad_chunk * alpha
            elif alpha != 0:
                of_chunk = (grad_chunk * alpha).add_(of_chunk)
            chunks.groups.put(grad_x, of_chunk, where)
            del of_chunk
        side.put([found.pop(0) for _ in side.cut], start, stop, where)
        for k in reversed(range(len(inputs))):
            part, before = found.pop(), sums[k]
            if part is not None:
                part = part.to(_sum_dtype(inputs[k]))
                sums[k] = part if before is None else before + part  # `part` may be shared: not in place
            del part, before  # the next chunk is to find the sums only
    of_shared = [sums.pop(0) if leaf.requires_grad else None for leaf in leaves]
    of_side = side.gradients([sums.pop(0) for _ in side.shared])
    pairs = [(s, g.to(s.dtype)) for s, g in zip(shared, of_shared, strict=True) if g is not None]
    if pairs:
        more = torch.autograd.grad([s for s, _ in pairs], parameters, [g for _, g in pairs], allow_unused=True)
        sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, more, strict=True)]
    of_parameters = [None if g is None else g.to(p.dtype) for g, p in zip(sums, parameters, strict=True)]
    f_of_all = None if out is None else out[:-1].view(x.shape)
    return f_of_all, None if grad_x is None else grad_x[:-1].view(x.shape), [*of_side, *of_parameters]


class _Side:
    """The tensors beside x while a branch is differentiated: what each chunk gets of them, and their gradients."""

    def __init__(self, chunks: Chunks, beside: Sequence[Tensor]) -> None:
        self.chunks = chunks
        self.tensors = [t.detach().requires_grad_(t.requires_grad) for t in beside]
        words = list(zip(self.tensors, chunks.beside, strict=True))
        self.shared = [t for t, word in words if word == "shared" and t.requires_grad]
        self.buffers = {  # of what is cut, by position
            i: _buffer(_rows(t)) if word == "rows" else torch.empty_like(t)
            for i, (t, word) in enumerate(words)
            if t.requires_grad and word in ("rows", "samples")
        }
        self.cut: list[Tensor] = []  # of the present chunk, those that want gradients

    def take(self, start: int, stop: int, where: Any) -> list[Tensor]:
        """As `Chunks.side`; what is cut is fresh, and has no graph behind it."""
        words = [word for word in self.chunks.beside if word != "unused"]
        own = []
        self.cut = []
        for word, tensor in zip(words, self.chunks.side(self.tensors, start, stop, where), strict=True):
            if word != "shared":
                tensor = tensor.detach().requires_grad_(tensor.requires_grad)
                self.cut += [tensor] if tensor.requires_grad else []
            own.append(tensor)
        return own

    def put(self, found: Sequence[Tensor | None], start: int, stop: int, where: Any) -> None:
        """The present chunk's gradients of `cut`."""
        for (i, buffer), leaf, gradient in zip(self.buffers.items(), self.cut, found, strict=True):
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
            if self.chunks.beside[i] == "rows":
                self.chunks.groups.put(buffer, gradient, where)
            else:
                buffer[start:stop] = gradient

    def gradients(self, of_shared: list[Tensor | None]) -> list[Tensor | None]:
        """One per tensor, None where none is wanted, given the sums over all chunks of `shared`."""
        of_cut = {i: (b[:-1] if self.chunks.beside[i] == "rows" else b) for i, b in self.buffers.items()}
        sums = {id(t): gradient for t, gradient in zip(self.shared, of_shared, strict=True)}
        found: list[Tensor | None] = []
        for i, t in enumerate(self.tensors):
            gradient = of_cut[i].view(t.shape) if i in of_cut else sums.get(id(t))
            found.append(None if gradient is None else gradient.to(t.dtype))
        return found


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _buffer(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return rows.new_empty(len(rows) + 1, rows.shape[1], dtype=dtype)


def edge_of(f: Tensor) -> torch.autograd.graph.GradientEdge:
    """Where the backward of f begins; f's values may be freed before it.

    Of a view, whose node is C++'s own and holds the graph: an edge to a node made in Python (a compiled branch) holds
    nothing in torch before 2.8, and to differentiate it crashed the process.
    """
    with torch.enable_grad():
        return torch.autograd.graph.get_gradient_edge(f.view_as(f))


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Sums over many chunks in bfloat16 would lose the small ones."""
    return torch.promote_types(tensor.dtype, torch.float32)
