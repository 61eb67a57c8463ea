"""However a model calls its blocks, they take part in a reversible pass, and stay the modules they were."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import WIDTH, ToyBlock, ToyNet, build_input, build_net, converted, gradients, relative, stored

import dr2net

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

WAYS = ["float", "anchored", "exact"]


def by_index(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for index in range(len(blocks)):
        x = blocks[index](x)
    return x


def by_negative_index(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for index in range(-len(blocks), 0):
        x = blocks[index](x)
    return x


def by_slices(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for part in (blocks[:1], blocks[1:3], blocks[3:]):
        for block in part:
            x = block(x)
    return x


def by_name(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for name, _ in blocks.named_children():
        x = getattr(blocks, name)(x)
    return x


def by_children(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks.children():
        x = block(x)
    return x


def kept_beside(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for _, block in zip(range(9), [*blocks], strict=False):
        x = block(x)
    return x


class Calling(ToyNet):
    def __init__(self, net: ToyNet, call: Callable) -> None:
        super().__init__(net.blocks)
        self.load_state_dict(net.state_dict())
        self.call = call
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.blocks, self.stem(x)).mean(1))


@pytest.mark.parametrize("inversion", WAYS)
@pytest.mark.parametrize("call", [by_index, by_negative_index, by_slices, by_name, by_children, kept_beside])
def test_blocks_called_in_any_way_take_part(call: Callable, inversion: str) -> None:
    net, x = Calling(build_net(4), call), build_input()
    plain = copy.deepcopy(net)
    report = dr2net.convert(net, inversion=inversion)
    assert report.sequences == (("blocks", 4, 8),) and net.blocks.ran == 0
    assert "4 blocks, 8 branches; none of them ran" in str(report)
    dr2net.set_coefficients(net, 0.5, 0.5)
    expected, found = stored(plain, x, 0.5, 0.5), net(x)
    assert "4 blocks, 8 branches; 8 of them ran" in str(report)
    assert net.blocks.ran == 8 and "8 of 8 branches ran" in repr(net.blocks)
    assert relative([found], [expected]) < 1e-8
    expected.square().sum().backward()
    found.square().sum().backward()
    assert relative(gradients(net), gradients(plain)) < (1e-5 if inversion == "anchored" else 1e-8)
    error = dr2net.gradient_error(net, x, lambda net, x: net(x).square().sum())
    assert error.overall < (1e-5 if inversion == "anchored" else 1e-8)


@pytest.mark.parametrize("inversion", WAYS)
def test_two_passes_may_run_side_by_side(inversion: str) -> None:
    net = converted(build_net(3), 0.5, 0.5, inversion=inversion)
    a, b = build_input(seed=1), build_input(2, 7, WIDTH, seed=2)
    expected = [net.blocks(a), net.blocks(b)]
    for index in range(3):
        a, b = net.blocks[index](a), net.blocks[index](b)
    assert torch.equal(a, expected[0]) and torch.equal(b, expected[1])


def test_the_gradient_check_of_a_model_that_calls_parts_of_its_blocks_names_them() -> None:
    def by_parts(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = x + block.mix(x)
            x = x + block.mlp(x)
        return x

    net = Calling(build_net(2), by_parts)
    dr2net.convert(net)
    with pytest.raises(ValueError, match="the loss ran no reversible block of blocks"):
        dr2net.gradient_error(net, build_input(), lambda net, x: net(x).sum())
    assert net.blocks.ran == 0 and "0 of 4 branches ran" in repr(net)


def test_a_block_stays_the_module_it_was() -> None:
    net = build_net(3)
    block = net.blocks[1]
    dr2net.convert(net)
    assert net.blocks[1] is block and type(block) is ToyBlock and [*net.blocks][1] is block
    assert isinstance(net.blocks, nn.ModuleList) and isinstance(net.blocks, dr2net.ReversibleSequence)
    net.blocks[1].dropout = 0.5
    assert block.dropout == 0.5 and net.blocks[1].norm1.weight is block.norm1.weight
    seen = []
    handle = net.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    net(build_input())
    handle.remove()
    net(build_input())
    assert seen == [1]
    net.blocks[1].value = nn.Linear(WIDTH, WIDTH).double()  # as LoRA exchanges a layer
    net(build_input()).sum().backward()
    assert net.blocks[1].value.weight.grad is not None


def test_a_slice_in_front_may_be_evaluated_alone() -> None:
    net, x = converted(build_net(3), 0.5, 0.5, inversion="float"), build_input()
    with torch.no_grad():
        h = previous = x
        for block in net.blocks[:2]:
            for branch in block.functions():
                h, previous = branch(h) + 0.5 * h + 0.5 * previous, h
        for block in net.blocks[:2]:
            x = block(x)
    assert torch.equal(x, h) and net.blocks.ran == 4
    assert net.blocks[:] is net.blocks and len(net.blocks) == 3


def test_a_slice_in_the_middle_is_refused() -> None:
    net = converted(build_net(3), 0.5, 0.5)
    with pytest.raises(ValueError, match="block 1 is not the output of the block before it"):
        net.blocks[1:][0](build_input())


def test_a_block_that_came_in_after_the_conversion_is_refused() -> None:
    net = converted(build_net(2), 0.5, 0.5)
    net.blocks.append(copy.deepcopy(build_net(1).blocks[0]))
    with pytest.raises(ValueError, match=r"block 2 \(ToyBlock\) came into its container after the conversion"):
        net(build_input())


def test_a_block_that_was_copied_in_the_converted_model_is_refused() -> None:
    net = converted(build_net(3), 0.5, 0.5)
    net.blocks[2] = copy.deepcopy(net.blocks[0])
    with pytest.raises(ValueError, match="block 2 was copied into its container after the conversion"):
        net(build_input())


def test_blocks_may_be_deleted_and_a_model_cut_to_a_slice_is_refused() -> None:
    net, x = converted(build_net(3), 0.5, 0.5), build_input()
    plain = build_net(3)
    del net.blocks[1], plain.blocks[1]
    assert relative([net(x)], [stored(plain, x, 0.5, 0.5)]) < 1e-8 and net.blocks.ran == 4
    net.blocks = net.blocks[:1]
    with pytest.raises(ValueError, match="container of this ToyBlock is gone"):
        net(x)


def test_a_model_that_was_compiled_and_run_before_is_converted_too() -> None:
    net, x = build_net(2), build_input()
    compiled = torch.compile(net, backend="eager")
    expected = compiled(x)
    dr2net.convert(net, inversion="float")
    dr2net.set_coefficients(net, 0.5, 0.5)
    assert relative([compiled(x)], [stored(build_net(2), x, 0.5, 0.5)]) < 1e-12 and net.blocks.ran == 4
    dr2net.set_coefficients(net, 1, 0)
    dr2net.deconvert(net)
    assert torch.equal(compiled(x), expected)


def test_a_block_wrapped_after_the_conversion_is_refused() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    net = converted(build_net(3), 0.5, 0.5)
    net.blocks[1] = Wrapper(net.blocks[1])
    with pytest.raises(ValueError, match=r"ToyBlock is no longer a block of blocks, or was wrapped"):
        net(build_input())


@pytest.mark.parametrize("inversion", WAYS)
def test_a_pass_that_is_left_early_keeps_nothing_alive(inversion: str) -> None:
    net = converted(build_net(3), 0.5, 0.5, inversion=inversion)
    gc.disable()  # freed at once, not when Python looks for cycles
    try:
        h = net.blocks[1](net.blocks[0](build_input().requires_grad_()))
        alive = weakref.ref(h)
        del h
        assert alive() is None
        alive = weakref.ref(net.blocks)
        del net
        assert alive() is None
    finally:
        gc.enable()


def test_copies_and_files_of_a_converted_model_are_converted_models_of_their_own(tmp_path) -> None:
    net, x = converted(build_net(3), 0.5, 0.5), build_input()
    expected = net(x)
    torch.save(net, tmp_path / "model.pt")
    for twin in (copy.deepcopy(net), torch.load(tmp_path / "model.pt", weights_only=False)):
        dr2net.set_coefficients(twin, 0.25, 0.75)
        assert torch.equal(net(x), expected) and not torch.equal(twin(x), expected)
        assert twin.blocks.ran == 6


def test_a_block_copied_alone_is_the_plain_block() -> None:
    net, x = converted(build_net(3), 0.5, 0.5), build_input()
    assert torch.equal(copy.deepcopy(net.blocks[0])(x), build_net(3).blocks[0](x))
    blocks = list(net.blocks)
    del net
    with pytest.raises(ValueError, match="container of this ToyBlock is gone"):
        blocks[0](x)
