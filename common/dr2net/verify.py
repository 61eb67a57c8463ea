"""One call that tries a converted model on the user's own batch: is it still her network, and are its gradients right?

    print(dr2net.verify(model, batch, lambda model, batch: criterion(model(batch), labels)))

Three comparisons, with the same random draws: at (alpha, beta) = (1, 0) with the plain blocks, output and gradient; at
the present coefficients with stored activations; and which parameters get a gradient. It finds a registration that left
the residual in, swapped or forgot modules or goes around a patch, tensors that no module of a branch holds, caches
among the arguments, and blocks that the model does not call. Not here: the error over a schedule (`dr2net check`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dr2net import rng
from dr2net.convert import sequences
from dr2net.gradient_check import gradient_error
from dr2net.sequence import ReversibleSequence

TOLERANCE = 1e-3  # the grid of exact inversion and sums in another order cost less
EPSILONS = 30  # of the dtype that the branches compute in: their rounding differs where the stream's is kept
ERRORS = (RuntimeError, ValueError, ArithmeticError, TypeError)


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `problems` are sentences; there are none if all is well. Errors are relative, None where a
    problem kept them from being measured.
    """

    problems: tuple[str, ...]
    branches: int  # that ran
    output: float | None  # of the model at (1, 0), against its plain blocks
    plain_gradient: float | None  # the gradient there, against theirs
    stored_gradient: float | None  # at the present coefficients, against stored activations
    parameters: int  # tensors that get a gradient

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def __str__(self) -> str:
        shown = [
            (self.output, "output at (1, 0), against the plain blocks"),
            (self.plain_gradient, "gradient at (1, 0), against the plain blocks"),
            (self.stored_gradient, "gradient at the present coefficients, against stored activations"),
        ]
        lines = [f"{'-' if error is None else f'{error:.1e}':>8}  {text}" for error, text in shown]
        lines.append(f"{self.branches:>8}  branches ran, {self.parameters} parameters get a gradient")
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems or ())])


@dataclass
class _Seen:
    """One run: the floating-point tensors the model returned and the loss, and the gradient of each parameter."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]


def verify(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Verification:
    """Try a converted model: `loss(model, batch)`, a scalar, is run and differentiated four or five times.

    Choose a small batch. Leaves no trace: .grad, buffers, random generators, coefficients stay as they were. What goes
    wrong in the converted model is a problem in the report; an error of the plain model, a model that is not converted
    and one without parameters that train are raised.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to verify")
    own = sequences(model)
    problems: list[str] = []
    errors: dict[str, float | None] = {"output": None, "plain_gradient": None, "stored_gradient": None}

    with _plain(own):
        plain = _run(model, batch, loss, trained)
    reached = {name for name, gradient in plain.gradients.items() if gradient is not None}
    present: set[str] = set()
    with _at_one_and_zero(own):
        try:
            seen = _run(model, batch, loss, trained)
        except ERRORS as error:
            problems.append(f"at (1, 0): {error}")
        else:
            present = {name for name, gradient in seen.gradients.items() if gradient is not None}
            errors["output"] = _distance(seen.outputs, plain.outputs)
            pairs = [(seen.gradients[name], plain.gradients[name]) for name in reached & present]
            errors["plain_gradient"] = _distance(*map(list, zip(*pairs, strict=True))) if pairs else None
    bound = max(TOLERANCE, EPSILONS * max(_epsilon(sequence) for sequence in own))
    if errors["output"] is not None and not errors["output"] <= bound:
        problems.append(
            f"at (1, 0) the output is {errors['output']:.1e} off the plain blocks': a branch is registered as another "
            "function than its block computes (a residual left in, modules swapped, a patch it goes around)"
        )
    if errors["plain_gradient"] is not None and not errors["plain_gradient"] <= bound:
        problems.append(f"at (1, 0) the gradient is {errors['plain_gradient']:.1e} off the plain blocks'")
    if present and reached - present:
        names = ", ".join(sorted(reached - present)[:6])
        problems.append(f"{len(reached - present)} parameters that the plain blocks train get no gradient: {names}")

    try:
        errors["stored_gradient"] = gradient_error(model, batch, loss).overall
    except ERRORS as error:
        if str(error) not in " ".join(problems):
            problems.append(str(error))
    tolerance = max(bound, *(sequence.tolerance for sequence in own))
    if errors["stored_gradient"] is not None and not errors["stored_gradient"] <= tolerance:
        problems.append(
            f"at the present coefficients the gradient is {errors['stored_gradient']:.1e} off that of stored "
            "activations: use inversion='exact', or coefficients nearer to (0, 1)"
        )
    for sequence in own:
        if sequence.ran != sequence.num_branches() and errors["output"] is not None:
            problems.append(
                f"{sequence.ran} of {sequence.num_branches()} branches of {sequence.place} ran: the model does not "
                "call all of its blocks, or calls parts of them"
            )
    ran = sum(sequence.ran for sequence in own)
    return Verification(tuple(problems), ran, **errors, parameters=len(present))


def _run(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], trained: dict[str, nn.Parameter]
) -> _Seen:
    like = next(iter(trained.values()))
    states, buffers = rng.record(like), [(buffer, buffer.clone()) for buffer in model.buffers()]
    caught: list[Any] = []
    hook = model.register_forward_hook(lambda _, arguments, output: caught.append(output))
    try:
        with torch.enable_grad(), rng.replay(states, like):
            value = loss(model, batch)
            found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    finally:
        hook.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    tensors = [t.detach() for t in tree_leaves(caught) if isinstance(t, Tensor) and t.is_floating_point()]
    return _Seen([value.detach(), *tensors], dict(zip(trained, found, strict=True)))


@contextmanager
def _plain(own: list[ReversibleSequence]) -> Iterator[None]:
    """Inside, each block runs as it did before the conversion."""
    for sequence in own:
        sequence.plain = True
    try:
        yield
    finally:
        for sequence in own:
            sequence.plain = False


@contextmanager
def _at_one_and_zero(own: list[ReversibleSequence]) -> Iterator[None]:
    before = [(sequence.alpha, sequence.beta) for sequence in own]
    for sequence in own:
        sequence.coefficients.alpha, sequence.coefficients.beta, sequence.ran = 1.0, 0.0, 0
    try:
        yield
    finally:
        for sequence, (alpha, beta) in zip(own, before, strict=True):
            sequence.coefficients.alpha, sequence.coefficients.beta = alpha, beta


def _epsilon(sequence: ReversibleSequence) -> float:
    return torch.finfo(sequence.computed_in).eps


def _distance(ours: list[Any], theirs: list[Any]) -> float:
    """|ours - theirs| / |theirs| over all tensors; infinity where they do not match."""
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    norm = sum(float(b.double().square().sum()) for b in theirs)
    if not difference < float("inf"):
        return float("inf")
    return 0.0 if difference == 0 else (difference / norm) ** 0.5 if norm > 0 else float("inf")
