"""Recall of captions and images, against torchmetrics and by hand."""

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate

from vitrail.metrics import retrieval
from vitrail.metrics.retrieval import ranks, recall


@pytest.mark.parametrize("at_once", [2, 1000])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_recall_is_torchmetrics_hit_rate(at_once, most, monkeypatch):
    monkeypatch.setattr(retrieval, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    queries, answers = rng.normal(size=(9, 4)), rng.normal(size=(7, 4))
    groups, wanted = np.array([0, 1, 1, 2, 3, 0, 3]), rng.integers(0, 4, 9)
    found = recall(ranks(queries, answers, wanted, groups), most)
    hits = RetrievalHitRate(top_k=most)
    index = torch.arange(9).repeat_interleave(7)
    right = torch.from_numpy(wanted[:, None] == groups)
    want = hits(torch.from_numpy(queries @ answers.T).flatten(), right.flatten(), index)
    assert found == pytest.approx(float(want))


def test_the_best_of_several_right_answers_counts():
    queries, answers = np.array([[1.0]]), np.array([[0.3], [0.9], [0.5], [0.1]])
    assert ranks(queries, answers, np.array([7]), np.array([7, 0, 7, 1])).tolist() == [1]


def test_who_says_the_same_of_everything_finds_nothing():
    queries, answers = np.ones((3, 2)), np.ones((3, 2))
    found = ranks(queries, answers, np.arange(3), np.arange(3))
    assert found.tolist() == [2, 2, 2]
    assert recall(found, 1) == 0
