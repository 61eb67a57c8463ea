"""transformers' Trainer with the callback: it trains as a loop of one's own, and resumes bit for bit."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_trainers import build_vit, coefficients, samples
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTForImageClassification, set_seed

import dr2net
from dr2net import Schedule
from dr2net.integrations.hf import Dr2Net

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:float inversion"),
]

MOVING = Schedule((0.9, 0.1), (0.6, 0.4), until=1.0)
STEPS = 6


def build_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        build_vit(), LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    )


class Seen(TrainerCallback):
    """(alpha, beta) of each forward pass."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def on_init_end(self, args, state, control, **named) -> None:
        named["model"].register_forward_pre_hook(lambda model, _: self.at.append(coefficients(model)))


def build_trainer(
    folder: Path, model: nn.Module | None = None, callbacks: tuple = (Dr2Net(MOVING),), **arguments: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
    }
    return Trainer(
        model if model is not None else build_vit(),
        TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=samples(),
        eval_dataset=samples(6),
        callbacks=list(callbacks),
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def warnings_of(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is UserWarning and "pin_memory" not in str(w.message)]


def test_training_is_that_of_a_model_converted_by_hand_whose_schedule_moves_by_hand(tmp_path: Path) -> None:
    class ByHand(TrainerCallback):
        def on_step_begin(self, args, state, control, **named) -> None:
            MOVING.apply(named["model"], state.global_step / state.max_steps)

    model = build_vit()
    dr2net.convert(model)
    set_seed(1)
    build_trainer(tmp_path, model, (ByHand(),)).train()
    seen = Seen()
    set_seed(1)
    trainer = build_trainer(tmp_path, callbacks=(Dr2Net(MOVING), seen))
    trainer.train()
    assert equal(weights(trainer.model), weights(model))
    assert seen.at == [MOVING.at(step / STEPS) for step in range(STEPS)]
    assert coefficients(trainer.model) == MOVING.at((STEPS - 1) / STEPS)


def test_accumulated_steps_have_one_pair_of_coefficients(tmp_path: Path) -> None:
    seen = Seen()
    build_trainer(tmp_path, callbacks=(Dr2Net(MOVING), seen), gradient_accumulation_steps=2, max_steps=3).train()
    assert seen.at == [MOVING.at(step / 3) for step in range(3) for _ in range(2)]


def test_bf16_trains_and_evaluation_runs_at_the_present_coefficients(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, bf16=True, learning_rate=5e-3, max_steps=24)
    before = trainer.evaluate()["eval_loss"]
    assert coefficients(trainer.model) == MOVING.at(0)
    result = trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert result.training_loss > 0 and after < before
    assert coefficients(trainer.model) == MOVING.at(23 / 24)


@pytest.mark.parametrize("kind", ["vit", "lora", "converted_lora", "plain_module"])
def test_a_resumed_training_ends_as_the_uninterrupted_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    class Wrapped(nn.Module):  # no PreTrainedModel: the Trainer writes its state dict
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_vit()

        def forward(self, pixel_values, labels=None):
            return self.inner(pixel_values, labels=labels)

    def build() -> nn.Module:
        if kind == "converted_lora":
            from peft import LoraConfig, get_peft_model

            model = build_vit()
            dr2net.convert(model)
            return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
        return {"vit": build_vit, "lora": build_lora, "plain_module": Wrapped}[kind]()

    def train(folder: Path, resume: Path | None, *callbacks: TrainerCallback) -> dict[str, torch.Tensor]:
        trainer = build_trainer(folder, build(), callbacks, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return weights(trainer.model)

    for name, callbacks in {"plain": (), "dr2net": (Dr2Net(MOVING),)}.items():
        if name == "plain" and kind in ("converted_lora", "vit"):
            continue  # converted already; or not resumed at all, see _keep_names
        whole = train(tmp_path / name, None, *callbacks)
        resumed = train(tmp_path / name, tmp_path / name / "checkpoint-4", *callbacks)
        assert equal(whole, resumed), name

    folder = tmp_path / "dr2net" / "checkpoint-6"
    again = build()
    assert warnings_of(lambda: dr2net.restore(again, folder)) == []
    (sequence,) = [m for m in again.modules() if isinstance(m, dr2net.ReversibleSequence)]
    assert (sequence.alpha, sequence.beta) == MOVING.at(5 / 6)
    assert equal(weights(again), whole)
    if kind != "vit":
        assert (tmp_path / "dr2net" / "dr2net.json").exists()  # beside what trainer.save_model() writes


def test_the_best_checkpoint_comes_with_its_coefficients(tmp_path: Path) -> None:
    trainer = build_trainer(
        tmp_path,
        learning_rate=10.0,  # so that the first evaluation is the best
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    step = trainer.state.best_global_step
    assert 0 < step < STEPS
    assert coefficients(trainer.model) == MOVING.at((step - 1) / STEPS)
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_a_saved_model_goes_on_where_it_was(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = trainer.evaluate()["eval_loss"]
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["dr2net"]["sequences"]
    assert saved["vit.layers"]["alpha"] == MOVING.at(5 / 6)[0]

    again = ViTForImageClassification.from_pretrained(tmp_path / "saved")
    trainer = build_trainer(tmp_path, again)
    assert trainer.evaluate()["eval_loss"] == expected  # at the coefficients it was trained with
    trainer.train()
    assert coefficients(trainer.model) == MOVING.at(5 / 6)


def test_a_schedule_other_than_the_checkpoints_is_told(tmp_path: Path) -> None:
    build_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    other = build_trainer(tmp_path, callbacks=(Dr2Net(Schedule.constant(0.5, 0.5)),))
    messages = warnings_of(lambda: other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")))
    assert any("checkpoint-4 was saved with vit.layers at (alpha, beta) = (0.75, 0.25)" in m for m in messages)


@pytest.mark.parametrize("how", ["argument", "model", "later"])
def test_gradient_checkpointing_is_switched_off_with_a_message(how: str, tmp_path: Path) -> None:
    model = build_vit()
    if how == "model":
        model.gradient_checkpointing_enable()

    def train() -> None:
        trainer = build_trainer(
            tmp_path, model, () if how == "later" else (Dr2Net(),), gradient_checkpointing=how != "model"
        )
        if how == "later":
            trainer.add_callback(Dr2Net())
        trainer.train()

    messages = warnings_of(train)
    assert any("checkpointing" in m and "was switched off" in m and "recompute_rest=True" in m for m in messages)
    assert coefficients(model) == (7 / 8, 1 / 8) and model.vit.layers.ran == 4


def test_checkpointing_turned_on_after_the_conversion_is_an_error_not_ignored(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path)
    trainer.model.gradient_checkpointing_enable()
    messages = warnings_of(trainer.train)  # the callback has a second look
    assert any("was switched off" in m for m in messages)
    trainer.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="own gradient checkpointing on"):
        trainer.model(pixel_values=torch.randn(1, 3, 8, 8))


def test_a_model_of_model_init_is_converted_when_training_begins(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    trainer = Trainer(model_init=build_vit, args=arguments, train_dataset=samples(), callbacks=[Dr2Net(MOVING)])
    trainer.train()
    assert coefficients(trainer.model) == MOVING.at(1 / 2)


def test_a_block_that_peft_wraps_as_a_whole_is_named(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_vit(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1"]))
    messages = warnings_of(lambda: Dr2Net().on_init_end(build_trainer(tmp_path).args, None, None, model=model))
    assert any("layers.1 is wrapped as a whole by peft (ModulesToSaveWrapper)" in m for m in messages)


def test_options_said_in_two_places_are_an_error(tmp_path: Path) -> None:
    model = build_vit()
    dr2net.convert(model, chunk_mib=8)
    with pytest.raises(ValueError, match=r"converted with chunk_mib=8 before, and Dr2Net\(\.\.\.\) has chunk_mib=None"):
        build_trainer(tmp_path, model, (Dr2Net(MOVING, chunk_mib=None),))
    build_trainer(tmp_path, model, (Dr2Net(MOVING),))
    with pytest.raises(ValueError, match="keep=0 before, and .* keep=2"):
        build_trainer(tmp_path, model, (Dr2Net(MOVING, keep=2),))
    build_trainer(tmp_path, callbacks=(Dr2Net(MOVING, keep=100),)).train()
    with pytest.raises(TypeError, match="chunks"):
        Dr2Net(MOVING, chunks=3)


def test_integrations_are_read_when_they_are_named() -> None:
    assert dr2net.integrations.hf.Dr2Net is Dr2Net
    with pytest.raises(AttributeError, match="no 'keras'; it has hf, lightning"):
        _ = dr2net.integrations.keras
