"""Peak memory of a training step: measured, or predicted without the memory, and the largest input that fits.

    def step() -> None:
        loss(model, torch.randn(16, 3, 224, 224)).backward()
        optimizer.step()
        optimizer.zero_grad()

    measure(step, model, optimizer).peak     # runs it
    predict(step, model, optimizer).peak     # the same number from fake tensors: no GPU, no memory, seconds

Both count live tensor bytes: every storage that an operator returns, from then until nobody refers to it, views counted
once. They see neither what a kernel allocates and frees inside one operator, nor fragmentation, nor the CUDA context;
`measure` therefore also reports the allocator's peak (CUDA) and the process's. A prediction is made with the operators
that a CPU would run, because the backward of fake CUDA tensors fails without a GPU; under autocast with the dtypes of
a card.
"""

import contextlib
import math
import resource
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dr2net.cuda_autocast import cuda_autocast

Category = Literal["parameters", "gradients", "optimizer", "stored", "temporaries"]
Step = Callable[[], object]
UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class LiveTensors:
    """Equal tensors that were alive at the peak: how many, what they are, which operator at which line made them."""

    count: int
    bytes: int  # of all of them together
    category: Category
    operator: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    line: str  # "file:line" of the nearest Python frame outside torch

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"
        size = format_bytes(self.bytes)
        return f"{size:>10}  {self.count:4d} x {kind:34} {self.category:11} {self.operator} {self.line}"


@dataclass(frozen=True)
class Memory:
    """Bytes alive at the moment of the peak: peak = parameters + gradients + optimizer + activations.

    `activations` is all that is not one of the other three: activations, their gradients, the input. `temporaries` is
    the part of it that is not alive at the end of the forward pass, when backward runs its first operator (the last
    forward pass that ended before the peak, else the first after it); the other part, `stored`, is what forward keeps
    for backward, and its input. Optimizer state counts from the beginning of the step, also in the first of a run.
    """

    peak: int
    parameters: int  # and buffers
    gradients: int
    optimizer: int
    activations: int
    temporaries: int = 0  # of the activations
    device: int | None = None  # peak of the CUDA allocator, where there is one
    process: int | None = None  # peak resident memory of the whole process since it started; None when predicted
    host: int | None = None  # what forward leaves in the host's memory, where it does (`offload.py`); it comes back
    live: tuple[LiveTensors, ...] = ()  # what lived at the peak, largest first

    @property
    def stored(self) -> int:
        """The activations that are no temporaries."""
        return self.activations - self.temporaries


@dataclass
class _Allocation:
    bytes: int
    operator: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    line: str
    category: Category = "temporaries"


