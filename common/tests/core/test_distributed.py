"""Two processes over gloo give the gradients of one, whatever the options of DistributedDataParallel; and FSDP2."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from toy_blocks import relative, stored
from toy_distributed import CASES, COEFFICIENTS, batches, model_of, work

BOUND = {"float": 1e-10, "exact": 1e-8}  # float64; the grid of 2^-40 for exact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes left; started once for all cases, since starting takes most of the time."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(work, (str(folder),), nprocs=2)
    return folder


def expected(case: str) -> list[torch.Tensor | None]:
    """The gradient in one process with stored activations. The mean over ranks of means is the mean of the batch."""
    net = model_of(case)
    first, last = batches()
    if case == "accumulation":
        shares = [*first.chunk(2), *last.chunk(2)]
    elif case == "uneven":
        shares = [last.chunk(2)[0]]  # rank 1 has joined; its missing gradient counts as zero
    else:
        shares = last.chunk(2)
    for x in shares:
        (stored(net, x, *COEFFICIENTS).square().mean() / 2).backward()
    return [p.grad for p in net.parameters()]


@pytest.mark.parametrize("inversion", BOUND)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_one_process(folder: Path, case: str, inversion: str) -> None:
    found = torch.load(folder / f"{case}_{inversion}.pt", weights_only=True)
    assert not isinstance(found, str), found
    assert relative(found, expected(case)) < BOUND[inversion]
