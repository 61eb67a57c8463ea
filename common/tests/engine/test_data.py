"""Batches are a function of (seed, epoch, position), and evaluation sees each sample once."""

import pytest
import torch
from toy_task.data import Points, collate

from engine.command_line import one_line
from engine.data.loader import KeyBatches, build_loader, gather, key_batches, sample_seed, to_device


def keys(batches: KeyBatches, **place: int) -> list[tuple[int, int]]:
    batches.place(**place)
    return [key for batch in batches for key in batch]


def test_one_epoch_visits_every_sample_once_and_epochs_differ():
    batches = KeyBatches(12, 4, seed=0, train=True)
    first, second = keys(batches, epoch=0), keys(batches, epoch=1)
    assert sorted(index for index, _ in first) == list(range(12))
    assert first != second
    assert first == keys(batches, epoch=0)


def test_draws_differ_between_samples_epochs_and_seeds():
    draws = {sample_seed(seed, epoch, position) for seed in range(3) for epoch in range(3) for position in range(20)}
    assert len(draws) == 180
    assert all(0 <= draw < 2**63 for draw in draws)


def test_resuming_in_an_epoch_continues_the_same_keys():
    batches = KeyBatches(24, 2, seed=3, train=True)
    assert keys(batches, epoch=2)[10:] == keys(batches, epoch=2, first=5)


def test_a_global_batch_is_the_same_set_on_one_device_and_on_three():
    one = keys(KeyBatches(24, 6, seed=1, train=True), last=2)
    batches = KeyBatches(24, 2, seed=1, train=True)
    three = [keys(batches, rank=rank, world=3, last=2) for rank in range(3)]
    for step in range(2):
        together = {key for rank in range(3) for key in three[rank][2 * step : 2 * step + 2]}
        assert together == set(one[6 * step : 6 * step + 6])


@pytest.mark.parametrize("num_samples, world", [(13, 2), (13, 4), (3, 4), (8, 2)])
def test_evaluation_shares_hold_each_sample_once_in_order(num_samples, world):
    batches = KeyBatches(num_samples, 4, seed=0, train=False)
    shares = [keys(batches, rank=rank, world=world) for rank in range(world)]
    assert [index for share in shares for index, _ in share] == list(range(num_samples))
    assert all(draw == 0 for share in shares for _, draw in share)


def test_workers_do_not_change_samples_nor_the_global_generator():
    loaders = [
        build_loader(Points(16, 3), batch_size=4, seed=5, train=True, num_workers=workers, collate=collate)
        for workers in (0, 2)
    ]
    before = torch.get_rng_state()
    alone, two = (torch.cat([batch["x"] for batch in loader]) for loader in loaders)
    assert torch.equal(alone, two)
    assert torch.equal(before, torch.get_rng_state())


def test_an_empty_set_and_a_foreign_loader_are_refused():
    with pytest.raises(ValueError, match="validation set is empty"):
        build_loader(Points(0, 3), batch_size=4, seed=0, train=False, num_workers=0, collate=collate)
    with pytest.raises(ValueError, match="build_loader"):
        key_batches(torch.utils.data.DataLoader([1, 2, 3]))


def test_only_tensors_of_a_batch_move():
    batch = {"x": torch.ones(2), "name": ["a", "b"], "boxes": [torch.ones(1), {"y": torch.ones(1)}], "size": 3}
    moved = to_device(batch, torch.device("meta"))
    assert moved["x"].is_meta and moved["boxes"][0].is_meta and moved["boxes"][1]["y"].is_meta
    assert moved["name"] == ["a", "b"] and moved["size"] == 3
    assert not batch["x"].is_meta


def test_gather_without_devices_returns_the_rows():
    assert gather([1, 2]) == [1, 2]


class Broken(Points):
    """Every sample raises an error whose constructor takes more than a sentence."""

    def __getitem__(self, key):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, f"no text in sample{key[0]}")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_sample_is_one_line_also_from_a_worker(num_workers):
    loader = build_loader(Broken(4, 3), batch_size=2, seed=0, train=False, num_workers=num_workers, collate=collate)
    with pytest.raises(ValueError) as caught:
        next(iter(loader))
    assert one_line(caught.value).endswith("no text in sample0") and "Traceback" not in one_line(caught.value)
