"""What a run's numbers come from besides its recipe, kept from its first step on: code, versions, data, weights, split.

A checkpoint carries it, so a run that goes on under another origin is noticed: in the middle it is refused, since no
Record could say where its numbers come from; at its end the numbers stay what they were, and the run is made anew.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from engine.data.fingerprint import Dataset, inputs_of
from engine.records.provenance import commit, sources_hash, versions
from engine.records.record import task_of


@dataclass(frozen=True)
class Origin:
    """All of it but `commit` must stay the same from the first step to the last."""

    sources: str  # hash of the code that the training imports
    commit: str  # of that code, to find it again
    versions: dict[str, str]
    inputs: dict[str, str]  # fingerprints of data and weights
    total_steps: int  # of the whole training
    micro_batch: int  # decides the measured memory, and with dropout the masks

    def changes_since(self, earlier: Mapping[str, Any]) -> list[str]:
        """What differs from the origin that a checkpoint carries, each as `name: then -> now`."""
        if not earlier:
            return ["the checkpoint does not say by which code and data it was made"]
        now, then = _flat(asdict(self)), _flat(dict(earlier))
        names = [name for name in {**then, **now} if name != "commit" and then.get(name) != now.get(name)]
        return [f"{name}: {then.get(name, 'absent')} -> {now.get(name, 'absent')}" for name in names]


def origin_of(config: Any, datasets: Mapping[str, Dataset], backbone: nn.Module, total_steps: int) -> Origin:
    """Where the numbers of a run that starts now come from; `backbone` as it was built. OSError where a file cannot be
    read.
    """
    return Origin(
        sources=sources_hash(task_of(config)),
        commit=commit(),
        versions=versions(),
        inputs=inputs_of(config, datasets, backbone),
        total_steps=total_steps,
        micro_batch=config.run.micro_batch,
    )


def refuse_other_origin(changes: list[str], earlier: Mapping[str, Any], source: Path) -> None:
    """ValueError, with the ways out, for a run in the middle of which something changed."""
    if changes:
        back = f" (its code was that of commit {earlier['commit']})" if earlier.get("commit") else ""
        raise ValueError(
            f"{source} was made by another origin: {'; '.join(changes)}. No Record could say where the numbers of such "
            f"a run come from. Put back what changed{back}, or begin anew: with --run.no-resume, in another "
            "--run.output, or by deleting this folder"
        )


def _flat(origin: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in origin.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat
