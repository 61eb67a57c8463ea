"""The planner's methods: predicted is what a real training needs, chunks or not; the user's model stays as it is."""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from dr2net import Options, Schedule, planner
from dr2net.planner import METHODS, RIVALS, Setting, calibrate, phases, predictor

RELATIVE = 0.02  # the promise of the planner
CHUNKS = Options(chunk_mib=0.25, recompute_rest=True)  # each branch of the first stage in more than three pieces


def small_vit() -> tuple[nn.Module, tuple[int, ...]]:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=96, embed_dim=96, num_classes=10)
    return model.train(), (16, 3, 96, 96)


def small_swin3d() -> tuple[nn.Module, tuple[int, ...]]:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    model = SwinTransformer3d([2, 4, 4], 24, [2, 2], [2, 4], [4, 7, 7], num_classes=10, stochastic_depth_prob=0.1)
    return model.train(), (2, 3, 8, 56, 56)


@pytest.mark.parametrize(("build", "precision"), [(small_vit, "bf16"), (small_swin3d, "fp32")])
def test_predicted_is_measured_for_every_method(build: Callable, precision: str) -> None:
    pytest.importorskip("peft", reason="LoRA is optional: pip install 'dr2net[lora]'")
    model, shape = build()
    for method in (*METHODS, *(rival for rival in RIVALS if rival.endswith("offloaded"))):
        setting = Setting(precision, options=CHUNKS)
        predicted, measured = calibrate(model, method, setting, shape, "cpu")
        assert predicted.host == measured.host and (predicted.host is None) == ("offloaded" not in method)
        for name in ("peak", "parameters", "gradients", "optimizer", "activations", "temporaries"):
            close = pytest.approx(getattr(measured, name), rel=RELATIVE, abs=RELATIVE * measured.peak)
            assert getattr(predicted, name) == close, (method, name)


def test_planning_leaves_the_model_alone_and_works_without_its_memory() -> None:
    model, shape = small_swin3d()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    methods = ("conventional", "checkpointed", "dr2net", "dr2net, chunks")
    peaks = {m: predictor(model, m, Setting(options=CHUNKS))(shape).peak for m in methods}
    assert type(model.features[0]) is nn.Sequential and model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.device("meta"):
        on_meta, _ = small_swin3d()
    assert peaks == {m: predictor(on_meta, m, Setting(options=CHUNKS))(shape).peak for m in peaks}
    assert peaks["dr2net, chunks"] < peaks["dr2net"] and peaks["checkpointed"] < peaks["conventional"]


def test_lora_trains_only_what_stands_beside_the_linear_layers() -> None:
    pytest.importorskip("peft", reason="LoRA is optional: pip install 'dr2net[lora]'")
    model, shape = small_vit()
    planner.apply(model, "lora", Setting())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    linear = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert trained == {f"blocks.{i}.{n}.lora_{x}.default.weight" for i in range(3) for n in linear for x in "AB"}
    assert model.blocks[0].attn.qkv.lora_A["default"].weight.shape == (planner.LORA_RANK, 96)
    model(torch.randn(2, *shape[1:])).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lora_without_peft_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'dr2net\[lora\]'"):
        predictor(small_vit()[0], "lora", Setting())


def test_tied_parameters_stay_tied_in_every_method() -> None:
    model, shape = small_vit()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for method in ("conventional", "checkpointed", "dr2net"):
        assert predictor(model, method, Setting())(shape).parameters == size


def test_phases_are_where_the_bits_change() -> None:
    schedule = Schedule(start=(1, 0), end=(0, 1), until=1)
    found = phases(schedule, Setting())
    kept = list(dict.fromkeys(phase.kept for phase in found))
    assert kept[0] == "its input" and kept[-4:] == ["3 bits", "2 bits", "1 bit", "nothing"]
    assert [phase.kept for phase in phases(schedule, Setting(options=Options(inversion="float")))] == [
        "its input",
        "nothing",
        "nothing",
    ]
    anchored = [phase.kept for phase in phases(schedule, Setting(options=Options(inversion="anchored")))]
    assert anchored[1] == "2 streams / 1" and anchored[-1] == "nothing"
    assert len(phases(Schedule.constant(7 / 8, 1 / 8), Setting())) == 1
    assert len(phases(Schedule(start=(0.75, 0.25), end=(0.7, 0.3), until=1), Setting())) == 2  # 1/4 divides simply


def test_many_chunks_are_predicted_from_two() -> None:
    model, shape = small_swin3d()
    calls = []
    model.features[0][0].mlp[0].register_forward_hook(lambda *a: calls.append(1))
    predictor(model, "dr2net, chunks", Setting(options=replace(CHUNKS, chunk_mib=0.01)))(shape)
    assert len(calls) <= 2 * 2 * 2  # forward and recomputation, two chunks; hooks of a copied model are copied
