"""The loop: recipe, methods, gradient check, and what stops a run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_task import evaluate
from toy_task.configs import Config
from toy_task.model import Toy
from toy_training import loaders_of, metrics_of, toy_config, train

import dr2net
from dr2net import Options, Schedule
from engine.config import METHODS, SCHEDULES, Finetuning, Optimization
from engine.records import record as results
from engine.training import checkpoint
from engine.training.devices import set_seed
from engine.training.ema import EMA
from engine.training.finetuning import apply_method, check_gradient, coefficients, load_trained
from engine.training.fit import fit
from engine.training.log import Log
from engine.training.optimization import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from engine.training.state import State
from engine.training.step import accumulation_steps

# Sums over 8 samples are taken in another order when the batch is split. Adam makes steps of full size out of rounding
# errors where the true gradient is zero (key biases), so losses and the head are compared, not every weight.
SPLIT_TOLERANCE = 1e-4


def final_weights(config: Config, kind: str = "model") -> dict[str, torch.Tensor]:
    return checkpoint.load(results.run_folder(config) / "checkpoint").tensors[kind]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_learning_rate_warms_up_and_follows_the_cosine():
    recipe = Optimization(epochs=10, warmup_epochs=2, learning_rate=1.0, min_learning_rate=0.1)
    assert learning_rate(0, recipe) == 0
    assert learning_rate(0.1, recipe) == pytest.approx(0.5)
    assert learning_rate(0.2, recipe) == pytest.approx(1.0)
    assert learning_rate(0.6, recipe) == pytest.approx(0.55)
    assert learning_rate(1.0, recipe) == pytest.approx(0.1)
    assert learning_rate(1.0, replace(recipe, warmup_epochs=10)) == pytest.approx(0.1)


def test_learning_rate_drops_at_shares_of_the_training():
    recipe = Optimization(
        epochs=12, warmup_epochs=0, learning_rate=1.0, decay="steps", drops=(0.5, 11 / 12), drop_factor=0.1
    )
    rates = [learning_rate(k / 12, recipe) for k in range(12)]
    assert rates == pytest.approx([1.0] * 6 + [0.1] * 5 + [0.01])


def test_the_longest_prefix_counts_and_vectors_decay_where_a_recipe_says_so():
    model = Toy(depth=2)
    multipliers = {"backbone.": 0.1, "backbone.blocks.1.": 0.5}
    recipe = Optimization(multipliers=multipliers, weight_decay=0.3, decay_vectors=True)
    groups = parameter_groups(model, recipe)
    scales = {id(p): group["scale"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        inner, outer = name.startswith("backbone.blocks.1."), name.startswith("backbone.")
        assert scales[id(parameter)] == (0.5 if inner else 0.1 if outer else 1.0)
    assert {group["weight_decay"] for group in groups} == {0.3}
    with pytest.raises(ValueError, match="no parameter's name begins with backbon.x"):
        parameter_groups(model, Optimization(multipliers={"backbon.x": 1.0}))


def test_layer_decay_multiplier_and_weight_decay_reach_the_right_parameters():
    model = Toy(depth=2)
    recipe = Optimization(layer_decay=0.5, multipliers={"backbone.": 0.1}, weight_decay=0.3, learning_rate=1.0)
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(optimizer, 2.0)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    head, block = found[id(model.head.weight)], found[id(model.backbone.blocks[0].mlp.fc1.weight)]
    assert (head["lr"], head["weight_decay"]) == (2.0, 0.3)
    assert block["lr"] == pytest.approx(2.0 * 0.5**2 * 0.1)  # block 0 is layer 1 of 3
    assert found[id(model.head.bias)]["weight_decay"] == 0
    assert found[id(model.backbone.blocks[0].norm1.weight)]["weight_decay"] == 0


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(Toy().requires_grad_(False), Optimization())


def test_averages_follow_and_swap_exactly():
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([0.0, 0.0]))
    averages = EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    averages.update(100)
    assert averages.tensors["weight"].tolist() == [0.5, 0.5]
    averages.swap()
    assert model.weight.tolist() == [0.5, 0.5]
    averages.swap()
    assert model.weight.tolist() == [1.0, 1.0] and averages.tensors["weight"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("global_batch, micro_batch, world, expected", [(8, 4, 1, 2), (8, 4, 2, 1), (384, 8, 4, 12)])
def test_accumulation_is_derived(global_batch, micro_batch, world, expected):
    assert accumulation_steps(global_batch, micro_batch, world) == expected


def test_batches_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="global_batch 8 is not a multiple of run.micro_batch 3"):
        accumulation_steps(8, 3, 1)
    with pytest.raises(ValueError, match="loader has batch size 4, but run.micro_batch is 2"):
        config = toy_config(tmp_path)
        fit(replace(config, run=replace(config.run, micro_batch=2)), Toy(), loaders_of(config), evaluate)


def test_too_few_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="32 training samples do not fill one global batch of 64"):
        train(toy_config(tmp_path, {"optimization": {"global_batch": 64}}))


def test_devices_and_precisions_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--run.device must be one of auto, cpu, cuda, not 'tpu'"):
        train(toy_config(tmp_path, {"run": {"device": "tpu"}}))
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train(toy_config(tmp_path, {"optimization": {"precision": "fp16"}}))


def test_accumulation_does_not_change_the_result(tmp_path):
    whole = toy_config(tmp_path / "whole", {"run": {"micro_batch": 8}, "model": {"dropout": 0.0}})
    split = toy_config(tmp_path / "split", {"run": {"micro_batch": 2}, "model": {"dropout": 0.0}})
    records = [train(config) for config in (whole, split)]
    losses = [[entry["loss"] for entry in record.curve] for record in records]
    assert losses[0] == pytest.approx(losses[1], abs=SPLIT_TOLERANCE)
    heads = [final_weights(config)["head.weight"] for config in (whole, split)]
    assert torch.allclose(*heads, atol=SPLIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_record(tmp_path, method):
    options = Options(tolerance=1e-2, chunk_mib=0.01 if method == "checkpointed_chunks" else None)
    config = toy_config(tmp_path, {"finetuning": {"method": method, "options": options}, "optimization": {"epochs": 2}})
    record = train(config)
    assert record.curve[-1]["loss"] < record.curve[0]["loss"]
    assert record.metrics["num_samples"] == 13
    assert record.memory["peak"] > record.memory["parameters"] > 0
    assert record.seconds["step"] > 0
    assert record.status == "tiny"
    assert len(record.gradient_checks) == (2 if method in SCHEDULES else 0)
    assert all(entry["error"] < 1e-5 for entry in record.gradient_checks)  # exact inversion in float32: rounding only
    assert results.read_record(results.run_folder(config) / "record.json") == record
    assert set(final_weights(config)) == set(Toy().state_dict())


def test_bf16_trains(tmp_path):
    record = train(toy_config(tmp_path, {"optimization": {"precision": "bf16", "epochs": 2}}))
    assert record.curve[-1]["loss"] < record.curve[0]["loss"]


def test_frozen_keeps_the_backbone_and_stores_no_graph_for_it(tmp_path):
    config = toy_config(
        tmp_path, {"finetuning": {"method": "frozen"}, "optimization": {"epochs": 1}, "model": {"dropout": 0.5}}
    )
    set_seed(0)
    model = Toy(dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    class Watched(Toy):
        def losses(self, outputs, batch):
            seen.append((self.training, self.backbone.training, self.backbone.blocks(batch["x"]).requires_grad))
            return super().losses(outputs, batch)

    model.__class__ = Watched
    fit(config, model, loaders_of(config), evaluate)
    assert set(seen) == {(True, False, False)}
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items() if n.startswith("backbone"))
    assert not torch.equal(before["head.weight"], model.state_dict()["head.weight"])


def test_chunks_and_recomputation_of_the_rest_reach_the_conversion():
    for options in (Options(), Options(chunk_mib=0.5, recompute_rest=True)):
        model = Toy()
        apply_method(model, Finetuning(options=options))
        assert model.backbone.blocks.chunk_mib == options.chunk_mib
        assert ("forward" in vars(model.backbone.norm)) == options.recompute_rest


def test_chunks_without_a_size_are_refused():
    with pytest.raises(ValueError, match=r"--finetuning.options.chunk-mib: .* needs a size"):
        Finetuning(method="checkpointed_chunks")


def test_a_method_acts_on_other_parts_of_the_model_too():
    for method in METHODS:
        model = Toy()
        model.encoder = Toy().backbone
        apply_method(model, Finetuning(method=method, also=("encoder",), options=Options(chunk_mib=1)))
        converted = [isinstance(part.blocks, dr2net.ReversibleSequence) for part in (model.backbone, model.encoder)]
        assert converted == [method in (*SCHEDULES, "checkpointed_chunks")] * 2
        assert all(parameter.requires_grad for parameter in model.encoder.parameters())
    with pytest.raises(ValueError, match="has no part 'decoder'"):
        apply_method(model, Finetuning(method="conventional", also=("decoder",)))


def test_the_coefficients_follow_the_schedule_and_are_restored_for_prediction(tmp_path):
    moving = {"method": "dr2net", "schedule": Schedule((0.75, 0.25), (0.25, 0.75), until=0.5)}
    config = toy_config(tmp_path, {"finetuning": moving, "optimization": {"epochs": 2}})
    record = train(config)
    assert [(entry["alpha"], entry["beta"]) for entry in record.gradient_checks] == [(0.75, 0.25), (0.25, 0.75)]
    assert (record.curve[0]["alpha"], record.curve[0]["beta"]) == pytest.approx((0.375, 0.625))
    model = Toy()
    state = load_trained(model, config.finetuning, results.run_folder(config) / "checkpoint")
    assert (state["alpha"], state["beta"]) == (0.25, 0.75)
    assert not model.training
    sequence = next(m for m in model.modules() if isinstance(m, dr2net.ReversibleSequence))
    assert (sequence.alpha, sequence.beta) == (0.25, 0.75)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    norms = []

    def watch(optimizer, arguments, options):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    for clip_norm in (None, 1e-3):
        config = toy_config(tmp_path / str(clip_norm), {"optimization": {"epochs": 1, "clip_norm": clip_norm}})
        hook = register_optimizer_step_pre_hook(watch)
        train(config)
        hook.remove()
    assert min(norms[:4]) > 0.01
    assert norms[4:] == pytest.approx([1e-3] * 4, rel=1e-2)  # clipping divides by norm + 1e-6


def test_evaluation_sees_the_averages_and_training_gets_its_weights_back(tmp_path):
    plain = toy_config(tmp_path / "plain", {"optimization": {"ema_decay": None}})
    averaged = toy_config(tmp_path / "averaged")
    records = [train(config) for config in (plain, averaged)]
    assert_same(final_weights(plain), final_weights(averaged))
    assert records[0].metrics["val_loss"] != records[1].metrics["val_loss"]
    model = Toy()
    checkpoint.load_weights(model, results.run_folder(averaged) / "checkpoint", averaged=False)
    assert metrics_of(model, plain) == records[0].metrics


def test_coefficients_belong_to_the_reversible_methods_only():
    assert coefficients(Finetuning(method="conventional"), 0.3) == (None, None)
    assert coefficients(Finetuning(method="reversible"), 0.3) == (0.0, 1.0)
    assert coefficients(Finetuning(method="dr2net_dynamic"), 0.0) == pytest.approx((1.0, 0.1), abs=0.05)
    assert coefficients(Finetuning(method="dr2net_dynamic"), 0.6) == pytest.approx((0.4, 0.7))
    for method in ("conventional", "reversible"):
        with pytest.raises(ValueError, match="--finetuning.schedule"):
            Finetuning(method=method, schedule=Schedule.constant(0.5, 0.5))
    assert coefficients(Finetuning(schedule=Schedule.constant(0.5, 0.5)), 0.9) == (0.5, 0.5)


def test_prediction_from_a_checkpoint_gives_the_recorded_metrics(tmp_path):
    config = toy_config(tmp_path, {"finetuning": {"method": "dr2net"}})
    record = train(config)
    model = Toy()
    load_trained(model, config.finetuning, results.run_folder(config) / "checkpoint")
    assert metrics_of(model, config) == record.metrics


@pytest.mark.filterwarnings("ignore:float inversion")
def test_a_noisy_inversion_is_reported_or_stops_the_run(tmp_path, capsys):
    options = Options(inversion="float", tolerance=1e-9)
    noisy = {"method": "dr2net", "options": options, "schedule": Schedule.constant(1.0, 0.015625)}
    record = train(toy_config(tmp_path / "warn", {"finetuning": noisy, "optimization": {"epochs": 1}}))
    assert record.gradient_checks[0]["error"] > 1e-9
    assert "warning: gradient error" in capsys.readouterr().out
    with pytest.raises(FloatingPointError, match="above the tolerance 1e-09 .*alpha 1, beta 0.015625"):
        train(toy_config(tmp_path / "stop", {"finetuning": {**noisy, "stop_above_tolerance": True}}))


def test_the_gradient_check_measures_in_training_mode_and_leaves_no_trace(tmp_path):
    finetuning = Finetuning(schedule=Schedule.constant(0.5, 0.5))
    model = Toy(dropout=0.5)
    model.head = nn.Sequential(nn.BatchNorm1d(4), model.head)  # over tokens; its running statistics must not move
    apply_method(model, finetuning)
    batch = next(iter(loaders_of(toy_config(tmp_path)).val))
    seen = []

    class Watched(Toy):
        def losses(self, outputs, batch):
            seen.append((self.training, outputs.detach()))
            return super().losses(outputs, batch)

    model.__class__ = Watched
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random_state = torch.get_rng_state()
    state = State(alpha=0.5, beta=0.5)
    with Log(tmp_path, "row", total=1, done=0, samples=4, every=1, speak=False) as log:
        entry = check_gradient(model.eval(), batch, finetuning, 0, state, log)
    assert entry["error"] < 1e-6  # without the very same masks it would be about 1
    assert [training for training, _ in seen] == [True] * 3  # stored, exact, and floats without a grid
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.allclose(seen[0][1], model.eval()(batch))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:float inversion")
def test_a_resumed_run_finds_the_same_gradient_errors(tmp_path):
    finetuning = {"options": Options(inversion="float"), "schedule": Schedule.constant(1.0, 0.1), "method": "dr2net"}
    noisy = {"finetuning": finetuning, "model": {"dropout": 0.5}}
    whole, short = (toy_config(tmp_path / name, {**noisy, "optimization": {"epochs": 2}}) for name in "ab")
    train(replace(short, run=replace(short.run, max_steps=4, evaluate_every_epochs=None)))
    torch.rand(7)
    resumed, undisturbed = train(short).gradient_checks, train(whole).gradient_checks
    assert resumed == undisturbed and len(resumed) == 2 and resumed[0]["error"] > 0


def test_a_non_finite_loss_names_step_terms_and_samples_and_keeps_the_checkpoint(tmp_path):
    config = toy_config(tmp_path, {"run": {"save_every_steps": 1}})
    order = [key[0] for batch in loaders_of(config).train.batch_sampler for key in batch]
    bad = order[21]  # in the third step, second micro batch
    with pytest.raises(FloatingPointError, match=rf"cross_entropy = nan, size.* at step 3; samples: .*sample{bad}\b"):
        train(replace(config, data=replace(config.data, bad=bad)))
    assert checkpoint.load(results.run_folder(config) / "checkpoint").state["step"] == 2


def test_evaluation_gradient_check_workers_and_log_change_no_number(tmp_path):
    plain = {"finetuning": {"method": "dr2net", "check_every_epochs": None}, "run": {"evaluate_every_epochs": None}}
    busy = {
        "finetuning": {"method": "dr2net"},
        "run": {"num_workers": 1, "log_every_steps": 1, "save_every_steps": 3},
    }
    configs = [toy_config(tmp_path / "plain", plain), toy_config(tmp_path / "busy", busy)]
    for config in configs:
        train(config)
    assert_same(final_weights(configs[0]), final_weights(configs[1]))


def test_a_shortened_run_continues_to_the_uninterrupted_result(tmp_path):
    whole, short = toy_config(tmp_path / "whole"), toy_config(tmp_path / "short", {"run": {"max_steps": 6}})
    train(whole)
    train(short)
    record = train(replace(short, run=replace(short.run, max_steps=None)))
    for kind in ("model", "optimizer", "ema"):
        assert_same(final_weights(whole, kind), final_weights(short, kind))
    assert [entry["epoch"] for entry in record.curve] == [1, 2, 2, 3]  # the shortened run evaluated in epoch 2


def test_a_finished_run_is_not_repeated_and_another_recipe_is_refused(tmp_path, capsys):
    config = toy_config(tmp_path, {"optimization": {"epochs": 1}})
    record = train(config)
    assert train(replace(config, run=replace(config.run, num_workers=1))) == results.finished_record(config)
    assert "finished with this config and code" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"optimization.epochs: 1 -> 2"):
        train(toy_config(tmp_path, {"optimization": {"epochs": 2}}))
    again = train(toy_config(tmp_path, {"optimization": {"epochs": 2}, "run": {"resume": False}}))
    assert len(again.curve) == 2 and len(record.curve) == 1


def test_seeding_covers_all_generators_and_differs_by_step_and_process():
    import random

    import numpy as np

    def draw(*words):
        set_seed(*words)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(0, 1, 0) == draw(0, 1, 0)
    for other in (draw(1, 1, 0), draw(0, 2, 0), draw(0, 1, 1)):
        assert all(a != b for a, b in zip(draw(0, 1, 0), other, strict=True))


def test_the_model_gets_its_forward_back(tmp_path):
    config = toy_config(tmp_path, {"optimization": {"precision": "bf16", "epochs": 1}})
    model = Toy()
    fit(config, model, loaders_of(config), evaluate)
    assert model.head(torch.randn(2, 4, 8)).dtype == torch.float32
    assert model({"x": torch.randn(1, 4, 8)}).grad_fn is not None
    assert "forward" not in vars(model) or model.forward.__func__ is Toy.forward


def test_run_folder_is_named_by_task_row_and_seed(tmp_path):
    config = toy_config(tmp_path, {"run": {"seed": 3}})
    assert results.run_folder(config) == Path(tmp_path) / "toy_task" / "toy_vit_conventional" / "seed3"
