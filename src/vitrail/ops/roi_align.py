"""RoIAlign (He et al., "Mask R-CNN", ICCV 2017, section 3): the mean of bilinear samples in each cell of a
box.

torchvision's operator is the definition, and what runs on a GPU. On a CPU it works channel by channel on one
core; there every cell is one bag of rows of the map, those around its samples by their bilinear shares, which
`embedding_bag` adds with all channels at once. The gradient is a sum of bags again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def roi_align(
    x: Tensor, boxes: Tensor, image: Tensor, size: int, *, scale: float, samples: int, aligned: bool
) -> Tensor:
    """Maps (B, C, h, w) -> (N, C, size, size).

    Args:
        boxes: (N, 4) xyxy, in pixels of which the map has `scale` to one. image: (N,), the map of each.
        samples: a side, in each cell; 0: one for each pixel of the map that the cell covers.
        aligned: pixel 0 has its centre at 0.5, so that boxes are moved by half a pixel; else boxes are at
            least one pixel large.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not len(boxes):
        import torchvision  # takes seconds

        rois = torch.cat((image[:, None].to(boxes), boxes), 1).to(x.dtype)
        return torchvision.ops.roi_align(x, rois, size, scale, samples, aligned)
    height, width = x.shape[2:]
    corner = boxes.nan_to_num() * scale - 0.5 * aligned  # NaN would be anywhere in memory
    low, side = corner[:, :2], corner[:, 2:] - corner[:, :2]
    if not aligned:
        side = side.clamp(min=1)
    counts = (side / size).ceil().long() if samples == 0 else torch.full_like(side, samples).long()
    kinds = counts.unique(dim=0).tolist()
    table = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # a view of a map in channels-last memory
    indices, shares, lengths, order = [], [], [], []
    for across, down in kinds:  # as many samples in each box, so that its bags are as long
        here = ((counts[:, 0] == across) & (counts[:, 1] == down)).nonzero()[:, 0]
        columns, of_column = _axis(low[here, 0], side[here, 0], size, across, width)
        rows, of_row = _axis(low[here, 1], side[here, 1], size, down, height)
        first = image[here, None, None].int() * (height * width)
        places = (first + rows * width)[:, :, None, :, None] + columns[:, None, :, None, :]
        indices.append(places.flatten())
        shares.append((of_row[:, :, None, :, None] * of_column[:, None, :, None, :]).flatten())
        lengths += [4 * across * down] * (len(here) * size * size)
        order.append(here)
    ends = torch.tensor(lengths).cumsum(0).int()
    starts = ends - torch.tensor(lengths, dtype=torch.int32)
    out = _Bags.apply(table, torch.cat(indices), torch.cat(shares).to(x.dtype), starts)
    out = out.unflatten(0, (-1, size, size)).permute(0, 3, 1, 2)
    return out if len(kinds) == 1 else out[torch.cat(order).argsort()]


def _axis(low: Tensor, side: Tensor, size: int, count: int, limit: int) -> tuple[Tensor, Tensor]:
    """Along one axis of `limit` pixels, (n,) boxes: the pixels that the samples of each cell lie between,
    int32, and their shares of the cell's mean, both (n, size, 2 * count)."""
    steps = (torch.arange(size * count, device=low.device, dtype=low.dtype) + 0.5) / count
    at = low[:, None] + steps * (side / size)[:, None]
    inside = (at >= -1) & (at <= limit)
    at = at.clamp(0, limit - 1)
    before = at.floor()
    near = at - before
    pixels = torch.stack((before, (before + 1).clamp(max=limit - 1)), -1).int()
    shares = torch.stack((1 - near, near), -1) * (inside.to(at.dtype) / count)[..., None]
    shape = (len(low), size, 2 * count)
    return pixels.reshape(shape), shares.reshape(shape)


class _Bags(torch.autograd.Function):
    """table (T, D) -> (N, D): bag n adds rows `indices[starts[n]:starts[n + 1]]` by their shares."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, indices: Tensor, shares: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(indices, shares, starts)
        ctx.rows = len(table)
        return F.embedding_bag(indices, table, starts, per_sample_weights=shares, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None, None, None]:
        indices, shares, starts = ctx.saved_tensors
        lengths = torch.diff(starts, append=starts.new_tensor([len(indices)]))
        bags = torch.repeat_interleave(
            torch.arange(len(starts), dtype=torch.int32), lengths, output_size=len(indices)
        )
        rows, order = indices.sort()
        first = torch.searchsorted(rows, torch.arange(ctx.rows, dtype=rows.dtype), out_int32=True)
        of_table = F.embedding_bag(
            bags[order], gradient.contiguous(), first, per_sample_weights=shares[order], mode="sum"
        )
        return of_table, None, None, None
