"""Every test runs with one thread, as the processes that tests start.

How many there are decides in which order sums are taken, and with that the last bits: what is bitwise the same, or the
same to the digits of a committed number, would depend on the machine.
"""

import torch

torch.set_num_threads(1)
