"""What transformers models do around their blocks: collected hidden states, checkpointing, tracing."""

import copy

import pytest
import torch
from model_zoo import FAMILIES
from torch import nn
from toy_blocks import build_input, build_net, converted, gradients, relative

import dr2net

pytestmark = [
    pytest.mark.filterwarnings("ignore:float inversion"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers renames a method, torch leaves jit behind
]

NAMES = ["huggingface_vit", "videomae"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_those_of_the_plain_model_and_leave_it_usable(name: str, when: str) -> None:
    torch.manual_seed(0)
    model, x = FAMILIES[name]()
    model.eval()
    if when == "before":  # its hooks stay on the blocks
        model(x, output_hidden_states=True)
    dr2net.convert(model, inversion="float")
    found = model(x, output_hidden_states=True).hidden_states
    model(x).logits.sum().backward()
    ours = [*gradients(model)]
    model.zero_grad()
    dr2net.deconvert(model)
    expected = model(x, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    model(x).logits.sum().backward()
    assert relative(ours, gradients(model)) < 1e-5
    dr2net.convert(model)  # and once more
    model(x, output_hidden_states=True).logits.sum().backward()


def test_the_block_of_t5_that_makes_the_position_bias_of_all_others_stays_with_all_that_is_inside_it() -> None:
    from transformers import T5Config, T5Model

    sizes = {
        "num_layers": 4,
        "d_model": 32,
        "d_ff": 64,
        "num_heads": 4,
        "d_kv": 8,
        "vocab_size": 99,
        "dropout_rate": 0.0,
    }
    torch.manual_seed(0)
    model = T5Model(T5Config(**sizes, use_cache=False)).train()
    words = torch.randint(99, (2, 7))

    def run(model: nn.Module) -> torch.Tensor:
        return model(input_ids=words, decoder_input_ids=words).last_hidden_state

    ours, stored = copy.deepcopy(model), copy.deepcopy(model)
    report = dr2net.convert(ours, probe=run)
    assert report.sequences == (("encoder.block", 3, 3), ("decoder.block", 3, 3))
    assert relative([run(ours)], [run(model)]) < 1e-4
    dr2net.convert(stored, probe=run, store=True)
    for net in (ours, stored):
        dr2net.set_coefficients(net, 7 / 8, 1 / 8)
        run(net).square().sum().backward()
    assert relative(gradients(ours), gradients(stored)) < 1e-6
    assert all(parameter.grad is not None for parameter in ours.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_turned_on_later_is_named_not_ignored(name: str) -> None:
    model, x = FAMILIES[name]()
    dr2net.convert(model.train())
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing on \(gradient_checkpointing=True\).*turn it off"):
        model(x)
    model.eval()(x)  # where transformers does not checkpoint either
    model.train().gradient_checkpointing_disable()
    model(x).logits.sum().backward()


def test_checkpointing_of_timm_turned_on_later_is_named() -> None:
    model, x = FAMILIES["vit"]()
    dr2net.convert(model)
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match=r"inside torch\.utils\.checkpoint: .*set_grad_checkpointing\(False\)"):
        model(x).sum().backward()
    model.set_grad_checkpointing(False)
    model(x).sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_all_blocks_is_right(reentrant: bool) -> None:
    net, x = converted(build_net(3), 0.5, 0.5), build_input()
    net(x).square().sum().backward()
    expected = [*gradients(net)]
    net.zero_grad()
    h = torch.utils.checkpoint.checkpoint(net.blocks, net.stem(x), use_reentrant=reentrant)
    net.head(h.mean(1)).square().sum().backward()
    assert relative(gradients(net), expected) == 0


@pytest.mark.parametrize("name", ["use_checkpoint", "with_cp"])
def test_checkpointing_of_other_libraries_is_refused(name: str) -> None:
    net = build_net(2)
    setattr(net.blocks[1], name, True)
    with pytest.raises(ValueError, match=rf"blocks\.1 has its own gradient checkpointing on \({name}=True\)"):
        dr2net.convert(net)
    assert type(net.blocks) is nn.ModuleList


def test_tracing_and_export_end_in_a_sentence() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = converted(build_net(2), 0.5, 0.5)

        def forward(self, x):
            for block in self.net.blocks:
                x = block(x)
            return x

    model, x = Plain(), build_input()
    calls = {
        "trace": lambda: torch.jit.trace(model, x),
        "export": lambda: torch.export.export(model, (x,)),
        "fx": lambda: torch.fx.symbolic_trace(model),
    }
    # before 2.7 torch.export itself ends at a block, in its own words, which name ours
    ours = hasattr(torch.compiler, "is_exporting")
    for name, call in calls.items():
        with pytest.raises(Exception, match=r"dr2net\.deconvert\(model\)" if ours or name != "export" else r"Entry\."):
            call()
            pytest.fail(name)
    assert model(x).isfinite().all()
