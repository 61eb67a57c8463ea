"""The contracts of the core on a card, in float32, bfloat16 and float16: a part of `check_gpu.py`.

    gradient     exact inversion, dropout on, against stored activations: 0, or no more than stored differ from stored
    streams      the input of every branch is rebuilt bit for bit
    draws        another step draws other masks; the generators end where stored activations leave them
    chunks       whole branches with stored activations, to rounding; in evaluation, as chunks draw other masks
    weights      saved, loaded into a new conversion: keys of the plain network, same coefficients, same output
    scaled step  GradScaler and AdamW: all weights move and stay finite
    verify       `dr2net.verify`, on a batch of two

Kernels that add in another order each time (attention's backward does) are why "stored against stored" is measured too.
Not here: what it costs (`gpu_costs.py`).
"""

import copy
import functools
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dr2net
from dr2net import rng
from dr2net.branches import find_branches
from scripts.gpu_card import Card, Net, Row, attempt, gradients, number, relative
from scripts.gpu_nets import KINDS, build

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COEFFICIENTS = (7 / 8, 1 / 8)
NOISE = 4  # times what stored activations differ from themselves
ORDER_OF_SUMS = {"fp32": 1e-6, "bf16": 1e-4, "fp16": 1e-4}  # where that happened to be none
ROUNDING = {"fp32": 2e-3, "bf16": 6e-2, "fp16": 2e-2}  # flips of the last bit, grown over the depth, and of the grid
SCALE = 1024.0  # of the loss in float16, whose small gradients vanish otherwise
BATCH = 2


class Case:
    """One network at one precision: converted with inverted and with stored activations, from the same weights."""

    def __init__(self, card: Card, kind: str, precision: str) -> None:
        self.card, self.precision = card, precision
        self.plain, shape = on(card, kind)
        torch.manual_seed(0)
        self.batch = torch.randn(BATCH, *shape[1:], device=card.device)

    def converted(self, **how: object) -> nn.Module:
        model = copy.deepcopy(self.plain)
        dr2net.convert(model, **how)
        dr2net.set_coefficients(model, *COEFFICIENTS)
        return model

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(self.card.device, PRECISIONS[self.precision], enabled=self.precision != "fp32"):
            outputs = model(batch)
        return outputs.float().square().mean()

    def scaled(self, model: nn.Module, batch: Tensor) -> Tensor:
        return self.loss(model, batch) * (SCALE if self.precision == "fp16" else 1)

    def gradients(self, model: nn.Module) -> list[Tensor | None]:
        return gradients(model, lambda: self.scaled(model, self.batch))


@functools.cache
def on(card: Card, kind: str) -> Net:
    """The network, which nobody changes, on the card: building it takes longer than most checks."""
    torch.manual_seed(0)
    plain, shape = build(kind, small=card.small, dropout=True)
    return plain.to(card.device), shape


def gradient(case: Case) -> Row:
    ours, stored = case.converted(), case.converted(store=True)
    expected = case.gradients(stored)
    noise = relative(case.gradients(stored), expected)
    error = relative(case.gradients(ours), expected)
    bound = max(NOISE * noise, ORDER_OF_SUMS[case.precision])
    words = "bitwise equal" if error == 0 else f"{error:.1e} off; stored against stored {noise:.1e}"
    return {"ok": error <= bound, "found": words, "error": number(error), "noise": number(noise)}


def streams(case: Case) -> Row:
    model = case.converted()
    seen: dict[nn.Module, list[Tensor]] = {}  # a first branch that outgrows its grid is run again: the last two count
    for module in model.modules():
        for branch in find_branches(module)[0]:  # each begins with its norm
            seen[branch.modules[0]] = []
            branch.modules[0].register_forward_pre_hook(
                lambda norm, given: seen[norm].append(given[0].detach().clone())
            )
    case.gradients(model)
    same = [len(inputs) > 1 and torch.equal(*inputs[-2:]) for inputs in seen.values()]
    return {"ok": bool(same) and all(same), "found": f"{sum(same)} of {len(same)} inputs of branches bitwise equal"}


def draws(case: Case) -> Row:
    ours, stored = case.converted(), case.converted(store=True)
    ends = []
    for model in (ours, stored):
        case.gradients(model)
        ends.append(rng.record(case.batch))
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = case.loss(ours, case.batch), case.loss(ours, case.batch)
    same_end = all(torch.equal(ends[0][device], ends[1][device]) for device in ends[0])
    words = f"generators end {'alike' if same_end else 'apart'}, masks {'differ' if first != second else 'repeat'}"
    return {"ok": same_end and bool(first != second), "found": words}


def chunks(case: Case) -> Row:
    whole, cut = case.converted(store=True).eval(), case.converted(chunk_mib=_chunk(case), recompute_rest=True).eval()
    error = relative(case.gradients(cut), case.gradients(whole))
    return {"ok": error <= ROUNDING[case.precision], "found": f"{error:.1e} off whole branches", "error": number(error)}


def _chunk(case: Case) -> float:
    """MiB of which every branch of the first stage is several."""
    return 0.25 if case.card.small else 4


def weights(case: Case) -> Row:
    ours = case.converted().eval()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location=case.card.device, weights_only=True)
    again = copy.deepcopy(case.plain)
    same_keys = list(loaded) == list(case.plain.state_dict())
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    dr2net.convert(again)
    again.load_state_dict(loaded)
    with torch.no_grad():
        same = torch.equal(case.loss(ours, case.batch), case.loss(again.eval(), case.batch))
    words = (
        f"keys {'of the plain network' if same_keys else 'changed'}, output {'bitwise equal' if same else 'differs'}"
    )
    return {"ok": same_keys and same, "found": words}


def scaled_step(case: Case) -> Row:
    model = case.converted()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(case.card.device, init_scale=SCALE, enabled=case.precision == "fp16")
    for _ in range(4):  # drop path may leave a branch out of one step, for both samples
        scaler.scale(case.loss(model, case.batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    words = f"{moved} of {len(before)} tensors moved, {'all' if finite else 'not all'} finite"
    return {"ok": finite and moved == len(before), "found": words}


def verify(case: Case) -> Row:
    found = dr2net.verify(case.converted(), case.batch, case.scaled)
    errors = {"output": found.output, "gradient": found.plain_gradient, "against stored": found.stored_gradient}
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if error is not None)
    return {"ok": found.ok, "found": "; ".join(found.problems) or shown}


CONTRACTS: dict[str, Callable[[Case], Row]] = {
    "gradient": gradient,
    "streams": streams,
    "draws": draws,
    "chunks": chunks,
    "weights": weights,
    "scaled step": scaled_step,
    "verify": verify,
}


def run(card: Card) -> list[Row]:
    """One row per network, precision and contract."""
    rows = [
        attempt(
            card,
            {"net": kind, "precision": precision, "contract": name},
            lambda kind=kind, precision=precision, contract=contract: contract(Case(card, kind, precision)),
        )
        for kind in KINDS
        for precision in PRECISIONS
        for name, contract in CONTRACTS.items()
    ]
    on.cache_clear()  # what stays on the card is not there for the others
    return rows
