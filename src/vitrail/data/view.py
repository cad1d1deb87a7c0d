"""What a training image shows of its original: the geometry of an augmentation, drawn once, free of pixels.

The same view is taken of an image and of what is true of it, whatever form that has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data import rle
from vitrail.data.augmentation import Augmentation
from vitrail_runtime.preprocess import Geometry

Box = tuple[int, int, int, int]  # (top, left, height, width) in pixels
NO_CLASS = 255  # in a class map: a pixel without a class
LEAST_SHARE = 0.25  # of a box's area that must be seen
LEAST_SIDE = 1.0  # pixels of what is seen of it
TRIES = 10  # for a part that fits
LARGE = (
    8  # times the pixels of the result, from which only what is kept of a "simple" crop is resized
)


@dataclass(frozen=True)
class View:
    """A part of an image of `original` (height, width), brought to `size`, perhaps mirrored.

    crop: what is taken of the original. Where a "simple" crop asks for it (`cut`), that is resized until it
        covers `size`, padded by `padding` pixels and cut where `cut` says, in shares of the places there are.
    """

    original: tuple[int, int]
    size: tuple[int, int]
    crop: Box
    cut: tuple[float, float] | None
    flip: bool
    padding: int = 0
    interpolation: str = "bicubic"

    def needed(self) -> tuple[int, int]:
        """The smallest (height, width) an image may be decoded at so that its crop is not enlarged."""
        height, width = self.original
        _, _, crop_h, crop_w = self.crop
        if self.cut is not None:
            crop_h, crop_w = self.original
        scale = max(self.size[0] / crop_h, self.size[1] / crop_w)
        return math.ceil(height * scale), math.ceil(width * scale)

    def image(self, pixels: np.ndarray) -> Tensor:
        """uint8 (H, W, 3), perhaps decoded at a reduced size -> uint8 (3, height, width)."""
        top, left, height, width = self.crop
        if self.original != pixels.shape[:2]:
            top, height = _scaled(top, height, pixels.shape[0], self.original[0])
            left, width = _scaled(left, width, pixels.shape[1], self.original[1])
        image = torch.from_numpy(pixels).permute(2, 0, 1)  # a view, channels last
        image = image[:, top : top + height, left : left + width]
        image = self._resize(image, self.size) if self.cut is None else self._simple(image)
        return image.flip(2) if self.flip else image

    def class_map(self, ids: np.ndarray, none: int = NO_CLASS) -> np.ndarray:
        """Class of every pixel of the original, (H, W) -> (height, width): that of the nearest pixel;
        `none` where the image is padded."""
        rows, columns = self._pixels()
        height, width = self.original
        inside = _within(rows, height)[:, None] & _within(columns, width)
        picked = ids[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)]
        return np.where(inside, picked, np.asarray(none, ids.dtype))

    def boxes(self, xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes in pixels of the original, (n, 4), as the view shows them: float32, cut at its edges; and
        (n,) bool, which of them are left.

        A box is left where at least a quarter of its area (LEAST_SHARE) lies in the view, and what is seen of
        it is at least a pixel (LEAST_SIDE) wide and high.
        """
        moved = self.geometry.boxes_to_input(xyxy)
        height, width = self.size
        if self.flip:
            moved = moved[:, [2, 1, 0, 3]]
            moved[:, 0::2] = width - moved[:, 0::2]
        seen = moved.clip(0, np.array((width, height, width, height), np.float32))
        sides = seen[:, 2:] - seen[:, :2]
        area = (moved[:, 2:] - moved[:, :2]).prod(1)
        return seen, (sides >= LEAST_SIDE).all(1) & (sides.prod(1) >= LEAST_SHARE * area)

    def masks(self, packed: Sequence[bytes]) -> np.ndarray:
        """Masks of the original, each packed as COCO does, -> (n, height, width) uint8 of 0 and 1: those of
        the nearest pixels, 0 where the image is padded."""
        rows, columns = self._pixels()
        height, _ = self.original
        inside = np.flatnonzero(_within(rows, height))
        shown = np.zeros((len(packed), *self.size), np.uint8)
        for mask, one in zip(shown, packed, strict=True):
            first, part = rle.columns(one, height)
            there = np.flatnonzero(_within(columns - first, part.shape[1]))
            picked = part[rows[inside][:, None], columns[there] - first]
            mask[inside[:, None], there] = picked
        return shown

    def _pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """The row and the column of the original that each of the view's shows, the nearest; beyond its edges
        where the image is padded."""
        rows, columns = (axis.nearest(n) for axis, n in zip(self._axes(), self.size, strict=True))
        return rows, columns[::-1] if self.flip else columns

    @property
    def geometry(self) -> Geometry:
        """Where the view lies on the original, before it is mirrored."""
        y, x = self._axes()
        offset = (y.start * y.scale + y.offset, x.start * x.scale + x.offset)
        return Geometry(self.original, (y.scale, x.scale), offset)

    def _axes(self) -> tuple["_Axis", "_Axis"]:
        if self.cut is None:
            top, left, height, width = self.crop
            return _Axis(top, height, self.size[0]), _Axis(left, width, self.size[1])
        covering = self._covering()
        if covering is None:
            top, left, height, width = self._kept()
            return _Axis(top, height, self.size[0]), _Axis(left, width, self.size[1])
        top, left, pad = self._corner(covering)
        height, width = self.original
        return (
            _Axis(0, height, covering[0], top - pad),
            _Axis(0, width, covering[1], left - pad),
        )

    def _simple(self, pixels: Tensor) -> Tensor:
        covering = self._covering()
        if covering is None:
            top, left, height, width = self._kept()
            top, height = _scaled(top, height, pixels.shape[1], self.original[0])
            left, width = _scaled(left, width, pixels.shape[2], self.original[1])
            return self._resize(pixels[:, top : top + height, left : left + width], self.size)
        pixels = self._resize(pixels, covering)
        top, left, pad = self._corner(covering)
        if pad > 0:
            pixels = F.pad(pixels[None], (pad, pad, pad, pad), mode="reflect")[0]
        return pixels[:, top : top + self.size[0], left : left + self.size[1]]

    def _corner(self, covering: tuple[int, int]) -> tuple[int, int, int]:
        """(top, left) of the cut on the padded image, and by how much that is padded."""
        assert self.cut is not None
        pad = max(0, min(self.padding, min(covering) - 1))  # reflection needs more than it adds
        top = int(self.cut[0] * (covering[0] + 2 * pad - self.size[0] + 1))
        return top, int(self.cut[1] * (covering[1] + 2 * pad - self.size[1] + 1)), pad

    def _covering(self) -> tuple[int, int] | None:
        """The size at which the image covers the result; None where that is far larger than the result: an
        image of 1 x 5000 must not grow to its full length."""
        height, width = self.original
        scale = max(self.size[0] / height, self.size[1] / width)
        covering = max(self.size[0], round(height * scale)), max(self.size[1], round(width * scale))
        return None if covering[0] * covering[1] > LARGE * self.size[0] * self.size[1] else covering

    def _kept(self) -> Box:
        """What is kept of an elongated image, before it is resized."""
        assert self.cut is not None
        height, width = self.original
        scale = max(self.size[0] / height, self.size[1] / width)
        keep_h = min(height, math.ceil(self.size[0] / scale))
        keep_w = min(width, math.ceil(self.size[1] / scale))
        top = int(self.cut[0] * (height - keep_h + 1))
        return top, int(self.cut[1] * (width - keep_w + 1)), keep_h, keep_w

    def _resize(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        # torch resizes 8-bit channels-last pixels with antialiasing by vector instructions: six times as
        # fast as Pillow on 299 x 512 -> 224 x 224 (0.18 against 1.1 ms).
        if pixels.shape[-2:] == size:
            return pixels
        mode = self.interpolation
        return F.interpolate(pixels[None], size, mode=mode, align_corners=False, antialias=True)[0]


@dataclass(frozen=True)
class _Axis:
    """Rows or columns of a view: `length` of the original from `start` on become `pixels`, shown from the one
    at `offset` on."""

    start: int
    length: int
    pixels: int
    offset: int = 0

    @property
    def scale(self) -> float:
        return self.pixels / self.length

    def nearest(self, count: int) -> np.ndarray:
        """The original's pixel that the centre of each of `count` pixels lies in; in whole numbers, exact."""
        centres = 2 * (np.arange(count) + self.offset) + 1
        return self.start + centres * self.length // (2 * self.pixels)


def draw_view(
    height: int,
    width: int,
    size: tuple[int, int],
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> View:
    """A view of an image of `height` x `width` pixels."""
    crop = crop_box(height, width, augmentation, rng)
    if augmentation.jitters:
        crop, size = _jittered(height, width, size, augmentation.scale_jitter, rng)
    cut = None
    if augmentation.crop == "simple":
        cut = float(rng.random()), float(rng.random())
    flip = bool(rng.random() < augmentation.flip)
    return View(
        (height, width), size, crop, cut, flip, augmentation.padding, augmentation.interpolation
    )


def _jittered(
    height: int,
    width: int,
    size: tuple[int, int],
    factors: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Box, tuple[int, int]]:
    """What is taken of the original, and the size it comes at: never more pixels than `size` has."""
    factor, down, across = rng.random(3)
    factor = factors[0] + factor * (factors[1] - factors[0])
    if factor <= 1:
        return (0, 0, height, width), (
            max(1, round(size[0] * factor)),
            max(1, round(size[1] * factor)),
        )
    crop_h, crop_w = max(1, round(height / factor)), max(1, round(width / factor))
    top, left = int(down * (height - crop_h + 1)), int(across * (width - crop_w + 1))
    return (top, left, crop_h, crop_w), size


def crop_box(height: int, width: int, augmentation: Augmentation, rng: np.random.Generator) -> Box:
    """(top, left, height, width) in pixels of the part that is taken, by torchvision's rule."""
    if augmentation.crop != "random_resized":
        return 0, 0, height, width
    low, high = augmentation.scale
    log_low, log_high = (math.log(r) for r in augmentation.ratio)
    draws = rng.random((TRIES, 4)).tolist()
    for u_area, u_ratio, u_top, u_left in draws:
        area = (low + u_area * (high - low)) * height * width
        ratio = math.exp(log_low + u_ratio * (log_high - log_low))
        crop_h, crop_w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_h <= height and 0 < crop_w <= width:
            top, left = int(u_top * (height - crop_h + 1)), int(u_left * (width - crop_w + 1))
            return top, left, crop_h, crop_w
    # No part fitted: the largest of an allowed shape, from the centre.
    ratio = min(max(width / height, augmentation.ratio[0]), augmentation.ratio[1])
    crop_h = min(height, max(1, round(width / ratio)))
    crop_w = min(width, max(1, round(height * ratio)))
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def _within(places: np.ndarray, length: int) -> np.ndarray:
    return (places >= 0) & (places < length)


def _scaled(start: int, length: int, have: int, full: int) -> tuple[int, int]:
    """A run of pixels of `full`, on an image of which `have` are left."""
    first, last = round(start * have / full), round((start + length) * have / full)
    return min(first, have - 1), max(1, last - first)
