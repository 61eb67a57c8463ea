"""Blocks that nobody registered, found by running the model once: what becomes reversible, and what does not."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_blocks import WIDTH, build_input, build_net, gradients, relative
from toy_probe import GRID, Net, Unknown, check, in_turn, net_of, probe_of

import dr2net
from dr2net import memory

pytestmark = pytest.mark.filterwarnings("ignore:float inversion")


@pytest.mark.parametrize("form", ["tensor", "pair", "mask too", "dictionary"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_blocks_of_any_type_and_form_become_reversible(dropout: float, form: str) -> None:
    mask = torch.zeros(3, 1, 5, dtype=torch.float64)
    check(net_of(dropout=dropout, form=form), build_input(), mask, num_branches=3)


@pytest.mark.parametrize("kind", [nn.Sequential, lambda *b: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(*b))])
def test_containers_of_every_kind_are_probed(kind: Callable[..., nn.Module]) -> None:
    check(kind(*net_of().blocks).double(), build_input(), num_branches=3)


def test_blocks_called_by_index_and_key_are_found() -> None:
    def by_index(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for index in range(len(blocks)):
            x = blocks[index](x)
        return x

    check(net_of(call=by_index), build_input(), num_branches=3)


def test_registered_blocks_keep_their_branches() -> None:
    net = build_net(2)
    net.blocks.extend(net_of(2).blocks)
    assert "4 blocks, 6 branches" in str(check(net, build_input(), num_branches=6))


def test_convert_costs_one_forward_and_leaves_no_trace() -> None:
    net = net_of(dropout=0.5)
    net.blocks.append(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Flatten(0, 1), nn.BatchNorm1d(WIDTH), nn.Unflatten(0, (3, 5)))
    )
    net.double()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    dr2net.convert(net, probe=probe_of(build_input()))
    assert [block.calls for block in list(net.blocks)[:3]] == [1, 1, 1]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_probe_that_fails_leaves_the_model_as_it_was() -> None:
    net = net_of()
    attributes = [vars(m).keys() for m in net.modules()]
    with pytest.raises(RuntimeError):
        dr2net.convert(net, probe=probe_of(torch.ones(2, 2, 3).double()))
    assert [vars(m).keys() for m in net.modules()] == attributes
    check(net, build_input(), num_branches=3)


def test_the_error_without_a_probe_names_it() -> None:
    with pytest.raises(ValueError, match=r"dr2net\.convert\(model, probe=lambda model: model\(batch\)\)"):
        dr2net.convert(net_of())


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.linear(x)), 1)


class Plain(nn.Module):
    """No residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x) + x.mean())


def test_a_block_that_changes_the_shape_runs_as_it_is_between_two_runs() -> None:
    blocks = net_of(4).blocks
    report = check(Net(*blocks[:2], Wider(), *blocks[2:]).double(), build_input(), num_branches=4)
    assert ("blocks.2", "it changes the shape of its input") in report.ordinary


def test_a_block_without_residual_connection_runs_as_it_is() -> None:
    blocks = net_of(4).blocks
    report = check(Net(*blocks[:2], Plain(), *blocks[2:]).double(), build_input(), num_branches=4)
    assert "it does not add to its input" in dict(report.ordinary)["blocks.2"]
    with pytest.raises(ValueError, match=r"blocks\.0: it does not add to its input, so it has no residual connection"):
        dr2net.convert(Net(Plain(), Plain()).double(), probe=probe_of(build_input()))


