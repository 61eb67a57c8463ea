"""The first branch of a run on the grid of exact inversion: it says whether the grid is coarse enough.

Not here: the grid itself (`grid.py`), and the arithmetic on it (`exact.py`).
"""

from collections.abc import Callable

from torch import Tensor

from dr2net import exact, rng
from dr2net.branches import Branch
from dr2net.grid import Rows, coarser
from dr2net.handed_out import forget
from dr2net.module_state import StatisticsKept
from dr2net.patches import hooks_asleep


def on_grid(
    branch: Branch, rows: Rows, run: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, n: Tensor, grid: Tensor
) -> tuple[Tensor, Tensor]:
    """F_1 of x on its grid, and that stream; where F_1 outgrows the grid, n and grid become coarser, in place.

    `run` gives F_1 and the stream for the decoded n; x is what entered the run of branches, without a graph. A first
    attempt leaves no trace in random generators and statistics, and hooks inside the branch do not see it: where there
    are any, the branch runs a second time, for them.
    """
    states, statistics = rng.record(x), StatisticsKept(branch.modules).__enter__()
    with hooks_asleep(branch.modules) as hooked:
        f, stream = run(exact.decode(n, grid))
    new = coarser(grid, f.detach(), rows)
    if new is not None:
        grid.copy_(new)
        n.copy_(exact.encode(x, grid)[0])
    if new is not None or hooked:
        del f, stream
        rng.restore(states)
        statistics.put_back()
        forget()
        f, stream = run(exact.decode(n, grid))
    return f, stream
