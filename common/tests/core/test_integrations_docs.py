"""The code in the README and in docs/ runs as it stands, on tiny models and data under the names that it uses."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_blocks import WIDTH, build_net
from toy_trainers import Task, build_vit, samples
from toy_trainers import batches as lightning_batches
from transformers import Trainer, TrainingArguments

import dr2net

ROOT = Path(__file__).resolve().parents[3]
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def blocks(page: str, heading: str = "") -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(r"```python\n(.*?)```", text[text.index(heading) :], re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the code runs: a folder in which the pretrained network's name leads to a tiny one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # a Trainer of a test before left it, and a state
    AcceleratorState._reset_state(reset_partial_state=True)
    build_vit().vit.save_pretrained(tmp_path / "google" / "vit-base-patch16-224-in21k")
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(code, names)
    return names


def test_the_readmes_first_block_is_short_and_trains(folder: Path) -> None:
    code = blocks("README.md", "## Hugging Face, Lightning, accelerate")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    model = run(code, train=samples(8))["model"].eval()
    assert (model.vit.layers.alpha, model.vit.layers.beta) == (7 / 8, 1 / 8) and model.vit.layers.ran == 4
    again = type(model).from_pretrained(folder / "runs" / "vit" / "final").eval()
    dr2net.restore(again, folder / "runs" / "vit" / "final")
    assert torch.equal(again(IMAGES).logits, model(IMAGES).logits)


def test_the_page_about_transformers(folder: Path) -> None:
    (code,) = blocks("docs/huggingface.md")
    names = run(code, train=samples(16))
    model, again = names["model"].eval(), names["again"].eval()
    assert torch.equal(again(IMAGES).logits, model(IMAGES).logits)
    assert names["trainer"].state.global_step == 4


def test_the_page_about_lightning(folder: Path) -> None:
    (code,) = blocks("docs/lightning.md")
    task = Task()
    run(code, task=task, batches=lightning_batches())
    assert task.net.blocks.beta == 1 / 8 and task.net.blocks.chunk_mib == 64


def test_the_ten_lines_about_accelerate(folder: Path) -> None:
    (code,) = blocks("docs/accelerate.md")
    assert len(code.splitlines()) == 10
    data = DataLoader(TensorDataset(torch.randn(24, 5, WIDTH), torch.arange(24) % 3), batch_size=4)
    seen: list[float] = []

    class Watched(dr2net.Schedule):
        def at(self, progress: float) -> tuple[float, float]:
            seen.append(progress)
            return super().at(progress)

    model = build_net(2, dtype=torch.float32)
    before = model.blocks[0].value.weight.clone()
    schedule = Watched((0.9, 0.1), (0.5, 0.5), until=1.0)
    given = {"model": model, "batches": data, "schedule": schedule}
    run(code, **given, dr2net=dr2net, torch=torch, Accelerator=Accelerator)
    assert seen == [0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3]
    again = build_net(2, dtype=torch.float32)
    dr2net.restore(again, folder / "final")
    assert again.blocks.beta == model.blocks.beta and not torch.equal(again.blocks[0].value.weight, before)


@pytest.mark.parametrize("order", ["peft first", "conversion first"])
def test_the_recipe_of_lora(order: str, folder: Path) -> None:
    import peft

    code, *_ = blocks("docs/lora.md")
    if order == "conversion first":
        lines = code.splitlines(keepends=True)
        lines[1], lines[2] = lines[2], lines[1]
        code = "".join(lines)

    def train(model: nn.Module) -> None:
        arguments = TrainingArguments("runs", max_steps=2, use_cpu=True, report_to=[], learning_rate=0.05)
        Trainer(model, arguments, train_dataset=samples(8)).train()

    from_peft = {"get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig}
    names = run(code, model=build_vit(), base=build_vit(), train=train, dr2net=dr2net, **from_peft)
    model, again = names["model"].eval(), names["again"].eval()
    assert torch.equal(again(IMAGES).logits, model(IMAGES).logits)
    assert not torch.equal(build_vit().eval()(IMAGES).logits, model(IMAGES).logits)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert any("q_proj.base_layer" in name for name in frozen) and not any("lora" in name for name in frozen)
