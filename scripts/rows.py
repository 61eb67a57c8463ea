"""What `reproduce.sh` has to run: one line per row and seed, `<row> <seed> <finished|open> <flags for prepare>`.

python -m scripts.rows action_recognition tiny
"""

import argparse
import dataclasses
import importlib
from typing import get_args

from engine.config import METHODS, Preset
from engine.records.record import is_finished

SEEDS = {"tiny": (0,), "laptop": (0, 1), "paper": (0,)}


def main() -> None:
    """Prints rows by seed, so that an interrupted run has whole tables of the first seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("preset", choices=get_args(Preset))
    options = parser.parse_args()
    rows = importlib.import_module(f"{options.task}.configs").ROWS
    for seed in SEEDS[options.preset]:
        for name, build in rows.items():
            config = build()
            if config.preset != options.preset or name.rpartition("_")[2] not in METHODS:
                continue
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
            state = "finished" if is_finished(config) else "open"
            print(name, seed, state, f"--kind {config.data.kind} --root {config.data.root}")


if __name__ == "__main__":
    main()
