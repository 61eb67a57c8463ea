"""Conversion of the model families we name: same keys, same outputs at (1, 0), right gradients, and the way back."""

import copy

import pytest
import torch
from model_zoo import FAMILIES, run
from torch import Tensor, nn
from toy_blocks import WIDTH, ToyBlock, build_input, build_net, gradients, relative, stored

import dr2net

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")

GRID = 1e-4  # the bound for the output on the grid against the unquantised network


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return FAMILIES[request.param]()


def step(model: nn.Module, x: Tensor) -> Tensor:
    """One training step's forward and backward from a fixed seed."""
    torch.manual_seed(3)
    outputs = run(model, x)
    outputs.square().sum().backward()
    return outputs.detach()


def test_the_converted_model_is_the_pretrained_one_at_one_and_zero(family: tuple[nn.Module, Tensor]) -> None:
    model, x = family
    model.eval()
    keys, state = list(model.state_dict()), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = run(model, x)
        for inversion in ("float", "anchored", "exact"):
            report = dr2net.convert(model, inversion=inversion)
            assert report.sequences and not model.training
            assert list(model.state_dict()) == keys
            found = run(model, x)
            if inversion == "exact":
                assert relative([found], [expected]) < GRID
            else:
                assert torch.equal(found, expected)
            dr2net.deconvert(model)
            assert not any(isinstance(m, dr2net.ReversibleSequence) for m in model.modules())
            assert torch.equal(run(model, x), expected)
    assert all(torch.equal(model.state_dict()[k], state[k]) for k in keys)


def test_training_at_one_and_zero_is_that_of_the_plain_model(family: tuple[nn.Module, Tensor]) -> None:
    model, x = family
    ours, all_again, checkpointed = (copy.deepcopy(model) for _ in range(3))
    dr2net.convert(ours, inversion="float")
    dr2net.convert(all_again, inversion="float", recompute_rest=True)
    assert dr2net.checkpoint_blocks(checkpointed) > 0
    assert list(checkpointed.state_dict()) == list(model.state_dict())
    expected = step(model, x)
    for twin in (ours, all_again, checkpointed):
        # dropout and drop path from the same seed; convolutions may add in another order
        torch.testing.assert_close(step(twin, x), expected, rtol=1e-5, atol=1e-6)
        assert relative(gradients(twin), gradients(model)) < 1e-5
        for (name, a), b in zip(twin.named_buffers(), model.buffers(), strict=True):  # statistics move once
            torch.testing.assert_close(a, b, msg=name)
    dr2net.deconvert(checkpointed)
    torch.testing.assert_close(step(checkpointed, x).shape, expected.shape)


@pytest.mark.parametrize("inversion", ["exact", "anchored"])
def test_gradients_are_those_of_stored_activations(family: tuple[nn.Module, Tensor], inversion: str) -> None:
    model, x = family
    twin = copy.deepcopy(model)
    for net, store in ((model, False), (twin, True)):
        dr2net.convert(net, inversion=inversion, store=store)
        dr2net.set_coefficients(net, 0.7, 0.3)
    assert torch.equal(step(model, x), step(twin, x))
    # float32 sums in another order; through BatchNorm of few values they are amplified
    assert relative(gradients(model), gradients(twin)) < (1e-5 if inversion == "exact" else 2e-3)


def test_checkpoints_fit_both_ways() -> None:
    plain, other = build_net(2), build_net(2)
    dr2net.convert(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    plain.load_state_dict(other.state_dict())
    assert torch.equal(plain(build_input()), plain(build_input()))
    fresh = build_net(2)
    dr2net.convert(fresh)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(build_input()), other(build_input()))


def test_a_checkpoint_file_of_the_converted_model_loads_into_the_plain_one(tmp_path) -> None:
    net = build_net(2)
    dr2net.convert(net)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    plain = build_net(2)
    plain.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))


def test_the_report_says_what_became_reversible_and_what_did_not() -> None:
    net = build_net(2)
    net.blocks.append(nn.Linear(8, 8))
    report = dr2net.convert(net)
    assert report.sequences == (("blocks", 2, 4),)
    assert report.ordinary == (("blocks.2", "no branches are known for blocks of type Linear"),)
    inside = sum(p.numel() for b in net.blocks.children() if isinstance(b, ToyBlock) for p in b.parameters())
    assert report.reversible_parameters == inside < report.all_parameters == sum(p.numel() for p in net.parameters())
    text = str(report)
    assert "blocks: 2 blocks, 4 branches" in text and "blocks.2: no branches are known" in text


def test_ordinary_blocks_between_reversible_ones_end_a_run_and_start_another() -> None:
    blocks = [*build_net(2).blocks, nn.Linear(8, 8), *build_net(3).blocks]
    net = build_net(1)
    net.blocks = nn.ModuleList(blocks).double()
    plain = copy.deepcopy(net)
    dr2net.convert(net, inversion="float")
    dr2net.set_coefficients(net, 0.4, 0.7)
    net(build_input()).sum().backward()

    h = plain.stem(build_input())
    for run_of in (plain.blocks[:2], plain.blocks[2:3], plain.blocks[3:]):
        previous = h
        for block in run_of:
            if isinstance(block, nn.Linear):
                h = block(h)
                continue
            for branch in block.functions():
                h, previous = branch(h) + 0.4 * h + 0.7 * previous, h
    plain.head(h.mean(1)).sum().backward()
    assert relative(gradients(net), gradients(plain)) < 1e-10  # float64


