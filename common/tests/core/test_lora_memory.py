"""LoRA inside reversible blocks needs the memory that docs/lora.md says; peft's adapters get the right gradients."""

import re
from pathlib import Path

import peft
import pytest
import torch
from model_zoo import FAMILIES
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import dr2net
from dr2net.memory import format_bytes, predict
from dr2net.planner import loss_of

ROOT = Path(__file__).resolve().parents[3]
COLUMNS = ("peak", "parameters", "gradients", "optimizer", "stored", "temporaries")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], use_dora=True),
    "bias": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "fc1"], feedforward_modules=["fc1"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj", "fc1"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj", "fc1"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj", "fc1"], total_step=10, init_r=2, target_r=1),
    "norms": lambda: peft.LNTuningConfig(target_modules=["layernorm_before", "layernorm_after"]),
    "target_parameters": lambda: peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["layers.0.attention.q_proj.weight"]
    ),
}


@pytest.mark.parametrize("first", ["peft", "conversion"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_inside_blocks_get_the_gradients_of_stored_activations(adapter: str, first: str) -> None:
    torch.manual_seed(0)
    model, x = FAMILIES["huggingface_vit"]()
    if first == "conversion":
        dr2net.convert(model)
    model = peft.get_peft_model(model, ADAPTERS[adapter]())
    if first == "peft":
        dr2net.convert(model)
    dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.1)
    found = dr2net.verify(model.train(), x, lambda model, x: model(x).logits.square().mean())
    assert found.ok, str(found)
    assert found.branches == 6 and found.parameters == len(trained)


def build(method: str) -> nn.Module:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**sizes, num_labels=10)).train()
        if "LoRA" in method:
            lora = peft.LoraConfig(
                r=8, target_modules="all-linear", exclude_modules=["classifier"], modules_to_save=["classifier"]
            )
            model = peft.get_peft_model(model, lora)
    if "checkpointing" in method:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if "Dr2Net" in method:
        dr2net.convert(model, chunk_mib=8 if "chunks" in method else None)
        dr2net.set_coefficients(model, 7 / 8, 1 / 8)
    return model


@pytest.mark.slow
def test_the_table_of_the_page_about_lora_is_predicted() -> None:
    rows = re.findall(r"^\| ((?:full|LoRA)[^|]*) \| (.*) \|$", (ROOT / "docs" / "lora.md").read_text(), re.MULTILINE)
    assert len(rows) == 5
    for method, cells in rows:
        model = build(method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            loss_of(model, torch.randn(8, 3, 224, 224), "fp32").backward()
            optimizer.step()
            optimizer.zero_grad()

        found = predict(step, model, optimizer)
        assert [format_bytes(getattr(found, name)) for name in COLUMNS] == cells.split(" | "), method
