"""Every family of blocks that an adapter knows, in a tiny model: one test, which says all that a conversion promises.

Not here: the families whose conversion is tried in more ways (`test_convert.py`), and what single adapters do besides.
"""

import copy

import pytest
import torch
from library_zoo import FAMILIES, SLOW
from torch import Tensor, nn
from toy_blocks import gradients, relative

import dr2net
from dr2net.convert import sequences
from dr2net.memory import predict

SAME = 1e-5  # float32: convolutions and sums in another order
DOUBLE = {"timm MobileOne"}  # 35 batch norms of few values behind each other enlarge the rounding of float32
FIRST = {"timm ConViT"}  # makes a buffer in its first pass, which must be over before the conversion


def loss_of(model: nn.Module, x: Tensor, *, bf16: bool = False) -> Tensor:
    """The outputs, after a backward pass of their squares, with the same randomness at each call."""
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = model(x)
    if not isinstance(outputs, Tensor):  # with a head for distillation
        outputs = torch.stack([output for output in outputs if output.dim() == 2])
    outputs.float().square().sum().backward()
    return outputs.detach()


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Its model and input, as a training leaves them: no layer scale or head of zeros hides what a block does."""
    torch.manual_seed(0)
    model, x = FAMILIES[name]()
    with torch.no_grad():
        if name in FIRST:
            model(x)
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                nn.init.normal_(parameter, std=0.1)
    return model, x


def without_randomness(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, but for LeViT's attention, which keeps a table with its graph then."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):
            module.training = True
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FAMILIES])
def test_a_converted_family_is_the_pretrained_one_and_its_gradients_are_right(name: str) -> None:
    model, x = build(name)
    if name in DOUBLE:
        model, x = model.double(), x.double()
    keys = list(model.state_dict())
    ours = copy.deepcopy(model)
    report = dr2net.convert(ours, inversion="float")
    assert list(ours.state_dict()) == keys
    expected, found = loss_of(model, x), loss_of(ours, x)  # training: dropout, drop path, batch statistics
    assert relative([found], [expected]) < SAME
    assert relative(gradients(ours), gradients(model)) < 10 * SAME
    for (key, a), b in zip(ours.named_buffers(), model.buffers(), strict=True):  # statistics move once
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=key)
    ran = sum(sequence.ran for sequence in sequences(ours))
    assert ran == sum(branches for _, _, branches in report.sequences), "every branch takes part"
    dr2net.deconvert(ours)
    assert not any(isinstance(module, dr2net.ReversibleSequence) for module in ours.modules())

    model, x = model.float(), x.float()
    for bf16 in (False, True):
        exact, stored = copy.deepcopy(model), copy.deepcopy(model)
        for net, store in ((exact, False), (stored, True)):
            dr2net.convert(net, store=store)
            dr2net.set_coefficients(net, 7 / 8, 1 / 8)
        assert torch.equal(loss_of(exact, x, bf16=bf16), loss_of(stored, x, bf16=bf16))
        assert relative(gradients(exact), gradients(stored)) < (1e-2 if bf16 else SAME)

    if name in DOUBLE:
        model, x = model.double(), x.double()
    whole, cut = without_randomness(model), without_randomness(model)
    for net, chunk_mib in ((whole, None), (cut, 1e-6)):  # one group at a time
        dr2net.convert(net, inversion="float", chunk_mib=chunk_mib)
    assert relative([loss_of(cut, x)], [loss_of(whole, x)]) < SAME
    assert relative(gradients(cut), gradients(whole)) < 10 * SAME


@pytest.mark.parametrize("name", ["timm MViTv2", "torchvision MViT"])
def test_blocks_that_return_a_size_beside_x_can_be_predicted(name: str) -> None:
    model, x = build(name)
    dr2net.convert(model)
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)

    def step() -> None:
        model(torch.randn(x.shape)).square().sum().backward()

    assert predict(step, model).activations > 0


def test_chunks_cut_every_branch_whose_norms_do_not_train() -> None:
    for name in ("timm EVA-02", "timm BEiT v2", "timm NaFlexViT", "timm ConvNeXt", "timm ResNet v2", "torchvision ViT"):
        model, x = build(name)
        dr2net.convert(model.eval(), chunk_mib=1e-6)
        model(x)
        assert {reason for sequence in sequences(model) for reason in sequence.whole.values()} == set(), name