class _LiveBytes(TorchDispatchMode):
    """Logs births, deaths and changes of size of storages. The peak and its split are read from the log afterwards,
    because what is a gradient or optimizer state is known only once the step is over.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.log: list[tuple[int, int]] = []  # (allocation number, change in bytes)
        self.allocations: list[_Allocation] = []
        self.forward_ends: list[int] = []  # lengths of the log at the first operator of each backward pass
        self._in_backward = False
        self._numbers: dict[int, int] = {}  # id of a live storage -> its allocation number
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls on fake tensors
            return func(*args)
        if any(hasattr(cls, "_local_tensor") for cls in types):
            return NotImplemented  # a DTensor calls again with what this process has of it
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._in_backward:
            self.forward_ends.append(len(self.log))
        self._in_backward = in_backward
        # An argument that no operator made (the batch, a constant) counts from its first use on.
        for value in _tensors((*args, *kwargs.values()) if kwargs else args):
            self.see(value, "input")
        result = func(*args, **(kwargs or {}))
        for value in _tensors((result,)):
            self.see(value, str(func))
        return result

    def see(self, tensor: Tensor, operator: str, category: Category | None = None) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        if tensor.device.type != self.device or tensor.layout != torch.strided:
            return
        self._see(tensor.untyped_storage(), operator, tensor.dtype, tuple(tensor.shape), category)

    @contextlib.contextmanager
    def watching_sizes(self) -> Iterator[None]:
        """Inside, storages that change their size are seen: FSDP gathers parameters into them and empties them, without
        an operator.
        """
        resize = torch.UntypedStorage.resize_

        def resize_and_see(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage.device.type in (self.device, "meta"):  # a fake tensor's
                self._see(storage, "resize_", torch.uint8, (storage.nbytes(),), None)

        torch.UntypedStorage.resize_ = resize_and_see  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def _see(
        self,
        storage: torch.UntypedStorage,
        operator: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        category: Category | None,
    ) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        number = self._numbers.get(key)
        if number is None:
            number = len(self.allocations)
            self.allocations.append(_Allocation(0, operator, dtype, shape, _line_outside_torch()))
            self._numbers[key] = number
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        allocation = self.allocations[number]
        if num_bytes != allocation.bytes:
            self.log.append((number, num_bytes - allocation.bytes))
            allocation.bytes = num_bytes
        if category is not None:
            allocation.category = category

    def _forget(self, key: int) -> None:
        del self._references[key]
        number = self._numbers.pop(key)
        self.log.append((number, -self.allocations[number].bytes))

    def memory(self) -> Memory:
        # The first step of a run makes the optimizer's state at its end; each later one finds it at its beginning.
        early = [self.allocations[number].category == "optimizer" for number, _ in self.log]
        log = [e for e, is_early in zip(self.log, early, strict=True) if is_early]
        shift = len(log)
        log += [e for e, is_early in zip(self.log, early, strict=True) if not is_early]
        now = peak = moment = 0
        for index, (_, change) in enumerate(log):
            now += change
            if now > peak:
                peak, moment = now, index + 1
        ends = [shift + end - sum(early[:end]) for end in self.forward_ends]
        before = [end for end in ends if end <= moment]
        forward_end = before[-1] if before else ends[0] if ends else 0
        alive, kept = _alive(log[:moment]), _alive(log[:forward_end])
        split: Counter[str] = Counter()
        groups: dict[tuple, list[int]] = {}
        for number, num_bytes in alive.items():
            a = self.allocations[number]
            category = "stored" if a.category == "temporaries" and number in kept else a.category
            split[category] += num_bytes
            groups.setdefault((category, a.operator, a.dtype, a.shape, a.line), []).append(num_bytes)
        live = (LiveTensors(len(sizes), sum(sizes), *group) for group, sizes in groups.items())
        return Memory(
            peak=peak,
            parameters=split["parameters"],
            gradients=split["gradients"],
            optimizer=split["optimizer"],
            activations=split["stored"] + split["temporaries"],
            temporaries=split["temporaries"],
            live=tuple(sorted(live, key=lambda tensors: -tensors.bytes)),
        )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operator's arguments or results, lists included; much faster than a general walk of a tree."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _alive(log: list[tuple[int, int]]) -> dict[int, int]:
    """Allocation number -> bytes, of what is alive after `log`."""
    alive: Counter[int] = Counter()
    for number, change in log:
        alive[number] += change
    return {number: num_bytes for number, num_bytes in alive.items() if num_bytes}


def measure(step: Step, model: nn.Module, optimizer: Optimizer | None = None) -> Memory:
    """Run `step` once and report its peak.

    `step` trains for real: forward, backward and, where an optimizer is given, its step. The device is that of the
    model's first parameter; only tensors there are counted.
    """
    device = _device_of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    memory = run_and_count(step, model, optimizer, device.type)
    allocator = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return replace(memory, device=allocator, process=process_peak())


def predict(
    step: Step, model: nn.Module, optimizer: Optimizer | None = None, *, like: Literal["cuda", "cpu"] = "cuda"
) -> Memory:
    """What `measure` would report, from fake tensors on a CPU: nothing is computed and nothing large is allocated.

    like: whose autocast decides what is float32, a card's (`cuda_autocast.py`) or this CPU's, with which the number is
    that of `measure` on a CPU. Without autocast it makes no difference.

    Model and optimizer get fake parameters while `step` runs, and their own ones back afterwards; the model may live on
    torch's "meta" device. With an optimizer, a step that leaves gradients behind runs twice, and the second, which
    finds them, counts. Let `step` make its batch, then that is fake as well. A step that reads values (`.item()`,
    `if loss > 1:`) cannot be predicted and raises. Takes seconds; a branch in many chunks no longer than one in three.
    """
    _device_of(model)
    lists = cuda_autocast() if like == "cuda" else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), fake_tensors(model, optimizer), lists:
        memory = run_and_count(step, model, optimizer, "cpu")
        if optimizer is not None and any(parameter.grad is not None for parameter in model.parameters()):
            memory = run_and_count(step, model, optimizer, "cpu")
        return memory


def largest(peak: Callable[[int], int], budget: int, *, limit: int = 1 << 16) -> int:
    """The largest n <= limit with peak(n) <= budget bytes; 0 if not even one fits.

    peak: the bytes for n samples (or frames), `lambda n: predict(...).peak`. As it is nearly a straight line, a handful
    of tries is enough. Where it falls again somewhere, n fits and n + 1 does not, but a larger one may.
    """
    peaks: dict[int, int] = {}
    low, high, guess = 0, limit + 1, 1  # low fits, high does not
    while high - low > 1:
        peaks[guess] = peak(guess)
        low, high = (guess, high) if peaks[guess] <= budget else (low, guess)
        if len(peaks) == 1:
            guess = 2
        elif len(peaks) > 6:  # not a straight line after all: halve
            guess = (low + high) // 2
        else:
            near, far = (low, high) if high in peaks else sorted(peaks)[-2:]
            guess = near + int((budget - peaks[near]) * (far - near) / max(1, peaks[far] - peaks[near]))
        guess = min(max(guess, low + 1), high - 1)
    return low


def process_peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_bytes(num_bytes: int) -> str:
    """`format_bytes(3 << 29)` is "1.50 GiB"; below one GiB the unit is MiB."""
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"


def parse_bytes(text: str) -> int:
    """`24GiB` -> 25769803776."""
    digits = text.rstrip("BbIiKkMmGg ")
    unit = text[len(digits) :].strip().upper()
    try:
        size = float(digits)
    except ValueError:
        size = math.nan
    if unit not in UNITS or not 0 < size < math.inf:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, as 24GiB, 512MiB or 80GB")
    return int(size * UNITS[unit])


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("the model has no parameters; give the module that is trained, not a function of it")
    return parameter.device


def run_and_count(step: Step, model: nn.Module, optimizer: Optimizer | None, device: str) -> Memory:
    """Run `step` and count what lives on `device`, "cpu" or "cuda"."""
    tracker = _LiveBytes(device)

    def see_gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        tracker.see(parameter.grad, "gradient", "gradients")

    def see_gradients(*_: object) -> None:  # of sharded parameters, which arrive without a hook
        for parameter in model.parameters():
            if parameter.grad is not None:
                see_gradient(parameter)

    with contextlib.ExitStack() as stack:
        for tensor in [*model.parameters(), *model.buffers()]:
            tracker.see(tensor, "parameter", "parameters")
            if tensor.grad is not None:
                see_gradient(tensor)
            if tensor.requires_grad:  # the gradients may be gone at the end of the step, so they are caught on arrival
                stack.callback(tensor.register_post_accumulate_grad_hook(see_gradient).remove)
        if optimizer is not None:
            stack.callback(optimizer.register_step_pre_hook(see_gradients).remove)
        _see_state(tracker, optimizer)
        with tracker, tracker.watching_sizes():
            step()
        _see_state(tracker, optimizer)
    return tracker.memory()


def _see_state(tracker: _LiveBytes, optimizer: Optimizer | None) -> None:
    for state in optimizer.state.values() if optimizer is not None else ():
        for value in tree_leaves(state):
            if isinstance(value, Tensor):
                tracker.see(value, "state", "optimizer")


@contextlib.contextmanager
def fake_tensors(model: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
    """Every tensor that the modules or the optimizer hold is a fake CPU tensor inside, and its own self afterwards."""
    fakes: dict[int, Any] = {}

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        if id(value) not in fakes:  # tied parameters stay tied
            twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            if isinstance(value, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=value.requires_grad)
            fakes[id(value)] = twin
        return fakes[id(value)]

    with contextlib.ExitStack() as stack:
        holders: list[Any] = [h for m in model.modules() for h in (m._parameters, m._buffers, vars(m))]
        if optimizer is not None:
            stack.callback(optimizer.state.update, dict(optimizer.state))
            stack.callback(optimizer.state.clear)
            optimizer.state.clear()  # the first fake step makes it anew
            for group in optimizer.param_groups:
                stack.callback(group.update, params=group["params"])
                group["params"] = [fake(parameter) for parameter in group["params"]]
        for holder in holders:
            own = {name: value for name, value in holder.items() if isinstance(value, Tensor)}
            stack.callback(holder.update, own)
            holder.update({name: fake(value) for name, value in own.items()})
        yield


def _line_outside_torch() -> str:
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__ and not name.startswith("<"):
            return f"{'/'.join(name.rsplit('/', 2)[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
