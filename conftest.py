"""Every test runs with one thread, as the processes that tests start.

How many there are decides in which order sums are taken, and with that the last bits: what is bitwise the same, or the
same to the digits of a committed number, would depend on the machine.
"""

import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Converted models are cycles, which Python collects too seldom: the whole suite once took 22 GB."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * resource.getpagesize() > 4 * 2**30:
        gc.collect()
