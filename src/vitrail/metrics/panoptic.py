"""Panoptic quality (Kirillov et al., CVPR 2019, https://arxiv.org/abs/1801.00868, section 4.1), over
torchmetrics."""

from collections.abc import Collection
from typing import Any

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
        per_class, a list of {PQ, SQ, RQ} by label, None where a class does neither."""
        metric: Any = self.metric
        each = metric.compute().tolist()
        with metric.sync_context():
            seen = metric.true_positives + metric.false_positives + metric.false_negatives
        order = [*self.things, *self.stuff, self.none]  # of the library's rows
        there = dict(zip(order, (seen > 0).tolist(), strict=True))
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
        return out


def _pairs(labels: Tensor, ids: Tensor, none: int) -> Tensor:
    return torch.stack([torch.where(labels < 0, none, labels), ids], -1).long()
