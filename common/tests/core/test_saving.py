"""A converted model that is saved and restored computes the same, bit for bit, or an error says what is wrong."""

import copy
import json
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model_zoo import FAMILIES, run
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from toy_blocks import build_input, build_net, converted

import dr2net

pytestmark = [
    pytest.mark.filterwarnings("ignore:float inversion"),
    pytest.mark.filterwarnings("ignore:.*ran at .alpha, beta.*another function"),
]


def warnings_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is UserWarning]


def huggingface_vit() -> tuple[nn.Module, torch.Tensor]:
    model, x = FAMILIES["huggingface_vit"]()
    return model.eval(), x


def lora_vit() -> tuple[nn.Module, torch.Tensor]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, x = huggingface_vit()
    lora = LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"], init_lora_weights=False)
    return get_peft_model(model, lora).eval(), x


KINDS = {"timm": FAMILIES["vit"], "timm_swin": FAMILIES["timm_swin"], "transformers": huggingface_vit, "peft": lora_vit}


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_restored_outputs_are_bit_equal(kind: str, already: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = KINDS[kind]()
    if kind == "peft":
        base = copy.deepcopy(model.state_dict())
    dr2net.convert(model.eval(), inversion="anchored", anchor_every=2)
    dr2net.set_coefficients(model, 0.8, Fraction(1, 4))
    expected = run(model, x)
    dr2net.save(model, tmp_path)

    other, _ = KINDS[kind]()
    other.eval()
    if kind == "peft":  # its folder has the adapters alone
        kept = {name: value for name, value in base.items() if "lora" not in name and "modules_to_save" not in name}
        other.load_state_dict({**other.state_dict(), **kept})
        for name, parameter in other.named_parameters():
            if "lora" in name:
                nn.init.zeros_(parameter)
    if already:
        dr2net.convert(other, inversion="anchored", anchor_every=2)
    assert not torch.equal(run(other, x), expected)
    assert warnings_of(lambda: dr2net.restore(other, tmp_path)) == []
    assert warnings_of(lambda: run(other, x)) == []
    assert torch.equal(run(other, x), expected)
    (sequence, *_) = dr2net.convert.__globals__["sequences"](other)
    assert sequence.beta == Fraction(1, 4) and sequence.inversion == "anchored" and sequence.anchor_every == 2
    run(other, x).sum().backward()


def test_models_save_pretrained_carries_the_coefficients_of_the_moment(tmp_path: Path) -> None:
    model, x = huggingface_vit()
    dr2net.convert(model)
    schedule = dr2net.Schedule((0.9, 0.1), (0.5, 0.5))
    for progress in (0.0, 0.3):
        schedule.apply(model, progress)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["dr2net"]
    assert saved["sequences"]["vit.layers"]["alpha"] == model.vit.layers.alpha == 0.7

    again = type(model).from_pretrained(tmp_path).eval()
    assert not torch.equal(again(x).logits, model(x).logits)  # plain, as it must not be run
    dr2net.restore(again, tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)


def test_conversion_takes_the_coefficients_that_the_config_names(tmp_path: Path) -> None:
    model, x = huggingface_vit()
    dr2net.convert(model)
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    report = dr2net.convert(again)
    assert "vit.layers is at (alpha, beta) = (0.875, 0.125), as its weights were saved" in str(report)
    assert torch.equal(again(x).logits, model(x).logits)
    dr2net.set_coefficients(again, 0.5, 0.5)
    assert again.config.dr2net["sequences"]["vit.layers"]["alpha"] == 0.5
    dr2net.deconvert(again)
    assert not hasattr(again.config, "dr2net")


def test_checkpointing_weights_of_other_coefficients_says_that_it_is_another_function(tmp_path: Path) -> None:
    model, _ = huggingface_vit()
    dr2net.convert(model)
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    (message,) = warnings_of(lambda: dr2net.checkpoint_blocks(again))
    assert "saved at (alpha, beta) = (0.875, 0.125)" in message and "dr2net.convert(model)" in message


def test_a_copy_of_the_model_has_a_config_of_its_own() -> None:
    model, _ = huggingface_vit()
    dr2net.convert(model)
    twin, part = copy.deepcopy(model), copy.deepcopy(model.vit)
    dr2net.set_coefficients(twin, 0.5, 0.5)
    dr2net.set_coefficients(part, 0.75, 0.25)
    assert [m.config.dr2net["sequences"]["vit.layers"]["alpha"] for m in (model, twin, part)] == [1, 0.5, 0.75]


def test_two_models_of_one_config_object_keep_their_own_coefficients(tmp_path: Path) -> None:
    first, _ = huggingface_vit()
    second = type(first)(first.config)
    dr2net.convert(first)
    dr2net.set_coefficients(first, 7 / 8, 1 / 8)
    dr2net.convert(second)
    assert second.vit.layers.beta == 0 and second.vit.config is second.config
    for model, beta in ((first, 1 / 8), (second, 0)):
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())["dr2net"]
        assert saved["sequences"]["vit.layers"]["beta"] == beta


