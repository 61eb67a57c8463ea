"""The engine's checkpoints of a model whose blocks are sharded (FSDP2): whole on disk, for any number of processes."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from toy_fsdp_checkpoints import accelerator_of, start, step, values, work

from engine.training import checkpoint, state

ORDER = 1e-5  # relative: AdamW divides sums that were added in another order


@pytest.mark.slow
def test_what_two_processes_save_two_go_on_with_bit_for_bit_and_one_to_rounding(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "values.pt", weights_only=True)
    assert found["step"] == 2
    assert all(torch.equal(a, b) for a, b in zip(found["resumed"], found["expected"], strict=True))
    net, optimizer, ema = start(sharded=False)
    state.resume(tmp_path / "checkpoint", net, optimizer, ema, accelerator_of(0))
    step(net, optimizer, ema, 2, 1, 0)
    for a, b in zip(values(net, ema), found["expected"], strict=True):
        assert (a - b).norm() <= ORDER * b.norm().clamp(min=0.1)
    weights = checkpoint.load(tmp_path / "checkpoint").tensors["model"]
    assert {name: value.shape for name, value in weights.items()} == {n: p.shape for n, p in net.named_parameters()}
