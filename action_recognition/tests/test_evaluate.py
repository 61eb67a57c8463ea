"""The metric, against hand-made cases and an independent definition."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from action_recognition import evaluate
from action_recognition.configs import ROWS
from action_recognition.evaluate import View, collect, merge, write

CONFIG = ROWS["motion_tiny_dr2net"]()
NAMES = [f"class {k}" for k in range(10)]


def score(views: list[View]) -> dict[str, float]:
    return evaluate.score(views, NAMES, CONFIG)


def view(name: str, number: int, label: int, probabilities: list[float]) -> View:
    return View(name, number, label, torch.tensor(probabilities))


def test_probabilities_and_not_votes_are_averaged_over_views():
    views = [view("a", 0, 0, [0.4, 0.6]), view("a", 1, 0, [0.45, 0.55]), view("a", 2, 0, [0.9, 0.1])]
    metrics = score(views)
    assert metrics["top1"] == 100
    assert metrics["top1_single_view"] == pytest.approx(100 / 3)
    assert metrics["views"] == 3


def test_top5_of_three_classes_is_everything():
    assert score([view("a", 0, 2, [0.5, 0.3, 0.2])])["top5"] == 100


def test_equal_probabilities_score_nothing():
    assert score([view(str(k), 0, k, [0.25] * 4) for k in range(4)])["top1"] == 0


def test_a_view_seen_twice_counts_once():
    views = [view("a", 0, 0, [0.9, 0.1]), view("a", 1, 0, [0.2, 0.8])]
    assert score(views + views[1:]) == score(views)


def test_order_of_views_and_videos_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    views = [View(str(i // 3), i % 3, i // 3 % 4, torch.rand(4, generator=generator).softmax(0)) for i in range(30)]
    assert score(views) == score(views[::-1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(2, 9), st.integers(1, 4))
def test_scores_equal_those_of_a_sort(seed: int, num_videos: int, num_classes: int, num_views: int):
    rng = np.random.default_rng(seed)
    answers = rng.dirichlet(np.ones(num_classes), (num_videos, num_views)).astype(np.float32)
    labels = rng.integers(num_classes, size=num_videos)
    views = [
        View(str(i), j, int(labels[i]), torch.from_numpy(answers[i, j]))
        for i in range(num_videos)
        for j in range(num_views)
    ]
    order = np.argsort(-torch.from_numpy(answers).mean(1).numpy(), axis=1)
    for k in (1, 5):
        expected = 100 * np.mean([labels[i] in order[i, :k] for i in range(num_videos)])
        assert score(views)[f"top{k}"] == pytest.approx(expected)


def test_nan_and_contradicting_labels_and_absent_classes_are_errors():
    with pytest.raises(ValueError, match="not finite"):
        score([view("a", 0, 0, [float("nan"), 1])])
    with pytest.raises(ValueError, match="labels"):
        merge([view("a", 0, 0, [0.5, 0.5]), view("a", 1, 1, [0.5, 0.5])])
    with pytest.raises(ValueError, match="num_classes"):
        score([view("a", 0, 7, [0.5, 0.5])])
    with pytest.raises(ValueError, match="empty"):
        score([])


def test_collect_softmaxes_logits_and_does_not_depend_on_the_batch_size():
    def network(batch: dict) -> dict:
        return {"logits": batch["video"]}

    logits = torch.tensor([[9.0, 0, 0], [0, 3, 2.9], [0, 1, 0], [5, 0, 4.9]])
    labels, names, numbers = torch.tensor([0, 2, 2, 2]), ["a", "b", "b", "c"], torch.tensor([0, 0, 1, 0])

    def batches(size: int) -> list[dict]:
        cuts = [slice(i, i + size) for i in range(0, 4, size)]
        return [{"video": logits[c], "label": labels[c], "name": names[c], "view": numbers[c]} for c in cuts]

    one, four = ([v for batch in batches(size) for v in collect(network, batch, CONFIG)] for size in (1, 4))
    assert all(float(v.probabilities.sum()) == pytest.approx(1) for v in four)
    assert score(one) == score(four)
    assert score(four)["top1"] == pytest.approx(100 / 3)


def test_predictions_are_written_best_first(tmp_path):
    path = write(tmp_path, [view("a", 0, 1, [0.2, 0.7, 0.1])], ["up", "down", "left"], CONFIG)
    entry = json.loads(path.read_text())["a"]
    assert entry["label"] == "down"
    assert [name for name, _ in entry["top5"]] == ["down", "up", "left"]
