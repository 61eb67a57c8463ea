"""How each way to finetune is drawn and called, in every picture and table: one color, one marker, one title.

Colors of Okabe and Ito, told apart by color-blind readers; markers for print. A variant in chunks has a solid line, the
whole one a dashed line.
"""

from typing import NamedTuple


class Style(NamedTuple):
    """Of one method."""

    title: str
    color: str
    marker: str


STYLES = {
    "conventional": Style("conventional", "#000000", "o"),
    "frozen": Style("frozen backbone", "#56B4E9", "s"),
    "checkpointed": Style("checkpointed", "#E69F00", "^"),
    "checkpointed_chunks": Style("checkpointed, in chunks", "#A66F00", "<"),
    "lora": Style("LoRA", "#CC79A7", "v"),
    "reversible": Style("hard reversible", "#D55E00", "D"),
    "dr2net_dynamic": Style("Dr2Net, dynamic (the paper's schedule)", "#0072B2", "P"),
    "dr2net": Style("Dr2Net, constant", "#009E73", "*"),
}
