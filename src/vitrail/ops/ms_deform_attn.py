"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021, https://arxiv.org/abs/2010.04159,
eq. 3).

A query does not attend to every pixel: each head reads a few points per level, bilinearly, and adds them with
weights. Points and weights are predicted from the query alone, so the cost does not grow with the maps.

One function, four forms that agree in the output and in every gradient:

- "plain": one `grid_sample` per level. It is the definition, as the official code has it.
- "bag": one `embedding_bag` over the four corners of all points of all levels, whose weights are bilinear
  times attention weight. It never writes the sampled values to memory, and reads the value where it lies.
- "gather": the same corners by `index_select` and a matrix product, for export where GridSample or
  EmbeddingBag is missing or miscompiled.
- "triton": kernels for CUDA, where Triton is installed.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitrail.ops.linear import Linear
from vitrail_runtime.errors import InputError

Implementation = Literal["auto", "plain", "bag", "gather", "triton"]
Shapes = Sequence[tuple[int, int]]


def ms_deform_attn(
    value: Tensor,
    shapes: Shapes,
    locations: Tensor,
    weights: Tensor,
    *,
    implementation: Implementation = "auto",
) -> Tensor:
    """What each query reads from the maps, head by head.

    Args:
        value: (B, S, heads, D) flattened maps, one level after the other; S is the sum of H * W.
        shapes: (H, W) of each level.
        locations: (B, Q, heads, L, P, 2) points as (x, y), 0 to 1 over the map from edge to edge, so that
            pixel i of n has its centre at (i + 0.5) / n; what lies outside reads zero.
        weights: (B, Q, heads, L, P), as a rule summing to 1 over the last two axes.
        implementation: "auto" takes "gather" under export, "triton" for CUDA tensors of 16 or 32 bits where
            Triton is installed, "bag" on the CPU and "plain" elsewhere.

    Returns: (B, Q, heads * D) in the dtype of `value`; sums are in float32 at least.
    Raises: InputError for shapes that do not fit each other.
    """
    _check(value, shapes, locations, weights)
    return _chosen(implementation, value)(value, shapes, locations, weights)


def _chosen(implementation: str, value: Tensor) -> Callable[..., Tensor]:
    if implementation == "auto":
        implementation = automatic(value)
    if implementation == "triton":
        if not has_triton():
            raise InputError("implementation='triton' needs Triton; install it or pass 'auto'")
        from vitrail.ops.triton.ms_deform_attn import triton_attention

        return triton_attention
    forms = {"plain": plain_attention, "bag": bag_attention, "gather": gather_attention}
    if implementation not in forms:
        known = ", ".join(get_args(Implementation))
        raise InputError(f"unknown implementation {implementation!r}; there are {known}")
    return forms[implementation]


