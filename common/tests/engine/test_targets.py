"""Losses divided by the number of targets of the whole global batch: how a step is split changes nothing.

python common/tests/engine/test_targets.py OUTPUT MICRO_BATCH       # one run, for torchrun
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))  # as conftest.py does, where this file is started by itself

from toy_task import data as toy_data  # noqa: E402
from toy_task import evaluate  # noqa: E402
from toy_task.model import Toy  # noqa: E402
from toy_training import toy_config  # noqa: E402

from engine.data.loader import Loaders, build_loader  # noqa: E402
from engine.task import Batch  # noqa: E402
from engine.training.devices import set_seed  # noqa: E402
from engine.training.fit import fit  # noqa: E402

SPLIT_TOLERANCE = 1e-5  # relative: sums over eight samples are taken in another order


class Counted(Toy):
    """Sample i has i % 4 targets; some batches have none."""

    def losses(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        each = torch.nn.functional.cross_entropy(outputs, batch["label"], reduction="none")
        return {"targets": (each * batch["count"]).sum() / max(batch["num_targets"], 1e-6)}


def collate(samples: list[dict[str, Any]]) -> Batch:
    counts = [int(sample["name"].removeprefix("sample")) % 4 for sample in samples]
    return toy_data.collate(samples) | {"count": torch.tensor(counts), "num_targets": float(sum(counts))}


def run(output: Path, micro_batch: int) -> list[float]:
    """The losses of three steps of eight samples."""
    changes = {
        "model": {"dropout": 0.0},
        "run": {"micro_batch": micro_batch, "max_steps": 3},
        "optimization": {"ema_decay": None},
    }
    config = toy_config(output, changes)
    shared = {"seed": 0, "num_workers": 0, "collate": collate, "batch_size": micro_batch}
    loaders = Loaders(
        build_loader(toy_data.build_dataset(config, "train"), train=True, **shared),
        build_loader(toy_data.build_dataset(config, "val"), train=False, **shared),
    )
    set_seed(0)
    record = fit(config, Counted(dropout=0.0), loaders, evaluate)
    return [entry["targets"] for entry in record.curve] + [record.metrics["val_loss"]]


def test_a_step_of_eight_samples_is_the_same_in_one_two_and_four_pieces(tmp_path: Path) -> None:
    whole, halves, quarters = (run(tmp_path / str(size), size) for size in (8, 4, 2))
    assert halves == pytest.approx(whole, rel=SPLIT_TOLERANCE)
    assert quarters == pytest.approx(whole, rel=SPLIT_TOLERANCE)


def test_two_processes_count_their_targets_together(tmp_path: Path) -> None:
    whole = run(tmp_path / "one", 8)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, __file__, str(tmp_path / "two"), "4"], env=environment, check=True, timeout=120)
    assert json.loads((tmp_path / "two" / "losses.json").read_text()) == pytest.approx(whole, rel=SPLIT_TOLERANCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    losses = run(folder, int(sys.argv[2]))
    (folder / "losses.json").write_text(json.dumps(losses))
