"""Classification scores, all from counts: a table of truth against prediction, and sums over images.

No metrics library: importing torchmetrics costs seconds of CPU, for what a few lines count.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vitrail_runtime.errors import NotFinite


class ClassificationMetrics:
    """Accumulates batches; `compute` sums up, over all processes where there are several.

    top5 counts the five best classes, or all of them where there are fewer. Of equal logits the first class
    is the better one, as in argmax. Precision of a class that is never predicted and recall of one without
    images are 0.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.top5 = torch.zeros((), dtype=torch.int64, device=device)
        self.not_finite = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits (B, K) and labels (B,) int64 in 0..K-1."""
        logits = logits.float()
        cells = labels * logits.shape[1] + logits.argmax(1)
        self.confusion.view(-1).scatter_add_(0, cells, torch.ones_like(cells))
        self.top5 += (rank_of(labels, logits) < 5).sum()
        self.not_finite += (~logits.isfinite()).any(1).sum()
        self.loss += F.cross_entropy(logits, labels, reduction="none").double().sum()

    def compute(self) -> dict[str, Any]:
        """Plain numbers and lists: top1, top5, loss, num_images, confusion[truth][predicted], per_class.

        Raises NotFinite, on every process, where any logit is NaN or infinite: argmax would take the first
        NaN for the best class.
        """
        confusion: list[list[int]] = over_processes(self.confusion).tolist()
        sums = (self.top5, self.not_finite, self.loss)
        top5, bad, loss = (over_processes(value).item() for value in sums)
        support = [sum(row) for row in confusion]
        predicted = [sum(column) for column in zip(*confusion, strict=True)]
        hits = [row[i] for i, row in enumerate(confusion)]
        images = sum(support)
        if bad:
            raise NotFinite(
                f"the model's scores are not finite (NaN or infinite) on {int(bad)} of {images} images; "
                "its weights are damaged or its training diverged: take an earlier model, or train with a "
                "lower --lr"
            )
        return {
            "top1": share(sum(hits), images),
            "top5": share(int(top5), images),
            "loss": loss / max(images, 1),
            "num_images": images,
            "per_class": [
                {
                    "precision": share(hit, said),
                    "recall": share(hit, there),
                    "f1": share(2 * hit, said + there),
                    "support": there,
                }
                for hit, said, there in zip(hits, predicted, support, strict=True)
            ],
            "confusion": confusion,
        }


def over_processes(value: Tensor) -> Tensor:
    """The sum of what all processes have; the value itself where there is one process."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def share(part: int, whole: int) -> float:
    """Nothing of nothing is 0."""
    return part / whole if whole else 0.0


def rank_of(labels: Tensor, logits: Tensor) -> Tensor:
    """(B,) how many classes of logits (B, K) are before the label's (B,), 0 where it is the best."""
    own = logits.gather(1, labels[:, None])
    first = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & first)).sum(1)
