"""What the examples share: batches, learning rates, and that checkpointing computes what it replaces."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dr2net
from engine.config import Finetuning
from examples.compare import Classifier, Data, Example, Recipe, _rate, _shuffled, evaluate, train


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


dr2net.branches_of.register(Block, lambda block: (dr2net.Branch("f", block.f, (block.f,)),))


class Points:
    """Two classes of points; of the k-th the cost is 100 - k."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(count, 6, generator=generator)
        self.labels = (self.points[:, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return {"x": self.points[indices]}

    def in_order(self) -> Tensor:
        return torch.arange(len(self)).flip(0)


def example(count: int = 100) -> Example:
    points = Points(count)
    return Example(
        "toy",
        "examples.compare",
        Recipe(steps=20, batch=8, learning_rate=1e-2),
        Data(points, points, 2, {}),
        lambda: Classifier(
            nn.Sequential(*(Block() for _ in range(3))), lambda backbone, batch: backbone(batch["x"]), 6, 2
        ),
    )


def recipe(method: str, steps: int = 20) -> Recipe:
    return replace(example().recipe, steps=steps, finetuning=Finetuning(method=method))


def test_checkpointing_computes_what_conventional_finetuning_computes_and_others_do_not() -> None:
    found = {m: train(example(), recipe(m)) for m in ("conventional", "checkpointed", "reversible", "frozen")}
    plain = found["conventional"]
    assert found["checkpointed"].curve == plain.curve and found["checkpointed"].metrics == plain.metrics
    assert found["reversible"].curve != plain.curve != found["frozen"].curve
    assert plain.curve[0]["loss"] > plain.curve[-1]["loss"] and plain.metrics["accuracy"] > 60


def test_a_seed_gives_the_same_run_and_another_one_another() -> None:
    first, second = train(example(), recipe("dr2net")), train(example(), recipe("dr2net"))
    assert first.curve == second.curve and first.metrics == second.metrics
    base = recipe("dr2net")
    assert train(example(), replace(base, run=replace(base.run, seed=1))).curve != first.curve


def test_a_round_has_each_sample_once_in_batches_of_equal_cost() -> None:
    points, own = Points(100), replace(recipe("frozen"), batch=5)
    batches = _shuffled(points, own)
    first = [next(batches) for _ in range(20)]
    assert sorted(torch.cat(first).tolist()) == list(range(100))
    assert all(len(batch) == 5 for batch in first) and torch.cat(first).tolist() != list(range(100))
    spread = sum(int(batch.max() - batch.min()) for batch in first) / len(first)
    assert spread < 30  # of 40 that are drawn together the neighbors; without that about 67
    assert [b.tolist() for b in first] != [next(batches).tolist() for _ in range(20)]
    with pytest.raises(ValueError, match="4 training samples are fewer than a batch of 5"):
        next(_shuffled(Points(4), own))


def test_the_learning_rate_rises_along_a_line_and_falls_along_a_cosine() -> None:
    own = recipe("frozen", steps=10)
    rates = [_rate(number, own) for number in range(10)]
    assert rates[0] == rates[1] == 1.0 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.1
    slow = replace(own, warmup=0.5)
    assert [_rate(number, slow) for number in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_accuracy_counts_every_sample_once() -> None:
    model, points = example().build().eval(), Points(70)
    right = (model({"x": points.points}).argmax(1) == points.labels).float().mean()
    assert evaluate(model, points, batch=16) == pytest.approx(100 * float(right))


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(FloatingPointError, match="lower the learning rates"):
        train(example(), replace(recipe("conventional"), learning_rate=1e30, head_learning_rate=1e30))
