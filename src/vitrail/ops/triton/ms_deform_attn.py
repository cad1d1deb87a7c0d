"""Kernels of multi-scale deformable attention, forward and backward; see `vitrail.ops.ms_deform_attn`.

A program serves one head of one image and a block of queries: it reads each point's four corners and adds
them in float32, so that nothing is as large as the sampled values. Backward, the gradients of locations and
weights belong to their query alone and are written; that of the value is shared, and added atomically in
float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

from vitrail_runtime.errors import InputError


@triton.jit
def _corner(value, stride, x, y, height, width, live, column, in_width):
    """Pixels (BLOCK_Q, BLOCK_D) at (x, y) of one level, zero outside; where they lie, and which to touch."""
    inside = live & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    # Zero before it becomes an integer: what NaN would become is anywhere in memory.
    token = tl.where(inside, y, 0).to(tl.int64) * width + tl.where(inside, x, 0).to(tl.int64)
    place = token[:, None] * stride + column[None, :]
    mask = inside[:, None] & in_width[None, :]
    pixel = tl.load(value + place, mask=mask, other=0.0).to(tl.float32)
    return pixel, place, mask


@triton.jit
def _forward(
    value,  # (B, S, heads, D)
    levels,  # (L, 3): height, width, first token
    locations,  # (B, Q, heads, L, P, 2)
    weights,  # (B, Q, heads, L, P)
    out,  # (B, Q, heads, D)
    tokens,
    queries,
    heads,
    head_dim,
    num_levels: tl.constexpr,
    num_points: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    query = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    column = tl.arange(0, BLOCK_D)
    live = query < queries
    in_width = column < head_dim
    row = (image * queries + query) * heads + head
    stride = heads * head_dim
    total = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    for level in range(num_levels):
        height = tl.load(levels + level * 3)
        width = tl.load(levels + level * 3 + 1)
        first = tl.load(levels + level * 3 + 2)
        pixels = value + ((image * tokens + first) * heads + head) * head_dim
        for point in range(num_points):
            i = (row * num_levels + level) * num_points + point
            weight = tl.load(weights + i, mask=live, other=0.0).to(tl.float32)
            x = tl.load(locations + 2 * i, mask=live, other=0.0).to(tl.float32) * width - 0.5
            y = tl.load(locations + 2 * i + 1, mask=live, other=0.0).to(tl.float32) * height - 0.5
            left = tl.floor(x)
            top = tl.floor(y)
            right = x - left
            bottom = y - top
            for down in tl.static_range(2):  # pyright: ignore
                for over in tl.static_range(2):  # pyright: ignore
                    share_x = right if over == 1 else 1 - right
                    share_y = bottom if down == 1 else 1 - bottom
                    pixel, _, _ = _corner(
                        pixels,
                        stride,
                        left + over,
                        top + down,
                        height,
                        width,
                        live,
                        column,
                        in_width,
                    )
                    total += (weight * share_x * share_y)[:, None] * pixel
    place = row[:, None] * head_dim + column[None, :]
    tl.store(out + place, total, mask=live[:, None] & in_width[None, :])


@triton.jit
def _backward(
    value,
    levels,
    locations,
    weights,
    grad_out,  # (B, Q, heads, D)
    grad_value,  # as value, float32, zero
    grad_locations,
    grad_weights,
    tokens,
    queries,
    heads,
    head_dim,
    num_levels: tl.constexpr,
    num_points: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    query = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    column = tl.arange(0, BLOCK_D)
    live = query < queries
    in_width = column < head_dim
    row = (image * queries + query) * heads + head
    stride = heads * head_dim
    slope = tl.load(
        grad_out + row[:, None] * head_dim + column[None, :],
        mask=live[:, None] & in_width[None, :],
        other=0.0,
    ).to(tl.float32)
    for level in range(num_levels):
        height = tl.load(levels + level * 3)
        width = tl.load(levels + level * 3 + 1)
        first = tl.load(levels + level * 3 + 2)
        start = ((image * tokens + first) * heads + head) * head_dim
        for point in range(num_points):
            i = (row * num_levels + level) * num_points + point
            weight = tl.load(weights + i, mask=live, other=0.0).to(tl.float32)
            x = tl.load(locations + 2 * i, mask=live, other=0.0).to(tl.float32) * width - 0.5
            y = tl.load(locations + 2 * i + 1, mask=live, other=0.0).to(tl.float32) * height - 0.5
            left = tl.floor(x)
            top = tl.floor(y)
            right = x - left
            bottom = y - top
            to_x = tl.zeros((BLOCK_Q,), dtype=tl.float32)
            to_y = tl.zeros((BLOCK_Q,), dtype=tl.float32)
            to_weight = tl.zeros((BLOCK_Q,), dtype=tl.float32)
            for down in tl.static_range(2):  # pyright: ignore
                for over in tl.static_range(2):  # pyright: ignore
                    share_x = right if over == 1 else 1 - right
                    share_y = bottom if down == 1 else 1 - bottom
                    pixel, place, mask = _corner(
                        value + start,
                        stride,
                        left + over,
                        top + down,
                        height,
                        width,
                        live,
                        column,
                        in_width,
                    )
                    along = tl.sum(
                        pixel * slope, axis=1
                    )  # what a unit of this corner's share gives
                    to_weight += share_x * share_y * along
                    to_x += (2 * over - 1) * share_y * along
                    to_y += (2 * down - 1) * share_x * along
                    change = (weight * share_x * share_y)[:, None] * slope
                    tl.atomic_add(grad_value + start + place, change, mask=mask)
            tl.store(grad_weights + i, to_weight, mask=live)
            tl.store(grad_locations + 2 * i, weight * to_x * width, mask=live)
            tl.store(grad_locations + 2 * i + 1, weight * to_y * height, mask=live)


def _blocks(value: Tensor, locations: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and what the kernels are told about sizes."""
    batch, tokens, heads, head_dim = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    block_d = triton.next_power_of_2(head_dim)
    block_q = max(1, 1024 // block_d)
    sizes: dict[str, Any] = {
        "tokens": tokens,
        "queries": queries,
        "heads": heads,
        "head_dim": head_dim,
    }
    sizes |= {"num_levels": levels, "num_points": points, "BLOCK_Q": block_q, "BLOCK_D": block_d}
    return (triton.cdiv(queries, block_q), batch * heads), sizes


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, levels: Tensor, locations: Tensor, weights: Tensor
    ) -> Tensor:
        out = value.new_empty(*locations.shape[:3], value.shape[-1])
        grid, sizes = _blocks(value, locations)
        if out.numel():
            _forward[grid](value, levels, locations, weights, out, **sizes)
        ctx.save_for_backward(value, levels, locations, weights)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        value, levels, locations, weights = ctx.saved_tensors
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        grid, sizes = _blocks(value, locations)
        if grad_out.numel():
            _backward[grid](
                value,
                levels,
                locations,
                weights,
                grad_out.contiguous(),
                grad_value,
                grad_locations,
                grad_weights,
                **sizes,
            )
        return grad_value.to(value.dtype), None, grad_locations, grad_weights


def triton_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(
            f"the Triton kernel sums in float32 and takes no {value.dtype}; pass implementation='plain'"
        )
    if value.device.type != "cuda" and not knobs.runtime.interpret:
        raise InputError(
            f"the Triton kernel runs on CUDA, and value is on {value.device}; pass implementation='auto'"
        )
    firsts = [sum(h * w for h, w in shapes[:i]) for i in range(len(shapes))]
    rows = [(*shape, first) for shape, first in zip(shapes, firsts, strict=True)]
    levels = torch.tensor(rows, dtype=torch.int32, device=value.device)
    return _Attention.apply(
        value.contiguous(), levels, locations.contiguous(), weights.contiguous()
    )
