"""Scores of class maps: thin over torchmetrics' confusion matrix."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

UNSEEN = -1  # a pixel that the model gave no class


class SegmentationMetrics:
    """Counts pixels, one image or batch at a time; `compute` sums up, over all processes where there are
    several. Only a matrix of counts is kept, never a map.

    A class is left out of a mean where the mean has nothing to say of it: of the IoU where it stands neither
    in the truth nor in what was predicted, of the accuracy where it is not in the truth (as in
    mmsegmentation). A pixel of the truth without a prediction is a wrong one.
    """

    def __init__(
        self, num_classes: int, device: torch.device | str = "cpu", *, ignore: int = 255
    ) -> None:
        self.num_classes, self.ignore = num_classes, ignore
        # One class more, for what the model did not see; our own check of values is the cheaper one.
        self.counts = MulticlassConfusionMatrix(
            num_classes + 1, ignore_index=ignore, validate_args=False
        ).to(device)

    def update(self, predicted: Tensor, truth: Tensor) -> dict[str, Any]:
        """Two maps of one shape; predicted: 0..K-1 or UNSEEN, truth: 0..K-1 or `ignore`.

        Returns: what `compute` would of these pixels alone.
        """
        truth = truth.to(self.counts.device, torch.int64)
        predicted = predicted.to(truth.device, torch.int64)
        classes = truth[truth != self.ignore]
        if predicted.shape != truth.shape or not _within(classes, 0, self.num_classes):
            raise ValueError(
                f"maps must have one shape and classes below {self.num_classes}, but the truth is "
                f"{tuple(truth.shape)} with {classes.unique().tolist()} and the prediction "
                f"{tuple(predicted.shape)}"
            )
        assert _within(predicted, UNSEEN, self.num_classes)
        predicted = predicted.where(predicted != UNSEEN, self.num_classes)
        return segmentation_scores(self.counts(predicted.reshape(-1), truth.reshape(-1)))

    def compute(self) -> dict[str, Any]:
        """See `segmentation_scores`; of all pixels in all processes."""
        return segmentation_scores(self.counts.compute())


def segmentation_scores(counts: Tensor) -> dict[str, Any]:
    """From counts (K + 1, K + 1) of pixels, row = truth, last column = unseen, to plain numbers and lists.

    Returns: mIoU and mean_accuracy over the classes that they can be told of, pixel_accuracy, num_pixels
        (labelled), confusion[truth][predicted], and for each class iou, accuracy and pixels (of the truth).
        NaN is what cannot be told: all of it where no pixel is labelled.
    """
    counts = counts[:-1]
    hits, truth = counts.diagonal().double(), counts.sum(1)
    union = truth + counts[:, :-1].sum(0) - hits
    iou, accuracy = hits / union, hits / truth  # 0 / 0 is NaN
    return {
        "mIoU": iou.nanmean().item(),
        "pixel_accuracy": (hits.sum() / truth.sum()).item(),
        "mean_accuracy": accuracy.nanmean().item(),
        "num_pixels": int(truth.sum()),
        "per_class": [
            {"iou": i, "accuracy": a, "pixels": n}
            for i, a, n in zip(iou.tolist(), accuracy.tolist(), truth.tolist(), strict=True)
        ],
        "confusion": counts[:, :-1].tolist(),
    }


def _within(values: Tensor, low: int, end: int) -> bool:
    return values.numel() == 0 or (int(values.min()) >= low and int(values.max()) < end)
