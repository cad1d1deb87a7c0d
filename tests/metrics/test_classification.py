import math

import pytest
import torch

from vitrail.metrics import ClassificationMetrics

# Truth 0, 0, 1, 2; predicted 0, 1, 1, 0. Class 2 is never predicted.
LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
LABELS = torch.tensor([0, 0, 1, 2])


def computed(*batches: slice) -> dict:
    metrics = ClassificationMetrics(3)
    for batch in batches:
        metrics.update(LOGITS[batch], LABELS[batch])
    return metrics.compute()


def test_scores_are_those_counted_by_hand():
    scores = computed(slice(0, 4))
    assert scores["top1"] == pytest.approx(0.5)
    assert scores["top5"] == 1.0, "three classes: the best three hold the truth"
    assert scores["num_images"] == 4
    assert scores["confusion"] == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(LOGITS, LABELS).item())
    first, second, third = scores["per_class"]
    assert first == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert second["recall"] == 1.0
    assert second["precision"] == 0.5
    assert third == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_a_loss_that_is_no_number_is_not_left_out():
    metrics = ClassificationMetrics(3)
    metrics.update(LOGITS, LABELS)
    metrics.update(torch.tensor([[float("nan"), 0.0, 0.0]]), torch.tensor([0]))
    assert math.isnan(metrics.compute()["loss"])


def test_batches_of_any_size_give_the_same_scores():
    whole, parts = computed(slice(0, 4)), computed(slice(0, 1), slice(1, 4))
    assert whole.pop("loss") == pytest.approx(parts.pop("loss"))
    assert whole == parts


def test_top5_needs_the_truth_among_five():
    metrics = ClassificationMetrics(7)
    metrics.update(torch.arange(7.0)[None].repeat(2, 1), torch.tensor([1, 2]))
    assert metrics.compute()["top5"] == 0.5