def automatic(value: Tensor) -> str:
    """The form that "auto" takes for a value."""
    if torch.compiler.is_exporting():
        return "gather"
    if value.device.type == "cpu":
        return "bag"
    kernel = value.dtype in (torch.float32, torch.bfloat16, torch.float16)  # they sum in float32
    return "triton" if value.device.type == "cuda" and kernel and has_triton() else "plain"


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def _check(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    tokens = sum(height * width for height, width in shapes)
    if value.ndim != 4 or value.shape[1] != tokens:
        raise InputError(
            f"value of shape {tuple(value.shape)} does not hold the levels {list(shapes)}: expected (batch, "
            f"{tokens}, heads, width); pass the flattened maps alone, without class or memory tokens"
        )
    batch, _, heads, _ = value.shape
    fits = locations.ndim == 6 and weights.ndim == 5 and locations.shape[:-1] == weights.shape
    wanted = (batch, heads, len(shapes), 2)
    if not fits or (locations.shape[0], *locations.shape[2:4], locations.shape[5]) != wanted:
        raise InputError(
            f"locations of shape {tuple(locations.shape)} and weights of shape {tuple(weights.shape)} do "
            f"not fit: expected ({batch}, queries, {heads}, {len(shapes)}, points, 2) and the same without "
            "the last axis"
        )


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    # Eight bits of mantissa place a point in a map of 80 pixels no better than a fifth of a pixel.
    return torch.promote_types(dtype, torch.float32)


def plain_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    dtype = _at_least_float32(value.dtype)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B * heads, D, S)
    grid = (2 * locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, L, P, 2)
    factors = weights.to(dtype).transpose(1, 2).flatten(0, 1)[:, None]  # (B * heads, 1, Q, L, P)
    out = maps.new_zeros(batch * heads, width, queries)
    for i, level in enumerate(maps.split([height * width for height, width in shapes], dim=2)):
        read = F.grid_sample(  # (B * heads, D, Q, P)
            level.unflatten(2, shapes[i]), grid[:, :, i], padding_mode="zeros", align_corners=False
        )
        out = out + (read * factors[:, :, :, i]).sum(-1)
    return out.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def _corners(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of `value.flatten(0, 2)` that every query and head reads, and their weights: each
    (B * Q * heads, L * 4 * P)."""
    batch, tokens, heads, _ = value.shape
    numbers = {"device": value.device, "dtype": torch.int32}
    image = torch.arange(batch, **numbers)[:, None, None, None]
    first = image * (tokens * heads) + torch.arange(heads, **numbers)[:, None]
    dtype = _at_least_float32(value.dtype)
    levels = zip(shapes, locations.to(dtype).unbind(3), weights.to(dtype).unbind(3), strict=True)
    indices, factors, start = [], [], 0
    for (height, width), place, weight in levels:  # at once they take twice the time on a CPU
        column, left, right = _neighbours(place[..., 0] * width - 0.5, width)
        row, top, bottom = _neighbours(place[..., 1] * height - 0.5, height)
        top, bottom = weight * top, weight * bottom
        factors.append(torch.stack([top * left, top * right, bottom * left, bottom * right], 3))
        corner = (row * width + column + start) * heads + first
        others = (heads, width * heads, (width + 1) * heads)
        indices.append(torch.stack([corner, *(corner + step for step in others)], 3))
        start = start + height * width
    rows = torch.stack(indices, 3).clamp_(0, batch * tokens * heads - 1)  # those without a share
    return rows.flatten(3).flatten(0, 2), torch.stack(factors, 3).flatten(3).flatten(0, 2)


def _neighbours(at: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of places along an axis of `length` pixels: the pixel before each as int32, from -1 on, and the shares
    of that and of the next, zero outside."""
    before = at.detach().floor()
    near = at - before  # how near the place is to the next pixel
    here = (before >= 0) & (before < length)
    there = (before >= -1) & (before < length - 1)
    # Zero before it becomes an integer: what NaN or 1e30 would become is anywhere in memory.
    pixel = before.masked_fill(~(here | there), 0).int()
    return pixel, (1 - near) * here, near * there  # times: a NaN in the network's output stays seen


def bag_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # which knows no sparse tensors
        indices, factors = _corners(value, shapes, locations, weights)
        out = _bag(indices, factors, value.to(factors.dtype).flatten(0, 2))
    else:
        out = _WeightedRows.apply(value, locations, weights, shapes)
    return out.view(*locations.shape[:2], -1).to(value.dtype)


def _bag(indices: Tensor, factors: Tensor, table: Tensor, starts: Tensor | None = None) -> Tensor:
    return F.embedding_bag(indices, table, starts, per_sample_weights=factors, mode="sum")


class _WeightedRows(torch.autograd.Function):
    """What each query and head reads, (B * Q * heads, D): sums of rows of the value times their factors.

    The gradients that PyTorch has for `embedding_bag` take four times as long on a CPU. That of the value is
    such a sum again, of the rows of the gradient that each row of the value went to; that of the factors are
    products of the pairs of rows at the non-zeros of a sparse matrix.

    Rows and factors are found anew in the backward pass, for a fifth more time of both passes: with what lies
    between them and the locations they would be three quarters of what attention keeps in memory.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        indices, factors = _corners(value, shapes, locations, weights)
        # A view where the value is contiguous.
        return _bag(indices, factors, value.to(factors.dtype).flatten(0, 2))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        value, *points = ctx.saved_tensors
        of_value, placed = ctx.needs_input_grad[0], ctx.needs_input_grad[1:3]
        points = [
            p.detach().requires_grad_(wanted) for p, wanted in zip(points, placed, strict=True)
        ]
        with torch.enable_grad():
            indices, factors = _corners(value, ctx.shapes, *points)
        table, gradient = value.to(factors.dtype).flatten(0, 2), gradient.contiguous()
        found: list[Tensor | None] = [None, None]
        if any(placed):
            asked = [p for p in points if p.requires_grad]
            own = iter(torch.autograd.grad(factors, asked, _products(indices, gradient, table)))
            found = [next(own) if p.requires_grad else None for p in points]
        of_table = None
        if of_value:
            rows, order = indices.flatten().sort()
            every = torch.arange(len(table), dtype=rows.dtype, device=rows.device)
            starts = torch.searchsorted(rows, every)
            shares = factors.detach().flatten()[order]
            of_table = _bag(order // indices.shape[1], shares, gradient, starts)
            of_table = of_table.view(value.shape).to(value.dtype)
        return of_table, found[0], found[1], None


def _products(indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(N, K): of row n of `left` (N, D) with the K rows of `right` (T, D) that `indices` names."""
    if indices.shape[1] > len(right):  # no matrix of so few columns has as many places in a row
        return (right[indices] @ left[..., None]).squeeze(-1)
    ends = torch.arange(0, indices.numel() + 1, indices.shape[1], dtype=indices.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        places = torch.sparse_csr_tensor(
            ends,
            indices.flatten(),
            left.new_zeros(indices.numel()),
            (len(left), len(right)),
            check_invariants=False,  # a row may name a place twice, in any order
        )
    found = torch.sparse.sampled_addmm(places, left, right.t(), beta=0.0)
    return found.values().view(indices.shape)


def gather_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    indices, factors = _corners(value, shapes, locations, weights)
    table = value.to(factors.dtype).flatten(0, 2)
    read = table.index_select(0, indices.flatten()).unflatten(0, indices.shape)
    out = factors[:, None] @ read  # (B * Q * heads, 1, D)
    return out.reshape(locations.shape[0], locations.shape[1], -1).to(value.dtype)


class MSDeformAttn(nn.Module):
    """Deformable attention with its projections; keys as in the official code.

    value_ratio: width of the value and of the heads, relative to `dim` (ViT-CoMer and ViT-Adapter use 0.5).
    implementation: see `ms_deform_attn`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        value_ratio: float = 1.0,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        inner = int(dim * value_ratio)
        if inner % num_heads:
            raise InputError(f"{inner} value channels do not divide into {num_heads} heads")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.implementation: Implementation = implementation
        points = num_heads * num_levels * num_points
        self.sampling_offsets = Linear(dim, points * 2)
        self.attention_weights = Linear(dim, points)
        self.value_proj = Linear(dim, inner)
        self.output_proj = Linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At first head k looks in direction 2 pi k / heads, its points 1 to P steps away on the edge of a
        square, all weighed alike."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)[:, None]
        bias = (directions[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        with torch.no_grad():
            nn.init.zeros_(self.sampling_offsets.weight)
            self.sampling_offsets.bias.copy_(bias.flatten())
            nn.init.zeros_(self.attention_weights.weight)
            nn.init.zeros_(self.attention_weights.bias)
            for projection in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        features: Tensor,
        shapes: Shapes,
        pad_mask: Tensor | None = None,
        record: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        """(B, Q, dim) -> (B, Q, dim). With `record` what is read is kept there: "name.locations" (B, Q,
        heads, L, P, 2) and "name.weights" (B, Q, heads, L, P).

        reference_points: (B, Q, L, 2) as (x, y) in 0 to 1, offsets are in pixels of the level; or
        (B, Q, L, 4) as (cx, cy, w, h), offsets are in halves of the box divided by the number of points.
        features: (B, S, dim), see `ms_deform_attn`. pad_mask: (B, S), True where the value is to read zero.
        """
        value = self.value_proj(features)
        if pad_mask is not None:  # after the projection: padding reads zero, not the bias
            value = value.masked_fill(pad_mask[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))
        points = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        reference = reference_points[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        if reference.shape[-1] == 2:
            sizes = torch.tensor(shapes, device=query.device, dtype=reference.dtype).flip(1)
            locations = reference + offsets / sizes[:, None]
        elif reference.shape[-1] == 4:
            locations = reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5
        else:
            raise InputError(
                f"reference points have {reference.shape[-1]} numbers; expected 2 (x, y) or 4 (cx, cy, w, h)"
            )
        weights = weights.unflatten(-1, points[1:])
        if record is not None:
            record[f"{name}.locations"], record[f"{name}.weights"] = locations, weights
        out = ms_deform_attn(value, shapes, locations, weights, implementation=self.implementation)
        return self.output_proj(out)
