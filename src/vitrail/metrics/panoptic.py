"""Panoptic quality (Kirillov et al., CVPR 2019, https://arxiv.org/abs/1801.00868, section 4.1), over
torchmetrics."""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class PanopticMetrics:
    """Of classes 0 to num_classes - 1, image by image; keeps sums alone, over all processes.

    A segment is found where it and one of its class have more than half in common (IoU). SQ is the mean IoU
    of those found, RQ their F1, PQ the product.
    """

    def __init__(
        self, num_classes: int, stuff: Collection[int], device: torch.device | str = "cpu"
    ) -> None:
        from torchmetrics.detection import PanopticQuality  # takes seconds to import

        self.things = [k for k in range(num_classes) if k not in stuff]
        self.stuff = sorted(stuff)
        # In an answer "none" is one more class of stuff: what the library takes for unlabelled it leaves out
        # of the unions, in answers too, and who says nothing of half an object would have all of it.
        self.none = num_classes
        self.metric = PanopticQuality(
            set(self.things),
            {*self.stuff, self.none},
            return_sq_and_rq=True,
            return_per_class=True,
        ).to(device)

    def update(self, said: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
        """Both (labels, ids), each (H, W) integers; a label of -1 is none."""
        both = _pairs(*said, self.none), _pairs(*truth, self.none + 1)
        self.metric.update(*(of[None].to(self.metric.device) for of in both))

    def compute(self) -> dict[str, Any]:
        """PQ, SQ, RQ and those of things and of stuff, means over the classes that occur or were said; and
        per_class, a list of {PQ, SQ, RQ} by label, None where a class does neither; and counts, by label how
        many segments are (found, wrong, missed)."""
        metric: Any = self.metric
        each = metric.compute().tolist()
        with metric.sync_context():
            sums = (metric.true_positives, metric.false_positives, metric.false_negatives)
            seen = torch.stack(sums, -1).round().long()
        order = [*self.things, *self.stuff, self.none]  # of the library's rows
        there = dict(zip(order, (seen.sum(-1) > 0).tolist(), strict=True))
        counts = dict(zip(order, map(tuple, seen.tolist()), strict=True))
        by_label = dict(zip(order, each, strict=True))
        names = ("PQ", "SQ", "RQ")
        out: dict[str, Any] = {}
        for suffix, labels in (
            ("", [*self.things, *self.stuff]),
            ("_things", self.things),
            ("_stuff", self.stuff),
        ):
            rows = [by_label[k] for k in labels if there[k]]
            for i, name in enumerate(names):
                out[name + suffix] = sum(r[i] for r in rows) / len(rows) if rows else float("nan")
        out["per_class"] = [
            dict(zip(names, by_label[k], strict=True)) if there[k] else None
            for k in range(self.none)
        ]
        out["counts"] = [counts[k] for k in range(self.none)]
        return out


def _pairs(labels: Tensor, ids: Tensor, none: int) -> Tensor:
    return torch.stack([torch.where(labels < 0, none, labels), ids], -1).long()


class Counted(NamedTuple):
    """Segments of one image: how many there are, how many of them are found, how many answers are wrong, and
    the panoptic quality of all of them as of one class; NaN where there is neither segment nor answer."""

    segments: int
    found: int
    wrong: int
    PQ: float


def counted(
    said: np.ndarray, said_labels: np.ndarray, truth: np.ndarray, true_labels: np.ndarray
) -> Counted:
    """said, truth: (H, W), n + 1 where segment n is, 0 for none, which in the truth is not counted."""
    mine, own = len(said_labels) + 1, len(true_labels) + 1
    both = np.bincount((truth.astype(np.int64) * mine + said).ravel(), minlength=mine * own)
    both = both.reshape(own, mine)
    area, unknown = both.sum(0)[1:], both[0, 1:]
    union = both.sum(1)[1:, None] + (area - unknown)[None] - both[1:, 1:]
    iou = both[1:, 1:] / np.maximum(union, 1)
    pairs = (iou > 0.5) & (np.asarray(true_labels)[:, None] == np.asarray(said_labels)[None])
    there = both.sum(1)[1:] > 0
    found, shown = int(pairs.sum()), (area > 0) & (unknown <= area / 2)
    wrong = int((shown & ~pairs.any(0)).sum())
    half = (found + wrong + int(there.sum())) / 2
    quality = float(iou[pairs].sum()) / half if half else float("nan")
    return Counted(int(there.sum()), found, wrong, quality)
