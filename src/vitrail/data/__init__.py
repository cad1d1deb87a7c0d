"""Labelled pictures from class folders, shards, tables and hubs; augmentation; the batch plan."""

from vitrail.data.images import ImageData, open_data

__all__ = ["ImageData", "open_data"]
