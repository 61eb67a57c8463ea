"""A sequence of few branches at half precision keeps their inputs as they come: less than two streams in float32."""

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import WIDTH, build_input, build_net, converted, gradients, relative

import dr2net
from dr2net import Options, planner
from dr2net.planner import Setting

HALF = [torch.bfloat16, torch.float16]


def bytes_saved(model: nn.Module, x: Tensor) -> int:
    """Of tensors of x's size and more, storages counted once."""
    seen: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel():
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, see):
        model(x)
    return sum(seen.values())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("alpha", "beta"), [(7 / 8, 1 / 8), (0.0, 1.0), (1.0, 0.0), (0.4, 0.7)])
@pytest.mark.parametrize("inversion", ["exact", "anchored", "float"])
def test_gradients_are_bit_for_bit_those_of_stored_activations(dtype, alpha, beta, inversion) -> None:
    net, x = build_net(2, dtype=dtype, dropout=0.1), build_input(dtype=dtype)
    ours, twin = (converted(net, alpha, beta, inversion=inversion, store=store) for store in (False, True))
    for model in (ours, twin):
        torch.manual_seed(3)
        outputs = model(x)
        assert outputs.dtype == dtype
        outputs.float().square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(twin), strict=True))
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("dtype", HALF)
def test_at_1_0_it_is_the_plain_network_bit_for_bit(dtype: torch.dtype) -> None:
    net, x = build_net(2, dtype=dtype), build_input(dtype=dtype)
    assert torch.equal(converted(net, 1, 0)(x), net(x))


def test_the_recurrence_is_the_papers() -> None:
    net, x = build_net(2, dtype=torch.bfloat16), build_input(dtype=torch.bfloat16)
    expected = converted(copy.deepcopy(net).double(), 0.4, 0.7, store=True)(x.double())
    assert relative([converted(net, 0.4, 0.7)(x).double()], [expected]) < 2e-2  # bfloat16 has 8 bits


@pytest.mark.parametrize(("blocks", "streams"), [(1, 2 * 2), (2, 4 * 2), (3, 2 * 4)])
def test_what_is_kept_is_an_input_each_until_two_streams_are_less(blocks: int, streams: int) -> None:
    dtype = torch.bfloat16
    net, x = build_net(blocks, dtype=dtype), torch.randn(16, 64, WIDTH).to(dtype).requires_grad_()
    model = converted(net, 0.0, 1.0)  # (0, 1) keeps no remainders
    assert bytes_saved(model.blocks[0] if blocks == 1 else _Blocks(model), x) == streams * x.numel()


class _Blocks(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model.blocks:
            x = block(x)
        return x


def test_float32_keeps_its_streams() -> None:
    net, x = build_net(1, dtype=torch.float32), build_input(dtype=torch.float32)
    model = converted(net, 7 / 8, 1 / 8)
    assert dr2net.gradient_error(model, x, lambda m, x: m(x).square().sum()).grid is not None


def test_a_stage_of_two_blocks_needs_no_more_than_checkpointing_in_chunks() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Linear(WIDTH, 256), nn.ModuleList(Bottleneck() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return x

    setting = Setting("bf16", options=Options(chunk_mib=0.25, recompute_rest=True))
    with torch.device("meta"):
        model = Stage().train()
    peaks = {m: planner.predictor(model, m, setting)((64, 64, WIDTH)).peak for m in planner.METHODS if "chunks" in m}
    assert peaks["dr2net, chunks"] <= 1.02 * peaks["checkpointed, chunks"]


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(256, 64), nn.Linear(64, 256)

    def function(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(x)


@dr2net.branches_of.register
def _(block: Bottleneck):
    return (dr2net.Branch("all", block.function, (block.first, block.last), independent="tokens"),)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("num_blocks", [2, 6])
def test_blocks_of_a_probe_keep_the_precision_in_short_and_checkpointed_sequences(dtype, num_blocks) -> None:
    class Unregistered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.value = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.value(self.norm(x))

    torch.manual_seed(0)
    net, x = nn.Sequential(*(Unregistered() for _ in range(num_blocks))).to(dtype), build_input(dtype=dtype)
    expected = net(x)
    for way in (dr2net.convert, dr2net.checkpoint_blocks):
        model = copy.deepcopy(net)
        way(model, chunk_mib=1, probe=lambda model: model(x))
        assert model(x).dtype == dtype and relative([model(x)], [expected]) < 0.02
        model(x).float().square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
