"""From a picture to a model's input: the ONE preprocessing of evaluation, Predictor and runtime."""

from dataclasses import dataclass
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes a model's input; travels with every checkpoint and artifact.

    `size` is (height, width) in pixels; `mode` says how a picture of another shape gets there:
    "crop" resizes the short side to size / crop_pct and cuts the centre, "squash" ignores the
    aspect ratio, "fit" keeps it within `size` and leaves the result smaller, "native" resizes nothing.
    """

    size: tuple[int, int] = (224, 224)
    mode: Literal["crop", "squash", "fit", "native"] = "crop"
    crop_pct: float = 0.875
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
