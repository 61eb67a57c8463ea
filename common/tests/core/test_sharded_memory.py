"""The plan for several processes is what each of two gloo processes measures when it trains, sharded by FSDP2."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from toy_sharded_plan import CASES, large_blocks, work

from dr2net import planner

RELATIVE = 0.05  # the promise; as for one process, kernels round their workspaces differently on real tensors


@pytest.mark.slow
def test_predicted_is_what_each_of_two_processes_measures(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    model, shape = large_blocks()
    for method, setting in CASES.items():
        measured = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        predicted = planner.predictor(model, method, setting, like="cpu")(shape)
        for name in ("peak", "parameters", "gradients", "optimizer", "activations"):
            close = pytest.approx(measured[name], rel=RELATIVE, abs=RELATIVE * measured["peak"])
            assert getattr(predicted, name) == close, (method, name)


@pytest.mark.slow
def test_more_processes_hold_less_each() -> None:
    model, shape = large_blocks()
    found = [planner.predictor(model, "dr2net", planner.Setting(shards=n))(shape) for n in (1, 2, 8)]
    size = found[0].parameters
    for memory, shards in zip(found, (1, 2, 8), strict=True):
        # padding: a vector of 10 classes is two per process of eight
        assert memory.parameters == pytest.approx(size / shards, rel=0.1)
        assert memory.optimizer == pytest.approx(2 * size / shards, rel=0.1)
    assert found[0].peak > found[1].peak > found[2].peak
    assert not dist.is_initialized()


def test_a_plan_for_one_shard_or_inside_a_process_group_is_refused(tmp_path: Path) -> None:
    from dr2net.sharded_memory import predict_sharded

    model, shape = large_blocks()
    with pytest.raises(ValueError, match="1 processes share nothing; give 2 or more"):
        predict_sharded(lambda model: (lambda: None, None), model, [], 1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="outside of torchrun"):
            planner.predictor(model, "dr2net", planner.Setting(shards=2))(shape)
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="2 shards are not measured by one process"):
        planner.calibrate(model, "dr2net", planner.Setting(shards=2), shape, "cpu")
