"""Where released weights of each model live, for `vitrail models`."""

from vitrail.registry import backbone_entry


def weight_sources(name: str) -> list[str]:
    """Sources of weights that `weights=` reads for a registered name, by what its layouts say."""
    return [layout.source for layout in backbone_entry(name).layouts.values() if layout.source]
