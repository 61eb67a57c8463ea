"""The comparison with other ways to save activations: what it builds is what it says, and its page is its Record."""

import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dr2net
from dr2net import planner
from dr2net.memory import measure
from scripts import compare_peers
from scripts.compare_peers import PEERS, Offload, allocator_peak, checkpoint_every, couple, page, revtorch_stack

CLOSE = 0.01  # of the profiler's bytes and ours: what a kernel needs inside is in the first only


def small_vit() -> tuple[nn.Module, planner.Shape]:
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64, embed_dim=48), (32, 3, 64, 64)


class Block(nn.Module):
    """What RevTorch's does, under plain autograd."""

    def __init__(self, f_block: nn.Module, g_block: nn.Module, split_along_dim: int) -> None:
        super().__init__()
        self.f, self.g, self.dim = f_block, g_block, split_along_dim

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, self.dim)
        first = first + self.f(second)
        return torch.cat([first, second + self.g(first)], self.dim)


def plain_stack(blocks: nn.ModuleList) -> nn.Module:
    return nn.Sequential(*blocks)


@pytest.fixture
def revtorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: the package is not among those that this repository installs."""
    package = types.ModuleType("revtorch")
    package.ReversibleBlock, package.ReversibleSequence = Block, plain_stack
    monkeypatch.setitem(sys.modules, "revtorch", package)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters()]


def test_the_hard_couplings_are_ours_at_zero_and_one(revtorch: None) -> None:
    model, shape = small_vit()
    x = torch.randn(shape)
    theirs, own = copy.deepcopy(model), copy.deepcopy(model)
    couple(theirs, revtorch_stack)
    assert type(theirs.blocks) is compare_peers.Coupled
    dr2net.convert(own, inversion="float")
    dr2net.set_coefficients(own, 0, 1)
    torch.testing.assert_close(theirs(x), own(x))
    norms = [sum(g.square().sum() for g in gradients(m, x)) for m in (theirs, own)]  # in another order of parameters
    torch.testing.assert_close(norms[0], norms[1])


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_every_block_or_every_second_gives_the_plain_gradient(every: int) -> None:
    model, shape = small_vit()
    x, twin = torch.randn(shape), copy.deepcopy(model)
    checkpoint_every(twin, every)
    wrapped = ["forward" in block.__dict__ for block in twin.blocks]
    assert wrapped == [k % every == 0 for k in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), gradients(twin, x), strict=True))


def test_offloading_copies_out_what_autograd_saves_and_gives_the_plain_gradient() -> None:
    model, shape = small_vit()
    x, twin = torch.randn(shape), copy.deepcopy(model)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        plain = gradients(model, x)
    with (offload := Offload()):
        moved = gradients(twin, x)
    assert offload.bytes == sum(saved)
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


@pytest.mark.parametrize("prepare", [lambda m: None, compare_peers.ours], ids=["plain", "ours"])
def test_the_allocator_hands_out_what_we_count(prepare: Callable[[nn.Module], object]) -> None:
    model, shape = small_vit()
    prepare(model)
    optimizer = torch.optim.AdamW(model.parameters())
    step = planner.training_step(model, optimizer, shape, "fp32", "cpu")
    step()
    standing = 3 * sum(p.nbytes for p in model.parameters())
    assert standing + allocator_peak(step) == pytest.approx(measure(step, model, optimizer).peak, rel=CLOSE)


def test_the_page_has_every_peer_or_the_reason_why_not(monkeypatch, tmp_path, revtorch) -> None:
    monkeypatch.setitem(compare_peers.NETS, "vit_s", lambda: ("a small ViT", *small_vit()))
    monkeypatch.setitem(sys.modules, "memcnn", None)
    compare_peers.main(["--nets", "vit_s", "--rounds", "1", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "peers.json").read_text())
    (net,) = record["nets"]
    assert net["rows"].keys() | net["omitted"].keys() == {peer.name for peer in PEERS}
    assert net["omitted"] == {"memcnn": "memcnn is not installed: pip install --no-deps memcnn==1.5.2"}
    peaks = {name: row["peak"] for name, row in net["rows"].items()}
    assert peaks["checkpoint, every block"] < peaks["checkpoint, every second block"] < peaks["plain"]
    assert peaks["save_on_cpu"] < peaks["plain"] and net["rows"]["save_on_cpu"]["host"] > 0
    text = (tmp_path / "peers.md").read_text()
    assert text == page(record) and "Left out: memcnn (memcnn is not installed" in text
    assert all(f"| {name} |" in text for name in net["rows"])
    words = ["--nets", "vit_s", "--rounds", "1", "--output", str(tmp_path), "--add", "--peers", "ours, anchored"]
    compare_peers.main(words)
    added = json.loads((tmp_path / "peers.json").read_text())
    assert added["nets"][0] == net and list(added["nets"][1]["rows"]) == ["plain", "ours, anchored"]
    text = (tmp_path / "peers.md").read_text()
    assert (
        text == page(added)
        and "A run of its own. Commit" in text
        and "checkpoint, every block (not in this run)" in text
    )


def test_the_committed_page_is_that_of_the_committed_record() -> None:
    results = Path(compare_peers.__file__).parents[1] / "results"
    assert (results / "peers.md").read_text() == page(json.loads((results / "peers.json").read_text()))
