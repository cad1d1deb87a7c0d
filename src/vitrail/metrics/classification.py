"""Classification scores: thin over torchmetrics."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)


class ClassificationMetrics:
    """Accumulates batches; `compute` sums up, over all processes where there are several.

    top5 counts the five best classes, or all of them where there are fewer; precision of a class that is
    never predicted and recall of one without pictures are 0.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        each: dict[str, Any] = {"num_classes": num_classes, "average": None}
        # NaN stays NaN; by default it would be left out of the mean, with a warning.
        self.loss = MeanMetric(nan_strategy=math.nan).to(device)
        self.scores = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)),
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
        self.loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.scores.update(logits, labels)

    def compute(self) -> dict[str, Any]:
        """Plain numbers and lists: top1, top5, loss, num_images, confusion[truth][predicted], per_class."""
        scores = {k: v.tolist() for k, v in self.scores.compute().items()}
        support = [int(sum(row)) for row in scores["confusion"]]
        per_class = [
            {"precision": p, "recall": r, "f1": f, "support": n}
            for p, r, f, n in zip(
                scores["precision"], scores["recall"], scores["f1"], support, strict=True
            )
        ]
        return {
            "top1": scores["top1"],
            "top5": scores["top5"],
            "loss": self.loss.compute().item(),
            "num_images": sum(support),
            "per_class": per_class,
            "confusion": scores["confusion"],
        }
