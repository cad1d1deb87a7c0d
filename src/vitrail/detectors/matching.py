"""Which object a box stands for, and of which boxes a loss is taken (Ren et al., "Faster R-CNN", NeurIPS
2015, https://arxiv.org/abs/1506.01497, section 3.1.2)."""

from typing import Literal

import torch
from torch import Tensor

from vitrail.boxes import iou

BACKGROUND = -1
BETWEEN = -2  # neither an object nor background: no loss is taken there
CELLS = 1 << 23  # overlaps reckoned at once: 375 objects beside 240,000 anchors would be 360 MB


def match(
    boxes: Tensor,
    objects: Tensor,
    *,
    high: float,
    low: float,
    every_object: bool | Literal["alone"] = False,
) -> Tensor:
    """The object that each box stands for, by overlap.

    Args:
        boxes: (N, 4) xyxy. objects: (G, 4) xyxy; G may be 0.
        high, low: the object of largest IoU is taken from `high` on; below `low` it is BACKGROUND, and
            BETWEEN what lies between.
        every_object: the boxes that overlap an object most take part too, however little that is: a box keeps
            the object that it overlaps most itself. "alone": of these the first one of each object stands for
            that object, whatever it overlaps itself (EfficientDet); for the first of several objects.

    Returns: (N,) indices of objects, BACKGROUND or BETWEEN.
    """
    best = boxes.new_full((len(boxes),), -1.0)
    index = boxes.new_zeros(len(boxes), dtype=torch.long)
    claimed = torch.zeros_like(index, dtype=torch.bool)
    claimant = torch.full_like(index, len(objects))
    step = max(1, CELLS // max(1, len(boxes)))
    for start in range(0, len(objects) if len(boxes) else 0, step):
        overlaps = iou(objects[start : start + step], boxes)  # (g, N)
        value, row = overlaps.max(0)
        better = value > best
        best = torch.where(better, value.to(best.dtype), best)
        index = torch.where(better, row + start, index)
        if every_object == "alone":
            place = overlaps.argmax(1)  # the first of equal ones
            there = (overlaps.amax(1) > 0).nonzero()[:, 0]
            claimant.scatter_reduce_(0, place[there], there + start, "amin")
        elif every_object:
            top = overlaps.amax(1, keepdim=True)
            # An object that no box overlaps would otherwise claim them all.
            claimed |= ((overlaps == top) & (top > 0)).any(0)
    if every_object == "alone":
        claimed = claimant < len(objects)
        index = torch.where(claimed, claimant, index)
    found = torch.where(best >= low, BETWEEN, BACKGROUND)
    return torch.where((best >= high) | claimed, index, found)


def sample(matched: Tensor, number: int, positive_share: float) -> tuple[Tensor, Tensor]:
    """Boxes drawn for a loss by torch's generator: at most `positive_share` of `number` that stand for an
    object, and background for the rest.

    matched: (N,) from `match`. Returns: (P,) and (M,) indices, P + M at most `number`.
    """
    positives = (matched >= 0).nonzero()[:, 0]
    negatives = (matched == BACKGROUND).nonzero()[:, 0]
    chosen = _draw(positives, int(number * positive_share))
    return chosen, _draw(negatives, number - len(chosen))


def _draw(of: Tensor, number: int) -> Tensor:
    return of[torch.randperm(len(of), device=of.device)[:number]]
