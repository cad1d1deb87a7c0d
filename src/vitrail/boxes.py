"""Boxes: formats, overlaps, the regression code of Faster R-CNN, and anchors. Pure functions.

A box is four numbers in the last axis. "xyxy" is left, top, right, bottom; "cxcywh" centre, width, height;
"xywh" left, top, width, height. Widths are right - left, without the +1 of early code. Units are the
caller's, pixels or fractions of the image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitrail_runtime.errors import InputError

# Regression never enlarges a box beyond this factor: exp of an untrained output must not overflow.
MAX_LOG_RATIO = math.log(1000 / 16)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) -> (..., 4)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) -> (..., 4)."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """(..., 4) -> (..., 4): COCO's format."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1, y1, x2 - x1, y2 - y1), dim=-1)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) -> (..., 4)."""
    x, y, w, h = boxes.unbind(-1)
    return torch.stack((x, y, x + w, y + h), dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (...,), half precision as fp32; boxes that are turned inside out have none."""
    boxes_xyxy = _wide(boxes_xyxy)
    size = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def clip(boxes_xyxy: Tensor, height: int, width: int) -> Tensor:
    """Boxes moved into the picture, edges included: x in [0, width], y in [0, height]. (..., 4) -> same."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    x1, x2 = x1.clamp(0, width), x2.clamp(0, width)
    y1, y2 = y1.clamp(0, height), y2.clamp(0, height)
    return torch.stack((x1, y1, x2, y2), dim=-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair, xyxy: (..., N, 4), (..., M, 4) -> (..., N, M) in [0, 1].
    Two boxes without area have 0."""
    inter, union = _overlap(a[..., :, None, :], b[..., None, :, :])
    return _ratio(inter, union)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of every pair, xyxy:
    (..., N, 4), (..., M, 4) -> (..., N, M) in [-1, 1]."""
    return paired_giou(a[..., :, None, :], b[..., None, :, :])


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes that stand at the same place of (..., 4): -> (...,)."""
    return _ratio(*_overlap(a, b))


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes that stand at the same place of (..., 4): -> (...,)."""
    a, b = _wide(a), _wide(b)
    inter, union = _overlap(a, b)
    hull_size = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = hull_size.clamp(min=0).prod(-1)
    return _ratio(inter, union) - _ratio(hull - union, hull)


def encode(
    boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """What a head must answer at `anchors` to give `boxes` (Girshick, ICCV 2015): the shift of the centre in
    units of the anchor's size and the log of the ratio of sizes, each times its weight.

    Args:
        boxes, anchors: (..., 4) xyxy; anchors with a positive width and height.
        weights: of dx, dy, dw, dh: the inverse of the standard deviations of other code. Faster R-CNN's
            second stage has (10, 10, 5, 5); Cascade R-CNN's third (30, 30, 15, 15).
    Returns: (..., 4) deltas; `decode` undoes it.
    """
    a, b = xyxy_to_cxcywh(anchors), xyxy_to_cxcywh(boxes)
    # A target without width or height: log 0 would make a loss infinite.
    size = b[..., 2:].clamp(min=torch.finfo(b.dtype).tiny)
    shift = (b[..., :2] - a[..., :2]) / a[..., 2:]
    deltas = torch.cat((shift, (size / a[..., 2:]).log()), dim=-1)
    return deltas * deltas.new_tensor(weights)


def decode(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    *,
    max_log_ratio: float = MAX_LOG_RATIO,
    clamp_small: bool = False,
) -> Tensor:
    """Boxes from deltas at anchors: the inverse of `encode`.

    Args:
        deltas: (..., 4), of any size; a head's raw output.
        anchors: (..., 4) xyxy.
        weights: as in `encode`.
        max_log_ratio: bound of log(size / anchor's size) from above, as in torchvision and detectron2.
        clamp_small: bound it from below too, as mmdetection does.
    Returns: (..., 4) xyxy, not clipped to the picture.
    """
    a = xyxy_to_cxcywh(anchors)
    d = deltas / deltas.new_tensor(weights)
    low = -max_log_ratio if clamp_small else None
    size = d[..., 2:].clamp(min=low, max=max_log_ratio).exp() * a[..., 2:]
    centre = d[..., :2] * a[..., 2:] + a[..., :2]
    return cxcywh_to_xyxy(torch.cat((centre, size), dim=-1))


def anchor_shapes(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(len(sizes) * len(ratios), 4) xyxy boxes around the origin, in pixels, sizes fastest.

    A size is the square root of the area, a ratio is height / width.
    """
    if not sizes or not ratios or min(*sizes, *ratios) <= 0:
        raise InputError(
            f"anchors need positive sizes and ratios, but got sizes {tuple(sizes)} and ratios "
            f"{tuple(ratios)}"
        )
    shapes = [(s / math.sqrt(r), s * math.sqrt(r)) for r in ratios for s in sizes]
    return torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes])


def anchor_grid(
    shapes: Tensor,
    height: int,
    width: int,
    stride: float | tuple[float, float],
    offset: float = 0.0,
) -> Tensor:
    """The shapes at every cell of a map, in the shapes' dtype and device.

    Args:
        shapes: (A, 4) from `anchor_shapes`.
        height, width: of the map, in cells.
        stride: pixels between cells, or (vertical, horizontal) of them; from the map's FeatureSpec.
        offset: of the first centre in cells: 0 in Faster R-CNN, 0.5 in RetinaNet's later code.
    Returns: (height * width * A, 4) xyxy in pixels; row, column, shape, the last fastest.
    """
    sy, sx = stride if isinstance(stride, tuple) else (stride, stride)
    ys = (torch.arange(height, device=shapes.device, dtype=shapes.dtype) + offset) * sy
    xs = (torch.arange(width, device=shapes.device, dtype=shapes.dtype) + offset) * sx
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    centres = torch.stack((x, y, x, y), dim=-1)  # (H, W, 4)
    return (centres[:, :, None] + shapes).reshape(-1, 4)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(intersection, union) of boxes that broadcast."""
    a, b = _wide(a), _wide(b)
    size = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inter = size.clamp(min=0).prod(-1)
    return inter, area(a) + area(b) - inter


def _wide(boxes: Tensor) -> Tensor:
    """fp16 ends at 65504 and bf16 counts in steps of 256 there: a box of 300 x 300 pixels has 90000."""
    return boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where the whole is 0, with a gradient that is finite there too."""
    empty = whole <= 0
    return (part / whole.masked_fill(empty, 1)).masked_fill(empty, 0)
