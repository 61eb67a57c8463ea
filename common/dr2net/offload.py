"""`torch.autograd.graph.save_on_cpu`, counted: what forward saves waits in the host's memory and comes back.

    with (offload := Offload()):
        loss = model(batch).square().mean()
    loss.backward()
    offload.bytes                # left for the host, and came back; all of it was there when backward began

On a card it is torch's own, through pinned memory. Tensors of a CPU, fake ones too, are copied where `memory.py` does
not count, so that a prediction, and a measurement on a CPU, is that of a card. As torch does it copies whatever an
operator saves: a tensor that two of them save goes twice, and so does a weight. What a recomputation saves stays.
Not here: anything faster, such as copies beside the computation.
"""

from typing import Any

from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes


class Offload(saved_tensors_hooks):
    """A context for the forward pass."""

    def __init__(self) -> None:
        self.bytes = 0  # since it was entered last
        self._to_host = save_on_cpu(pin_memory=True)
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> None:
        self.bytes = 0
        super().__enter__()

    def _pack(self, tensor: Tensor) -> Any:
        self.bytes += tensor.numel() * tensor.element_size()
        return self._to_host.pack_hook(tensor) if tensor.is_cuda else _uncounted(tensor)

    def _unpack(self, host: Any) -> Tensor:
        return _uncounted(host) if isinstance(host, Tensor) else self._to_host.unpack_hook(host)


def _uncounted(tensor: Tensor) -> Tensor:
    with _disable_current_modes():
        return tensor.detach().clone()
