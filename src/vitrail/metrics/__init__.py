"""What a model is worth."""

from vitrail.metrics.classification import ClassificationMetrics

__all__ = ["ClassificationMetrics"]
