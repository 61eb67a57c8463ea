"""Predicted peak memory of one training step: VideoMAE's ViT-S, 12 blocks, 1568 tokens, batch 16. Needs no memory.

    python -m scripts.table_memory [--precision bf16] [--batch 16] [--blocks 12]

"activations" is all that is not parameter, gradient or optimizer state at the peak: what is stored, what a branch needs
while it is recomputed, the clips themselves. No optimizer takes part, so the split is that of forward and backward.
Writes results/memory_<precision>.json.
"""

import argparse
import json
import warnings
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

import dr2net
from dr2net.cli import loss_of, print_table
from dr2net.memory import Memory, format_bytes, predict
from dr2net.training.results import commit, versions

CASES = (  # name, inversion, alpha, beta
    ("conventional", None, 1, 0),
    ("checkpointed", None, 1, 0),
    ("reversible, float", "float", 0, 1),
    ("reversible, exact", "exact", 0, 1),
    ("dr2net, exact, beta 1/2", "exact", 1 / 2, Fraction(1, 2)),
    ("dr2net, exact, beta 1/8", "exact", 7 / 8, Fraction(1, 8)),
    ("dr2net, exact, beta 1/64", "exact", 63 / 64, Fraction(1, 64)),
    ("dr2net, anchored, (1, 0.1)", "anchored", 1, 0.1),
)


def build_vit_small(num_blocks: int) -> nn.Module:
    """VideoMAE ViT-S for 16 frames of 224 x 224 in tubelets of 2 x 16 x 16: 8 x 14 x 14 tokens of width 384."""
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        hidden_size=384, num_hidden_layers=num_blocks, num_attention_heads=6, intermediate_size=1536
    )
    return VideoMAEModel(config).train()


def predict_case(
    name: str, inversion: str | None, alpha: float, beta: float, batch: int, blocks: int, precision: str
) -> Memory:
    """The Memory of forward and backward in one of CASES."""
    model = build_vit_small(blocks)
    if inversion is not None:
        dr2net.convert(model, inversion=inversion)
        dr2net.set_coefficients(model, alpha, beta)
    elif name == "checkpointed":
        dr2net.checkpoint_blocks(model)

    def step() -> None:
        loss_of(model, torch.randn(batch, 16, 3, 224, 224), precision).backward()

    return predict(step, model)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the precision of the inverse is not the subject here
    found: dict[str, Memory] = {}
    rows = []
    for case in CASES:
        memory = found[case[0]] = predict_case(*case, options.batch, options.blocks, options.precision)
        shares = []
        for baseline in ("conventional", "checkpointed"):
            share = memory.activations / found[baseline].activations if baseline in found else None
            shares.append("-" if share is None else f"{share:.3f}")
        rows.append((case[0], format_bytes(memory.peak), format_bytes(memory.activations), *shares))
    print_table(("", "peak", "activations", "/ conventional", "/ checkpointed"), rows)
    bytes_of = {name: {"peak": memory.peak, "activations": memory.activations} for name, memory in found.items()}
    setting = {"model": "VideoMAE ViT-S", "blocks": options.blocks, "tokens": 1568, "batch": options.batch}
    record = {**setting, "precision": options.precision, "versions": versions(), "commit": commit(), "bytes": bytes_of}
    path = options.output / f"memory_{options.precision}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
