"""What `dr2net.convert` says of a model: what became reversible, what did not, and why; after a pass also what ran.

Not here: how the reasons are found (`branches.py`, `probe.py`).
"""

import weakref
from collections import Counter
from dataclasses import dataclass, field

from dr2net.sequence import ReversibleSequence


@dataclass(frozen=True)
class Report:
    """What became reversible, what did not, and why; as text, also what ran in the last forward pass."""

    sequences: tuple[tuple[str, int, int], ...]  # name of the container, reversible blocks, branches
    ordinary: tuple[tuple[str, str], ...]  # name of a block that runs as it is, reason
    reversible_parameters: int
    all_parameters: int
    advice: tuple[str, ...] = ()  # where something else would be better
    converted: tuple[weakref.ref, ...] = field(default=(), repr=False, compare=False)  # the containers, in this order
    taken: tuple[tuple[str, str], ...] = ()  # name of a container, coefficients that the model's config had for it

    def __str__(self) -> str:
        lines = [
            f"reversible: {name}: {blocks} blocks, {branches} branches" for name, blocks, branches in self.sequences
        ]
        for index, container in enumerate(self.converted):
            if isinstance(sequence := container(), ReversibleSequence):  # and not deconverted since
                lines[index] += f"; {sequence.ran or 'none'} of them ran in the last pass{_in_chunks(sequence)}"
        lines += [f"as it was:  {name}: {reason}" for name, reason in self.ordinary]
        lines += [f"advice:     {text}" for text in self.advice]
        share = self.reversible_parameters / max(1, self.all_parameters)
        lines += [
            f"{share:.0%} of {self.all_parameters:,} parameters are in reversible blocks",
        ]
        lines += [f"{name} is at (alpha, beta) = {at}, as its weights were saved" for name, at in self.taken]
        if not self.taken:
            lines.append(
                "a conversion starts at (alpha, beta) = (1, 0), the plain network: see dr2net.set_coefficients"
            )
        return "\n".join(lines)


def _in_chunks(sequence: ReversibleSequence) -> str:
    """How many branches of the last pass ran in chunks, and why the others did not, where `chunk_mib` asks for it."""
    if sequence.chunk_mib is None or not sequence.ran:
        return ""
    whole = Counter((name.rpartition(".")[2], reason) for name, reason in sequence.whole.items())
    cut = sequence.ran - whole.total()
    text = f", {cut} in chunks of {sequence.chunk_mib:g} MiB"
    text += "" if cut else f", so that chunk_mib={sequence.chunk_mib:g} has no effect there"
    return text + "".join(f"\n    as a whole: {count} {name!r}: {reason}" for (name, reason), count in whole.items())
