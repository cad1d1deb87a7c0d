"""What a model is worth: thin over maintained libraries."""

from vitrail.metrics.classification import ClassificationMetrics
from vitrail.metrics.segmentation import SegmentationMetrics

__all__ = ["ClassificationMetrics", "SegmentationMetrics"]
