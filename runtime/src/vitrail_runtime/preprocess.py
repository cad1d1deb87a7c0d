"""From a picture to a model's input: the ONE preprocessing of evaluation, Predictor and runtime.

Two steps. `decode` (decoding.py) turns whatever a person has into upright 8-bit RGB; `prepare` turns that
into a model's input and says how to find the way back. Sizes are (height, width) in pixels throughout.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from PIL import Image

from vitrail_runtime.decoding import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from vitrail_runtime.decoding import decode as decode
from vitrail_runtime.decoding import name_of as name_of
from vitrail_runtime.decoding import read_size as read_size
from vitrail_runtime.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Mode = Literal["crop", "squash", "fit", "letterbox", "edges", "native"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes a model's input; travels with every checkpoint and artifact.

    `size` is (height, width) in pixels; `mode` says how a picture of another shape gets there:
    "crop" resizes the short side to size / crop_pct and cuts the centre, "squash" ignores the
    aspect ratio, "fit" keeps it within `size` and leaves the result smaller, "native" resizes nothing but
    what has more than `patches`: (the most patches, pixels of a patch's side), for "native" alone.
    "letterbox" is "fit", rounded down, at the top left of a picture of `size` in the colour of `mean`, as
    released EfficientDets see images.
    "edges" is for detectors: the short edge becomes the smaller number of `size`, such as (800, 1333), unless
    the long edge would exceed the larger one, either way round.
    `crop_pct` is for "crop" alone. "crop" is timm's and torchvision's evaluation transform.
    """

    size: tuple[int, int] = (224, 224)
    mode: Mode = "crop"
    crop_pct: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    patches: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise InputError(
                f"preprocessing size must be (height, width), both >= 1, but is {self.size}"
            )
        if self.mode not in get_args(Mode):
            raise InputError(
                f"preprocessing mode must be one of {', '.join(get_args(Mode))}, but is {self.mode!r}"
            )
        if self.interpolation not in _RESAMPLING:
            raise InputError(
                f"interpolation must be one of {', '.join(_RESAMPLING)}, but is {self.interpolation!r}"
            )
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct must lie in (0, 1], but is {self.crop_pct}")
        if self.patches is not None and (self.mode != "native" or min(self.patches) < 1):
            raise InputError(
                "patches must be (how many at most, pixels of a side), both >= 1, and goes with mode "
                f"'native', but is {self.patches} with {self.mode!r}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                f"mean and std need three numbers, std above 0, but are {self.mean} and {self.std}"
            )


