"""Rows of the planner beside ours: offloaded ones are what a training moves and holds, an 8-bit optimizer's bytes."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import dr2net
from dr2net import Options, memory, planner
from dr2net.adamw8bit import AdamW8bitState
from dr2net.cli import main
from dr2net.inputs import Inputs, MadeBatch, parse_inputs
from dr2net.planner import RIVALS, Setting, calibrate, loss_of, predictor

OFFLOADED = [method for method in RIVALS if method.endswith("offloaded")]
FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.rise, self.fall = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.fall(torch.relu(self.rise(self.norm(x))))

class Net(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 32), nn.Linear(32, 5)
        self.layers, self.layerdrop = nn.ModuleList(Block(32) for _ in range(depth)), 0.0

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))

def batch():  # no count: nothing grows
    return torch.zeros(16, 64, 8)

def dropping():
    net = Net()
    net.layerdrop = 0.1
    return net
"""
SHAPE = (16, 64, 8)
CHUNKS = Options(chunk_mib=0.25, recompute_rest=True)


def small_vit() -> tuple[nn.Module, tuple[int, ...]]:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=96, embed_dim=96, num_classes=10)
    return model.train(), (16, 3, 96, 96)


def plan(capsys, words: str) -> tuple[str, dict[str, list[str]]]:
    """What `dr2net plan` prints, and the rows of its table."""
    assert main(["plan", *words.split()]) == 0
    printed = capsys.readouterr().out
    lines = (re.split(r"\s{2,}", line.strip()) for line in printed.splitlines())
    return printed, {name: cells for name, *cells in lines if name in (*planner.METHODS, *RIVALS) and len(cells) > 7}


@pytest.fixture
def unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    """A network of blocks that nobody registered."""
    (tmp_path / "unknown_blocks.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "unknown_blocks", raising=False)
    import unknown_blocks  # type: ignore[import-not-found]

    return unknown_blocks.Net


@pytest.mark.parametrize("method", OFFLOADED)
def test_the_bytes_on_the_host_are_those_that_autograd_saves_and_asks_for_again(method: str) -> None:
    model, shape = small_vit()
    setting = Setting(options=CHUNKS)
    predicted = predictor(model, method, setting, like="cpu")(shape).host
    planner.apply(model, method, setting)
    out, back = [], []

    def count(to: list[int], tensor: torch.Tensor) -> torch.Tensor:
        to.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: count(out, t), lambda t: count(back, t)):
        loss = loss_of(model, torch.randn(shape), "fp32")
    loss.backward()
    assert predicted == sum(out) == sum(back) > 0


def test_an_offloaded_gradient_is_the_gradient() -> None:
    model, shape = small_vit()
    dr2net.convert(model)
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    x, found = torch.randn(shape), []
    for saving in (planner.Offload(), torch.autograd.graph.save_on_cpu()):  # which moves nothing on a CPU
        model.zero_grad()
        with saving:
            loss = loss_of(model, x, "fp32")
        loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_8_bit_state_has_two_bytes_a_number_and_two_scales_a_block() -> None:
    sizes = {4096: 2 * (4096 + 4 * 16), 4097: 2 * (4097 + 4 * 17), 4095: 8 * 4095, 100_000: 2 * (100_000 + 4 * 391)}
    model = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes)
    optimizer = AdamW8bitState(model.parameters())

    def step() -> None:
        sum(parameter.sum() for parameter in model).backward()
        optimizer.step()

    assert memory.predict(step, model, optimizer).optimizer == sum(sizes.values())
    assert memory.measure(step, model, optimizer).optimizer == sum(sizes.values())


def test_the_8_bit_row_is_the_conventional_one_with_less_state_and_trains_nothing() -> None:
    model, shape = small_vit()
    plain, small = (
        predictor(model, method, Setting())(shape) for method in ("conventional", "conventional, adamw8bit")
    )
    assert small.peak - small.optimizer == plain.peak - plain.optimizer and small.optimizer < 0.3 * plain.optimizer
    assert small == predictor(model, "conventional", Setting(optimizer="adamw8bit"))(shape)
    with pytest.raises(ValueError, match="take bitsandbytes or torchao"):
        calibrate(model, "conventional, adamw8bit", Setting(), shape, "cpu")


