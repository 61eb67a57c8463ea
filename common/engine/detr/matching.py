"""The assignment of predictions to targets that costs least: the Hungarian method of scipy."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def assign(cost: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """A cost (Q, n) on the CPU -> queries and targets, int64 (min(Q, n),) each.

    FloatingPointError, naming `where`, for a cost that is not finite: an assignment of NaN would be any. Fake tensors
    (a predicted memory) have no values: the first queries are taken.
    """
    if isinstance(cost, FakeTensor):
        order = torch.arange(min(cost.shape))
        return order, order
    if not torch.isfinite(cost).all():
        raise FloatingPointError(f"the predictions for {where} are not finite: nothing to match")
    rows, columns = linear_sum_assignment(cost.numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)
