"""Regions of interest: features of a box from the level that fits its size, and the heads that read them
(Girshick, "Fast R-CNN", ICCV 2015; He et al., "Mask R-CNN", ICCV 2017, https://arxiv.org/abs/1703.06870)."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitrail.features import FeatureSpec
from vitrail.ops.linear import Linear
from vitrail.ops.roi_align import roi_align

BOXES = 64  # whose masks are learnt at once
CELLS = 14  # of a level, sqrt(area) from which it takes a box: 224 pixels at stride 16 (Lin et al., eq. 1)


class RoIPooling(nn.Module):
    """Maps and boxes -> (N, C, size, size), by RoIAlign from one level for each box.

    specs: of the maps that are read, finest first. samples: a side, in each of the size x size cells; 0: one
    for each cell of the map that it covers. aligned: cells are counted from their centres, not their corners.
    """

    def __init__(
        self, specs: Mapping[str, FeatureSpec], size: int, *, samples: int, aligned: bool
    ) -> None:
        super().__init__()
        self.strides = [spec.stride for spec in specs.values()]
        self.size, self.samples, self.aligned = size, samples, aligned

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """maps: (B, C, h, w), of which as many are read as there are specs. boxes: (n, 4) xyxy of each image.
        The result has the boxes of one image after the other, in the dtype of the maps."""
        maps = maps[: len(self.strides)]
        every = torch.cat(list(boxes))
        image = torch.arange(len(boxes), device=every.device).repeat_interleave(
            torch.tensor([len(b) for b in boxes], device=every.device)
        )
        # roi_align knows no bfloat16 on a CPU; in half precision coordinates of boxes are too coarse.
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        levels = self.level_of(every)
        out, order = [], []
        for level, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
            here = (levels == level).nonzero()[:, 0]
            order.append(here)
            how = {"scale": 1 / stride, "samples": self.samples, "aligned": self.aligned}
            own = every[here].to(dtype)
            out.append(roi_align(x.to(dtype), own, image[here], self.size, **how))
        back = torch.cat(order).argsort()
        return torch.cat(out)[back].to(maps[0].dtype)

    def level_of(self, boxes: Tensor) -> Tensor:
        """(N, 4) -> (N,) indices of levels: the coarsest in which sqrt(area) covers 14 cells, else the
        finest. A level of the same stride as the one before takes none."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.zeros_like(side, dtype=torch.long)
        for i in range(1, len(self.strides)):
            if self.strides[i] > self.strides[i - 1]:
                # The references add 1e-6 to the logarithm, so that a box on the border goes up.
                least = CELLS * self.strides[i] * math.exp2(-1e-6)
                level = torch.where(side >= least, i, level)
        return level


