"""What a model is worth: thin over maintained libraries."""

from vitrail.metrics.classification import ClassificationMetrics

__all__ = ["ClassificationMetrics"]
