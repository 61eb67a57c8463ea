"""One forward pass through a run of reversible blocks, which keeps no activations between them.

Each residual branch of each block is one node of the autograd graph (`node.py`).

    inversion   streams             kept besides the last two streams            gradient
    "exact"     integers on a grid  ceil(log2(1/beta)) bits per element, branch  that of stored activations
    "anchored"  floats              both streams every k branches                within a tolerance
    "float"     floats              nothing                                      noise at small beta (error_law.py)

At beta = 0 nothing can be inverted and every node keeps its input: plain checkpointing. So does a run of few branches
that enters at half precision, at any beta and in that precision: n inputs of 2 bytes take no more than two streams of 4
up to n = 4, and those of a stage of two blocks would be most of what is stored. `store=True` runs the same
arithmetic under plain autograd with all activations kept: the reference of the tests and of `gradient_error`. With
`chunk_mib` the branches that allow it run in chunks (`chunks.py`), else each as a whole.

Not supported: double backward (an error), functorch transforms, reading the second stream. Not here: the container of
the blocks and how a pass is found (`sequence.py`).
"""

import inspect
import math
import sys
import warnings
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_structure, tree_unflatten

from dr2net import coupling, exact
from dr2net.beside import positional_names
from dr2net.branches import Branch, begins_run, blocks_of, find_branches, refuse_uncovered
from dr2net.checkpointed import Checkpointed
from dr2net.chunks import Chunks
from dr2net.entry import entry_of
from dr2net.error_law import anchor_spacing, predicted_error
from dr2net.first_branch import on_grid
from dr2net.foreign import refuse_arguments, remembers
from dr2net.grid import PRECISION_BITS, Rows, grid_of, rows_of
from dr2net.node import DualResidual, Node, Tape, autocast_is_on, version_of
from dr2net.patches import CONVERT_AGAIN, refuse_backward_hooks, refuse_checkpointing, refuse_replaced_forward
from dr2net.sharding import door_of, put_door, refuse_sharded

if TYPE_CHECKING:
    from dr2net.sequence import ReversibleSequence


COARSE = 0.02  # relative change of F in a recomputation that is still taken for rounding
FEWEST = 256  # steps of the grid that the largest value of a stream has to have, else its last digits are too few
FADED = (
    "the stream {} of a reversible sequence is so weak against what entered that its largest value has fewer than "
    f"{FEWEST} steps of the integers' grid, and would be wrong without notice; norm what enters (a block whose norm "
    "comes after the sum makes any input small), leave the first block out, or convert with inversion='anchored'"
)


