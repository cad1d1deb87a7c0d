"""What every backbone returns and declares, and what heads ask for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail_runtime.errors import InputError


class Features(NamedTuple):
    """A backbone's output.

    maps: name -> (B, C, h, w), finest first; h = ceil(H / stride) by the backbone's `feature_specs`.
    prefix: (B, P, C) class, distillation and register tokens, or None.
    """

    maps: dict[str, Tensor]
    prefix: Tensor | None = None

    def __repr__(self) -> str:
        """Names and shapes: whole tensors would fill the screen."""
        named = {**self.maps, **({} if self.prefix is None else {"prefix": self.prefix})}
        return f"Features({', '.join(f'{k}: {_size(v)}' for k, v in named.items())})"


@dataclass(frozen=True)
class FeatureSpec:
    """Channels and true stride of one map, known before any forward. The stride need not be a
    power of two (14 in DINOv2) nor, after `adapt_levels`, a whole number (3.5)."""

    channels: int
    stride: float


def level_name(stride: float) -> str:
    """ "c4" for 16 and for 14: the level nearest to log2(stride)."""
    return f"c{round(math.log2(stride))}"


def pyramid_specs(dims: Sequence[int], first_stride: int) -> dict[str, FeatureSpec]:
    """Specs of stages that halve the map one after another, finest first."""
    strides = [first_stride * 2**i for i in range(len(dims))]
    return {level_name(s): FeatureSpec(d, s) for d, s in zip(dims, strides, strict=True)}


def check_images(images: Tensor, model: nn.Module) -> None:
    """Raise InputError unless `images` is a (B, 3, H, W) float batch."""
    name = type(model).__name__
    if images.ndim != 4:
        raise InputError(
            f"{name} takes images of shape (batch, 3, height, width), but got "
            f"{images.ndim} axes {tuple(images.shape)}; add a batch axis with images[None]"
        )
    if images.shape[1] != 3:
        raise InputError(
            f"{name} takes 3 channels, but got {images.shape[1]} in {tuple(images.shape)}; "
            "convert grey or alpha pictures to RGB first (vitrail.Predictor does)"
        )
    # A traced size has no answer here, and none of its graphs is for nothing.
    if not torch.compiler.is_compiling() and min(images.shape[2:]) < 1:
        raise InputError(
            f"{name} takes pictures of any size from 1 x 1 pixel, but got {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise InputError(
            f"{name} takes normalised floats, but got {images.dtype}; "
            "use vitrail.Predictor, or scale to [0, 1] and normalise"
        )


def pad_to_multiple(x: Tensor, multiple: int | tuple[int, int]) -> Tensor:
    """Zeros at the right and the bottom until height and width are multiples. (..., H, W).

    Arithmetic only while tracing, so that exported graphs keep dynamic sizes; eagerly an image
    that fits is returned as it is, without a copy.
    """
    mh, mw = (multiple, multiple) if isinstance(multiple, int) else multiple
    height, width = x.shape[-2:]
    # Rounded up by whole divisions: of such a size a tracer proves that it is divisible.
    pad = (0, (width + mw - 1) // mw * mw - width, 0, (height + mh - 1) // mh * mh - height)
    if not torch.compiler.is_compiling() and pad == (0, 0, 0, 0):
        return x
    return F.pad(x, pad)


class AdaptLevels(nn.Module):
    """Maps at the strides that a head wants, from whatever a backbone has. See `adapt_levels`."""

    def __init__(self, specs: Mapping[str, FeatureSpec], wanted: Sequence[int]) -> None:
        super().__init__()
        self.feature_specs: dict[str, FeatureSpec] = {}
        self.sources: dict[str, tuple[str, float]] = {}  # wanted level -> (map name, scale factor)
        for stride in wanted:
            # The source is the map of the nearest stride; the finer one where two are equally near, and of
            # several of one stride (a plain ViT's `out_blocks`) the last, which has seen most.
            source = min(
                reversed(list(specs)),
                key=lambda n: (abs(math.log2(specs[n].stride / stride)), specs[n].stride),
            )
            scale = 2.0 ** round(math.log2(specs[source].stride / stride))
            name = level_name(stride)
            self.sources[name] = (source, scale)
            self.feature_specs[name] = FeatureSpec(
                specs[source].channels, _whole(specs[source].stride / scale)
            )

    def forward(self, features: Features) -> dict[str, Tensor]:
        """Features -> level -> (B, C, h, w), in the order wanted."""
        out = {}
        for name, (source, scale) in self.sources.items():
            x = features.maps[source]
            if scale > 1:
                x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            elif scale < 1:
                x = x[..., :: int(1 / scale), :: int(1 / scale)]
            out[name] = x
        return out


def adapt_levels(
    specs: Mapping[str, FeatureSpec], wanted: Sequence[int] = (4, 8, 16, 32)
) -> AdaptLevels:
    """A parameter-free module from a backbone's `Features` to maps at the wanted strides.

    A stride that the backbone has is passed through; a finer one is resampled bilinearly from the
    nearest map, a coarser one strided. A backbone of stride 14 gives 3.5, 7, 14, 28 for 4, 8, 16, 32:
    `feature_specs` of the result holds the true strides, for anchors and RoI pooling.
    """
    if not specs:
        raise InputError("adapt_levels needs at least one map, but the backbone declares none")
    names = [level_name(stride) for stride in wanted if stride > 0]
    if len(set(names)) != len(wanted):
        raise InputError(
            f"wanted strides must be positive and of different levels, but are {tuple(wanted)}; "
            "strides nearer to each other than a factor of two share a level"
        )
    return AdaptLevels(specs, wanted)


def _size(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) + f" {str(x.dtype).removeprefix('torch.')} {x.device}"


def _whole(stride: float) -> float:
    return int(stride) if stride == int(stride) else stride