class BoxHead(nn.Module):
    """Pooled features (N, C, s, s) -> class logits (N, K + 1), the background last, and deltas (N, R, 4): R
    is 1 where one box serves all classes, else K."""

    def __init__(self, config: Any, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        dim = in_chans
        for _ in range(config.box_convs):
            self.convs.append(nn.Conv2d(dim, config.box_conv_dim, 3, padding=1, bias=False))
            self.norms.append(nn.BatchNorm2d(config.box_conv_dim))
            dim = config.box_conv_dim
        dim *= config.pool_size**2
        self.fcs = nn.ModuleList()
        for _ in range(config.box_fcs):
            self.fcs.append(Linear(dim, config.box_dim))
            dim = config.box_dim
        self.classes = Linear(dim, num_classes + 1)
        self.deltas = Linear(dim, 4 if config.class_agnostic else 4 * num_classes)
        for fc in self.fcs:
            assert isinstance(fc, nn.Linear)
            nn.init.xavier_uniform_(fc.weight)
            nn.init.zeros_(fc.bias)
        for fc, std in ((self.classes, 0.01), (self.deltas, 0.001)):
            nn.init.trunc_normal_(fc.weight, std=std)
            nn.init.zeros_(fc.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        x = x.flatten(1)
        for fc in self.fcs:
            x = F.relu(fc(x))
        return self.classes(x), self.deltas(x).unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Pooled features (N, C, s, s) -> logits (N, K, 2 s, 2 s): whether each of the box's cells is the
    object's, for every class by itself."""

    def __init__(self, config: Any, in_chans: int, num_classes: int) -> None:
        super().__init__()
        dims = [in_chans, *[config.mask_dim] * config.mask_convs]
        bias = not config.mask_norm
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=bias) for a, b in pairwise(dims)
        )
        norms = nn.BatchNorm2d if config.mask_norm else nn.Identity
        self.norms = nn.ModuleList(norms(dim) for dim in dims[1:])
        self.grow = nn.ConvTranspose2d(dims[-1], config.mask_dim, 2, 2)
        self.masks = nn.Conv2d(config.mask_dim, num_classes, 1)
        for conv in (*self.convs, self.grow, self.masks):
            assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
            # He et al.'s normal numbers, drawn so that building on `meta` imports no compiler.
            fan_out = conv.weight.shape[0] * conv.weight[0, 0].numel()
            nn.init.trunc_normal_(conv.weight, std=math.sqrt(2 / fan_out))
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        # As detectron2: by that rule the logits of one class would start at a loss of ten.
        nn.init.trunc_normal_(self.masks.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.masks(F.relu(self.grow(x)))


def crop_masks(masks: Tensor, boxes: Tensor, index: Tensor, size: int) -> Tensor:
    """What each box sees of an object's mask, brought to size x size cells by RoIAlign.

    masks: (G, h, w) uint8. boxes: (N, 4) xyxy. index: (N,), the object of each box. Returns (N, size, size).

    One object's mask after the other, and only what its boxes see of it: 375 masks of 800 x 1333 pixels would
    be 1.6 GB as floats.
    """
    import torchvision  # takes seconds

    out = boxes.new_zeros(len(boxes), size, size)
    height, width = masks.shape[-2:]
    for which in index.unique().tolist():
        rows = (index == which).nonzero()[:, 0]
        own = boxes[rows]
        # A sample reads the pixels on both sides of it, so one more is taken all around.
        low = (own[:, :2].amin(0).floor() - 1).clamp(min=0).long()
        left, top = low.tolist()
        right, bottom = (own[:, 2:].amax(0).ceil() + 2).long().tolist()
        part = masks[which, top : min(bottom, height), left : min(right, width)]
        rois = torch.cat((own.new_zeros(len(own), 1), own - torch.cat((low, low))), 1)
        out[rows] = torchvision.ops.roi_align(part[None, None].to(boxes.dtype), rois, size)[:, 0]
    return out


def mask_entropy(head: MaskHead, pooled: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy, added up over the cells of all boxes, of the masks of their classes.

    pooled: (N, C, s, s). labels: (N,). wanted: (N, 2 s, 2 s) in 0 to 1.

    The gradient is taken with it, some boxes after the other: 256 boxes would else keep 440 MB for each stage
    of a cascade until all of them have run.
    """
    learnt = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (learnt or pooled.requires_grad):
        return _AtOnce.apply(head, labels, wanted, pooled, *learnt)
    return _mask_entropy(head, labels, wanted, pooled)


def _mask_entropy(head: MaskHead, labels: Tensor, wanted: Tensor, pooled: Tensor) -> Tensor:
    mine = head(pooled)[torch.arange(len(labels), device=labels.device), labels]
    mine = mine.to(torch.promote_types(mine.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(mine, wanted.to(mine.dtype), reduction="sum")


class _AtOnce(torch.autograd.Function):
    """`_mask_entropy`, and in the same pass its gradients by the pooled features and by the parameters."""

    @staticmethod
    def forward(
        ctx: Any, head: MaskHead, labels: Tensor, wanted: Tensor, pooled: Tensor, *learnt: Tensor
    ) -> Tensor:
        # BatchNorm's statistics are those of all boxes.
        step = len(pooled) if any(True for _ in head.buffers()) else BOXES
        total, gradients = torch.zeros((), device=pooled.device), []
        of_pooled = torch.empty_like(pooled)
        for start in range(0, max(1, len(pooled)), max(1, step)):
            here = slice(start, start + step)
            part = pooled[here].detach().requires_grad_()
            with torch.enable_grad():
                loss = _mask_entropy(head, labels[here], wanted[here], part)
                of_pooled[here], *own = torch.autograd.grad(loss, (part, *learnt))
            gradients = [a + b for a, b in zip(gradients, own, strict=True)] if start else own
            total = total + loss.detach()
        ctx.save_for_backward(of_pooled, *gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, None, *(one * gradient.to(one.dtype) for one in ctx.saved_tensors)
