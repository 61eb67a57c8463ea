"""Time of a training step (forward and backward), all methods side by side in one process, as ratios.

    python -m scripts.table_step_time [--batch 4] [--tokens 197] [--precision bf16] [--rounds 7]     # ViT-S
    python -m scripts.table_step_time --swin3d --frames 16 --side 112 --threads 1                    # Video Swin-T

The methods take turns, so that a machine whose speed drifts slows all of them; the ratio is the median over rounds of
each method's time over conventional finetuning's in the same round. Seconds are the processor's with one thread, which
other programs disturb little, else the clock's. The bound for recomputation is 4/3 where a backward costs two forwards.
Writes results/step_time_<precision>_<size>.json.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import dr2net
from engine.files import write_text
from engine.records.provenance import commit, device_name, versions


@dataclass(frozen=True)
class Case:
    """A way to run the same blocks. inversion None: not reversible."""

    name: str
    inversion: str | None = None
    alpha: float = 1.0
    beta: float = 0.0
    chunk_mib: float | None = None
    recompute_rest: bool = False


PLAIN = (Case("conventional"), Case("checkpointed"))
VIT = (
    *PLAIN,
    Case("float (0, 1)", "float", 0.0, 1.0),
    Case("exact (0, 1)", "exact", 0.0, 1.0),
    Case("float (.9, .1)", "float", 0.9, 0.1),
    Case("exact (.9, .1)", "exact", 0.9, 0.1),
    Case("exact (7/8, 1/8)", "exact", 7 / 8, 1 / 8),
    Case("exact (63/64, 1/64)", "exact", 63 / 64, 1 / 64),
)
SWIN3D = (
    *PLAIN,
    *(
        Case(f"checkpointed, chunks of {chunk_mib} MiB, rest recomputed", chunk_mib=chunk_mib, recompute_rest=True)
        for chunk_mib in (64, 256)
    ),
    Case("exact (7/8, 1/8), whole branches", "exact", 7 / 8, 1 / 8),
    *(
        Case(f"exact {name}, chunks of {chunk_mib} MiB, rest recomputed", "exact", alpha, beta, chunk_mib, True)
        for chunk_mib in (64, 256)
        for name, alpha, beta in (("(0, 1)", 0.0, 1.0), ("(7/8, 1/8)", 7 / 8, 1 / 8))
    ),
)


def build_models(plain: nn.Module, cases: tuple[Case, ...]) -> dict[str, nn.Module]:
    """The same weights, once per case."""
    models = {}
    for case in cases:
        model = models[case.name] = copy.deepcopy(plain)
        if case.inversion is not None:
            dr2net.convert(
                model, inversion=case.inversion, chunk_mib=case.chunk_mib, recompute_rest=case.recompute_rest
            )
            dr2net.set_coefficients(model, case.alpha, case.beta)
        elif case.name.startswith("checkpointed"):
            dr2net.checkpoint_blocks(model, chunk_mib=case.chunk_mib, recompute_rest=case.recompute_rest)
    return models


class Blocks(nn.Module):
    """The twelve blocks of a ViT-S; input (B, N, 384)."""

    def __init__(self) -> None:
        import timm

        super().__init__()
        self.blocks = timm.create_model("vit_small_patch16_224").blocks

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.blocks(tokens)


def build_swin3d() -> nn.Module:
    """Video Swin-T without a head; input (B, 3, T, H, W)."""
    from torchvision.models.video import swin3d_t

    model = swin3d_t()
    model.head = nn.Identity()
    return model


def step(model: nn.Module, batch: torch.Tensor, precision: str) -> float:
    """Seconds of one forward and backward."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = now()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        y = model(batch)
    y.float().square().mean().backward()
    seconds = now() - started
    model.zero_grad(set_to_none=True)
    return seconds


def median_ratio(times: list[float], others: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=197, help="of the ViT-S")
    parser.add_argument("--swin3d", action="store_true", help="Video Swin-T instead of a ViT-S; its batch is 1")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=112, help="of a frame, in pixels")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the precision of the inverse is not the subject here
    torch.manual_seed(0)
    if options.swin3d:
        models = build_models(build_swin3d(), SWIN3D)
        batch = torch.randn(1, 3, options.frames, options.side, options.side)
        size = f"swin3d_t_{options.frames}x{options.side}"
        setting = {"model": "swin3d_t", "batch": 1, "frames": options.frames, "side": options.side}
    else:
        models = build_models(Blocks(), VIT)
        batch = torch.randn(options.batch, options.tokens, 384, requires_grad=True)
        size = str(options.tokens)
        setting = {"model": "vit_small_patch16_224, 12 blocks", "batch": options.batch, "tokens": options.tokens}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            batch.grad = None
            duration = step(model, batch, options.precision)
            if turn:  # the first round warms up
                seconds[name].append(duration)
    ratios = {name: median_ratio(times, seconds["conventional"]) for name, times in seconds.items()}
    width = max(map(len, seconds))
    for name, times in seconds.items():
        print(
            f"{name:{width}} {statistics.median(times):7.3f} s   {ratios[name]:.2f} x conventional   "
            f"{median_ratio(times, seconds['checkpointed']):.2f} x checkpointed"
        )
    facts = {"device": device_name(torch.device("cpu")), "versions": versions(), "commit": commit()}
    record = {**facts, **setting, "precision": options.precision, "seconds": seconds, "ratios": ratios}
    path = options.output / f"step_time_{options.precision}_{size}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