def test_plan_lists_the_rivals_when_asked(unknown: Callable, capsys) -> None:
    command = "--model unknown_blocks:Net --batch unknown_blocks:batch --budget 1GiB"
    (asked, rows), (plain, fewer) = plan(capsys, f"{command} --rivals"), plan(capsys, command)
    assert all(rows[method][6].endswith("MiB") for method in OFFLOADED) and rows["dr2net"][6] == "-"
    assert "It wins where the host has the room" in asked and "  host  " in asked
    assert "offloaded" not in plain and "host" not in plain
    assert rows["conventional"][:6] == fewer["conventional"][:6]


def test_blocks_that_a_probe_finds_are_planned_as_they_will_train(unknown: Callable, capsys) -> None:
    model, batches = unknown().train(), Inputs(parse_inputs(["16x64x8"]).tensors)
    with planner.known_blocks(model, batches) as said:
        predicted = {
            method: predictor(model, method, Setting(options=CHUNKS))(batches)
            for method in ("checkpointed", "checkpointed, chunks", "dr2net", "dr2net, chunks")
        }
    assert said == "blocks found by a probe: 4 in layers"
    assert predicted["dr2net, chunks"].peak < predicted["dr2net"].peak  # samples are apart
    for method, options in (("dr2net", dr2net.Options()), ("dr2net, chunks", CHUNKS)):
        own = unknown().train()
        dr2net.convert(own, options, probe=lambda model: model(torch.randn(SHAPE)))
        dr2net.set_coefficients(own, 7 / 8, 1 / 8)
        optimizer = torch.optim.AdamW(own.parameters())
        step = planner.training_step(own, optimizer, SHAPE, "fp32", "cpu")
        step()
        assert predicted[method].peak == pytest.approx(memory.measure(step, own, optimizer).peak, rel=0.02)
    with pytest.raises(ValueError, match="nothing in Net can be made reversible"):
        predictor(model, "dr2net", Setting())  # forgotten again
    printed, rows = plan(capsys, "--model unknown_blocks:Net --batch unknown_blocks:batch --budget 1GiB")
    assert "note: blocks found by a probe: 4 in layers" in printed and "dr2net, chunks" in rows


def test_a_probe_on_paper_finds_the_same_blocks_and_leaves_chunks_whole(unknown: Callable) -> None:
    batches = Inputs(parse_inputs(["16x64x8"]).tensors)
    with torch.device("meta"):
        on_meta = unknown().train()
    real = unknown().train()
    peaks = []
    for model in (on_meta, real):
        with planner.known_blocks(model, batches) as said:
            assert said.startswith("blocks found by a probe: 4 in layers")
            assert said.endswith("without values") == (model is on_meta)
            peaks.append(predictor(model, "dr2net", Setting())(batches).peak)
    assert peaks[0] == peaks[1]


def test_what_a_probe_refuses_is_a_note_and_a_batch_that_does_not_grow_is_taken_whole(
    unknown: Callable, capsys
) -> None:
    printed, rows = plan(capsys, "--model unknown_blocks:dropping --input 16x64x8 --chunk-mib 0")
    assert "note: the model was not probed for blocks: Net leaves out blocks at random" in printed
    assert list(rows) == ["conventional"]
    with planner.known_blocks(unknown(), MadeBatch(lambda: torch.randn(SHAPE), "mine", grows=False)) as said:
        assert "4 in layers" in said
    options = dr2net.plan_budget(unknown(), torch.randn(SHAPE), "3MiB")
    assert options.keep < 4


def test_registered_blocks_are_not_probed() -> None:
    model, _ = small_vit()
    model.forward = None  # type: ignore[method-assign]  # it would be called
    with planner.known_blocks(model, parse_inputs(["2x3x96x96"])) as said:
        assert said == ""
