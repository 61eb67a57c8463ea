"""Workers that hang: named in one line and ended, however they hang; slow ones are waited for."""

import os
import signal
import time

import pytest
from torch.utils.data import DataLoader
from toy_hanging import Sleepy, job

from engine.data import busy
from engine.data.loader import build_loader
from engine.data.workers import run_jobs


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(busy, "PATIENCE", 2.0)
    monkeypatch.setattr(busy, "INTERVAL", 0.2)


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "hung.mp4")
    return str(tmp_path / "hung.mp4")


def loader_of(samples: Sleepy, **sizes: int) -> DataLoader:
    return build_loader(samples, seed=0, train=False, collate=lambda found: {"all": found}, **sizes)


# Of what hears no signal only another process can say so.
@pytest.mark.parametrize("kind, workers", [("pipe", 1), ("pipe", 2), ("deaf", 2)])
def test_a_job_that_hangs_is_named_and_ends_the_command(kind, workers, pipe):
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=f"{pipe}.*: not done after 2 s without a sign of life"):
        run_jobs(job, [("quick", "a"), (kind, pipe), ("quick", "b")], workers=workers, chunk=1)
    assert time.monotonic() - started < 40


def test_a_job_that_takes_long_and_says_so_is_waited_for():
    assert run_jobs(job, [("slow", "a")], workers=1) == ["a"]
    assert run_jobs(job, [("slow", "a"), ("quick", "b")], workers=2) == ["a", "b"]


@pytest.mark.slow
def test_a_job_for_which_the_processor_works_is_given_more_time_but_not_for_ever(monkeypatch):
    for workers in (1, 2):
        assert run_jobs(job, [("works", "a"), ("quick", "b")], workers=workers, chunk=1) == ["a", "b"]
    monkeypatch.setattr(busy, "SLACK", 1)
    for workers in (1, 2):
        with pytest.raises(TimeoutError, match="a.*not done after 2 s"):
            run_jobs(job, [("works", "a"), ("quick", "b")], workers=workers, chunk=1)


def test_many_jobs_keep_their_order_and_each_is_told(tmp_path):
    told = []
    found = run_jobs(job, [("quick", str(k)) for k in range(50)], workers=2, on_done=lambda: told.append(1), chunk=4)
    assert found == [str(k) for k in range(50)] and len(told) == 50


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["pipe", "deaf"])
def test_a_sample_that_hangs_a_worker_of_the_loader_is_named_with_its_file(kind, pipe):
    loader = build_loader(
        Sleepy(6, {3: kind}, pipe),
        batch_size=2,
        seed=0,
        train=False,
        num_workers=2,
        collate=lambda found: {"all": found},
    )
    batches = iter(loader)
    assert next(batches) == {"all": [0, 1]}
    with pytest.raises(TimeoutError, match=rf"sample 3 \({pipe}\): not done after 2 s"):
        next(batches)


def test_a_sample_that_hangs_the_main_process_is_named_with_its_file(pipe):
    loader = build_loader(
        Sleepy(4, {3: "pipe"}, pipe),
        batch_size=2,
        seed=0,
        train=False,
        num_workers=0,
        collate=lambda found: {"all": found},
    )
    batches = iter(loader)
    assert next(batches) == {"all": [0, 1]}
    with pytest.raises(TimeoutError, match=rf"sample 3 \({pipe}\): not done after 2 s"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_sample_is_waited_for(workers, pipe):
    loader = build_loader(
        Sleepy(2, {1: "slow"}, pipe),
        batch_size=2,
        seed=0,
        train=False,
        num_workers=workers,
        collate=lambda found: {"all": found},
    )
    assert list(loader) == [{"all": [0, 1]}]


def test_a_worker_of_the_loader_that_dies_is_one_line(pipe):
    loader = build_loader(
        Sleepy(2, {1: "die"}, pipe),
        batch_size=1,
        seed=0,
        train=False,
        num_workers=1,
        collate=lambda found: {"all": found},
    )
    with pytest.raises(OSError, match=r"worker .*was it killed for memory\? Lower --run.num-workers"):
        list(loader)


def test_time_in_which_nobody_looked_does_not_count():
    board = busy.Board(1)
    watch = busy.Watch(board)
    with board.at(0, 7):
        watch.look()
        watch.last -= 1000.0  # stopped, and continued
        assert watch.look() == []
    assert busy.Watch(board).look() == []


def test_the_alarm_of_a_job_leaves_that_of_others_alone():
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        with busy.limited("a", 5.0):
            pass
        os.kill(os.getpid(), signal.SIGALRM)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGALRM, before)
