"""COCO's run-length encoding of masks: {"size": [height, width], "counts": text}, without a compiler.

A mask is read column by column; counts are the lengths of its runs, the first of which is of background (and
may be 0). From the third on a count is stored as its difference to the one two places before; a number is
written in groups of five bits, the lowest first, a sixth bit says that more follow, and 48 is added to make
a letter of it. https://github.com/cocodataset/cocoapi, common/maskApi.c.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vitrail_runtime.errors import InputError


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool -> {"size": [H, W], "counts": text}."""
    mask = np.asarray(mask, dtype=bool)
    return encode_part(mask, (0, 0), mask.shape)


def encode_part(part: np.ndarray, corner: tuple[int, int], size: tuple[int, ...]) -> dict[str, Any]:
    """The same of a mask (H, W) = `size` that is True only within `part` (h, w), which lies at `corner` (top,
    left): of a large image only the part is looked at."""
    height, width = size
    (rows, columns), (top, left) = part.shape, corner
    assert 0 <= top <= height - rows
    assert 0 <= left <= width - columns
    framed = np.zeros(
        (columns, rows + 2), np.int8
    )  # a background pixel before and behind each column
    framed[:, 1:-1] = part.T
    column, row = np.nonzero(np.diff(framed, axis=1))
    # Starts and ends of runs, alternating, as positions in the whole image.
    edges = (column + left) * height + row + top
    # A run that ends where the next begins goes on over the end of a column.
    meeting = np.flatnonzero(edges[1:-1:2] == edges[2::2])
    edges = np.delete(edges, np.concatenate([2 * meeting + 1, 2 * meeting + 2]))
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:  # the mask ends with foreground
        counts = counts[:-1]
    return {"size": [int(height), int(width)], "counts": _text(counts.tolist())}


def decode_mask(rle: Mapping[str, Any]) -> np.ndarray:
    """{"size", "counts"} -> (H, W) bool. counts: text, or bytes of it, or the list of the run lengths itself.

    Raises: InputError where the runs are not as long as the image is large.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _counts(counts)
    if sum(counts) != height * width or min(counts, default=0) < 0:
        raise InputError(
            f"the runs of a mask cover {sum(counts)} pixels, but its size is {height} x {width} "
            f"(height x width), which is {height * width}"
        )
    foreground = np.arange(len(counts)) % 2 == 1
    return np.repeat(foreground, counts).reshape(width, height).T


def _text(counts: list[int]) -> str:
    out = []
    for i, count in enumerate(counts):
        x = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits, x = x & 31, x >> 5
            # The last group's highest bit is the sign.
            more = x != (-1 if bits & 16 else 0)
            out.append(chr((bits | 32 if more else bits) + 48))
    return "".join(out)


def _counts(text: str | bytes) -> list[int]:
    letters = text.encode("ascii") if isinstance(text, str) else text
    counts: list[int] = []
    value = shift = 0
    for letter in letters:
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return counts
