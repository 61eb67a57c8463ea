"""Every family of transformers with an adapter computes what its plain model computes, and differentiates it."""

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from toy_blocks import gradients, relative
from transformers_zoo import FAMILIES, FLOAT32_ONLY

import dr2net
from dr2net.adapters.transformers import TABLE
from dr2net.convert import sequences

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return model.to(dtype), cast


def step(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The outputs, after a backward pass of a random combination of them. The same randomness each time."""
    model.zero_grad()
    torch.manual_seed(5)
    found = [leaf for leaf in tree_leaves(tuple(model(**inputs).values())) if isinstance(leaf, Tensor)]
    found = [leaf for leaf in found if leaf.requires_grad]
    generator = torch.Generator().manual_seed(3)
    sum((leaf.double() * torch.randn(leaf.shape, generator=generator).double()).mean() for leaf in found).backward()
    return [leaf.detach() for leaf in found]


def at(model: nn.Module, beta: float, **how: Any) -> nn.Module:
    twin = copy.deepcopy(model)
    dr2net.convert(twin, **how)
    dr2net.set_coefficients(twin, 1 - beta, beta)
    return twin


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_its_plain_model_and_has_the_gradients_of_stored_activations(name: str) -> None:
    dtype = torch.float32 if name in FLOAT32_ONLY else torch.float64
    near, grid = (1e-5, 2e-4) if dtype == torch.float32 else (1e-8, 1e-6)  # parts of some compute in float32
    plain, inputs = build(name, dtype)
    for mode in (False, True):
        plain.train(mode)
        twin = at(plain, 0.0)
        assert list(twin.state_dict()) == list(plain.state_dict())
        expected, found = step(plain, inputs), step(twin, inputs)
        assert relative(found, expected) < grid
        assert relative(gradients(twin), gradients(plain)) < grid
        assert {sequence.ran for sequence in sequences(twin)} != {0}
        assert all(sequence.ran in (0, sequence.num_branches()) for sequence in sequences(twin))  # a model may skip one
        dr2net.deconvert(twin)
        assert all(torch.equal(a, b) for a, b in zip(step(twin, inputs), expected, strict=True))
        ours, stored = at(plain, 0.125), at(plain, 0.125, store=True)
        expected = step(stored, inputs)
        assert all(torch.equal(a, b) for a, b in zip(step(ours, inputs), expected, strict=True))
        assert relative(gradients(ours), gradients(stored)) < near
        if not mode:  # in training, chunks draw other masks
            chunks = at(plain, 0.125, chunk_mib=1e-6)
            assert relative(step(chunks, inputs), expected) < 10 * near
            assert relative(gradients(chunks), gradients(stored)) < 10 * near


@pytest.mark.parametrize("name", ["bert", "clip", "dinov3_vit", "llama", "swin", "wav2vec2", "whisper"])
def test_a_family_in_bfloat16_has_the_gradients_of_stored_activations(name: str) -> None:
    plain, inputs = build(name, torch.bfloat16)
    ours, stored = at(plain.eval(), 0.125), at(plain, 0.125, store=True)
    assert all(torch.equal(a, b) for a, b in zip(step(ours, inputs), step(stored, inputs), strict=True))
    assert relative(gradients(ours), gradients(stored)) < 1e-2  # sums of what the encoder gets are in bfloat16


def forward_of(name: str) -> str:
    """The text of a class's forward, without its arguments' types, documentation and empty lines."""
    module, _, cls = name.rpartition(".")
    text = Path(importlib.util.find_spec(module).origin).read_text()
    body = text.split(f"\nclass {cls}(")[1].split("\nclass ")[0]
    body = body.split("def forward(")[1].split("\n    def ")[0].split("\n\n\n")[0]
    body = re.sub(r'r?"""[\s\S]*?"""|#.*|:[^=\n]*(?== )|\s', "", body)
    return body[body.index("):") :] if "):" in body else body[body.index("->") :]


@pytest.mark.slow
def test_every_class_of_the_table_is_tested_or_reads_like_one_that_is() -> None:
    tested = {
        f"{type(m).__module__}.{type(m).__qualname__}" for build in FAMILIES.values() for m in build()[0].modules()
    }
    missing = [name for name in TABLE if name not in tested]
    texts = {forward_of(name) for name in TABLE if name in tested}
    assert [name for name in missing if forward_of(name) not in texts] == []
