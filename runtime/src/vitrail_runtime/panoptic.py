"""Panoptic segmentation (Kirillov et al., CVPR 2019, https://arxiv.org/abs/1801.00868): every pixel belongs
to one segment, which is one object ("thing") or all there is of a class ("stuff"); and COCO's form of it.

COCO stores an image's segments as a colour image, whose colours are ids (red + 256 green + 65,536 blue, 0 is
none), beside a list in JSON that says of each id which category it is.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from vitrail_runtime.errors import InputError

LARGEST = 256**3 - 1  # an id that three bytes hold
SURE = 0.85  # score from which a query counts as a segment (DETR, section 4.4)
OWN = 0.8  # share of its mask that a segment must keep where others lie over it
ON = 0.5  # probability from which a pixel belongs to a mask


def ids_of(colours: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) int32 ids."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return red + 256 * green + 65536 * blue


def colours_of(ids: np.ndarray) -> np.ndarray:
    """(H, W) ids -> (H, W, 3) uint8. Raises InputError where one is negative or does not fit."""
    if ids.size and not 0 <= ids.min() <= ids.max() <= LARGEST:
        raise InputError(
            f"ids of segments are 0 to {LARGEST:,}, but here are {ids.min()} to {ids.max()}"
        )
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)


def segments_of(ids: np.ndarray, categories: Mapping[int, int]) -> list[dict[str, Any]]:
    """COCO's list of the segments of an image, by id: category, area in pixels, box (x, y, width, height).

    categories: id of a segment -> that of its category.
    """
    out = []
    for i in np.unique(ids[ids > 0]).tolist():
        mask = ids == i
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        out.append(
            {
                "id": i,
                "category_id": categories[i],
                "area": int(mask.sum()),
                "bbox": [int(v) for v in box],
                "iscrowd": 0,
            }
        )
    return out


def merge(
    size: tuple[int, int],
    masks: Iterable[np.ndarray],
    scores: np.ndarray,
    labels: np.ndarray,
    stuff: Collection[int],
    *,
    sure: float = SURE,
    own: float = OWN,
    on: float = ON,
) -> tuple[np.ndarray, list[int], list[float]]:
    """Masks of queries, which may lie over each other -> one segment for every pixel (DETR, section 4.4).

    A query with a score above `sure` takes the pixels at which its probability times its score is the
    highest. Of one that keeps `own` of its mask (where that product is `on` at least) or less, nothing is
    left. Segments of one class of stuff are one.

    Args:
        size: (H, W). masks: N of (H, W) probabilities, which are read one after another.
        scores, labels: (N,). stuff: labels that are no things.
    Returns: ids (H, W) int32, from 1 on, 0 for none; and of each id its label and the score of its first
        query.
    """
    best, winner = np.full(size, -np.inf, np.float32), np.full(size, -1, np.int32)
    whole: dict[int, int] = {}
    for query, (mask, score) in enumerate(zip(masks, scores.tolist(), strict=True)):
        if score > sure:
            weighed = np.asarray(mask, np.float32) * np.float32(score)
            higher = weighed > best
            best[higher], winner[higher] = weighed[higher], query
            whole[query] = int((weighed >= on).sum())
    ids = np.zeros(size, np.int32)
    found_labels: list[int] = []
    found_scores: list[float] = []
    for query, area in whole.items():
        mine = winner == query
        if not mine.any() or not area or mine.sum() / area <= own:
            continue
        label = int(labels[query])
        if label in stuff and label in found_labels:
            ids[mine] = found_labels.index(label) + 1
            continue
        found_labels.append(label)
        found_scores.append(float(scores[query]))
        ids[mine] = len(found_labels)
    return ids, found_labels, found_scores
