"""The assignment of predictions to targets that costs least: the Hungarian method of scipy, per image."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def assign(costs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Per image a cost (Q, n) -> (queries, targets), int64 (min(Q, n),) each, on the cost's device.

    FloatingPointError, with the image's place in the batch, for a cost that is not finite: an assignment of NaN would
    be any. Fake tensors (a predicted memory) have no values: the first queries are taken.
    """
    found = []
    for index, cost in enumerate(costs):
        if isinstance(cost, FakeTensor):
            order = torch.arange(min(cost.shape), device=cost.device)
            found.append((order, order))
            continue
        matrix = cost.detach().float().cpu()
        if not torch.isfinite(matrix).all():
            raise FloatingPointError(f"predictions of image {index} of the batch are not finite: nothing to match")
        rows, columns = linear_sum_assignment(matrix.numpy())
        found.append((torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)))
    return found
