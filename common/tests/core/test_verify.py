"""dr2net.verify finds, in a user's own model, what would be wrong without a word; and is content with what is right."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dr2net

WIDTH = 8
pytestmark = pytest.mark.filterwarnings("ignore")


class Layer(nn.Module):
    """The user's block: x + second(gelu(first(norm(x)))), dropout at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.3)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def added(self, x: Tensor, cache: Any = None) -> Tensor:
        if cache is not None:
            cache.seen.append(x)
        return self.dropout(self.second(F.gelu(self.first(self.norm(x)))))

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        return x + self.added(x, cache)


class User(nn.Module):
    """A model as a user may have it."""

    def __init__(self, layer: type[Layer], depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layers = nn.Linear(4, WIDTH), nn.ModuleList(layer() for _ in range(depth))
        self.cache: Any = None
        self.parts = False  # call parts of the layers instead of the layers

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer.added(x) if self.parts else layer(x, self.cache)
        return x


def made(register: Any = None, **options: Any) -> User:
    """A converted model whose layers are registered as `register` says: layer -> branches."""
    kind = type("Layer", (Layer,), {"forward": lambda self, x, cache=None: x + self.added(x, cache)})
    right = lambda layer: (dr2net.Branch("added", layer.added, tuple(layer.children())),)  # noqa: E731
    dr2net.branches_of.register(kind, register or right)
    model = User(kind)
    dr2net.convert(model, **options)
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    return model


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def batch() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


def problems(model: nn.Module) -> str:
    found = dr2net.verify(model, batch(), loss)
    assert not found.ok and "problem: " in str(found)
    return " | ".join(found.problems)


@pytest.mark.parametrize("inversion", ["exact", "anchored"])
def test_a_right_model_has_no_problems_and_is_left_as_it_was(inversion: str) -> None:
    model = made(inversion=inversion)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = dr2net.verify(model, batch(), loss)
    assert found.ok, str(found)
    assert (found.branches, found.parameters) == (3, 20)
    assert found.output < 1e-4 and found.plain_gradient < 1e-4 and found.stored_gradient < 1e-3
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (model.layers.alpha, float(model.layers.beta), model.layers.plain) == (7 / 8, 1 / 8, False)


def test_a_residual_left_in_is_found() -> None:
    model = made(lambda layer: (dr2net.Branch("all", lambda x, cache: x + layer.added(x), (*layer.children(),)),))
    assert "registered as another function than its block computes" in problems(model)


def test_modules_in_the_wrong_order_are_found() -> None:
    def swapped(layer: Layer) -> tuple[dr2net.Branch, ...]:
        function = lambda x, cache: layer.first(F.gelu(layer.second(layer.norm(x))))  # noqa: E731
        return (dr2net.Branch("added", function, tuple(layer.children())),)

    assert "at (1, 0) the output is" in problems(made(swapped))


def test_a_patch_that_a_registration_goes_around_is_found() -> None:
    def around(layer: Layer) -> tuple[dr2net.Branch, ...]:
        function = lambda x, cache: F.linear(F.gelu(layer.first(layer.norm(x))), layer.second.weight)  # noqa: E731
        return (dr2net.Branch("added", function, tuple(layer.children())),)

    model = made(around).eval()
    model.layers[1].second.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert "at (1, 0) the output is" in problems(model)


def test_a_tensor_that_no_module_holds_is_found() -> None:
    model = made()
    model.gate = nn.Parameter(torch.tensor(1.5))
    model.layers[1].second.register_forward_hook(lambda module, inputs, output: output * model.gate)
    assert "uses a tensor that trains, of shape ()" in problems(model)


def test_a_parameter_that_the_branch_forgets_is_found() -> None:
    def forgets(layer: Layer) -> tuple[dr2net.Branch, ...]:
        function = lambda x, cache: layer.dropout(  # noqa: E731
            F.linear(F.gelu(layer.first(layer.norm(x))), layer.second.weight, layer.second.bias.detach())
        )
        return (dr2net.Branch("added", function, tuple(layer.children())),)

    assert "3 parameters that the plain blocks train get no gradient: layers.0.second.bias" in problems(made(forgets))


def test_a_cache_among_the_arguments_is_found() -> None:
    model = made()
    model.cache = type("Cache", (), {"seen": []})()
    assert "called with a Cache, which it may change" in problems(model)


def test_blocks_that_the_model_does_not_call_are_found() -> None:
    model = made()
    model.parts = True
    assert "0 of 3 branches of layers ran" in problems(model)


def test_an_inversion_that_is_noise_is_found() -> None:
    model = made(inversion="float")
    dr2net.set_coefficients(model, 1.0, 1e-6)
    assert "off that of stored activations" in problems(model)


def test_what_is_not_converted_or_does_not_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="not converted"):
        dr2net.verify(User(Layer), batch(), loss)
    with pytest.raises(ValueError, match="nothing to verify"):
        dr2net.verify(made().requires_grad_(False), batch(), loss)
