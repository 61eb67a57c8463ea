"""The fastest setting within a budget: it fits, one turn more would not, and its time is counted rightly."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import dr2net
from dr2net import budget, planner, work
from dr2net.inputs import MadeBatch
from dr2net.memory import predict
from dr2net.planner import CHUNKED, Setting

SHAPE = (16, 3, 32, 32)
SETTING = Setting(options=replace(CHUNKED, chunk_mib=1))


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, embed_dim=48, num_heads=3)


def peak_of(model: nn.Module, options: dr2net.Options) -> int:
    model = copy.deepcopy(model).train()
    dr2net.convert(model, options)
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.randn(SHAPE)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return predict(step, model, optimizer).peak


@pytest.mark.parametrize("kind", ["a model", "a factory"])
def test_the_plan_fits_and_one_branch_more_would_not(kind: str) -> None:
    model = vit().eval()
    least, most = (peak_of(model, replace(dr2net.Options(), keep=keep)) for keep in (0, 8))
    allowed = (least + most) // 2
    given = model if kind == "a model" else vit
    options = dr2net.plan_budget(given, torch.zeros(SHAPE), allowed, setting=SETTING)
    assert 0 < options.keep < 8 and not model.training
    assert peak_of(model, options) <= allowed < peak_of(model, replace(options, keep=options.keep + 1))


def test_what_cannot_fit_is_refused_with_the_least_that_would() -> None:
    with pytest.raises(ValueError, match=r"within 1\.0 MiB; the leanest needs \d+\.\d MiB"):
        dr2net.plan_budget(vit, torch.zeros(SHAPE), "1MiB", setting=SETTING)
    with pytest.raises(ValueError, match="is not a size"):
        dr2net.plan_budget(vit, torch.zeros(SHAPE), "20 apples")


def test_conventional_is_the_fastest_where_it_fits_and_the_order_of_time_follows_the_dial() -> None:
    found = list(budget.choices(vit().train(), SHAPE, 1 << 34, SETTING))
    assert [choice.method for choice in found] == list(budget.METHODS)
    assert budget.fastest(found).method == "conventional" and found[0].time == 1
    assert all(choice.options.keep == 8 for choice in found[1:])
    assert found[1].time < found[3].time  # everything kept: the streams' arithmetic is what is left
    print(*budget.lines(found, "16GiB"), sep="\n")
    assert "fastest: conventional: nothing to do" in budget.lines(found, "16GiB")[-1]
    assert budget.lines([], "1MiB") == ["no setting trains within 1MiB"]


def test_the_line_of_code_does_what_the_choice_says() -> None:
    options = dr2net.Options(keep=3, chunk_mib=256, recompute_rest=True)
    choice = budget.Choice("dr2net, chunks", options, predict(lambda: None, nn.Linear(1, 1)), 1.2)
    assert choice.call == "dr2net.convert(model, keep=3, chunk_mib=256, recompute_rest=True)"
    choice = replace(choice, method="checkpointed", options=dr2net.Options(keep=3))
    assert choice.call == "dr2net.checkpoint_blocks(model, keep=3)"


def test_flops_are_those_of_torchs_own_counter_and_attention_is_counted() -> None:
    model = vit().train()

    def step() -> None:
        model(torch.zeros(SHAPE)).square().mean().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    assert work.count(step, model).flops >= counter.get_total_flops() > 0
    q = nn.Parameter(torch.zeros(2, 3, 10, 8))
    attention = work.count(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward(), nn.ParameterList([q]))
    once = 2 * 2 * 3 * 10 * 10 * 8  # one product of the two
    assert attention.flops == 2 * once + 5 * once  # backward makes the scores again, and four products


def test_bytes_are_what_operators_read_and_write() -> None:
    model = nn.Linear(1, 1)
    assert work.count(lambda: torch.zeros(1000).add(1), model).bytes == 4000 + 2 * 4000
    assert work.count(lambda: torch.empty(1000).view(10, 100).t(), model).bytes == 0


def test_the_rate_is_the_one_at_which_both_measured_times_are_right() -> None:
    plain, other = work.Work(100, 10), work.Work(130, 18)
    rate = work.flops_per_byte(plain, 2.0, other, 2.9)
    assert other.time(rate) / plain.time(rate) == pytest.approx(1.45)
    assert work.flops_per_byte(plain, 2.0, other, 2.0) == 0  # faster than its FLOPs allow: bytes cost nothing


def test_recomputing_less_is_less_work_and_a_batch_may_be_anything_that_the_model_takes() -> None:
    model, batches = vit().train(), MadeBatch(lambda: torch.zeros(SHAPE), "mine", grows=False)

    def flops(method: str, keep: int) -> int:
        own = copy.deepcopy(model)
        setting = replace(SETTING, options=replace(SETTING.options, keep=keep))
        planner.apply(own, method, setting)
        return work.count(
            planner.training_step(own, planner.build_optimizer(own, setting), batches, "fp32", "cpu"), own
        ).flops

    assert flops("conventional", 0) == flops("dr2net", 8) < flops("dr2net", 4) < flops("dr2net", 0)
    assert flops("checkpointed", 8) == flops("conventional", 0) < flops("checkpointed", 0)
