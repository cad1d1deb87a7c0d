"""Classification scores: thin over torchmetrics."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from vitrail_runtime.errors import NotFinite


class ClassificationMetrics:
    """Accumulates batches; `compute` sums up, over all processes where there are several.

    top5 counts the five best classes, or all of them where there are fewer. Of equal logits the first class
    is the better one, as in argmax. Precision of a class that is never predicted and recall of one without
    images are 0.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        each: dict[str, Any] = {"num_classes": num_classes, "average": None}
        self.loss = MeanMetric(nan_strategy="disable").to(device)
        self.top5 = MeanMetric(nan_strategy="disable").to(device)
        self.not_finite = SumMetric(nan_strategy="disable").to(device)
        self.scores = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro"),
                "precision": MulticlassPrecision(**each),
                "recall": MulticlassRecall(**each),
                "f1": MulticlassF1Score(**each),
                "confusion": MulticlassConfusionMatrix(num_classes),
            },
            compute_groups=False,
        ).to(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits (B, K) and labels (B,) int64 in 0..K-1."""
        logits = logits.float()
        self.not_finite.update((~logits.isfinite()).any(1).sum())
        self.loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.top5.update((rank_of(labels, logits) < 5).float())
        self.scores.update(logits, labels)

    def compute(self) -> dict[str, Any]:
        """Plain numbers and lists: top1, top5, loss, num_images, confusion[truth][predicted], per_class.

        Raises NotFinite, on every process, where any logit is NaN or infinite: argmax would take the first
        NaN for the best class.
        """
        scores = {k: v.tolist() for k, v in self.scores.compute().items()}
        support = [int(sum(row)) for row in scores["confusion"]]
        bad = int(self.not_finite.compute())
        if bad:
            raise NotFinite(
                f"the model's scores are not finite (NaN or infinite) on {bad} of {sum(support)} images; "
                "its weights are damaged or its training diverged: take an earlier model, or train with a "
                "lower --lr"
            )
        per_class = [
            {"precision": p, "recall": r, "f1": f, "support": n}
            for p, r, f, n in zip(
                scores["precision"], scores["recall"], scores["f1"], support, strict=True
            )
        ]
        return {
            "top1": scores["top1"],
            "top5": self.top5.compute().item(),
            "loss": self.loss.compute().item(),
            "num_images": sum(support),
            "per_class": per_class,
            "confusion": scores["confusion"],
        }


def rank_of(labels: Tensor, logits: Tensor) -> Tensor:
    """(B,) how many classes of logits (B, K) are before the label's (B,), 0 where it is the best."""
    own = logits.gather(1, labels[:, None])
    first = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & first)).sum(1)
