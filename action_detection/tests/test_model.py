"""The whole network: backbone and head under every method, its layers, its example batch, and that it learns."""

from dataclasses import replace

import pytest
import torch

from action_detection.configs import ROWS, Config, Detection
from action_detection.head import ActionFormerHead
from action_detection.model import ActionDetector, build_head, build_model, example_batch
from action_detection.vsgn import VSGNHead
from engine.config import METHODS, Method
from engine.training.finetuning import apply_method, set_mode
from engine.training.plan import plan_row

HEADS = {"actionformer": ActionFormerHead, "vsgn": VSGNHead}


def tiny(method: Method = "dr2net", head: str = "actionformer") -> Config:
    """16 steps of 2 frames of 28 x 28 pixels: one thirtieth of the laptop row's work."""
    config = ROWS[f"untrimmed_tiny_{method}"]()
    data = replace(config.data, num_times=16, frames_per_time=2, image_size=28)
    model = replace(config.model, weights=None, head=head, width=32, num_levels=3, attention_span=5)
    return replace(config, data=data, model=model, run=replace(config.run, micro_batch=2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", HEADS)
def test_every_method_applies_keeps_parameter_names_and_trains_what_it_should(head, method):
    torch.manual_seed(0)
    config = tiny(method, head)
    model = build_model(config)
    assert type(model.head) is HEADS[head]
    names = [name for name, _ in model.named_parameters()]
    apply_method(model, config.finetuning)
    set_mode(model, config.finetuning)
    assert [name for name, _ in model.named_parameters()] == names
    batch = example_batch(config)
    batch["video"] = torch.randn_like(batch["video"])
    sum(model.losses(model(batch), batch).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == [
        name for name in names if method == "frozen" and name.startswith("backbone.")
    ]


@pytest.mark.parametrize(("method", "head"), [("dr2net", "actionformer"), ("conventional", "vsgn")])
def test_memory_of_a_row_is_planned_in_its_precision(method, head):
    config = tiny(method, head)
    config = replace(config, optimization=replace(config.optimization, precision="bf16"))
    record = plan_row(config, build_model(config), lambda: example_batch(config))
    assert record.memory["peak"] > record.memory["parameters"] > 0


def test_the_example_batch_has_the_shapes_of_the_row():
    config = tiny()
    batch = example_batch(config)
    assert batch["video"].shape == (2, 3, 32, 28, 28) and batch["mask"].shape == (2, 16)
    for segments, labels in zip(batch["segments"], batch["labels"], strict=True):
        assert len(segments) == len(labels) and labels.max() < config.data.num_classes
        assert (segments[:, 0] < segments[:, 1]).all() and segments.max() <= 16


def test_layers_reach_from_zero_to_the_head():
    model = build_model(tiny())
    assert {model.layer_of(name) for name, _ in model.named_parameters()} == set(range(model.num_layers + 1))
    assert model.layer_of("head.scale") == model.num_layers


def test_a_class_agnostic_row_has_one_class_and_takes_any_label():
    config = tiny()
    config = replace(config, model=replace(config.model, class_agnostic=True))
    head = build_head(config, 8)
    batch = example_batch(config)
    outputs = head(torch.randn(2, 8, 16), batch["mask"])
    assert outputs["logits"].shape[2] == 1
    assert all(loss.isfinite() for loss in head.losses(outputs, batch).values())


class TimeOnly(torch.nn.Module):
    """A backbone whose features are the frames themselves, one of `every`."""

    width, num_layers = 3, 1

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video[:, :, :: self.every]


@pytest.mark.parametrize(("every", "expected"), [(1, [0.5, 2.5, 4.5, 6.5]), (2, [0, 2, 4, 6]), (4, [0, 1, 3, 4])])
def test_features_of_any_rate_are_brought_to_the_steps(every, expected):
    seen = []

    class Keep(torch.nn.Module):
        def forward(self, features: torch.Tensor, mask: torch.Tensor) -> dict:
            seen.append(features)
            return {}

    video = torch.arange(8.0)[None, None, :, None, None].expand(1, 3, 8, 2, 2)
    ActionDetector(TimeOnly(every), Keep())({"video": video, "mask": torch.ones(1, 4, dtype=torch.bool)})
    torch.testing.assert_close(seen[0][0, 0], torch.tensor(expected, dtype=torch.float32))


def test_slowfast_carries_a_head():
    from engine.backbones.slowfast import build_slowfast

    backbone = build_slowfast("slowfast50", weights=None, widths=(16, 2))
    config = tiny()
    model = ActionDetector(backbone, build_head(config, backbone.width))
    batch = example_batch(config)
    batch["video"] = torch.randn(2, 3, 32, 32, 32)
    losses = model.losses(model(batch), batch)
    assert all(loss.isfinite() for loss in losses.values())
    assert {model.layer_of(name) for name, _ in model.named_parameters()} == set(range(model.num_layers + 1))


def test_a_network_trained_on_two_windows_finds_their_actions():
    torch.manual_seed(0)
    config = tiny("conventional")
    model = build_model(config)
    batch = example_batch(config)
    batch["segments"] = [torch.tensor([[2.0, 6.0]]), torch.tensor([[7.0, 14.0]])]
    batch["labels"] = [torch.tensor([3]), torch.tensor([8])]
    batch["video"] = 0.1 * torch.randn_like(batch["video"])
    batch["video"][0, 0, 4:12] += 1  # frames of the steps 2 to 6 turn red
    batch["video"][1, 2, 14:28] += 1  # ... 7 to 14 blue
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 60)
        loss = sum(model.losses(model(batch), batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    windows = model.head.detect(model(batch), batch, Detection())
    for window, expected, label in zip(windows, batch["segments"], (3, 8), strict=True):
        assert window.labels[0] == label and window.scores[0] > 0.3
        torch.testing.assert_close(window.segments[0], expected[0], atol=0.5, rtol=0)
