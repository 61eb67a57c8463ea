"""Blocks of a type that nobody registers, a network that calls them in any way, and what must hold of it converted."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_blocks import WIDTH, gradients, relative

import dr2net

GRID = 1e-6  # in float64 the grid of exact inversion is far below


class Unknown(nn.Module):
    """x + mix(x), then x + mlp(x); `form` is how it answers, `change` what it does with its input first."""

    def __init__(self, dropout: float = 0.0, form: str = "tensor") -> None:
        super().__init__()
        self.norm, self.value = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.dropout, self.form, self.calls = nn.Dropout(dropout), form, 0

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Any:
        self.calls += 1
        h = self.norm(x)
        weights = torch.softmax(h @ h.transpose(1, 2) + (0 if mask is None else mask), -1)
        x = x + self.dropout(weights @ self.value(h))
        y = x + self.dropout(self.down(F.gelu(self.up(x))))
        if cache is not None:
            cache.seen.append(x)
        forms: dict[str, Any] = {"tensor": y, "pair": (y, None), "mask too": (y, mask), "two": (y, weights)}
        return {**forms, "cache": (y, cache), "dictionary": {"y": y, "mask": mask}}[self.form]


class Net(nn.Module):
    """stem, blocks called by `call`, head."""

    def __init__(self, *blocks: nn.Module, call: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(WIDTH, WIDTH), nn.ModuleList(blocks), nn.Linear(WIDTH, 3)
        self.call = call or in_turn

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.head(self.call(self.blocks, self.stem(x), *rest).mean(1))


def in_turn(blocks: nn.ModuleList, x: Tensor, *rest: Any) -> Tensor:
    for block in blocks:
        answer = block(x, *rest)
        x = (
            answer
            if isinstance(answer, Tensor)
            else next(iter(answer.values() if isinstance(answer, dict) else answer))
        )
    return x


def net_of(num: int = 3, call: Callable[..., Tensor] | None = None, **how: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(*(Unknown(**how) for _ in range(num)), call=call).double()


def probe_of(*inputs: Any) -> Callable[[nn.Module], Any]:
    return lambda model: model(*inputs)


def check(net: nn.Module, *inputs: Any, num_branches: int, **options: Any) -> dr2net.Report:
    """Output and gradients at (1, 0) are the plain model's, those at (7/8, 1/8) bitwise those of stored activations."""
    plain, classes = copy.deepcopy(net), [vars(m).keys() for m in net.modules()]
    report = dr2net.convert(net, probe=probe_of(*inputs), **options)
    assert sum(branches for *_, branches in report.sequences) == num_branches, str(report)
    outputs = []
    for model in (net, plain):
        torch.manual_seed(1)
        outputs.append(model(*inputs))
        outputs[-1].square().sum().backward()
    assert relative(outputs[:1], outputs[1:]) < GRID
    assert relative(gradients(net), gradients(plain)) < GRID
    sequences = [m for m in net.modules() if isinstance(m, dr2net.ReversibleSequence)]
    assert sum(s.ran for s in sequences) == num_branches
    dr2net.set_coefficients(net, 7 / 8, 1 / 8)
    found = []
    for store in (False, True):
        for sequence in sequences:
            sequence.store = store
        net.zero_grad()
        torch.manual_seed(1)
        net(*inputs).square().sum().backward()
        found.append([None if g is None else g.clone() for g in gradients(net)])
    pairs = list(zip(*found, strict=True))
    if options.get("chunk_mib") is None:
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    assert relative(*found) < 1e-8
    dr2net.set_coefficients(net, 1, 0)
    dr2net.deconvert(net)
    assert [vars(m).keys() for m in net.modules()] == classes
    torch.manual_seed(1)
    assert torch.equal(net(*inputs), outputs[1])
    return report
