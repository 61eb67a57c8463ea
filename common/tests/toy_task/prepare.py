"""Nothing to prepare: python -m toy_task.prepare --preset tiny."""

from engine import commands
from engine.data.check import Check
from toy_task.configs import ROWS


def write_synthetic(arguments: commands.Preparation) -> None:
    """The clouds are made on the fly."""


def check(arguments: commands.Preparation) -> Check:
    """Always complete."""
    return Check("memory", {"classes": 3})


def fetch(arguments: commands.Preparation) -> None:
    """ValueError: there is nothing to fetch."""
    raise ValueError("--download: there is nothing to download")


if __name__ == "__main__":
    commands.prepare(commands.Preparation, ROWS, synthetic=write_synthetic, check=check, download=fetch)
