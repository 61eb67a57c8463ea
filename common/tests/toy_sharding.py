"""`fully_shard` for the tests, on a CPU, in every version of torch that is supported.

Before 2.7 torch's stand-in for a CPU's stream lacked two of the methods that `fully_shard` calls. Streams order work on
a GPU; on a CPU there is nothing to order, and later versions have them, empty.
"""

import torch
from torch.distributed.fsdp import fully_shard

__all__ = ["fully_shard"]

for name in ("record_event", "wait_event"):
    if not hasattr(torch.cpu.Stream, name):
        setattr(torch.cpu.Stream, name, lambda stream, *event: None)
