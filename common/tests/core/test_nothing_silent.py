"""Gradients are right or an error says why not: foreign tensors, hooks, caught features, changes before backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dr2net
from dr2net.foreign import hooks_suspended, refuse_foreign

WAYS = [(inversion, chunk_mib) for inversion in ("exact", "anchored", "float") for chunk_mib in (None, 0.001)]
IDS = [f"{inversion}{'' if chunk_mib is None else '-chunks'}" for inversion, chunk_mib in WAYS]
# Against stored activations, relative: exact inversion is bitwise as whole branches, the others rebuild streams.
NEAR = 1e-4
WIDTH = 8

pytestmark = pytest.mark.filterwarnings("ignore:float inversion", "ignore:branches")


class Part(nn.Module):
    """x + w2 gelu(w1 x) without the x; `scale` is whatever somebody puts there."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.down(F.gelu(self.up(self.norm(x)))))


class Block(nn.Module):
    """x + part(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return x + self.part(x)


@dr2net.branches_of.register(Block)
def _(block: Block) -> tuple[dr2net.Branch, ...]:
    return (dr2net.Branch("part", lambda x, *args: block.part(x), (block.part,), independent="tokens"),)


class Net(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.gate = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *args)
        return x


def converted(inversion: str = "exact", chunk_mib: float | None = None, store: bool = False) -> Net:
    torch.manual_seed(0)
    net = Net()
    dr2net.convert(net, inversion=inversion, chunk_mib=chunk_mib, store=store)
    dr2net.set_coefficients(net, 0.5, 0.5)
    return net


def batch() -> Tensor:
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= NEAR * other.norm())


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("kind", ["leaf", "computed", "replaced"])
def test_a_tensor_that_trains_and_no_module_of_the_branch_holds_is_named(way: tuple, kind: str) -> None:
    net = converted(*way)
    part = net.blocks[2].part
    if kind == "leaf":
        part.scale = lambda x: x * net.gate
    elif kind == "computed":
        outside = net.gate * 2
        part.scale = lambda x: x * outside
    else:  # as FSDP1 and DataParallel do: what the module uses is a view of a tensor that somebody else holds
        flat = nn.Parameter(part.down.weight.detach().flatten().clone())
        del part.down.weight
        part.down.weight = flat.view(WIDTH, 2 * WIDTH)
    with pytest.raises(RuntimeError, match="branch 2.part uses a tensor that trains, of shape .*modules"):
        net(batch()).square().mean().backward()


def test_the_parameters_of_functional_call_are_right_or_named() -> None:
    net = converted()
    own = {name: (parameter * 1.1) for name, parameter in net.named_parameters()}
    with pytest.raises((RuntimeError, ValueError)):
        torch.func.functional_call(net, own, (batch(),)).square().mean().backward()


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_hooks_on_a_parameter_run_once_on_its_final_gradient(way: tuple) -> None:
    found = []
    for store in (True, False):
        net = converted(*way, store=store)
        weight, calls = net.blocks[1].part.up.weight, []
        weight.register_hook(lambda grad, calls=calls: (calls.append("gradient"), 0.1 * grad)[1])
        weight.register_post_accumulate_grad_hook(lambda _, calls=calls: calls.append("accumulated"))
        for _ in range(2):
            net(batch()).square().mean().backward()
        assert calls == ["gradient", "accumulated"] * 2
        found.append(weight.grad)
    assert near(found[1], found[0])


def test_hooks_come_back_also_after_an_error() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.register_hook(lambda grad: 3 * grad)
    with pytest.raises(ZeroDivisionError), hooks_suspended([weight]):
        (found,) = torch.autograd.grad(weight.sum(), weight)
        assert found.tolist() == [1, 1]
        raise ZeroDivisionError
    weight.sum().backward()
    assert weight.grad.tolist() == [3, 3]


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_loss_on_a_feature_caught_inside_a_branch_is_an_error(way: tuple) -> None:
    for caught in ("norm", "up", "down"):
        net = converted(*way)
        features: list[Tensor] = []
        module = getattr(net.blocks[2].part, caught)
        module.register_forward_hook(lambda *seen, features=features: features.append(seen[-1]))
        output = net(batch())
        loss = output.square().mean() + features[0].square().mean()
        with pytest.raises(RuntimeError, match="caught inside branch 2.part"):
            loss.backward()
        with pytest.raises(RuntimeError, match="caught inside branch 2.part"):
            torch.autograd.grad(features[0].square().mean(), net.blocks[2].part.norm.weight)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_features_between_blocks_have_the_gradients_of_stored_activations(way: tuple) -> None:
    found = []
    for store in (True, False):
        net = converted(*way, store=store)
        x = batch().requires_grad_()
        features, y = [], x
        for block in net.blocks:
            y = block(y)
            features.append(y)
        (y.square().mean() + 3 * features[1].square().mean()).backward()
        found.append([x.grad, *(p.grad for p in net.blocks.parameters())])
    assert all(near(ours, stored) for stored, ours in zip(*found, strict=True))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_what_changes_between_forward_and_backward_is_an_error_with_its_cause(way: tuple) -> None:
    net = converted(*way)
    net.eval()
    output = net(batch())
    net.train()
    with pytest.raises(RuntimeError, match="branch 3.part were switched between training and evaluation mode"):
        output.square().mean().backward()
    net, switch = converted(*way), {"scale": 1.0}
    net.blocks[1].part.scale = lambda x: x * switch["scale"]
    output = net(batch())
    switch["scale"] = 2.0
    with pytest.raises(RuntimeError, match="branch 1.part did not compute in backward what .* adapter") as caught:
        output.square().mean().backward()
    assert "inversion='anchored'" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("change", [lambda f: f.roll(1, 1), lambda f: f.roll(1, 0), lambda f: f + 0.1 * f.std()])
def test_a_branch_that_computes_something_else_of_the_same_size_is_found(way: tuple, change: Any) -> None:
    net, changed = converted(*way), {"now": False}
    net.blocks[1].part.scale = lambda f: change(f) if changed["now"] else f
    output = net(batch())
    changed["now"] = True
    with pytest.raises(RuntimeError, match="branch 1.part did not compute in backward what"):
        output.square().mean().backward()


def test_tensors_between_blocks_of_a_bfloat16_model_are_on_the_way_of_the_gradient() -> None:
    gradients = {}
    for name in ("plain", "exact", "stored"):
        torch.manual_seed(0)
        net = Net().bfloat16()
        if name != "plain":
            dr2net.convert(net, store=name == "stored")  # at (1, 0), where it is the plain model
        x = batch().bfloat16().requires_grad_()
        y, features = x, []
        for index, block in enumerate(net.blocks):
            y = block(y)
            y.retain_grad()
            features.append(y)
            if index == 1:
                y.register_hook(lambda grad: 0.5 * grad)
        y.float().square().mean().backward()
        gradients[name] = [x.grad.float(), *(feature.grad.float() for feature in features)]
    for ours, stored, plain in zip(*(gradients[name] for name in ("exact", "stored", "plain")), strict=True):
        assert torch.equal(ours, stored)
        assert (ours - plain).norm() <= 0.02 * plain.norm()  # a few roundings to bfloat16


def test_a_list_that_branches_change_is_refused() -> None:
    net = converted()
    net.blocks[0].part.scale = lambda x: x

    def appends(block: Block) -> tuple[dr2net.Branch, ...]:
        def function(x: Tensor, seen: list) -> Tensor:
            seen.append(len(seen))
            return block.part(x)

        return (dr2net.Branch("part", function, (block.part,)),)

    kind = type("Appending", (Block,), {"forward": lambda self, x, seen: x + self.part(x)})
    dr2net.branches_of.register(kind, appends)
    model = nn.Sequential()
    model.blocks = nn.ModuleList([kind(), kind()])
    dr2net.convert(model)
    with pytest.raises(ValueError, match="branch 0.part changes a list or dictionary among its arguments"):
        model.blocks[0](batch(), [])


@pytest.mark.parametrize("argument", [{"cache": []}, object(), [object()]], ids=["plain", "object", "in a list"])
def test_an_object_that_a_branch_may_write_to_is_refused_while_training(argument: Any) -> None:
    net = converted()
    if argument == {"cache": []}:
        net(batch(), argument).sum().backward()  # nothing in it but values
        return
    with pytest.raises(ValueError, match="called with a object, which it may change"):
        net(batch(), argument)
    with torch.no_grad():
        net(batch(), argument)


def test_sharded_parameters_are_refused_with_the_remedy() -> None:
    net = converted()
    net.blocks[0].part.up.weight._local_tensor = None
    with pytest.raises(RuntimeError, match="sharded .*fully_shard: call it on each block and then on the model"):
        net(batch())


def test_parameters_that_deepspeed_takes_apart_are_refused_with_the_remedy() -> None:
    net = converted()
    net.blocks[0].part.up.weight.ds_id = 0  # what ZeRO-3 puts on a parameter
    with pytest.raises(RuntimeError, match="ZeRO-3.*use ZeRO-1 or ZeRO-2, or PyTorch's fully_shard"):
        net(batch())


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("change", ["frozen", "replaced"])
def test_a_parameter_that_is_lost_before_backward_is_an_error(way: tuple[str, float | None], change: str) -> None:
    net = converted(*way)
    loss, layer = net(batch()).sum(), net.blocks[1].part.up
    if change == "frozen":
        layer.weight.requires_grad_(False)
    else:  # as a wrapper does that puts its own tensor there during a call
        layer.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"a parameter of branch 1.part, shape \(16, 8\), trained in forward"):
        loss.backward()


def test_a_parameter_that_is_never_used_stays_without_a_gradient() -> None:
    net = converted()
    net.blocks[0].part.unused = nn.Linear(2, 2)
    net(batch()).sum().backward()
    assert net.blocks[0].part.unused.weight.grad is None and net.blocks[0].part.up.weight.grad is not None


def test_the_graph_is_not_looked_at_behind_what_is_known() -> None:
    outer = torch.ones(2, requires_grad=True)
    known = outer * 2
    refuse_foreign((known * 3).sum(), [known], "f")
    with pytest.raises(RuntimeError):
        refuse_foreign((known * 3).sum(), [], "f")


@pytest.mark.parametrize("inversion", ["exact", "anchored", "float"])
def test_one_sample_and_one_token_work_in_every_layout(inversion: str) -> None:
    for shape in ((1, 1, WIDTH), (1, 4, WIDTH), (3, 1, WIDTH)):
        net = converted(inversion)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        for laid in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.as_strided(shape, (7, *x.stride()[1:]))):
            error = dr2net.gradient_error(net, laid.clone(memory_format=torch.preserve_format), lambda m, b: m(b).sum())
            assert error.overall <= NEAR
