"""Images and what is true of them, from folders, shards, tables and hubs; augmentation; the batch plan."""

from vitrail.data.examples import Examples
from vitrail.data.opening import open_data

__all__ = ["Examples", "open_data"]
