"""torch.compile of the whole model, or of what the branches are made of: one graph break, and exactness survives.

The backend "aot_eager" traces, functionalises and partitions like inductor, which is where a recomputation could go
wrong, and takes a second; inductor runs once, on two branches.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import WIDTH, ToyNet, build_input, build_net, converted, gradients, relative

import dr2net

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

BOUND = {"exact": 1e-6, "float": 1e-5}  # against stored activations compiled alike, float32, 4 branches at (.2, .8)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole_model(net: ToyNet, backend: str, **how: object) -> nn.Module:
    return torch.compile(converted(net, 0.2, 0.8, **how), backend=backend)


def modules_after_conversion(net: ToyNet, backend: str, **how: object) -> nn.Module:
    net = converted(net, 0.2, 0.8, **how)
    for block in net.blocks.children():
        for part in (block.norm1, block.value, block.mlp1, block.mlp2):
            part.compile(backend=backend)
    return net


def modules_before_conversion(net: ToyNet, backend: str, **how: object) -> nn.Module:
    for block in net.blocks:
        for part in (block.norm1, block.value, block.mlp1, block.mlp2):
            part.compile(backend=backend)
    dr2net.convert(net, **how)
    dr2net.set_coefficients(net, 0.2, 0.8)
    return net


def whole_branches(net: ToyNet, backend: str, **how: object) -> nn.Module:
    net = converted(net, 0.2, 0.8, **how)
    for block in net.blocks.children():
        block.mix, block.mlp = torch.compile(block.mix, backend=backend), torch.compile(block.mlp, backend=backend)
    return net


def train(net: nn.Module, x: Tensor, autocast: bool = False) -> Tensor:
    """Two steps' gradients, from the same seed each."""
    for _ in "12":
        net.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = net(x)
        outputs.float().square().sum().backward()
    return outputs.detach()


@pytest.mark.parametrize(("inversion", "autocast"), [("exact", False), ("exact", True), ("float", False)])
@pytest.mark.parametrize(
    "compile_parts", [whole_model, modules_after_conversion, modules_before_conversion, whole_branches]
)
def test_a_compiled_model_trains_like_stored_activations(compile_parts, autocast: bool, inversion: str) -> None:
    net, x = build_net(2, dtype=torch.float32, dropout=0.1), build_input(4, 6, WIDTH, dtype=torch.float32)
    ours, twin = (
        compile_parts(copy.deepcopy(net), "aot_eager", inversion=inversion, store=store) for store in (False, True)
    )
    outputs = train(ours, x, autocast)
    train(twin, x, autocast)
    assert relative(gradients(ours), gradients(twin)) < BOUND[inversion]
    uncompiled = train(converted(net, 0.2, 0.8, inversion=inversion), x, autocast)
    # compiled code may leave out a rounding to bfloat16 (2^-9) between two operators
    assert relative([outputs], [uncompiled]) < (1e-2 if autocast else 1e-5)


def test_the_sequence_is_one_graph_break_and_nothing_of_it_is_traced() -> None:
    net = converted(build_net(3), 0.5, 0.5)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    class Whole(nn.Module):
        """Calls the container, as timm does."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net.head(self.net.blocks(self.net.stem(x)).mean(1))

    compiled = torch.compile(Whole(), backend=backend)
    compiled(build_input()).sum().backward()
    assert len(graphs) == 2  # before and after the sequence


def test_exactness_survives_inductor() -> None:
    # the frozen stem: the first branch must be compiled for the same requires_grad in forward and recomputation
    net, x = build_net(1, dtype=torch.float32), build_input(4, 6, WIDTH, dtype=torch.float32)
    net.stem.requires_grad_(False)
    ours = whole_branches(net, "inductor")
    train(ours, x)
    with torch.no_grad():
        evaluated = ours(x)
    train(twin := converted(net, 0.2, 0.8, store=True), x)
    assert relative(gradients(ours), gradients(twin)) < 1e-5  # other kernels: rounding of float32
    assert relative([evaluated], [twin(x)]) < 1e-5


def test_coefficients_of_a_compiled_model_may_move() -> None:
    net, x = build_net(2), build_input()
    compiled = whole_model(net, "aot_eager")
    for alpha, beta in ((1.0, 0.1), (0.5, 0.5)):
        dr2net.set_coefficients(compiled, alpha, beta)
        assert relative([compiled(x)], [converted(net, alpha, beta)(x)]) < 1e-10  # float64
