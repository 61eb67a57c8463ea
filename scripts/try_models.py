"""Convert many models of timm, torchvision or transformers with a probe and see whether each is right.

    python -m scripts.try_models timm                     # the smallest model of each module
    python -m scripts.try_models transformers bert gpt2   # these
    python -m scripts.try_models torchvision --json OUT   # also as JSON

Random weights, tiny configurations where the library has them. Of each model one line: what became of it, the share of
its parameters in reversible blocks, the errors of output and gradient, or the reason why not; then the counts. `Trial`
and `try_model` are for other scripts. Not here: adapters and their tests, docs/models.md.
"""

import argparse
import copy
import json
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import dr2net
from scripts import zoo_transformers, zoo_vision

OUTPUT, GRADIENT = 1e-3, 1e-5  # relative: the grid of exact inversion; a sum in another order
TINY = 1e-40  # squared norm of outputs that have died away in random layers
ALPHA, BETA = 7 / 8, 1 / 8

Run = Callable[[nn.Module], Any]


@dataclass
class Trial:
    """What became of one model. status: "converted", "refused" (nothing to convert, `why`), "not built", "wrong"."""

    name: str
    status: str
    why: str = ""
    share: float = 0.0  # of the parameters, in reversible blocks
    blocks: int = 0
    branches: int = 0
    types: tuple[str, ...] = ()  # of the reversible blocks
    output: float | None = None  # relative error at (1, 0) against the plain model
    gradient: float | None = None  # at (7/8, 1/8) against stored activations, in training mode
    seconds: float = 0.0


def loss_of(outputs: Any) -> Tensor:
    """A scalar on which all floating-point outputs depend."""
    found = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
    return torch.stack(
        [(t.float() * torch.linspace(0.5, 1.5, t.shape[-1] if t.dim() else 1)).mean() for t in found]
    ).sum()


def try_model(name: str, model: nn.Module, run: Run, *, probe: bool = True, **options: Any) -> Trial:
    """Convert `model` in evaluation mode, compare with the plain one, then train a step against stored activations.

    run: the model on its batch. probe: whether blocks that are not registered are found by running it.
    """
    began = time.monotonic()
    trial = Trial(name, "converted")
    model.eval()
    plain = copy.deepcopy(model)
    try:
        report = dr2net.convert(model, probe=run if probe else None, **options)
    except ValueError as error:
        trial.status, trial.why = "refused", " ".join(str(error).split())[:600]
        return trial
    trial.share = report.reversible_parameters / max(1, report.all_parameters)
    trial.blocks = sum(blocks for _, blocks, _ in report.sequences)
    trial.branches = sum(branches for *_, branches in report.sequences)
    own = [m for m in model.modules() if isinstance(m, dr2net.ReversibleSequence)]
    trial.types = tuple(sorted({type(b).__name__ for s in own for b in s.children() if "forward" in vars(b)}))
    try:
        with torch.no_grad():
            trial.output = _distance(_seeded(model, run), _seeded(plain, run))
        ran = sum(s.ran for s in own)
        dr2net.set_coefficients(model, ALPHA, BETA)
        for mode in (False, True):
            model.train(mode)
            found = [_gradients(model, run, own, store) for store in (True, False)]
            error = _relative(*found)
            if trial.gradient is None or not error <= trial.gradient:  # one that is not a number, too
                trial.gradient = error
        dr2net.set_coefficients(model, 1, 0)
        dr2net.deconvert(model)
        model.eval()
        with torch.no_grad():
            same = _distance(_seeded(model, run), _seeded(plain, run)) == 0
    except Exception as error:
        trial.status, trial.why = "wrong", f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    else:
        wrong = [
            *([f"the output is {trial.output:.1e} off"] if not trial.output <= OUTPUT else []),
            *([f"the gradient is {trial.gradient:.1e} off"] if not trial.gradient <= GRADIENT else []),
            *([] if same else ["deconverted, it is not the plain model"]),
            *([] if ran == trial.branches else [f"{ran} of {trial.branches} branches ran"]),
        ]
        trial.status, trial.why = ("wrong", "; ".join(wrong)) if wrong else ("converted", "")
    trial.seconds = time.monotonic() - began
    return trial


def _seeded(model: nn.Module, run: Run) -> Any:
    torch.manual_seed(0)
    numpy.random.seed(0)  # transformers' masks of speech features
    random.seed(0)
    return run(model)


def _gradients(model: nn.Module, run: Run, own: list[dr2net.ReversibleSequence], store: bool) -> list[Tensor | None]:
    """Of all parameters, with the same random draws; batch norm's statistics are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for sequence in own:
        sequence.store = store
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss_of(_seeded(model, run)), trained, allow_unused=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    for sequence in own:
        sequence.store = False
    return list(found)


def _relative(expected: list[Tensor | None], found: list[Tensor | None]) -> float:
    if [t is None for t in expected] != [t is None for t in found]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a is not None and b is not None]
    norm = sum(float(a.square().sum()) for a, _ in pairs)
    if norm < TINY:
        return 0.0
    return (sum(float((a - b).square().sum()) for a, b in pairs) / norm) ** 0.5


def _distance(found: Any, expected: Any) -> float:
    tensors = [
        [t for t in tree_leaves(o) if isinstance(t, Tensor) and t.is_floating_point()] for o in (found, expected)
    ]
    if len(tensors[0]) != len(tensors[1]):
        return float("inf")
    return _relative(tensors[1], tensors[0])


def main(arguments: list[str] | None = None) -> int:
    """The number of models that came out wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("library", choices=("timm", "torchvision", "transformers"))
    parser.add_argument("names", nargs="*", help="default: one of each family")
    parser.add_argument("--json", type=Path, help="also write the trials there, one a line")
    parser.add_argument("--chunk-mib", type=float)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    build: Callable[[str], tuple[nn.Module, Run]]
    if options.library == "transformers":
        names, build = options.names or zoo_transformers.names(), zoo_transformers.build
    else:
        names = options.names or zoo_vision.names(options.library)
        build = zoo_vision.builder(options.library)
    counts: Counter[str] = Counter()
    for name in names:
        try:
            model, run = build(name)
            with torch.no_grad():
                run(model.eval())
        except Exception as error:
            trial = Trial(name, "not built", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            trial = try_model(name, model, run, chunk_mib=options.chunk_mib)
        counts[trial.status] += 1
        print(line_of(trial), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
    print(", ".join(f"{count} {status}" for status, count in counts.most_common()))
    return counts["wrong"]


def line_of(trial: Trial) -> str:
    """One line for the terminal."""
    if trial.output is None or trial.gradient is None:
        return f"{trial.status:>10}  {trial.name}: {trial.why}"
    text = f"{trial.share:4.0%} in {trial.blocks} blocks, {trial.branches} branches ({', '.join(trial.types)})"
    return (
        f"{trial.status:>10}  {trial.name}: {text}; output {trial.output:.0e}, gradient {trial.gradient:.0e}"
        f"{'; ' + trial.why if trial.why else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