def test_an_interrupted_chain_is_two_runs() -> None:
    def interrupted(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        x = blocks[1](blocks[0](x)) * 2
        return blocks[3](blocks[2](x))

    check(net_of(4, call=interrupted), build_input(), num_branches=4)
    known = build_net(4)
    net = Net(*known.blocks, call=interrupted).double()
    check(net, build_input(), num_branches=8)

    def in_place(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        x = blocks[1](blocks[0](x))
        x += 1
        return blocks[3](blocks[2](x))

    check(net_of(4, call=in_place), build_input(), num_branches=4)


def refusal(call: Callable[..., Tensor], num: int = 3) -> str:
    with pytest.raises(ValueError) as caught:
        dr2net.convert(net_of(num, call=call), probe=probe_of(build_input()))
    return str(caught.value)


def test_what_is_no_chain_says_so() -> None:
    alone = "it is alone"
    assert alone in refusal(lambda blocks, x: sum(block(x) for block in blocks)), "parallel branches"
    assert alone in refusal(lambda blocks, x: blocks[0](blocks[1](blocks[2](x)))), "out of order"
    assert alone in refusal(lambda blocks, x: blocks[0](x), 1), "a container with one block"
    shared = "its own output enters it again (3 calls share its weights)"
    assert shared in refusal(lambda blocks, x: blocks[0](blocks[0](blocks[0](x))), 1)
    assert "the model did not call it in the probe" in refusal(lambda blocks, x: blocks[2](blocks[0](x)))
    text = refusal(lambda blocks, x: blocks[1](blocks[0](x)) + blocks[1](2 * x), 2)
    assert "it is called after the block before it and also on its own" in text


def test_a_container_that_is_no_chain_is_one_line_of_the_report() -> None:
    net = net_of()
    net.heads = nn.ModuleList(net_of().blocks)
    net.call = lambda blocks, x: sum(head(in_turn(blocks, x)) for head in net.heads)
    report = dr2net.convert(net, probe=probe_of(build_input()))
    (line,) = [line for line in str(report).splitlines() if "heads" in line]
    assert line.startswith("as it was:  heads: it is alone")


def test_a_model_that_is_called_twice_in_a_pass_has_two_passes() -> None:
    def twice(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        return in_turn(blocks, x) * in_turn(blocks, 2 * x)

    net = net_of(call=twice)
    plain = copy.deepcopy(net)
    dr2net.convert(net, probe=probe_of(build_input()))
    for model in (net, plain):
        model(build_input()).square().sum().backward()
    assert relative(gradients(net), gradients(plain)) < GRID
    repeated = net_of(call=lambda blocks, x: in_turn(blocks, in_turn(blocks, x)))
    dr2net.convert(repeated, probe=probe_of(build_input()))
    dr2net.set_coefficients(repeated, 0.5, 0.5)
    assert dr2net.gradient_error(repeated, build_input(), lambda m, x: m(x).square().sum()).overall < 1e-8


def test_other_tensors_that_a_block_returns_are_handed_out_without_a_gradient() -> None:
    net, plain = net_of(form="two"), net_of(form="two")
    check(net, build_input(), num_branches=3)
    dr2net.convert(net, probe=probe_of(build_input()))
    (y, weights), (_, expected) = (model.blocks[0](build_input()) for model in (net, plain))
    assert torch.allclose(weights, expected) and y.requires_grad
    for ask in (torch.Tensor.backward, lambda loss: torch.autograd.grad(loss, [*net.parameters()], allow_unused=True)):
        (y, weights) = net.blocks[0](build_input())
        with pytest.raises(RuntimeError, match="handed out beside its output"):
            ask(y.sum() + weights.sum())


def test_a_block_whose_other_tensors_the_next_one_uses_runs_as_it_is() -> None:
    def biased(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        weights = None
        for block in blocks:
            x, weights = block(x, weights)
        return x

    net = net_of(4, form="two", call=biased)
    with pytest.raises(ValueError, match=r"blocks\.0: a later block uses what it returns beside its output"):
        dr2net.convert(net, probe=probe_of(build_input()))


def test_a_cache_is_handed_on_in_evaluation_and_refused_in_training() -> None:
    class Cache:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

    net = net_of(form="cache")
    dr2net.convert(net, probe=probe_of(build_input(), None, Cache()))
    cache = Cache()
    with torch.no_grad():
        y, same = net.blocks[0](build_input(), None, cache)
        assert same is cache and isinstance(y, Tensor)
    with pytest.raises(ValueError, match="called with a Cache, which it may change"):
        net(build_input(), None, cache)


def test_an_early_exit_may_be_evaluated_and_is_an_error_in_training() -> None:
    net, x = net_of(), build_input()
    dr2net.convert(net, probe=probe_of(x), inversion="float")
    dr2net.set_coefficients(net, 0.5, 0.5)
    net.call = lambda blocks, x: in_turn(blocks[:2], x)
    with torch.no_grad():
        assert net(x).shape == (3, 3)
    with pytest.raises(RuntimeError, match="before its end"):
        net(x).sum().backward()


def test_layer_drop_is_refused_at_the_conversion_or_at_the_block_that_is_left_out() -> None:
    net = net_of()
    net.layerdrop = 0.1
    with pytest.raises(ValueError, match=r"leaves out blocks at random in training \(layerdrop=0.1\).*set it to 0"):
        dr2net.convert(net, probe=probe_of(build_input()))
    net.layerdrop = 0.0
    dr2net.convert(net, probe=probe_of(build_input()))
    net.call = lambda blocks, x: blocks[2](blocks[0](x))
    with pytest.raises(ValueError, match="nor can a block in it be left out"):
        net(build_input())


def test_a_model_on_the_meta_device_is_refused() -> None:
    with pytest.raises(ValueError, match="on the meta device, without values; load them first"):
        dr2net.convert(net_of().to("meta"), probe=probe_of(build_input().to("meta")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_work(dtype: torch.dtype) -> None:
    net, x = net_of(4).to(dtype), build_input().to(dtype)
    plain = copy.deepcopy(net)
    dr2net.convert(net, probe=probe_of(x))
    assert net(x).dtype == dtype and relative([net(x)], [plain(x)]) < 0.02
    dr2net.set_coefficients(net, 7 / 8, 1 / 8)
    assert dr2net.gradient_error(net, x, lambda m, x: m(x).float().square().sum()).overall == 0


def test_a_block_that_changes_its_input_in_place_gets_a_copy() -> None:
    class InPlace(Unknown):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return x + self.value(self.norm(x))

    net = Net(*(InPlace() for _ in range(3))).double()
    plain = copy.deepcopy(net)
    dr2net.convert(net, probe=probe_of(build_input()))
    for model in (net, plain):
        model(build_input()).square().sum().backward()
    assert relative(gradients(net), gradients(plain)) < GRID


class ByToken(Unknown):
    """Mixes along the first dimension, as torch's layers without batch_first do."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x.transpose(0, 1), mask).transpose(0, 1)


@pytest.mark.parametrize(
    "mask", [None, torch.randn(3, 1, 5).double(), torch.randn(1, 5, 5).double(), torch.randn(5, 5).double()]
)
def test_samples_are_cut_where_that_was_tried(mask: Tensor | None) -> None:
    net = net_of()
    report = dr2net.convert(copy.deepcopy(net), probe=probe_of(build_input(), mask), chunk_mib=1e-6)
    assert report.sequences == (("blocks", 3, 3),)
    ours, inputs = copy.deepcopy(net), (build_input(), mask)
    check(net, *inputs, num_branches=3, chunk_mib=1e-6)
    report = dr2net.convert(ours, probe=probe_of(*inputs), chunk_mib=1e-6)
    ours(*inputs)
    assert "3 in chunks of 1e-06 MiB" in str(report)


def test_blocks_that_mix_samples_run_as_a_whole() -> None:
    net = Net(*(ByToken() for _ in range(3))).double()
    report = dr2net.convert(net, probe=probe_of(build_input()), chunk_mib=1e-6)
    net(build_input())
    assert "3 'block': it does not say that tokens or samples are independent" in str(report)


def test_blocks_inside_blocks_are_taken_once_and_the_inner_ones_if_their_runs_are_long() -> None:
    class Group(nn.Module):
        def __init__(self, num: int) -> None:
            super().__init__()
            self.inner = nn.Sequential(*net_of(num).blocks)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    long, short = (nn.Sequential(*(Group(num) for _ in range(3))).double() for num in (5, 2))
    assert check(long, build_input(), num_branches=15).sequences[0] == ("0.inner", 5, 5)
    assert check(short, build_input(), num_branches=3).sequences == (("Sequential", 3, 3),)


def test_short_runs_are_told_to_store_no_less_than_checkpointing() -> None:
    advice = dr2net.convert(net_of(2).float(), probe=probe_of(build_input().float())).advice
    assert len(advice) == 1 and "blocks stores more than checkpointing of each block would" in advice[0]
    assert dr2net.convert(net_of(4).float(), probe=probe_of(build_input().float())).advice == ()


def test_a_probe_with_one_sample_is_told_that_chunks_want_two() -> None:
    one = build_input().float()[:1]
    assert dr2net.convert(net_of(4).float(), probe=probe_of(one)).advice == ()
    (advice,) = dr2net.convert(net_of(4).float(), probe=probe_of(one), chunk_mib=1).advice
    assert "one sample in the probe's batch" in advice and advice.endswith("give it two")
    assert dr2net.convert(net_of(4).float(), probe=probe_of(build_input().float()), chunk_mib=1).advice == ()


def stored_bytes(net: Net, batch: int) -> int:
    """At the peak of a step, in float32."""

    def step() -> None:
        net(torch.randn(batch, 5, WIDTH)).square().sum().backward()

    return memory.predict(step, net).stored


def test_whole_blocks_store_no_more_than_checkpointing_each_of_them() -> None:
    x = build_input().float()
    ours, theirs = net_of(8).float(), net_of(8).float()
    dr2net.convert(ours, probe=probe_of(x))
    dr2net.set_coefficients(ours, 7 / 8, 1 / 8)
    assert dr2net.checkpoint_blocks(theirs, probe=probe_of(x)) == 8
    assert stored_bytes(ours, 64) < 0.8 * stored_bytes(theirs, 64)


@pytest.mark.parametrize("chunk_mib", [None, 1e-6])
def test_blocks_of_any_type_are_checkpointed(chunk_mib: float | None) -> None:
    net, plain = net_of(), net_of()
    assert dr2net.checkpoint_blocks(net, probe=probe_of(build_input()), chunk_mib=chunk_mib) == 3
    for model in (net, plain):
        model(build_input()).square().sum().backward()
    assert relative(gradients(net), gradients(plain)) < 1e-9
    dr2net.deconvert(net)
    assert [vars(m).keys() for m in net.modules()] == [vars(m).keys() for m in plain.modules()]


def test_copies_of_a_probed_model_are_converted_models_of_their_own(tmp_path) -> None:
    net, x = net_of(form="pair"), build_input()
    dr2net.convert(net, probe=probe_of(x))
    dr2net.set_coefficients(net, 0.5, 0.5)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x)) and twin.blocks.ran == 3
    dr2net.set_coefficients(net, 0.25, 0.75)
    assert not torch.equal(twin(x), net(x))
    assert torch.equal(copy.deepcopy(net.blocks[0])(x)[0], net_of().blocks[0](x)), "a block alone is the plain block"