def test_a_part_that_was_converted_by_itself_is_found_in_the_whole(tmp_path: Path) -> None:
    model, x = huggingface_vit()
    dr2net.convert(model.vit)
    dr2net.set_coefficients(model.vit, 7 / 8, 1 / 8)
    model.save_pretrained(tmp_path)  # its config names "layers", as it was converted
    again = type(model).from_pretrained(tmp_path).eval()
    dr2net.restore(again, tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)


def test_adapters_merged_into_the_weights_keep_the_coefficients(tmp_path: Path) -> None:
    model, x = lora_vit()
    dr2net.convert(model)
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    dr2net.restore(again, tmp_path)
    assert torch.equal(again(x).logits, merged(x).logits)


def test_options_differ_by_sequence_and_plain_parts_stay_plain(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({name: build_net(2) for name in "abc"})

    model, x = build(), build_input()
    dr2net.convert(model["a"], chunk_mib=1.0, keep=1)
    dr2net.convert(model["b"], inversion="anchored")
    dr2net.recompute(model["b"].stem)
    dr2net.set_coefficients(model["a"], 7 / 8, 1 / 8)
    dr2net.save(model, tmp_path)
    again = build()
    dr2net.restore(again, tmp_path)
    a, b = again["a"].blocks, again["b"].blocks
    assert (a.chunk_mib, a.inversion, b.chunk_mib, b.inversion) == (1.0, "exact", None, "anchored")
    assert (a.keep, b.keep) == (1, 0)
    assert type(again["c"].blocks) is nn.ModuleList
    assert "forward" in vars(again["b"].stem) and "forward" not in vars(again["a"].stem)
    assert all(torch.equal(again[name](x), model[name](x)) for name in "abc")


def test_blocks_checkpointed_in_chunks_come_back_as_such(tmp_path: Path) -> None:
    model, x = FAMILIES["vit"]()
    dr2net.checkpoint_blocks(model.eval(), chunk_mib=1, recompute_rest=True)
    dr2net.save(model, tmp_path)
    again, _ = FAMILIES["vit"]()
    dr2net.restore(again.eval(), tmp_path)
    assert again.blocks.checkpointed and torch.equal(again(x), model(x))


def test_blocks_that_a_probe_found_are_restored_after_the_same_conversion(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.f(x))

    def build() -> nn.Module:
        return nn.Sequential(nn.Sequential(*(Block() for _ in range(3))))

    model, x = build(), torch.randn(2, 5, 8)
    dr2net.convert(model, probe=lambda model: model(x))
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    dr2net.save(model, tmp_path)
    again = build()
    with pytest.raises(ValueError, match="probe="):
        dr2net.restore(again, tmp_path)
    dr2net.convert(again, probe=lambda model: model(x))
    dr2net.restore(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_a_tensor_under_two_names_is_saved_once_and_restored_under_both(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = build_net(2)
        net.tied = net.head
        return net

    net = converted(build(), 7 / 8, 1 / 8)
    dr2net.save(net, tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) == len(net.state_dict()) - 2
    again = build()
    nn.init.zeros_(again.head.weight)
    dr2net.restore(again, tmp_path)
    assert torch.equal(again.tied.weight, net.head.weight) and again.tied.weight is again.head.weight


def saved_net(folder: Path) -> nn.Module:
    net = converted(build_net(2), 7 / 8, 1 / 8)
    dr2net.save(net, folder)
    return net


def change(folder: Path, **entries: object) -> None:
    path = folder / "dr2net.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def drop(path: Path) -> None:
    path.unlink()


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS = {
    "no weights": (lambda folder: drop(folder / "model.safetensors"), FileNotFoundError, "model.safetensors does not"),
    "no description": (lambda folder: drop(folder / "dr2net.json"), FileNotFoundError, "dr2net.json does not exist"),
    "half the weights": (
        lambda folder: halve(folder / "model.safetensors"),
        ValueError,
        "model.safetensors is damaged",
    ),
    "half the description": (lambda folder: halve(folder / "dr2net.json"), ValueError, "dr2net.json is damaged"),
    "another file": (lambda folder: (folder / "dr2net.json").write_text("[]"), ValueError, "does not describe a conv"),
    "newer": (lambda folder: change(folder, format=2, version="9.1"), ValueError, r"written by dr2net 9\.1.*update"),
    "no sequence": (lambda folder: change(folder, sequences={}), ValueError, "names no reversible sequence"),
    "other sequences": (
        lambda folder: change(
            folder, sequences={"x": json.loads((folder / "dr2net.json").read_text())["sequences"]["blocks"]}
        ),
        ValueError,
        "reversible sequences x of 4 branches; the model has blocks of 4",
    ),
    "other branches": (
        lambda folder: change(
            folder,
            sequences={
                "blocks": {**json.loads((folder / "dr2net.json").read_text())["sequences"]["blocks"], "branches": 2}
            },
        ),
        ValueError,
        "blocks of 2 branches; the model has blocks of 4. Convert",
    ),
    "an option too many": (
        lambda folder: change(
            folder, sequences={"blocks": {"alpha": 1, "beta": [1, 8], "checkpointed": False, "branches": 4, "speed": 3}}
        ),
        ValueError,
        "does not know the options speed: update",
    ),
    "an entry too few": (
        lambda folder: change(folder, sequences={"blocks": {"alpha": 1}}),
        ValueError,
        "damaged.*beta",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_folder_is_named(fault: str, tmp_path: Path) -> None:
    saved_net(tmp_path)
    damage, kind, message = FAULTS[fault]
    damage(tmp_path)
    net = build_net(2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(kind, match=message):
        dr2net.restore(net, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_folder_that_is_none_and_a_model_that_is_not_converted_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        dr2net.restore(build_net(2), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not converted"):
        dr2net.save(build_net(2), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_another_number_of_classes_is_named(kind: str, tmp_path: Path) -> None:
    model, _ = KINDS[kind]()
    dr2net.convert(model)
    dr2net.save(model, tmp_path)
    if kind == "timm":
        model, _ = KINDS[kind]()
        model.reset_classifier(7)
    else:
        config = copy.deepcopy(model.config)
        config.num_labels = 7
        model = type(model)(config)
    with pytest.raises(ValueError, match=r"is \(5, \d+\) there and \(7, \d+\) in the model.*number of classes"):
        dr2net.restore(model, tmp_path)


def test_a_folder_of_another_model_or_of_a_plain_one_is_named(tmp_path: Path) -> None:
    model, _ = huggingface_vit()
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"config\.json has no entry 'dr2net'.*was not converted"):
        dr2net.restore(model, tmp_path / "plain")
    dr2net.convert(model)
    dr2net.save(model, tmp_path / "vit")
    other, _ = FAMILIES["videomae"]()
    with pytest.raises(ValueError, match="VideoMAE"):
        dr2net.restore(other, tmp_path / "vit")
    halve(tmp_path / "vit" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        dr2net.restore(model, tmp_path / "vit")
    saved_net(tmp_path / "toy")
    with pytest.raises(ValueError, match="are of another model: .* are missing"):
        dr2net.restore(build_net(3), tmp_path / "toy")


def test_weights_without_the_coefficients_are_named_when_the_model_runs(tmp_path: Path) -> None:
    saved_net(tmp_path)
    net = build_net(2)
    dr2net.convert(net)
    net.load_state_dict(load_file(tmp_path / "model.safetensors"))
    (message,) = warnings_of(lambda: net(build_input()))
    assert "dr2net.restore(model, folder)" in message


def test_weights_of_another_dtype_are_told(tmp_path: Path) -> None:
    saved_net(tmp_path)
    net = build_net(2, dtype=torch.float32)
    (message,) = warnings_of(lambda: dr2net.restore(net, tmp_path))
    assert "torch.float64" in message and "not bit for bit" in message


@pytest.mark.parametrize("kind", ["toy", "transformers"])
def test_a_sharded_model_is_gathered_and_saved_as_a_whole(kind: str, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model, x = (build_net(2), build_input()) if kind == "toy" else huggingface_vit()
        plain = copy.deepcopy(model)
        dr2net.convert(model)
        dr2net.set_coefficients(model, 7 / 8, 1 / 8)
        for block in model.blocks if kind == "toy" else model.vit.layers:
            fully_shard(block)
        fully_shard(model)
        dr2net.save(model, tmp_path / "saved")
        dr2net.restore(plain, tmp_path / "saved")
        found, expected = plain(x), model(x)
        assert torch.equal(*((found, expected) if kind == "toy" else (found.logits, expected.logits)))
        with pytest.raises(ValueError, match="restore it first, then shard it"):
            dr2net.restore(model, tmp_path / "saved")
    finally:
        dist.destroy_process_group()


def test_saving_again_replaces_what_other_means_wrote(tmp_path: Path) -> None:
    net = saved_net(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    dr2net.set_coefficients(net, 0.5, 0.5)
    dr2net.save(net, tmp_path)
    again = build_net(2)
    dr2net.restore(again, tmp_path)
    assert again.blocks.beta == 0.5 and torch.equal(again(build_input()), net(build_input()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dr2net.json", "model.safetensors"]
