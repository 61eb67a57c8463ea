"""The loop: recipe, methods, guard, and what stops a run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy_training import Config, Points, Toy, build_loaders, collate, criterion, evaluate, toy_config, train

import dr2net
from engine.config import METHODS, Finetuning, Optimization
from engine.data.loader import Loaders, build_loader
from engine.records import record as results
from engine.training import checkpoint
from engine.training.devices import set_seed
from engine.training.finetuning import apply_method, check_gradient, coefficients, load_trained
from engine.training.fit import accumulation_steps, fit
from engine.training.log import Log
from engine.training.optimization import Averages, build_optimizer, learning_rate, parameter_groups, set_learning_rate

# Sums over 8 samples are taken in another order when the batch is split. Adam makes steps of full size out of rounding
# errors where the true gradient is zero (key biases), so losses and the head are compared, not every weight.
SPLIT_TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny layers: more threads only add noise to the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_layer_decay_multiplier_and_weight_decay_reach_the_right_parameters():
    model = Toy(depth=2)
    recipe = Optimization(layer_decay=0.5, backbone_multiplier=0.1, weight_decay=0.3, learning_rate=1.0)
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
    averages = Averages(model, decay=0.5)
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
        loaders = build_loaders(config)
        fit(replace(config, run=replace(config.run, micro_batch=2)), Toy(), criterion, loaders, evaluate)


def test_too_few_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="32 training samples do not fill one global batch of 64"):
        train(toy_config(tmp_path, {"optimization": {"global_batch": 64}}))


def test_devices_and_precisions_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="run.device is 'tpu'"):
        train(toy_config(tmp_path, {"run": {"device": "tpu"}}))
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train(toy_config(tmp_path, {"optimization": {"precision": "fp16"}}))


def test_accumulation_does_not_change_the_result(tmp_path):
    whole = toy_config(tmp_path / "whole", {"run": {"micro_batch": 8}, "dropout": 0.0})
    split = toy_config(tmp_path / "split", {"run": {"micro_batch": 2}, "dropout": 0.0})
    records = [train(config) for config in (whole, split)]
    losses = [[entry["loss"] for entry in record.curve] for record in records]
    assert losses[0] == pytest.approx(losses[1], abs=SPLIT_TOLERANCE)
    heads = [final_weights(config)["head.weight"] for config in (whole, split)]
    assert torch.allclose(*heads, atol=SPLIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_record(tmp_path, method):
    config = toy_config(tmp_path, {"finetuning": {"method": method}, "optimization": {"epochs": 2}})
    record = train(config)
    assert record.curve[-1]["loss"] < record.curve[0]["loss"]
    assert record.metrics["num_samples"] == 13
    assert record.memory["peak"] > record.memory["parameters"] > 0
    assert record.seconds["step"] > 0
    assert record.status == "tiny"
    assert len(record.guard) == (2 if method in ("reversible", "dr2net") else 0)
    assert all(entry["error"] < 1e-5 for entry in record.guard)  # exact inversion in float32: rounding only
    assert results.read_record(results.run_folder(config) / "record.json") == record
    assert set(final_weights(config)) == set(Toy().state_dict())


def test_bf16_trains(tmp_path):
    record = train(toy_config(tmp_path, {"optimization": {"precision": "bf16", "epochs": 2}}))
    assert record.curve[-1]["loss"] < record.curve[0]["loss"]


def test_frozen_keeps_the_backbone_and_stores_no_graph_for_it(tmp_path):
    config = toy_config(tmp_path, {"finetuning": {"method": "frozen"}, "optimization": {"epochs": 1}, "dropout": 0.5})
    set_seed(0)
    model = Toy(dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def watch(outputs, batch):
        seen.append((model.training, model.backbone.training, model.backbone.blocks(batch["x"]).requires_grad))
        return criterion(outputs, batch)

    fit(config, model, watch, build_loaders(config), evaluate)
    assert set(seen) == {(True, False, False)}
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items() if n.startswith("backbone"))
    assert not torch.equal(before["head.weight"], model.state_dict()["head.weight"])


def test_chunks_and_recomputation_of_the_rest_reach_the_conversion():
    for chunk_mib, expected in ((0, None), (0.5, 0.5)):
        backbone = Toy().backbone
        apply_method(backbone, Finetuning(chunk_mib=chunk_mib, recompute_rest=chunk_mib > 0))
        assert backbone.blocks.chunk_mib == expected
        assert ("forward" in vars(backbone.norm)) == (chunk_mib > 0)


def test_the_coefficients_follow_the_schedule_and_are_restored_for_prediction(tmp_path):
    moving = {"method": "dr2net", "path": "together", "start": (0.75, 0.25), "end": (0.25, 0.75), "until": 0.5}
    config = toy_config(tmp_path, {"finetuning": moving, "optimization": {"epochs": 2}})
    record = train(config)
    assert [(entry["alpha"], entry["beta"]) for entry in record.guard] == [(0.75, 0.25), (0.25, 0.75)]
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

    for clip_norm in (0.0, 1e-3):
        config = toy_config(tmp_path / str(clip_norm), {"optimization": {"epochs": 1, "clip_norm": clip_norm}})
        hook = register_optimizer_step_pre_hook(watch)
        train(config)
        hook.remove()
    assert min(norms[:4]) > 0.01
    assert norms[4:] == pytest.approx([1e-3] * 4, rel=1e-2)  # clipping divides by norm + 1e-6


def test_evaluation_sees_the_averages_and_training_gets_its_weights_back(tmp_path):
    plain = toy_config(tmp_path / "plain", {"optimization": {"ema_decay": 0.0}})
    averaged = toy_config(tmp_path / "averaged")
    records = [train(config) for config in (plain, averaged)]
    assert_same(final_weights(plain), final_weights(averaged))
    assert records[0].metrics["val_loss"] != records[1].metrics["val_loss"]
    model = Toy()
    checkpoint.load_weights(model, results.run_folder(averaged) / "checkpoint", averaged=False)
    with torch.no_grad():
        assert evaluate(model.eval(), build_loaders(plain).val) == records[0].metrics


def test_coefficients_belong_to_the_reversible_methods_only():
    assert coefficients(Finetuning(method="conventional"), 0.3) == (None, None)
    assert coefficients(Finetuning(method="reversible"), 0.3) == (0.0, 1.0)
    assert coefficients(Finetuning(method="dr2net", path="constant", start=(0.5, 0.5)), 0.9) == (0.5, 0.5)


def test_prediction_from_a_checkpoint_gives_the_recorded_metrics(tmp_path):
    config = toy_config(tmp_path, {"finetuning": {"method": "dr2net"}})
    record = train(config)
    model = Toy()
    load_trained(model, config.finetuning, results.run_folder(config) / "checkpoint")
    with torch.no_grad():
        assert evaluate(model, build_loaders(config).val) == record.metrics


@pytest.mark.filterwarnings("ignore:float inversion")
def test_a_noisy_inversion_is_reported_or_stops_the_run(tmp_path, capsys):
    noisy = {"method": "dr2net", "inversion": "float", "start": (1.0, 0.015625), "tolerance": 1e-9}
    record = train(toy_config(tmp_path / "warn", {"finetuning": noisy, "optimization": {"epochs": 1}}))
    assert record.guard[0]["error"] > 1e-9
    assert "warning: gradient error" in capsys.readouterr().out
    with pytest.raises(FloatingPointError, match="above the tolerance 1e-09 .*alpha 1, beta 0.015625"):
        train(toy_config(tmp_path / "stop", {"finetuning": {**noisy, "stop_above_tolerance": True}}))


def test_the_guard_measures_in_training_mode_and_leaves_no_trace(tmp_path):
    finetuning = Finetuning(method="dr2net", start=(0.5, 0.5))
    model = Toy(dropout=0.5)
    model.head = nn.Sequential(nn.BatchNorm1d(8), model.head)  # its running statistics must not move
    apply_method(model.backbone, finetuning)
    batch = next(iter(build_loaders(toy_config(tmp_path)).val))
    seen = []

    def watch(outputs, batch):
        seen.append((model.training, outputs.detach()))
        return criterion(outputs, batch)

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random_state = torch.get_rng_state()
    state = {"step": 0, "alpha": 0.5, "beta": 0.5}
    with Log(tmp_path, "row", total=1, done=0, samples=4, every=1, speak=False) as log:
        entry = check_gradient(model.eval(), watch, batch, finetuning, 0, state, log)
    assert entry["error"] < 1e-6  # without the very same masks it would be about 1
    assert [training for training, _ in seen] == [True, True]
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.allclose(seen[0][1], model.eval()(batch))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:float inversion")
def test_a_resumed_run_finds_the_same_gradient_errors(tmp_path):
    noisy = {"finetuning": {"method": "dr2net", "inversion": "float", "start": (1.0, 0.1)}, "dropout": 0.5}
    whole, short = (toy_config(tmp_path / name, {**noisy, "optimization": {"epochs": 2}}) for name in "ab")
    train(replace(short, run=replace(short.run, max_steps=4, evaluate_every_epochs=0)))
    torch.rand(7)
    resumed, undisturbed = train(short).guard, train(whole).guard
    assert resumed == undisturbed and len(resumed) == 2 and resumed[0]["error"] > 0


def test_a_non_finite_loss_names_step_terms_and_samples_and_keeps_the_checkpoint(tmp_path):
    config = toy_config(tmp_path, {"run": {"save_every_steps": 1}})
    order = [key[0] for batch in build_loaders(config).train.batch_sampler for key in batch]
    bad = order[21]  # in the third step, second micro batch
    with pytest.raises(FloatingPointError, match=rf"step 3: cross_entropy = nan, size = nan; samples: .*sample{bad}\b"):
        train(config, bad=bad)
    assert checkpoint.load(results.run_folder(config) / "checkpoint").state["step"] == 2


def test_evaluation_guard_workers_and_log_change_no_number(tmp_path):
    plain = {"finetuning": {"method": "dr2net", "guard_every_epochs": 0}, "run": {"evaluate_every_epochs": 0}}
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
    record = train(replace(short, run=replace(short.run, max_steps=0)))
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
    loaders = Loaders(
        train=build_loader(Points(8), batch_size=4, seed=0, train=True, num_workers=0, collate=collate),
        val=build_loader(Points(4), batch_size=4, seed=0, train=False, num_workers=0, collate=collate),
    )
    fit(config, model, criterion, loaders, evaluate)
    x = torch.randn(2, 8)
    assert model.head(x).dtype == torch.float32
    assert model({"x": torch.randn(1, 4, 8)}).grad_fn is not None
    assert "forward" not in vars(model) or model.forward.__func__ is Toy.forward


def test_run_folder_is_named_by_task_row_and_seed(tmp_path):
    config = toy_config(tmp_path, {"run": {"seed": 3}})
    assert results.run_folder(config) == Path(tmp_path) / "toy_training" / "toy_vit_conventional" / "seed3"
