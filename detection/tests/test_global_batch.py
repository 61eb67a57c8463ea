"""Two processes make the step of one: the losses are divided by the boxes of all images of the global batch.

python detection/tests/test_global_batch.py OUTPUT MICRO_BATCH       # one run, for torchrun
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "common")]  # as pytest does, where this file is started by itself

from detection.configs import ROWS  # noqa: E402
from detection.data import collate  # noqa: E402
from detection.model import build_model  # noqa: E402
from engine.data.fingerprint import Files  # noqa: E402
from engine.data.loader import Loaders, build_loader  # noqa: E402
from engine.training.devices import set_seed  # noqa: E402
from engine.training.fit import fit  # noqa: E402

COUNTS = (3, 0, 7, 1, 0, 0, 2, 5)  # boxes: one process of two has most of them
SPLIT_TOLERANCE = 1e-5  # relative: sums over eight images are taken in another order
STAND_IN = SimpleNamespace(
    read_truth=lambda config: None,
    collect=lambda model, batch, config: [0.0] * len(batch["name"]),
    score=lambda rows, truth, config: {"images": float(len(rows))},
)


class Pictures:
    """Noise with boxes, whatever the sample's seed; of one size, since padding depends on the split as well."""

    def __len__(self) -> int:
        return len(COUNTS)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index = key[0]
        random = np.random.default_rng(index)
        boxes = np.concatenate(
            [random.uniform(0.3, 0.7, (COUNTS[index], 2)), random.uniform(0.1, 0.4, (COUNTS[index], 2))], 1
        )
        return {
            "image": torch.from_numpy(random.standard_normal((3, 64, 64))).float(),
            "labels": torch.from_numpy(random.integers(5, size=COUNTS[index])),
            "boxes": torch.from_numpy(boxes).float(),
            "name": f"picture {index}",
            "image_id": index + 1,
            "original_size": (64, 64),
            "skipped": [],
        }

    def files(self) -> Files:
        """None."""
        return Files()


def run(output: Path, micro_batch: int) -> list[float]:
    """The losses of two steps of eight pictures, the second with the weights that the first left."""
    config = ROWS["shapes_tiny_conventional"]()
    # denoising depends on how a batch is split; one learning rate from the first step on
    config = replace(
        config,
        model=replace(config.model, weights=None, denoising=0, queries=30),
        optimization=replace(config.optimization, epochs=2, warmup_epochs=0, learning_rate=1e-3, global_batch=8),
        finetuning=replace(config.finetuning, check_every_epochs=None),
        run=replace(config.run, output=output, micro_batch=micro_batch, device="cpu"),
    )
    torch.manual_seed(0)
    model = build_model(config)
    shared = {"seed": 0, "num_workers": 0, "collate": collate, "batch_size": micro_batch}
    loaders = Loaders(
        build_loader(Pictures(), train=True, **shared),
        build_loader(Pictures(), train=False, **shared),
    )
    set_seed(0)
    record = fit(config, model, loaders, STAND_IN)
    return [entry[name] for entry in record.curve for name in ("class", "box", "giou", "auxiliary", "encoder")]


@pytest.mark.slow
def test_two_processes_count_their_boxes_together(tmp_path: Path) -> None:
    whole = run(tmp_path / "one", 8)
    assert run(tmp_path / "pieces", 2) == pytest.approx(whole, rel=SPLIT_TOLERANCE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, __file__, str(tmp_path / "two"), "4"], env=environment, check=True, timeout=200)
    assert json.loads((tmp_path / "two" / "losses.json").read_text()) == pytest.approx(whole, rel=SPLIT_TOLERANCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    losses = run(folder, int(sys.argv[2]))
    (folder / "losses.json").write_text(json.dumps(losses))
