"""What is put on a model from outside, hooks and replaced forwards, does in a converted model what it did before, or is
refused by name: when the model is converted, and at the next pass if it comes later."""

import copy
import functools
import inspect
from contextlib import nullcontext

import pytest
import torch
from model_zoo import FAMILIES, run
from torch import Tensor, nn
from toy_blocks import WIDTH, ToyBlock, build_input, build_net, converted, gradients, relative

import dr2net

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

WAYS = ["float", "exact"]


def double(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * 2


def double_input(module: nn.Module, args: tuple) -> tuple:
    return (args[0] * 2, *args[1:])


def double_forward(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda *args, **named: old(*args, **named) * 2


PATCHES = {
    "hook": lambda module: module.register_forward_hook(double),
    "pre-hook": lambda module: module.register_forward_pre_hook(double_input),
    "forward": double_forward,
}

# the module that the branch of a block goes around, where its parts are called or its weights read
AROUND = {
    "videomae": ("videomae.encoder.layer.1.output", {}),
    "swin": ("features.1.1.attn", {"chunk_mib": 0.01}),
    "swin3d": ("features.0.1.attn", {"chunk_mib": 0.01}),
    "vit_with_layer_scale_and_drop_path": ("blocks.1.drop_path1", {"chunk_mib": 0.01}),
    "vit": ("blocks.1.mlp.fc1", {"chunk_mib": 0.01}),
    "huggingface_vit": ("vit.layers.1.dropout", {}),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("family", AROUND)
def test_what_is_put_on_a_module_inside_a_block_is_honored(family: str, patch: str, when: str) -> None:
    torch.manual_seed(0)
    model, x = FAMILIES[family]()
    model.eval()
    name, how = AROUND[family]
    plain = copy.deepcopy(model)
    PATCHES[patch](plain.get_submodule(name))
    if when == "before":
        PATCHES[patch](model.get_submodule(name))
    dr2net.convert(model, inversion="float", **how)
    if when == "after":
        with torch.no_grad():
            run(model, x)  # a pass that knows nothing of it yet
        PATCHES[patch](model.get_submodule(name))
    expected = run(plain, x)
    with pytest.warns(UserWarning, match="as a whole, not in chunks") if how else nullcontext():
        found = run(model, x)
    assert relative([found], [expected]) < 1e-5  # sums in another order
    expected.square().sum().backward()
    found.square().sum().backward()
    assert relative(gradients(model), gradients(plain)) < 1e-4


def test_a_module_inside_that_was_exchanged_for_another_is_called() -> None:
    class Output(nn.Module):
        def __init__(self, old: nn.Module) -> None:
            super().__init__()
            self.dense, self.dropout = old.dense, old.dropout

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return self.dense(h).tanh() + x

    model, x = FAMILIES["videomae"]()
    model.eval()
    layer = model.videomae.encoder.layer[1]
    layer.output = Output(layer.output)
    expected = run(model, x)
    dr2net.convert(model, inversion="float")
    assert relative([run(model, x)], [expected]) < 1e-5


@pytest.mark.parametrize("inversion", WAYS)
def test_hooks_on_a_block_and_on_its_container_fire_once_in_each_pass(inversion: str) -> None:
    net, x = build_net(3), build_input()
    net.blocks = nn.Sequential(*net.blocks)
    net.forward = lambda x: net.head(net.blocks(net.stem(x)).mean(1))
    seen, seen_plain = [], []
    for module in (*net.blocks, net.blocks):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        module.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    net(x).sum().backward()
    seen_plain, seen[:] = list(seen), []
    dr2net.convert(net, inversion=inversion)
    net(x).sum().backward()
    assert len(seen) == len(seen_plain) == 8
    assert relative(seen, seen_plain) < 1e-6


def test_a_pre_hook_of_the_first_block_and_a_hook_of_the_last_may_change_what_passes() -> None:
    net, x = build_net(3), build_input()
    net.blocks[0].register_forward_pre_hook(double_input)
    net.blocks[2].register_forward_hook(double)
    expected = net(x)
    expected.square().sum().backward()
    ours = build_net(3)
    dr2net.convert(ours, inversion="float")
    ours.blocks[0].register_forward_pre_hook(double_input)
    ours.blocks[2].register_forward_hook(double)
    found = ours(x)
    found.square().sum().backward()
    assert torch.equal(found, expected)
    assert relative(gradients(ours), gradients(net)) < 1e-12


@pytest.mark.parametrize("patch", ["hook", "pre-hook"])
def test_a_hook_that_changes_what_passes_between_blocks_is_refused(patch: str) -> None:
    net = converted(build_net(3), 0.5, 0.5)
    PATCHES[patch](net.blocks[1])
    with pytest.raises(ValueError, match=r"input of block . is not the output.*hook"):
        net(build_input())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_on_a_block_are_refused(kind: str, when: str) -> None:
    net = build_net(3)
    if when == "after":
        dr2net.convert(net)
    getattr(net.blocks[1], kind)(lambda *_: None)
    with pytest.raises(ValueError, match=r"(blocks\.1|block 1) \(ToyBlock\) has backward hooks.*inside the block"):
        dr2net.convert(net) if when == "before" else net(build_input())


def test_a_forward_replaced_on_a_block_is_refused_before_and_after_and_the_model_left_as_it_was() -> None:
    net = build_net(3)
    double_forward(net.blocks[1])
    with pytest.raises(ValueError, match=r"forward of blocks\.1 \(ToyBlock\) is replaced on the instance.*del block"):
        dr2net.convert(net)
    assert type(net.blocks) is nn.ModuleList and not any("forward" in vars(net.blocks[i]) for i in (0, 2))
    del net.blocks[1].forward
    dr2net.convert(net)
    for index in (1, 2):  # the last one as well, whose output nobody inside compares
        double_forward(net.blocks[index])
        with pytest.raises(ValueError, match=rf"forward of block {index} \(ToyBlock\) was replaced"):
            net(build_input())
        dr2net.deconvert(net)
        del net.blocks[index].forward
        dr2net.convert(net)


@pytest.mark.parametrize("inversion", WAYS)
def test_a_wrapper_that_names_what_it_wraps_may_come_after_the_conversion(inversion: str) -> None:
    net, calls = converted(build_net(3), 0.5, 0.5, inversion=inversion), []
    twin = copy.deepcopy(net)
    for block in net.blocks:
        old = block.forward

        @functools.wraps(old, updated=())
        def forward(*args, old=old, **named):
            calls.append(args)
            return old(*args, **named)

        block.forward = forward
    net(build_input()).sum().backward()
    twin(build_input()).sum().backward()
    assert len(calls) == 3 and relative(gradients(net), gradients(twin)) == 0
    dr2net.set_coefficients(net, 1, 0)
    dr2net.deconvert(net)
    assert torch.equal(net(build_input()), build_net(3)(build_input())) and len(calls) == 6


def test_accelerate_s_hooks_are_named_before_and_honored_after_the_conversion() -> None:
    accelerate = pytest.importorskip("accelerate")
    net, x = build_net(3), build_input()
    expected = net(x)
    accelerate.hooks.add_hook_to_module(net.blocks[1], accelerate.hooks.ModelHook())
    with pytest.raises(ValueError, match="remove_hook_from_module"):
        dr2net.convert(net)
    accelerate.hooks.remove_hook_from_module(net, recurse=True)
    dr2net.convert(net, inversion="float")
    for module in net.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    assert torch.equal(net(x), expected)
    accelerate.hooks.remove_hook_from_module(net, recurse=True)
    assert torch.equal(net(x), expected) and net.blocks.ran == 6


@pytest.mark.parametrize("inversion", WAYS)
def test_parametrizations_are_honored(inversion: str) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    net, x = build_net(3), build_input()
    for block in net.blocks:
        nn.utils.parametrize.register_parametrization(block.value, "weight", Half())
    ours = copy.deepcopy(net)
    dr2net.convert(ours, inversion=inversion)
    for model in (net, ours):
        model(x).square().sum().backward()
    assert relative(gradients(ours), gradients(net)) < 1e-6


def test_a_class_whose_forward_was_exchanged_is_not_converted() -> None:
    from timm.models.vision_transformer import Block

    model, _ = FAMILIES["vit"]()
    old = Block.forward

    def half(self: nn.Module, x: Tensor) -> Tensor:
        return old(self, x) / 2

    try:
        Block.forward = half
        with pytest.raises(ValueError, match="forward of the class Block was replaced"):
            dr2net.convert(model)
    finally:
        Block.forward = old


@pytest.mark.parametrize("how", ["class of one block", "forward of the class"])
def test_a_block_that_changes_its_class_after_the_conversion_is_refused(how: str) -> None:
    from timm.models.vision_transformer import Block

    class Merging(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model, x = FAMILIES["vit"]()
    dr2net.convert(model)
    old = Block.forward
    try:
        if how == "class of one block":
            model.blocks[0].__class__ = Merging
        else:
            Block.forward = Merging.forward
        with pytest.raises(ValueError, match=r"block 0 was converted and is not reversible any more: .*register"):
            model(x)
    finally:
        Block.forward = old


def test_a_class_of_one_s_own_whose_forward_is_exchanged_after_the_conversion_is_refused() -> None:
    net, old = converted(build_net(2), 0.5, 0.5), ToyBlock.forward
    try:
        ToyBlock.forward = lambda self, x: old(self, x) / 2
        with pytest.raises(ValueError, match="forward of the class of block 0 was replaced"):
            net(build_input())
    finally:
        ToyBlock.forward = old
    assert net(build_input()).isfinite().all()


def test_an_adapter_put_beside_the_modules_of_a_block_is_refused_before_and_after() -> None:
    def adapt(block: nn.Module) -> None:
        block.adapter, old = nn.Linear(WIDTH, WIDTH).double(), block.value.forward
        block.value.forward = lambda x: old(x) + block.adapter(x)

    for when in ("before", "after"):
        net = build_net(2)
        if when == "after":
            dr2net.convert(net)
            net(build_input())
        adapt(net.blocks[1])
        with pytest.raises(ValueError, match=r"1 \(ToyBlock\) do not name .* hold adapter\.weight, adapter\.bias"):
            dr2net.convert(net) if when == "before" else net(build_input())


def test_what_was_replaced_outside_the_blocks_comes_back() -> None:
    net, x = build_net(2), build_input()
    double_forward(net.head)
    expected = net(x)
    dr2net.convert(net, inversion="float", recompute_rest=True)
    assert torch.equal(net(x), expected)
    dr2net.deconvert(net)
    assert torch.equal(net(x), expected)


def test_a_container_whose_class_changed_again_cannot_be_undone() -> None:
    net = converted(build_net(2), 1, 0)
    net.blocks.__class__ = type("Other", (type(net.blocks),), {})
    with pytest.raises(ValueError, match="blocks became a Other after it was converted"):
        dr2net.deconvert(net)


def test_data_parallel_is_refused() -> None:
    net = converted(build_net(2), 0.5, 0.5)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        net.blocks._replicate_for_data_parallel()  # what torch.nn.DataParallel calls for each module and device


def test_the_input_may_be_passed_by_name_and_the_signature_is_the_block_s() -> None:
    net, x = build_net(1), build_input(2, 5, WIDTH)
    signature = inspect.signature(net.blocks[0].forward)
    expected = net.blocks[0](x=x)
    dr2net.convert(net, inversion="float")
    assert torch.equal(net.blocks[0](x=x), expected) and net.blocks.ran == 2
    assert inspect.signature(net.blocks[0].forward) == signature
    with pytest.raises(TypeError, match="input 'x'"):
        net.blocks[0]()
