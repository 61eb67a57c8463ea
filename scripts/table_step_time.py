"""Time of a training step (forward and backward) of a ViT-S, all methods side by side in one process, as ratios.

    python -m scripts.table_step_time [--batch 4] [--tokens 197] [--precision bf16] [--rounds 7]

The methods take turns, so that a machine whose speed drifts slows all of them; the ratio is the median over rounds of
each method's time over conventional finetuning's in the same round. The bound for recomputation is 4/3 where a backward
costs two forwards. Writes results/step_time_<precision>_<tokens>.json.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import dr2net
from dr2net.training.results import commit, device_name, versions

CASES = (  # name, inversion, alpha, beta
    ("conventional", None, 1.0, 0.0),
    ("checkpointed", None, 1.0, 0.0),
    ("float (0, 1)", "float", 0.0, 1.0),
    ("exact (0, 1)", "exact", 0.0, 1.0),
    ("float (.9, .1)", "float", 0.9, 0.1),
    ("exact (.9, .1)", "exact", 0.9, 0.1),
    ("exact (7/8, 1/8)", "exact", 7 / 8, 1 / 8),
    ("exact (63/64, 1/64)", "exact", 63 / 64, 1 / 64),
)


def build() -> dict[str, nn.Module]:
    """The same twelve blocks, once per case."""
    import timm

    torch.manual_seed(0)
    plain = nn.ModuleDict({"blocks": timm.create_model("vit_small_patch16_224").blocks})
    models = {}
    for name, inversion, alpha, beta in CASES:
        model = models[name] = copy.deepcopy(plain)
        if inversion is not None:
            dr2net.convert(model, inversion=inversion)
            dr2net.set_coefficients(model, alpha, beta)
        elif name == "checkpointed":
            dr2net.checkpoint_blocks(model)
    return models


def step(model: nn.Module, tokens: torch.Tensor, precision: str) -> float:
    """Seconds of one forward and backward."""
    x = tokens.clone().requires_grad_()
    started = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        y = model["blocks"](x)
    y.float().square().mean().backward()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the precision of the inverse is not the subject here
    models = build()
    tokens = torch.randn(options.batch, options.tokens, 384)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            duration = step(model, tokens, options.precision)
            if turn:  # the first round warms up
                seconds[name].append(duration)
    plain = seconds["conventional"]
    ratios = {n: statistics.median(a / b for a, b in zip(s, plain, strict=True)) for n, s in seconds.items()}
    for name, times in seconds.items():
        print(f"{name:20} {statistics.median(times):7.3f} s   {ratios[name]:.2f} x conventional")
    facts = {"device": device_name(torch.device("cpu")), "versions": versions(), "commit": commit()}
    setting = {"model": "vit_small_patch16_224, 12 blocks", "batch": options.batch, "tokens": options.tokens}
    record = {**facts, **setting, "precision": options.precision, "seconds": seconds, "ratios": ratios}
    path = options.output / f"step_time_{options.precision}_{options.tokens}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