class Pass:
    """One forward pass through a run of reversible blocks: the two streams, carried from block to block."""

    # The streams: tensors; None while only the caller holds x, after the run, and n and grid without exact inversion.
    x: Any
    previous: Any
    n: Any
    n_previous: Any
    grid: Any
    version: int | None  # of the tensor returned last
    plain: bool  # inputs are kept, in the plain network's precision; else two streams are

    def __init__(self, sequence: "ReversibleSequence", block: nn.Module) -> None:
        self.sequence = sequence
        self.blocks = list(blocks_of(sequence).items())
        self.branches = [find_branches(other)[0] for _, other in self.blocks]
        self.expected = self._start_at(block)  # index of the block that comes next
        self.end = self.expected  # index after the last block of the run
        while self.end < len(self.blocks) and self.branches[self.end]:
            name, other = self.blocks[self.end]
            if self.end > self.expected and begins_run(other):
                break
            refuse_backward_hooks(other, f"block {name}")
            if other.training:
                refuse_checkpointing(other, f"block {name}")
            entry = entry_of(other)
            if entry is None:
                refuse_replaced_forward(other, f"block {name}")
            elif not entry.belongs_to(other, sequence):
                raise ValueError(f"block {name} was copied into its container after the conversion; {CONVERT_AGAIN}")
            elif entry.plain is not inspect.unwrap(type(other).forward):
                raise ValueError(f"the forward of the class of block {name} was replaced; {CONVERT_AGAIN}")
            elif entry.has_new_parts(other):
                refuse_uncovered(other, f"block {name}", self.branches[self.end])
            put_door(other)
            self.end += 1
        if not any(self.branches[: self.expected]):
            sequence.ran, sequence.whole = 0, {}
            sequence.coefficients.say_doubts(sequence.place)
        self.started = self.ended = False

    def _start_at(self, block: nn.Module) -> int:
        """Where a run begins with `block`."""
        places = [index for index, (_, other) in enumerate(self.blocks) if other is block]
        if not places:
            raise ValueError(
                f"a {type(block).__name__} is no longer a block of {self.sequence.place}, or was wrapped there after "
                f"the conversion; {CONVERT_AGAIN}"
            )
        if not self.branches[places[0]]:
            raise ValueError(
                f"block {self.blocks[places[0]][0]} was converted and is not reversible any more: "
                f"{find_branches(block)[1]}; {CONVERT_AGAIN}"
            )
        starts = [i for i in places if i == 0 or not self.branches[i - 1] or begins_run(block)]
        if not starts:
            raise ValueError(
                f"the input of block {self.blocks[places[0]][0]} is not the output of the block before it, or that was "
                "changed or used already; a reversible run of blocks cannot be interrupted, repeated or entered in the "
                f"middle, nor can a block in it be left out (LayerDrop: set it to 0){_likely_cause()}"
            )
        return starts[0]

    def expects(self, sequence: "ReversibleSequence", block: nn.Module) -> bool:
        return sequence is self.sequence and self.blocks[self.expected][1] is block

    def step(self, x: Tensor, args: tuple, named: dict[str, Any], given: Tensor) -> Tensor:
        """Through the next block. x: what it is handed, `given` or what FSDP put in its place (`sharding.py`)."""
        name, block = self.blocks[self.expected]
        if not self.started:
            self.remembers = remembers((args, named))
            self._start(self.expected, x)
            self.started = True
        elif version_of(given) != self.version:
            raise ValueError(
                f"the input of block {name} was changed in place; between the blocks of a run it must not be"
            )
        elif self.x is None and x.dtype == given.dtype:
            self.x = x
        elif x is not self.x:
            # A model in bfloat16 has the stream's copy between its blocks: put it on the gradient's way, so that hooks
            # on it, and losses, act as in the plain model. The value is the stream's: the difference is exact.
            stream = given if self.x is None else self.x
            self.x = x.to(stream.dtype) + (stream - x.to(stream.dtype)).detach()
        door = door_of(block)
        self.shards = [] if door is None else door.shards
        # a sharded block has other parameters while it runs than when the pass began
        for branch in self.branches[self.expected] if door is None else find_branches(block)[0]:
            if self.plain:  # as in the plain network the sum has the dtype that adding gives it
                self.dtype = self.x.dtype
            self._advance(branch, f"{name}.{branch.name}", args, named)
            self.sequence.ran += 1
        self.expected += 1
        output = self.x if self.plain else self.x.to(self.dtype)
        self.ended = self.expected == self.end
        if self.ended:
            self._finish()
        return output

    def hand_out(self, output: Tensor) -> None:
        """The caller has `output`, what `step` returned or a copy of it; the next block is to be given it."""
        self.version = version_of(output)
        if output is self.x:
            self.x = None  # the caller has it; see `sequence.py`

    def _start(self, index: int, x: Tensor) -> None:
        sequence = self.sequence
        run = [branch for branches in self.branches[index : self.end] for branch in branches]
        self.length = len(run)
        behind = sum(len(branches) for branches in self.branches[self.end :])
        self.rebuilt = max(0, self.length - max(0, sequence.keep - behind))  # the others keep their insides
        self.index, self.tape, self.sizes = 0, Tape(), []
        self.side: list[Tensor] | None = None  # of the first block
        self.dtype = x.dtype
        # Of few branches in half precision the inputs, as they come, take no more than two streams in float32 would.
        self.short = not sequence.checkpointed and x.element_size() < 4 and self.length * x.element_size() <= 8
        self.plain = sequence.checkpointed or self.short
        self.x = self.previous = x if self.plain or x.dtype == torch.float64 else x.float()
        self.n = self.n_previous = self.grid = None
        # the grid looks at all tokens, and with a cache some are not there; nothing is inverted then
        self.exact = sequence.inversion == "exact" and not self.remembers and not self.short
        self.largest, self.rows = 0, Rows()
        self.beta = exact.rational(sequence.beta) if self.exact else float(sequence.beta)
        computed_in = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) else x.dtype
        sequence.computed_in = computed_in
        self.every = self.length
        # An error of the streams within the tolerance changes F by about as much.
        self.coarse: float | None = min(max(5 * sequence.tolerance, COARSE), 10 * COARSE)
        if self.plain or self.beta == 0:
            self.every = 1
        elif sequence.inversion == "anchored":
            spacing = anchor_spacing(sequence.alpha, float(self.beta), computed_in, sequence.tolerance)
            self.every = sequence.anchor_every or spacing or self.length
        elif sequence.inversion == "float" and torch.is_grad_enabled() and not sequence.store:
            error = predicted_error(sequence.alpha, float(self.beta), max(1, self.rebuilt), computed_in)
            self.coarse = max(5 * error, COARSE) if error < 2 * COARSE else None  # else the streams themselves are off
            if error > sequence.tolerance:
                warnings.warn(
                    # no coefficients: they may move at each step, and Python shows each text once
                    f"float inversion of {self.rebuilt} branches in {computed_in} has a predicted relative gradient "
                    f"error of {error:.0e} at the present coefficients; use inversion='exact' or 'anchored'",
                    stacklevel=4,
                )
        if self.exact:
            self.largest = exact.limit(exact.rational(self.beta), self.length, self.x.dtype)
            self.rows = rows_of(run, self.x, self.largest)
            grid = grid_of(self.x, self.rows)
            self.n, size = exact.encode(self.x, grid)
            self.grid = exact.checked(grid, size, self.largest)
            self.n_previous = self.n
            self.sizes.append(("the input", size))

    def _advance(self, branch: Branch, name: str, args: tuple, named: dict[str, Any]) -> None:
        flat, structure = tree_flatten((args, named))
        structure = tree_structure(tree_unflatten(flat, structure))  # a torch.Size comes back as a tuple
        tensor_at = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
        side = [flat[i] for i in tensor_at]
        if self.side is None:
            self.side = side
        common = len(side) == len(self.side) and all(a is b for a, b in zip(side, self.side, strict=True))
        parameters = branch.parameters()
        differentiable = any(t.requires_grad for t in (self.x, self.previous, *side, *parameters))
        position = self.index
        keeps = (position + 1) % self.every == 0 or position + 1 == self.rebuilt
        stored = self.sequence.store or position >= self.rebuilt
        recording = torch.is_grad_enabled() and differentiable and not stored
        if recording:
            refuse_arguments(flat, name)
            refuse_sharded(branch.modules, parameters, name)
        node = Node(
            tape=self.tape,
            branch=branch,
            name=name,
            index=position,
            alpha=self.sequence.alpha if branch.residual else 0.0,
            beta=self.beta,
            exact=self.exact,
            rows=self.rows,
            largest=self.largest,
            stored=stored,
            recording=recording,
            keeps=keeps,
            inverts=position > 0 and position % self.every != 0 and self.x.requires_grad,
            arguments=[None if isinstance(value, Tensor) else value for value in flat],
            tensor_at=tensor_at,
            own_side=not common,
            common_side=self.side if keeps else [],
            structure=structure,
            dtype=self.dtype,
            parameters=parameters,
            watched=[*parameters, *self.shards],
            coarse=self.coarse,
            chunks=None if position >= self.rebuilt else self._chunks(branch, name, args, named),
        )
        if stored:
            result = self._stored(node, side)
        elif self.plain:
            previous = self.x.view_as(self.x) if position == 0 else self.previous  # summed in the order of `_stored`
            result = Checkpointed.apply(node, self.x, *side, *parameters)
            if self.short:  # alpha x is in it already
                like = self.x if node.alpha == 0 else result
                result = coupling.step(result, like, previous, 0, float(self.beta))
        else:
            result = DualResidual.apply(
                node, self.x, self.previous, self.n, self.n_previous, self.grid, *side, *parameters
            )
        if self.exact:
            following, n, size = result
            self.n, self.n_previous = n, self.n
            self.sizes.append((f"branch {name}", size))
        else:
            following = result.to(self.x.dtype) if branch.whole else result
        self.x, self.previous = following, self.x
        self.index += 1

    def _chunks(self, branch: Branch, name: str, args: tuple, named: dict[str, Any]) -> Chunks | None:
        """How the branch is cut, if chunks are asked for; why it is not is noted for the report."""
        if self.sequence.chunk_mib is None or self.remembers:
            return None
        names = positional_names(self.blocks[self.expected][1])
        chunks = branch.chunks(self.x, args, named, self.sequence.chunk_mib, names)
        if isinstance(chunks, str):
            self.sequence.whole[name] = chunks
            return None
        return chunks

    def _stored(self, node: Node, side: list[Tensor]) -> Any:
        """The same arithmetic under plain autograd; on the grid, the gradient passes straight through the rounding."""
        x, previous = self.x, self.previous
        if node.index == 0:
            previous = x.view_as(x)
        if node.exact and node.index == 0:

            def run(decoded: Tensor) -> tuple[Tensor, Tensor]:
                x = (decoded + (self.x - self.x.detach())).view_as(decoded)
                return node.call(x, side), x

            f, x = on_grid(node.branch, node.rows, run, x.detach(), self.n, self.grid)
        else:
            x = x.view_as(x)  # with the view above: gradients are summed in the order in which nodes return theirs
            f = node.call(x, side)
        if not self.exact:
            return coupling.step(f, x, previous, node.alpha, float(node.beta))
        smooth = coupling.step(f, x, previous, node.alpha, float(node.beta))
        q, size = exact.quantise(f.detach(), x.detach(), node.alpha, self.grid)
        n, _ = exact.step(q, self.n_previous, exact.rational(node.beta), keep=False)
        value = exact.decode(n, exact.checked(self.grid, size, self.largest))
        return value + (smooth - smooth.detach()), n, size

    def _finish(self) -> None:
        """Let go of the streams, then look whether the grid fitted: once per pass, as looking waits for the device."""
        sizes, n = self.sizes, self.n
        self.x = self.previous = self.n = self.n_previous = self.grid = self.side = None
        if not sizes or isinstance(sizes[0][1], FakeTensor):
            return
        *found, faintest = torch.stack([*(size for _, size in sizes), exact.faintest(n).to(sizes[0][1].dtype)]).tolist()
        before = bound = found[0]  # of |n_{i-1}|, |n_i|
        for index, ((name, _), size) in enumerate(zip(sizes, found, strict=True)):
            if not math.isfinite(size):
                raise FloatingPointError(f"{name} of a reversible sequence is not finite (NaN or infinite)")
            if size > self.largest:
                raise OverflowError(self._overflow(name, size))
            before, bound = bound, size + float(self.beta) * before + 1 if index else bound
            if index and size and bound < FEWEST:
                raise FloatingPointError(FADED.format(f"behind {name}"))
        if faintest < FEWEST:
            raise FloatingPointError(FADED.format("of a sample at the end"))

    def _overflow(self, name: str, size: float) -> str:
        alpha, beta = float(self.sequence.alpha), float(self.beta)
        scale = 2 ** PRECISION_BITS[torch.float64 if self.dtype == torch.float64 else torch.float32]
        if alpha + beta > 1:
            remedy = f"choose alpha + beta <= 1, not {alpha + beta:.4g}: a stream grows from branch to branch"
        else:
            remedy = (
                "what enters is so weak against what the branches add that no integer holds both: enlarge it (queries "
                "or latents that start near zero, their norm or their initialization), leave the first blocks out"
            )
        return (
            f"{name} of a reversible sequence reached {size / scale:.3g} times the scale of what entered the sequence, "
            f"more than the {self.largest / scale:.3g} that {self.length} branches allow at (alpha, beta) = "
            f"({alpha:.4g}, {beta:.4g}); {remedy}, or convert with inversion='anchored'"
        )


def _likely_cause() -> str:
    """For an error: the model's own checkpointing calls a block inside torch.utils.checkpoint."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return (
                ". It is called inside torch.utils.checkpoint: turn the model's own gradient checkpointing off (timm: "
                "model.set_grad_checkpointing(False), transformers: model.gradient_checkpointing_disable())"
            )
        frame = frame.f_back
    return (
        ", and hooks on a block may not return another tensor. What happens between two blocks belongs into one of "
        "them; or convert only a part of the model, as in dr2net.convert(model.encoder). To call one block alone, copy "
        "it: copy.deepcopy(block)"
    )
