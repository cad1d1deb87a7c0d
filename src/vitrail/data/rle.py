"""Masks as COCO stores them: lengths of runs, column by column, without and with the object in turn, packed
into characters of five bits.

What is read here is of any kind: `unpack` refuses what the library's own reader would run over.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

LONGEST = 7  # characters of a run: 35 bits


def unpack(packed: bytes) -> np.ndarray:
    """(R,) int64 lengths of the runs, the first without the object. Raises ValueError for what is no mask."""
    codes = np.frombuffer(packed, np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    ends = np.flatnonzero((codes & 32) == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError("is not a packed mask")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > LONGEST:
        raise ValueError("is not a packed mask")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    steps = np.add.reduceat((codes & 31) << (5 * place), starts)
    steps -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    # From the fourth on, a run is stored as its difference to the one before the last.
    runs = steps.copy()
    runs[1::2] = np.cumsum(steps[1::2])
    runs[2::2] = np.cumsum(steps[2::2])
    if runs.min() < 0:
        raise ValueError("is not a packed mask")
    return runs


def pack(runs: Sequence[int], height: int, width: int) -> bytes:
    """Runs that fill an image of `height` x `width`, packed."""
    given = {"size": [height, width], "counts": list(runs)}
    return _library().frPyObjects(given, height, width)["counts"]


def from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> bytes:
    """What any of the polygons (x, y, x, y, ...) covers, by the rule of COCO's own reader."""
    mask = _library()
    return mask.merge(mask.frPyObjects(list(polygons), height, width))["counts"]


def from_mask(shown: np.ndarray) -> bytes:
    """(H, W) bool, packed."""
    return _library().encode(np.asfortranarray(shown, np.uint8))["counts"]


def columns(packed: bytes, height: int) -> tuple[int, np.ndarray]:
    """The first column with the object, and the mask (height, n) uint8 from there to the last."""
    runs = unpack(packed)
    ends = np.cumsum(runs)
    on = np.flatnonzero(runs[1::2] > 0) * 2 + 1
    if not len(on):
        return 0, np.zeros((height, 0), np.uint8)
    first = int(ends[on[0] - 1]) // height
    last = int(ends[on[-1]] - 1) // height
    runs = runs[: on[-1] + 1].copy()
    runs[: on[0]] = 0
    runs[0] = ends[on[0] - 1] - first * height
    pixels = np.zeros((last - first + 1) * height, np.uint8)
    there = np.repeat(np.arange(len(runs)) & 1, runs)
    pixels[: len(there)] = there
    return first, pixels.reshape(-1, height).T


def box_and_area(packed: bytes, height: int) -> tuple[tuple[int, int, int, int], int]:
    """The smallest (left, top, right, bottom) around the object and its number of pixels; zeros for none."""
    first, shown = columns(packed, height)
    rows = np.flatnonzero(shown.any(1))
    if not len(rows):
        return (0, 0, 0, 0), 0
    box = first, int(rows[0]), first + shown.shape[1], int(rows[-1]) + 1
    return box, int(shown.sum())


def _library() -> Any:
    from faster_coco_eval import mask  # a tenth of a second, for those who have masks

    return mask
