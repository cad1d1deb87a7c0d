"""How images of any shape come packed in training, as a configuration. No torch here: `pack_plan` and
`packed` do it."""

from dataclasses import dataclass
from typing import Literal

from vitrail.configuration import Range, check_choices, check_ranges
from vitrail_runtime.errors import InputError

RANGES = {
    "max_tokens": Range(1),
    "packs": Range(1),
    "tokens_per_image": Range(1),
    "window": Range(1),
    "drop": Range(0, 1, below=True, hint="0 is off"),
    "drop_std": Range(0, 0.5, below=True),
    "drop_largest": Range(0, 1, below=True),
}


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Images at their own shape, many in one sequence of tokens (--native; Dehghani et al. 2023, arXiv
    2307.06304)."""

    max_tokens: int = 4096
    """Tokens of a pack, those that the model adds to each image included."""
    packs: int = 1
    """Packs per update, over all processes and accumulated parts together."""
    tokens_per_image: int | None = None
    """An image of more patches is made smaller, its ratio kept; none: as many as a pack holds."""
    too_long: Literal["resize", "error"] = "resize"
    """"error" stops at an image of more patches instead."""
    window: int = 256
    """Images, in random order, of which the one that fits best comes next into a pack."""
    resolution: Literal["own", "uniform", "normal"] = "own"
    """"own": each image at its own size. Else a side is drawn anew in every epoch, from low to high or from a
    normal between them that prefers low ones, and the image resized to it, its ratio kept.
    """
    sides: tuple[int, int] = (64, 256)
    """Lowest and highest side that is drawn, in pixels."""
    side_of: Literal["area", "long"] = "area"
    """What the side is of: a square of the image's area, or its long side."""
    drop: float = 0.0
    """Token dropping: mean share of an image's patches that are left out, drawn for each image from a Beta
    distribution."""
    drop_std: float = 0.1
    """Its standard deviation."""
    drop_largest: float | None = None
    """Mean share for the largest images; `drop` is that for the smallest, and between them it grows with the
    number of patches. None: the same for all."""

    def __post_init__(self) -> None:
        check_choices(self, where="packing")
        check_ranges(self, RANGES)
        low, high = self.sides
        if not 1 <= low <= high:
            raise InputError(f"sides must be 1 <= low <= high, but are {self.sides}")
        for mean in self.drop_means:
            # A Beta distribution of this mean cannot vary more.
            if mean and self.drop_std**2 >= mean * (1 - mean):
                most = (mean * (1 - mean)) ** 0.5
                raise InputError(
                    f"drop_std must be below {most:.3f} for a mean share of {mean}, but is {self.drop_std}"
                )

    @property
    def drop_means(self) -> tuple[float, float]:
        """For the smallest images and for the largest."""
        return self.drop, self.drop if self.drop_largest is None else self.drop_largest

    @property
    def drops(self) -> bool:
        return max(self.drop_means) > 0
