"""Positions: learned tables and patch kernels at other sizes than the trained one, and sines of any size."""

import math

import torch
from torch import Tensor

Grid = tuple[int, int]


def cubic_weights(
    new: int, old: int, *, antialias: bool, offset: float | Tensor = 0.0, like: Tensor
) -> Tensor:
    """The matrix (new, old) of bicubic resampling along one axis, each row summing to 1.

    It is what `F.interpolate(mode="bicubic", align_corners=False)` computes, as arithmetic on the
    sizes: a traced graph keeps dynamic ones, no engine needs a resize operator, and a size of 1 is no
    special case. The kernel is Keys' cubic convolution, with a = -0.75 and repeated borders; with
    `antialias` a = -0.5, stretched by the scale when shrinking, and renormalised at the borders.

    offset: added to the new size before the scale old / new is taken, nowhere else.
    like: gives dtype and device.
    """
    options = {"dtype": like.dtype, "device": like.device}
    scale = old / (new + offset)
    centres = (torch.arange(new, **options) + 0.5) * scale - 0.5
    if antialias:
        stretch = torch.clamp(torch.full((), 1.0, **options) * scale, min=1.0)
        distance = (centres[:, None] - torch.arange(old, **options)) / stretch
        weights = _keys_cubic(distance.abs(), a=-0.5)
        return weights / weights.sum(1, keepdim=True)
    # Two taps beyond either border, which read the border itself.
    taps = torch.arange(-2, old + 2, **options)
    weights = _keys_cubic((centres[:, None] - taps).abs(), a=-0.75)
    border = taps.clamp(0, old - 1)[:, None] == torch.arange(old, **options)
    return weights @ border.to(weights.dtype)


def _keys_cubic(x: Tensor, a: float) -> Tensor:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resample_positions(
    table: Tensor, old: Grid, new: Grid, *, antialias: bool, offset: float | Tensor = 0.0
) -> Tensor:
    """A position table (1, h * w, C) of grid `old` resampled bicubically to grid `new`.

    The sum is taken in float32 or wider and returned in the table's dtype. When the grids are equal
    the table itself is returned; a traced graph computes that case like any other, to the same values.
    """
    tracing = torch.compiler.is_compiling()
    if not tracing and old == new:
        return table
    if tracing and isinstance(offset, float) and offset:
        # The table is used as it is at its own grid, where an offset would still shift it.
        difference = abs(new[0] - old[0]) + abs(new[1] - old[1])
        offset = offset * torch.full((), difference, device=table.device).clamp(max=1)
    if not table.is_meta and torch.is_autocast_enabled(table.device.type):
        with torch.autocast(table.device.type, enabled=False):  # products would be taken in bf16
            return resample_positions(table, old, new, antialias=antialias, offset=offset)
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    rows = cubic_weights(new[0], old[0], antialias=antialias, offset=offset, like=wide)
    columns = cubic_weights(new[1], old[1], antialias=antialias, offset=offset, like=wide)
    # Plain matrices, and a copy before axes are joined: a broadcast product, or the search for a view,
    # would ask a traced graph whether a width is 1.
    grid = wide.reshape(old[0], old[1], -1).transpose(0, 1).flatten(1)  # (x, y * C)
    grid = (columns @ grid).unflatten(1, (old[0], -1))  # (w, y, C)
    grid = grid.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    grid = grid.flatten(1)  # (y, w * C)
    return (rows @ grid).reshape(1, -1, table.shape[-1]).to(table.dtype)


def resize_patch_embedding(weight: Tensor, new_patch_size: int) -> Tensor:
    """A patch kernel (D, C, p, p) for another patch size (Beyer et al., "FlexiViT", CVPR 2023,
    https://arxiv.org/abs/2212.08013, section 3.4): (D, C, new, new).

    If B resizes a patch bicubically with antialias, the new kernel (B^T)^+ w gives the resized patch the
    token that w gave the patch: exactly when patches grow, with the least square error when they shrink.
    """
    old_patch_size = weight.shape[-1]
    if old_patch_size == new_patch_size:
        return weight
    # Small, so always on the CPU and in float64: the pseudo-inverse is then the same on every machine.
    like = torch.empty(0, dtype=torch.float64)
    resize = cubic_weights(new_patch_size, old_patch_size, antialias=True, like=like)
    # B is the Kronecker product of the two axes' matrices, and so is its pseudo-inverse.
    inverse = torch.linalg.pinv(resize.T).to(weight.device)  # (new, old)
    return (inverse @ weight.double() @ inverse.T).to(weight.dtype)


def sine_positions(keep: Tensor, dim: int, *, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    """Sines and cosines of where each cell of a map lies in its image, by "Attention Is All You Need", a half
    of the channels for y and then one for x (Carion et al., ECCV 2020, appendix A.4).

    Args:
        keep: (B, h, w), False for padding at the right and the bottom; positions run over what is kept, from
            0 to 2 pi, for maps of any size.
        dim: of the result, a multiple of 4. offset: of a cell in it: of the k-th of n it is (k + offset) / n,
            counted from 1 on.
    Returns: (B, h, w, dim).
    """
    # Wide: of a hundred rows the last two would be the same in bf16.
    wide = torch.promote_types(dtype, torch.float32)
    parts = []
    for axis in (1, 2):
        counted = keep.to(wide).cumsum(axis)
        last = counted.narrow(axis, counted.shape[axis] - 1, 1)
        parts.append(sines((counted + offset) / (last + 1e-6), dim // 2))
    return torch.cat(parts, 3).to(dtype)


def sines(places: Tensor, dim: int) -> Tensor:
    """Of places from 0 to 1 (...) sines and cosines by turns, (..., dim): of one period, and of periods up to
    10,000 times as long."""
    steps = torch.arange(dim // 2, device=places.device, dtype=places.dtype)
    angles = (places * (2 * math.pi))[..., None] / 10000 ** (2 * steps / dim)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)
