"""Panoptic quality, against the paper's formula written out."""

import math

import numpy as np
import pytest
import torch

from vitrail.metrics.panoptic import PanopticMetrics

K, STUFF = 4, (0, 2)


def scene(seed, shape=(9, 12)):
    """Labels and ids of an image of rectangles, some pixels without a class."""
    rng = np.random.default_rng(seed)
    labels = np.full(shape, int(rng.choice(STUFF)))
    ids = np.zeros(shape, int)
    for number in range(1, 6):
        y, x = rng.integers(0, shape[0] - 3), rng.integers(0, shape[1] - 4)
        here = np.s_[y : y + rng.integers(2, 6), x : x + rng.integers(2, 7)]
        labels[here] = label = int(rng.integers(-1, 3))  # class 3 never occurs
        ids[here] = 0 if label in STUFF else number
    return labels, ids


def moved(labels, ids):
    return np.roll(labels, 1, 1), np.roll(ids, 1, 1)


def by_hand(pairs):
    """Of each class the sum of IoUs, and how many are found, too many and missed."""
    counts = {k: [0.0, 0, 0, 0] for k in range(K)}
    for said, truth in pairs:
        segments = []
        for labels, ids in (said, truth):
            found = {
                (k, i) for k, i in zip(labels.ravel().tolist(), ids.ravel().tolist(), strict=True)
            }
            segments.append({c: (labels == c[0]) & (ids == c[1]) for c in found if c[0] >= 0})
        unlabelled = truth[0] < 0
        matched = set(), set()
        for a, mask in segments[0].items():
            for b, own in segments[1].items():
                union = (mask & ~unlabelled) | own
                iou = (mask & own).sum() / union.sum()
                if a[0] == b[0] and iou > 0.5:
                    counts[a[0]][0] += iou
                    counts[a[0]][1] += 1
                    matched[0].add(a)
                    matched[1].add(b)
        for a, mask in segments[0].items():
            if a not in matched[0] and (mask & unlabelled).sum() / mask.sum() <= 0.5:
                counts[a[0]][2] += 1
        for b in segments[1]:
            counts[b[0]][3] += b not in matched[1]
    return counts


def test_every_figure_is_the_papers():
    pairs = [(moved(*scene(s)), scene(s)) for s in range(4)] + [(scene(9), scene(10))]
    metrics = PanopticMetrics(K, STUFF)
    for said, truth in pairs:
        metrics.update(*(tuple(map(torch.from_numpy, of)) for of in (said, truth)))
    got = metrics.compute()
    rows = {}
    for k, (total, found, more, missed) in by_hand(pairs).items():
        if found + more + missed:
            sq, rq = total / found if found else 0.0, found / (found + (more + missed) / 2)
            rows[k] = (sq * rq, sq, rq)
    assert sorted(rows) == [0, 1, 2]
    assert all(0 < value < 1 for row in rows.values() for value in row)
    for k in range(K):
        each = got["per_class"][k]
        assert (each is None) == (k not in rows)
        if each is not None:
            assert tuple(each[n] for n in ("PQ", "SQ", "RQ")) == pytest.approx(rows[k])
    for suffix, labels in (("", (0, 1, 2)), ("_things", (1,)), ("_stuff", STUFF)):
        mean = np.mean([rows[k] for k in labels], 0)
        assert [got[n + suffix] for n in ("PQ", "SQ", "RQ")] == pytest.approx(mean.tolist())


def test_a_class_that_is_always_missed_counts_as_nothing_and_one_that_is_not_there_not_at_all():
    metrics = PanopticMetrics(3, (0,))
    truth = torch.zeros(4, 4, dtype=torch.long)
    truth[0, 0] = 1
    ids = (truth == 1).long()
    metrics.update((torch.zeros_like(truth), torch.zeros_like(ids)), (truth, ids))
    got = metrics.compute()
    assert got["per_class"] == [
        {"PQ": pytest.approx(15 / 16), "SQ": pytest.approx(15 / 16), "RQ": 1.0},
        {"PQ": 0.0, "SQ": 0.0, "RQ": 0.0},
        None,
    ]
    assert got["PQ"] == pytest.approx(15 / 32)
    assert got["PQ_things"] == 0


def test_without_things_there_is_no_mean_of_them():
    metrics = PanopticMetrics(1, (0,))
    whole = torch.zeros(2, 3, dtype=torch.long)
    metrics.update((whole, whole), (whole, whole))
    assert metrics.compute()["PQ"] == 1
    assert math.isnan(metrics.compute()["PQ_things"])


def test_who_says_nothing_of_half_an_object_has_half_of_it():
    metrics = PanopticMetrics(2, (0,))
    truth, ids = torch.ones(2, 10, dtype=torch.long), torch.ones(2, 10, dtype=torch.long)
    said = truth.clone()
    said[:, 6:] = -1
    metrics.update((said, ids), (truth, ids))
    assert metrics.compute()["per_class"][1]["SQ"] == pytest.approx(0.6)