@dataclass(frozen=True)
class Geometry:
    """Where a prepared picture lies on the original: x_input = x_original * scale - offset.

    original: (height, width) of the upright picture. scale: (sy, sx). offset: (top, left), in input pixels.
    """

    original: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    def boxes_to_original(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """(N, 4) xyxy in pixels of the input -> (N, 4) float32 in pixels of the original, clipped to it."""
        (sy, sx), (top, left), (h, w) = self.scale, self.offset, self.original
        boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
        boxes = (boxes + np.array((left, top, left, top))) / (sx, sy, sx, sy)
        return boxes.clip(0, (w, h, w, h)).astype(np.float32)

    def boxes_to_input(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """The inverse of `boxes_to_original`, without clipping: (N, 4) float32."""
        (sy, sx), (top, left) = self.scale, self.offset
        boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
        return (boxes * (sx, sy, sx, sy) - (left, top, left, top)).astype(np.float32)


def preprocessed_size(height: int, width: int, p: Preprocessing) -> tuple[int, int]:
    """(height, width) that `prepare` makes of a picture of this size, without touching pixels."""
    if p.mode in ("crop", "squash", "letterbox"):
        return p.size
    return _resized_size(height, width, p)


def limited_sizes(sizes: np.ndarray, most: int, patch_size: int) -> np.ndarray:
    """(N, 2) heights and widths -> the largest of the same ratio, up to rounding, that have at most `most`
    patches each, those at the edges begun included. Nothing is enlarged."""
    sizes = np.asarray(sizes, np.int64)
    out = sizes.copy()
    long = num_patches(sizes, patch_size) > most
    given = sizes[long]
    low, high = np.zeros(len(given)), np.ones(len(given))  # factors that fit, and that do not
    for _ in range(32 if len(given) else 0):
        middle = (low + high) / 2
        fits = num_patches(_times(given, middle), patch_size) <= most
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    out[long] = _times(given, low)
    return out


def num_patches(sizes: np.ndarray, patch_size: int) -> np.ndarray:
    """(N,) patches of images of these sizes (N, 2), those at the edges begun included."""
    return (-(-sizes // patch_size)).prod(1)


def _times(sizes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return np.maximum(1, (sizes * factors[:, None]).astype(np.int64))


def decode_size(p: Preprocessing) -> tuple[int, int] | None:
    """`at_least` for `decode` before `prepare(..., p)`: 1.5 times what the resize makes; None: all of it.

    A JPEG decoded at a fraction is sharper and noisier than the same picture resized with antialiasing.
    On 1500 x 1000 mosaics of photographs brought to 256 pixels the result differs from that of a full
    decode by 9.5 of 255 (root mean square) at a factor just above 1, by at most 3 from 1.5 on, at 2.4
    times the speed; a factor of 2 leaves 3, at 1.6 times the speed.
    """
    if p.mode == "native":
        return None
    height, width = _scaled(p) if p.mode == "crop" else p.size
    if p.mode == "edges":  # whichever edge is the short one, the other has the same scale
        height = width = min(p.size)
    return math.ceil(1.5 * height), math.ceil(1.5 * width)


def prepare(
    image: np.ndarray, p: Preprocessing, *, original: tuple[int, int] | None = None
) -> tuple[np.ndarray, Geometry]:
    """A model's input: uint8 (H, W, 3) RGB -> float32 (3, h, w), normalised and contiguous, and the way back.

    original: (height, width) of the upright picture, where `decode` gave a reduced one; sizes and the
        geometry are reckoned from it, so that they don't depend on how the file was decoded.
    """
    pixels, geometry = resize(image, p, original=original)
    return normalise(pixels, p), geometry


def resize(
    image: np.ndarray, p: Preprocessing, *, original: tuple[int, int] | None = None
) -> tuple[np.ndarray, Geometry]:
    """`prepare` without its last step: uint8 (H, W, 3) -> uint8 (h, w, 3), resized and cut or filled up."""
    pixels, geometry = _resize(image, p, original)
    if p.mode == "letterbox":
        colour = [round(255 * mean) for mean in p.mean]
        whole = np.full((*p.size, 3), colour, np.uint8)
        whole[: pixels.shape[0], : pixels.shape[1]] = pixels
        pixels = whole
    return pixels, geometry


def _resize(
    image: np.ndarray, p: Preprocessing, original: tuple[int, int] | None
) -> tuple[np.ndarray, Geometry]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(
            f"prepare takes uint8 pictures (H, W, 3), but got {image.dtype} {image.shape}; decode() makes one"
        )
    height, width = original or image.shape[:2]
    out_h, out_w = _resized_size(height, width, p)
    if p.mode == "crop":
        crop_h, crop_w = p.size
        # torchvision's CenterCrop: Python's round, half to even.
        top, left = round((out_h - crop_h) / 2), round((out_w - crop_w) / 2)
    else:
        (crop_h, crop_w), top, left = (out_h, out_w), 0, 0
    geometry = Geometry((height, width), (out_h / height, out_w / width), (top, left))

    if image.shape[:2] == (out_h, out_w):
        return np.ascontiguousarray(image[top : top + crop_h, left : left + crop_w]), geometry
    filter_, pil = _RESAMPLING[p.interpolation], Image.fromarray(np.ascontiguousarray(image))
    if out_h * out_w <= _WHOLE_RESIZE * crop_h * crop_w:
        resized = np.asarray(pil.resize((out_w, out_h), filter_))
        return np.ascontiguousarray(resized[top : top + crop_h, left : left + crop_w]), geometry
    # A picture of 1 x 5000 would grow to 256 x 1,280,000 before the cut. Resizing the region alone
    # gives the same pixels but for the rounding of its corners to float32 inside Pillow.
    sy, sx = image.shape[0] / out_h, image.shape[1] / out_w
    box = (left * sx, top * sy, (left + crop_w) * sx, (top + crop_h) * sy)
    return np.array(pil.resize((crop_w, crop_h), filter_, box=box)), geometry


def normalise(pixels: np.ndarray, p: Preprocessing) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (3, H, W): (x / 255 - mean) / std, to the bit what torchvision gives."""
    out = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel, table in enumerate(_normalised_values(p.mean, p.std)):
        np.take(table, pixels[:, :, channel], out=out[channel], mode="clip")
    return out


# The whole picture is resized and then cut, to the bit as torchvision does, up to this many times
# the pixels of the cut: aspect ratios to about 6.
_WHOLE_RESIZE = 8


@lru_cache(maxsize=64)
def _normalised_values(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    # (3, 256): what each 8-bit value becomes, in float32 and in torchvision's order of operations.
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    return (values - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def _scaled(p: Preprocessing) -> tuple[int, int]:
    return math.floor(p.size[0] / p.crop_pct), math.floor(p.size[1] / p.crop_pct)


def _resized_size(height: int, width: int, p: Preprocessing) -> tuple[int, int]:
    # The whole picture's size after the resize, before the cut.
    if p.mode == "native":
        if p.patches is None:
            return height, width
        out_h, out_w = limited_sizes(np.array([(height, width)]), *p.patches)[0].tolist()
        return out_h, out_w
    if p.mode == "squash":
        return p.size
    if p.mode == "fit":
        max_h, max_w = p.size
        if height * max_w >= width * max_h:
            return max_h, max(1, round(width * max_h / height))
        return max(1, round(height * max_w / width)), max_w
    if p.mode == "letterbox":  # effdet's pixels
        scale = min(p.size[0] / height, p.size[1] / width)
        return max(1, int(height * scale)), max(1, int(width * scale))
    if p.mode == "edges":  # the pixels of torchvision's GeneralizedRCNNTransform
        scale = min(min(p.size) / min(height, width), max(p.size) / max(height, width))
        return max(1, int(height * scale)), max(1, int(width * scale))
    target_h, target_w = _scaled(p)
    if target_h == target_w:  # torchvision's Resize of the short side truncates the long one
        if width <= height:
            return int(target_w * height / width), target_w
        return target_h, int(target_h * width / height)
    ratio = min(height / target_h, width / target_w)  # timm's ResizeKeepRatio rounds
    return round(height / ratio), round(width / ratio)
