"""Scores equal scikit-learn's: labels unbalanced, classes absent or never predicted, ties."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
)

from vitrail.metrics import ClassificationMetrics
from vitrail.metrics.classification import rank_of
from vitrail_runtime.errors import InputError, NotFinite

# Truth 0, 0, 1, 2; predicted 0, 1, 1, 0. Class 2 is never predicted.
LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
LABELS = torch.tensor([0, 0, 1, 2])


def computed(logits: torch.Tensor, labels: torch.Tensor, *cuts: int) -> dict:
    """Scores of what is given in batches that end at `cuts`."""
    metrics = ClassificationMetrics(logits.shape[1])
    for x, y in zip(logits.tensor_split(cuts), labels.tensor_split(cuts), strict=True):
        metrics.update(x, y)
    return metrics.compute()


def unbalanced(num_classes: int, *, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """97 answers: class 0 is half of the truth, class 1 is absent, the last one is never predicted."""
    rng = np.random.default_rng(num_classes)
    share = np.r_[8, 0, np.ones(num_classes - 2)]
    labels = rng.choice(num_classes, 97, p=share / share.sum())
    logits = rng.normal(size=(97, num_classes))
    logits[np.arange(97), labels] += 1
    logits[:, -1] -= 20
    if ties:
        logits = logits.round()
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels)


def test_scores_are_those_counted_by_hand():
    scores = computed(LOGITS, LABELS)
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


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_classes", [3, 5, 6, 12])
def test_scores_are_scikit_learns(num_classes, ties):
    logits, labels = unbalanced(num_classes, ties=ties)
    scores = computed(logits, labels, 10, 11, 60)
    x, y = logits.double().numpy(), labels.numpy()
    predicted, every = x.argmax(1), np.arange(num_classes)
    assert not (y == 1).any()
    assert not (predicted == num_classes - 1).any()

    assert scores["confusion"] == confusion_matrix(y, predicted, labels=every).tolist()
    assert scores["top1"] == pytest.approx(accuracy_score(y, predicted), abs=1e-6)
    probabilities = np.exp(log_softmax(x, axis=1))
    assert scores["loss"] == pytest.approx(log_loss(y, probabilities, labels=every), abs=1e-5)
    theirs = precision_recall_fscore_support(y, predicted, labels=every, zero_division=0)
    ours = [[c[k] for c in scores["per_class"]] for k in ("precision", "recall", "f1", "support")]
    np.testing.assert_allclose(ours, np.array(theirs), atol=1e-6)
    # Of equal logits the first class is the better one.
    best = np.argsort(-x, axis=1, kind="stable")[:, :5]
    assert scores["top5"] == pytest.approx((best == y[:, None]).any(1).mean(), abs=1e-6)
    assert scores["num_images"] == 97


def test_a_model_that_says_the_same_of_every_class_has_the_first_five_right():
    scores = computed(torch.zeros(12, 12), torch.arange(12))
    assert scores["top1"] == pytest.approx(1 / 12)
    assert scores["top5"] == pytest.approx(5 / 12)


def test_the_rank_is_counted_on_the_device_of_the_logits():
    # A device that knows shapes alone does not mix with the processor either.
    ranks = rank_of(LABELS.to("meta"), LOGITS.to("meta"))
    assert (ranks.device.type, ranks.shape) == ("meta", (4,))


def test_batches_of_any_size_give_the_same_scores():
    whole, parts = computed(LOGITS, LABELS), computed(LOGITS, LABELS, 1)
    assert whole.pop("loss") == pytest.approx(parts.pop("loss"))
    assert whole == parts


def test_scores_of_half_precision_logits_are_computed_in_full_precision():
    logits, labels = unbalanced(6)
    half = logits.bfloat16()
    assert computed(half, labels) == computed(half.float(), labels)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused_with_how_many_images_have_them(bad):
    logits, labels = LOGITS.clone(), LABELS
    logits[1, 2], logits[2] = bad, bad
    assert issubclass(NotFinite, InputError)
    with pytest.raises(NotFinite, match=r"not finite .* on 2 of 4 images; .*--lr"):
        computed(logits, labels, 2)


def test_a_loss_beyond_all_numbers_is_not_left_out():
    far = torch.tensor([[3e38, -3e38, 0.0]])
    scores = computed(torch.cat([LOGITS, far]), torch.cat([LABELS, torch.tensor([1])]))
    assert scores["loss"] == math.inf
