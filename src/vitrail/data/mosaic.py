"""Mosaic: four training images in one (Bochkovskiy et al. 2020, arXiv 2004.10934), for detectors.

Of four neighbours in a batch each becomes a mosaic of all four, in another order, around one point. The paper
cuts its parts at full scale; here a part shows its image at the scale at which it covers the part.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.augment import Key, generator
from vitrail.data.batch import Batch, Dense, Padded
from vitrail.data.view import LEAST_SHARE, LEAST_SIDE
from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    import numpy as np

IN_ONE = 4
_MOSAIC = 2  # stream of random numbers
NEAREST, FARTHEST = 0.25, 0.75  # of the height and the width, where the four may meet

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A corner of a mosaic. place: (top, left, height, width) on it. cut: which part of its image it shows,
    in shares of the places there are, down and to the right."""

    place: tuple[int, int, int, int]
    cut: tuple[float, float]


def mosaic(batch: Batch, key: Key, probability: float) -> Batch:
    """A batch of mosaics, as large as the batch; or the batch itself, where none is drawn.

    Images are normalised floats on any device, targets dicts as `Boxes.target` gives them, in tensors. Boxes
    are cut at the edge of their part; those of which a quarter of the area or less is seen, or less than a
    pixel each way, or no pixel of the mask, are dropped, as `View.boxes` does. The last images of a batch
    that four do not divide stay as they are.

    key: (seed, epoch, step), the same on every process. One drawing serves the whole batch, and partners are
    neighbours: so a mosaic does not change when a batch of one size is shared among processes, as long as
    each takes a multiple of four. probability: how often a batch becomes mosaics; 0 is off.
    """
    if not 0 <= probability <= 1:
        raise InputError(f"mosaic is a probability in [0, 1], but is {probability}")
    whole = batch.num_images - batch.num_images % IN_ONE
    height, width = batch.images.shape[-2:]
    if not probability or not whole or min(height, width) < 2:
        return batch
    rng = generator(key, _MOSAIC)
    if rng.random() >= probability:
        return batch
    sizes = _sizes(batch)
    parts = draw_parts(height, width, rng)
    images, targets = batch.images.clone(), list(batch.targets)
    for first in range(0, whole, IN_ONE):
        four = range(first, first + IN_ONE)
        for turn, row in enumerate(four):
            shown = []
            for place, part in enumerate(parts):
                which = first + (turn + place) % IN_ONE
                pixels, target = _shown(batch, which, sizes[which], part)
                top, left, high, wide = part.place
                images[row, :, top : top + high, left : left + wide] = pixels
                shown.append(_placed(target, part.place, (height, width)))
            targets[row] = _joined(shown)
    full = (height, width)
    made: dict[str, Any] = {"images": images, "targets": tuple(targets)}
    sizes = tuple(full if i < whole else size for i, size in enumerate(sizes))
    if set(sizes) == {full}:
        return Dense(**made, indices=batch.indices, step=batch.step, geometries=batch.geometries)
    assert isinstance(batch, Padded)
    return replace(batch, **made, sizes=sizes)


def draw_parts(height: int, width: int, rng: "np.random.Generator") -> tuple[Part, ...]:
    """The four corners: top left, top right, bottom left, bottom right; none is empty."""
    y, x = (
        min(max(1, round(side * rng.uniform(NEAREST, FARTHEST))), side - 1)
        for side in (height, width)
    )
    spans = [
        ((0, y), (0, x)),
        ((0, y), (x, width)),
        ((y, height), (0, x)),
        ((y, height), (x, width)),
    ]
    cuts = rng.random((IN_ONE, 2)).tolist()
    return tuple(
        Part((top, left, bottom - top, right - left), (down, across))
        for ((top, bottom), (left, right)), (down, across) in zip(spans, cuts, strict=True)
    )


def _sizes(batch: Batch) -> tuple[tuple[int, int], ...]:
    """Of each image, without its padding."""
    if isinstance(batch, Padded):
        return batch.sizes
    height, width = batch.images.shape[-2:]
    return ((height, width),) * batch.num_images


def _shown(batch: Batch, which: int, size: tuple[int, int], part: Part) -> tuple[Tensor, Target]:
    """Image `which` and its objects as a part shows them, in pixels of the part."""
    _, _, high, wide = part.place
    height, width = size
    scale = max(high / height, wide / width)
    keep_h = min(height, max(1, round(high / scale)))
    keep_w = min(width, max(1, round(wide / scale)))
    top = int(part.cut[0] * (height - keep_h + 1))
    left = int(part.cut[1] * (width - keep_w + 1))
    rows, columns = slice(top, top + keep_h), slice(left, left + keep_w)
    image, target = batch.images[which, :, rows, columns], batch.targets[which]
    pixels = F.interpolate(
        image[None], (high, wide), mode="bilinear", align_corners=False, antialias=True
    )[0]
    boxes = target["boxes"]
    ratio = boxes.new_tensor((wide / keep_w, high / keep_h)).repeat(2)
    moved = (boxes - boxes.new_tensor((left, top, left, top))) * ratio
    seen = moved.clamp(min=0).minimum(moved.new_tensor((wide, high, wide, high)))
    sides = seen[:, 2:] - seen[:, :2]
    area = (moved[:, 2:] - moved[:, :2]).prod(1)
    kept = (sides >= LEAST_SIDE).all(1) & (sides.prod(1) >= LEAST_SHARE * area)
    shown = {"boxes": seen[kept], "labels": target["labels"][kept]}
    if "masks" in target:
        masks = target["masks"][kept][:, rows, columns]
        if len(masks):  # it refuses to resize none
            shown["masks"] = F.interpolate(masks[None], (high, wide), mode="nearest-exact")[0]
        else:
            shown["masks"] = masks.new_zeros(0, high, wide)
        there = shown["masks"].flatten(1).bool().any(1)
        shown = {name: column[there] for name, column in shown.items()}
    return pixels, shown


def _placed(target: Target, place: tuple[int, int, int, int], size: tuple[int, int]) -> Target:
    """A part's objects on the whole mosaic."""
    top, left, high, wide = place
    placed = dict(target)
    placed["boxes"] = target["boxes"] + target["boxes"].new_tensor((left, top, left, top))
    if "masks" in target:
        placed["masks"] = target["masks"].new_zeros(len(target["masks"]), *size)
        placed["masks"][:, top : top + high, left : left + wide] = target["masks"]
    return placed


def _joined(parts: list[Target]) -> Target:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
