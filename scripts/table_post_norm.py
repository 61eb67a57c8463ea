"""How far the streams of a post-norm network grow, and what its gradient costs, over beta: results/post_norm.md.

    python -m scripts.table_post_norm

A post-norm layer is F(x) = norm(x + f(x)) - x, so a branch takes x away, and the recurrence is

    x_i = norm(x_{i-1} + f(x_{i-1})) - (1 - alpha) x_{i-1} + beta x_{i-2}

What the norms give is bounded; what is left has the roots of r^2 + (1 - alpha) r - beta. BERT with 12 layers of width
256 and random weights, two texts of 64 tokens, float32, in about a minute. Not here: pre-norm networks
(`table_precision.py`), what a training makes of it.
"""

import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dr2net
from dr2net.node import RecomputationError
from engine.files import write_text

OUTPUT = Path(__file__).parents[1] / "results" / "post_norm.md"
SETTINGS: tuple[tuple[float, Fraction], ...] = (
    *((float(1 - beta), beta) for beta in map(Fraction, ("0", "1/64", "1/8", "1/4", "1/2"))),
    (0.4, Fraction(7, 10)),
    (0.0, Fraction(1)),
)
HEADER = "| alpha | beta | root | largest stream | output, against BERT | exact | anchored | float |"
NOTE = (
    "`root` is the growth per branch of what the norms do not hold, the larger root, in size, of",
    "r^2 + (1 - alpha) r - beta: on alpha = 1 - beta it is below 1 for beta < 1/2. `exact`,",
    "`anchored` and `float` are the gradient's error against stored activations; refused:",
    "backward finds that the streams were rebuilt too roughly, and says so.",
)


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """BERT with random weights, and two texts; the second is shorter."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 1024}
    model = BertModel(BertConfig(vocab_size=1000, **sizes), add_pooling_layer=False).eval()
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 48:] = 0
    return model, {"input_ids": torch.randint(1000, (2, 64)), "attention_mask": mask}


def root(alpha: float, beta: float) -> float:
    """The growth of what the norms do not hold, per branch: the larger root, in size, of r^2 + (1 - alpha) r - beta."""
    return ((1 - alpha) + ((1 - alpha) ** 2 + 4 * beta) ** 0.5) / 2


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A fixed random combination of the outputs."""
    output: Any = model(**batch).last_hidden_state
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return (output * weights).mean()


def row(alpha: float, beta: Fraction) -> str:
    """One line of the table."""
    errors, size, distance = [], 0.0, 0.0
    for inversion in ("exact", "anchored", "float"):
        model, batch = build()
        with torch.no_grad():
            plain = model(**batch).last_hidden_state
        dr2net.convert(model, inversion=inversion)
        dr2net.set_coefficients(model, alpha, beta)
        seen: list[float] = []
        for layer in model.encoder.layer:
            layer.register_forward_hook(lambda _, args, output, seen=seen: seen.append(float(output.abs().max())))
        try:
            with torch.no_grad():
                output = model(**batch).last_hidden_state
            size, distance = max(seen), float((output - plain).norm() / plain.norm())
            errors.append(f"{dr2net.gradient_error(model, batch, loss).overall:.0e}")
        except (OverflowError, RecomputationError) as error:  # both say so in a training
            errors.append("overflow" if isinstance(error, OverflowError) else "refused")
    return (
        f"| {alpha:.4g} | {beta} | {root(alpha, float(beta)):.2f} | {size:.3g} | {distance:.2f} | "
        + " | ".join(errors)
        + " |"
    )


def main() -> None:
    warnings.simplefilter("ignore")  # of the float inversion, which is what is measured
    lines = [row(alpha, beta) for alpha, beta in SETTINGS]
    text = "\n".join(
        [
            "# Post-norm networks over beta",
            "",
            "Made by `python -m scripts.table_post_norm`: BERT, 12 layers of width 256, random weights, float32.",
            "",
            HEADER,
            "|" + "---|" * HEADER.count(" |"),
            *lines,
            "",
            *NOTE,
            "",
        ]
    )
    write_text(OUTPUT, text)
    print(text)


if __name__ == "__main__":
    main()