def two_blocks(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A network of two blocks converted at (.9, .5), and the plain one."""
    net = nn.Module()
    net.blocks = nn.Sequential(block, copy.deepcopy(block)).double().eval()
    plain = copy.deepcopy(net)
    dr2net.convert(net, inversion="float")
    dr2net.set_coefficients(net, 0.9, 0.5)
    return net, plain


class NoResidual(nn.Linear):
    """A block that is all branch."""


@dr2net.branches_of.register
def _(block: NoResidual):
    return (dr2net.Branch("block", lambda x: nn.Linear.forward(block, x), (block,), residual=False),)


def test_a_block_without_a_residual_has_alpha_zero() -> None:
    net, plain = two_blocks(NoResidual(WIDTH, WIDTH))
    x = build_input()
    first = plain.blocks[0](x) + 0.5 * x
    torch.testing.assert_close(net.blocks(x), plain.blocks[1](first) + 0.5 * x, rtol=1e-12, atol=1e-12)


def test_the_branch_of_a_post_activation_block_is_what_it_adds_to_its_input() -> None:
    from torchvision.models.resnet import BasicBlock

    net, plain = two_blocks(BasicBlock(4, 4))
    x = build_input(2, 4, 6, 6)
    first = plain.blocks[0](x) + (0.9 - 1 + 0.5) * x
    expected = plain.blocks[1](first) + (0.9 - 1) * first + 0.5 * x
    torch.testing.assert_close(net.blocks(x), expected, rtol=1e-12, atol=1e-12)


def test_nothing_to_convert_names_the_blocks_and_the_remedy() -> None:
    net = nn.Module()
    net.layers = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"(?s)layers\.0: no branches are known for blocks of type Linear.*register"):
        dr2net.convert(net)
    with pytest.raises(ValueError, match="no nn.Sequential or nn.ModuleList"):
        dr2net.convert(nn.Linear(2, 2))


def test_converting_twice_is_refused_in_any_order() -> None:
    for first in (dr2net.convert, dr2net.checkpoint_blocks):
        for second in (dr2net.convert, dr2net.checkpoint_blocks):
            net = build_net(2)
            first(net)
            with pytest.raises(ValueError, match="converted already"):
                second(net)


def test_there_must_be_something_to_undo() -> None:
    with pytest.raises(ValueError, match="no reversible or checkpointed blocks"):
        dr2net.deconvert(build_net(2))


def test_the_model_s_own_gradient_checkpointing_is_refused() -> None:
    model, _ = FAMILIES["vit"]()
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        dr2net.convert(model)
    model, _ = FAMILIES["videomae"]()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        dr2net.convert(model)


def test_a_subclass_with_another_forward_is_not_converted_by_mistake() -> None:
    class Scaled(ToyBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = build_net(2)
    net.blocks = nn.ModuleList([Scaled(2, 0.0, 0.0, False)])
    with pytest.raises(ValueError, match="Scaled overrides the forward of ToyBlock"):
        dr2net.convert(net)


def test_branches_that_forget_a_module_are_refused() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.forgotten = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.forgotten(self.used(x))

    @dr2net.branches_of.register
    def _(block: Forgetful):
        return (dr2net.Branch("only", lambda x: block.forgotten(block.used(x)), (block.used,)),)

    net = nn.Module()
    net.blocks = nn.Sequential(Forgetful())
    with pytest.raises(ValueError, match=r"forgotten\.weight"):
        dr2net.convert(net)


def test_train_and_eval_reach_the_blocks() -> None:
    net = build_net(2)
    net.eval()
    dr2net.convert(net)
    assert not any(m.training for m in net.modules())
    net.train()
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("inversion", ["float", "exact"])
def test_a_block_that_stands_twice_in_its_container_runs_twice(inversion: str) -> None:
    net = build_net(3)
    net.blocks[2] = net.blocks[0]
    plain, keys = copy.deepcopy(net), list(net.state_dict())
    report = dr2net.convert(net, inversion=inversion)
    assert report.sequences == (("blocks", 3, 6),) and list(net.state_dict()) == keys
    dr2net.set_coefficients(net, 0.5, 0.5)
    net(build_input()).square().sum().backward()
    stored(plain, build_input(), 0.5, 0.5).square().sum().backward()
    assert relative(gradients(net), gradients(plain)) < 1e-8  # float64, and the grid of 2^-40
    dr2net.set_coefficients(net, 1, 0)
    dr2net.deconvert(net)
    assert list(net.state_dict()) == keys


def test_attributes_set_while_iterating_reach_the_blocks() -> None:
    net = build_net(2)
    dr2net.convert(net)
    for block in net.blocks:
        block.dropout = 0.5
        assert block.num_branches == 2
    assert [block.dropout for block in net.blocks.children()] == [0.5, 0.5]


def test_what_is_frozen_in_eval_mode_stays_so() -> None:
    net = build_net(2, batch_norm=True)
    net.blocks[1].batch_norm.eval()
    dr2net.convert(net)
    assert net.blocks.training and not net.blocks[1].batch_norm.training
    dr2net.deconvert(net)
    assert net.blocks.training and not net.blocks[1].batch_norm.training


def test_intermediate_layers_of_a_timm_model_are_those_of_the_plain_one() -> None:
    torch.manual_seed(0)
    model, x = FAMILIES["vit"]()
    expected = model.forward_intermediates(x)[1]
    dr2net.convert(model, inversion="float")
    found = model.forward_intermediates(x)[1]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
