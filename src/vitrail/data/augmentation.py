"""What is done to a training picture, as a configuration. No torch here; `vitrail.data.augment` does it."""

import math
from dataclasses import dataclass
from typing import Literal

from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of training pictures; the defaults crop and flip only."""

    crop: Literal["random_resized", "simple", "whole"] = "random_resized"
    """"random_resized" takes a part of the area (Szegedy et al. 2015); "simple" resizes the short side, pads
    and cuts at random (DeiT III); "whole" squashes the whole picture.
    """
    scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the area that "random_resized" takes."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width to height of what it takes."""
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    """Detectors: least and largest factor of an image's size (Ghiasi et al. 2021, arXiv 2012.07177); below 1
    the whole of it comes smaller, above 1 a part of it as large as before. It needs crop "whole".
    """
    padding: int = 4
    """Pixels of reflection around the picture before "simple" cuts."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Of the resize."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    color_jitter: float = 0.0
    """Strength s in [0, 1] of random brightness, contrast and saturation, each within [1 - s, 1 + s]."""
    three_augment: bool = False
    """One of grey, solarise and blur, each as likely (Touvron et al. 2022, arXiv 2204.07118)."""
    randaugment_ops: int = 0
    """Operations of RandAugment per picture (Cubuk et al. 2020, arXiv 1909.13719), each applied with
    probability 0.5; 0 is off. "rand-m9-mstd0.5-inc1" of the DeiT recipe is 2, magnitude 9, std 0.5.
    """
    randaugment_magnitude: float = 9.0
    """Strength of the operations, in [0, 10]."""
    randaugment_std: float = 0.5
    """Standard deviation of the normal by which the magnitude varies."""
    random_erasing: float = 0.0
    """Probability of one rectangle of noise (Zhong et al. 2020, arXiv 1708.04896)."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of the model's input, in [0, 1]: rectangles are filled around it. Training takes the model's own."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Likewise."""

    def __post_init__(self) -> None:
        if self.crop not in ("random_resized", "simple", "whole"):
            raise InputError(
                f"crop must be 'random_resized', 'simple' or 'whole', but is {self.crop!r}"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise InputError(
                f"interpolation must be 'bilinear' or 'bicubic', but is {self.interpolation!r}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"scale must be 0 < low <= high <= 1, but is {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"ratio must be 0 < low <= high, but is {self.ratio}")
        if not 0 < self.scale_jitter[0] <= self.scale_jitter[1] < math.inf:
            raise InputError(f"scale_jitter must be 0 < low <= high, but is {self.scale_jitter}")
        if self.jitters and self.crop != "whole":
            raise InputError(
                f"scale_jitter takes parts by itself: crop must be 'whole', but is {self.crop!r}"
            )
        for name in ("flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a probability in [0, 1], but is {getattr(self, name)}")
        if not 0 <= self.randaugment_magnitude <= 10:
            raise InputError(
                f"randaugment_magnitude must lie in [0, 10], but is {self.randaugment_magnitude}"
            )
        if not 0 <= self.color_jitter <= 1:
            raise InputError(f"color_jitter must lie in [0, 1], but is {self.color_jitter}")
        for name in ("padding", "randaugment_ops", "randaugment_std"):
            if not 0 <= getattr(self, name) < math.inf:  # so is NaN refused
                raise InputError(f"{name} must not be negative, but is {getattr(self, name)}")

    @property
    def jitters(self) -> bool:
        """Whether images come at other sizes than their own."""
        return self.scale_jitter != (1.0, 1.0)
