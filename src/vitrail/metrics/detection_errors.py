"""What kinds of mistakes a detector makes, and what each costs: TIDE (Bolya et al., ECCV 2020,
https://arxiv.org/abs/2008.08115).

Every wrong answer is of one kind, decided by the box of an object that it overlaps most (section 2.2):

- classification: well placed on an object of another class,
- localisation: of the right class, but too far off,
- both: some overlap with an object, but neither class nor place is right,
- duplicate: right, but a better answer already has the object,
- background: no object there;

and missed are the objects that no answer found, unless one of the first two kinds would have, once put right.
What a kind costs is the gain in AP50 once an oracle puts right all mistakes of that kind alone (section 2.3).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vitrail.boxes import iou as box_iou

FOREGROUND, BACKGROUND = 0.5, 0.1  # the paper's t_f and t_b
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
RIGHT, IGNORED = -1, -2  # of answers that are no mistakes
_CLASS, _PLACE, _BOTH, _DUPLICATE, _BACKGROUND = range(5)


def error_breakdown(rows: Sequence[Any], num_classes: int, cap: int) -> dict[str, dict[str, Any]]:
    """Of each of KINDS its `count` and its cost `dAP50`; of boxes, whatever else the model gives.

    rows: (Found, Annotated) of each image. cap: how many answers of an image count, the best first.
    """
    scores, labels, kinds, fixed, owners = [], [], [], [], []
    positives, missed = np.zeros(num_classes, int), np.zeros(num_classes, int)
    for found, truth in rows:
        best = np.argsort(-found.scores, kind="stable")[:cap]
        own = found.labels[best]
        kind, target = mistakes(found.boxes[best], own, truth)
        scores.append(found.scores[best])
        labels.append(own)
        kinds.append(kind)
        real = truth.labels[~truth.crowd]
        positives += np.bincount(real, minlength=num_classes)
        # Of several mistakes that could find an object, once put right, the best one does; an object that is
        # found needs none.
        repairs = np.zeros(len(best), bool)
        repairs[_first_of_each(target)] = True
        repairs &= target >= 0
        fixed.append(repairs)
        owners.append(np.where(repairs, truth.labels[target], own) if len(truth.labels) else own)
        left = ~truth.crowd
        left[target[(kind == RIGHT) | repairs]] = False
        missed += np.bincount(truth.labels[left], minlength=num_classes)

    def joined(parts: list[Any], kind: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, kind), *parts]).astype(kind)

    score, label, kind = joined(scores, float), joined(labels, int), joined(kinds, int)
    repaired, new_label = joined(fixed, bool), joined(owners, int)
    right, counts = kind == RIGHT, kind != IGNORED
    now = _ap50(score[counts], label[counts], right[counts], positives)
    out = {}
    for number, name in enumerate(KINDS[:-1]):
        mine = kind == number
        kept = counts & (~mine | repaired)
        better = np.where(mine & repaired, new_label, label)
        ap = _ap50(score[kept], better[kept], (right | (mine & repaired))[kept], positives)
        out[name] = {"count": int(mine.sum()), "dAP50": ap - now}
    ap = _ap50(score[counts], label[counts], right[counts], positives - missed)
    out["missed"] = {"count": int(missed.sum()), "dAP50": ap - now}
    return out


def mistakes(boxes: np.ndarray, labels: np.ndarray, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of answers, best first: the kind of each (a place in KINDS, RIGHT or IGNORED), and the object that it
    found, or would find once put right (classification, localisation, and nobody else did); -1: none.
    """
    kind, target = np.full(len(boxes), _BACKGROUND), np.full(len(boxes), -1)
    if not len(boxes) or not len(truth.labels):
        return kind, target
    overlap = box_iou(_tensor(boxes), _tensor(truth.boxes)).numpy()
    inside = _share_inside(boxes, truth.boxes[truth.crowd])
    crowd_labels = truth.labels[truth.crowd]
    overlap[:, truth.crowd] = 0
    same = labels[:, None] == truth.labels
    used = truth.crowd.copy()
    for i, (row, alike) in enumerate(zip(overlap, same, strict=True)):
        free = np.where(alike & ~used, row, 0)
        # The last of equals, as in COCO's matching.
        at = len(free) - 1 - int(free[::-1].argmax())
        if free[at] >= FOREGROUND:
            kind[i], target[i], used[at] = RIGHT, at, True
        elif (inside[i][labels[i] == crowd_labels] >= FOREGROUND).any():
            kind[i] = IGNORED
    for i in np.flatnonzero(kind == _BACKGROUND):
        row, alike = overlap[i], same[i]
        own, other = np.where(alike, row, 0), np.where(alike, 0, row)
        place, strange = int(own.argmax()), int(other.argmax())
        if BACKGROUND <= own[place] < FOREGROUND:
            kind[i], target[i] = _PLACE, -1 if used[place] else place
        elif own[place] >= FOREGROUND:  # and in use, else it were right
            kind[i] = _DUPLICATE
        elif other[strange] >= FOREGROUND:
            kind[i], target[i] = _CLASS, -1 if used[strange] else strange
        elif row.max() > BACKGROUND:
            kind[i] = _BOTH
    return kind, target


def _first_of_each(target: np.ndarray) -> np.ndarray:
    return np.unique(target, return_index=True)[1]


def _share_inside(boxes: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """(D, C) share of each box that lies within each crowd."""
    low = np.maximum(boxes[:, None, :2], crowds[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], crowds[None, :, 2:])
    common = (high - low).clip(min=0).prod(-1)
    own = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1)[:, None]
    return np.divide(common, own, out=np.zeros_like(common), where=own > 0)


def _ap50(
    scores: np.ndarray, labels: np.ndarray, right: np.ndarray, positives: np.ndarray
) -> float:
    """Mean over the classes with objects of the mean precision at 101 recalls."""
    order = np.argsort(-scores, kind="stable")
    labels, right = labels[order], right[order]
    found = []
    for label in np.flatnonzero(positives > 0):
        hits = np.cumsum(right[labels == label])
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(hits / positives[label], np.linspace(0, 1, 101), side="left")
        found.append(np.where(at < len(hits), np.append(precision, 0)[at], 0).mean())
    return float(np.mean(found)) if found else 0.0


def _tensor(boxes: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.asarray(boxes), dtype=torch.float64)
