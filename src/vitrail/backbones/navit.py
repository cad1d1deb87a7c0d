"""NaViT (Dehghani et al., "Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution",
NeurIPS 2023, https://arxiv.org/abs/2307.06304).

A ViT that is trained on images at their own shape: patches of many images stand in one sequence, and each
attends to its own image's alone (`forward_packed`; plans of packs stand in data/pack_plan.py). One
position table over a square grid does not fit that; here rows and columns have each their own embedding, of
the patch's number or of its place as a share of the side, and both are added (section 2.1). Queries and keys
are normed, there are no biases, and the head is attention pooling with an MLP.

Where the paper, vit-pytorch's NaViT and timm's NaFlexViT differ, a field chooses; the defaults are the
paper's as far as we know it (written from memory, unverified). vit-pytorch norms the patches before and after
their projection, norms queries and keys to the length of a head's width without dividing their product, and
pools without an MLP; timm resamples its tables linearly, keeps biases, norms neither, and pools the mean,
which is normed after. Fractional learned embeddings read a table between its rows, so every size is taken.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.backbones.vit import (
    BASE,
    LARGE,
    SMALL,
    TINY,
    Attention,
    Block,
    KeysValues,
    PatchEmbed,
    ViT,
    ViTConfig,
    smallest,
)
from vitrail.features import Features, FeatureSpec, pad_to_multiple
from vitrail.layers.attention import map_to_tokens, tokens_to_map
from vitrail.layers.keys import join_rows
from vitrail.layers.position import resample_positions
from vitrail.layers.residual import drop_path_schedule
from vitrail.ops.linear import Linear
from vitrail.ops.packed_attention import packed_attention
from vitrail.packing import Spans
from vitrail.registry import Layout, Tensors, register_backbone, rename_keys
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

Coordinates = Literal["absolute", "fractional", "fractional_long"]


@dataclass(frozen=True, kw_only=True)
class NaViTConfig(ViTConfig):
    """A ViT's fields, and what the paper varies. image_size: of images that the tables are made for."""

    class_token: bool = False
    prefix_positions: bool = False
    pool: Literal["token", "avg", "both"] = "avg"
    qkv_bias: bool = False
    # Of each axis: one table for both ("grid") is ViT's.
    positions: Literal["learned", "sinusoidal", "fourier", "grid"] = "learned"
    # The number of a row or column; its share of the side; its share of the image's longer side.
    coordinates: Coordinates = "fractional"
    combine: Literal["sum", "stack", "product"] = "sum"
    qk_norm: Literal["layer", "rms", "none"] = "layer"
    proj_bias: bool = False  # of the layer behind attention
    bias: bool = False  # of the patches' projection and the MLPs
    norm_bias: bool = True  # of LayerNorms
    patch_norm: bool = False  # LayerNorms before and after the patches' projection
    attention_pool: Literal["mlp", "plain", "none"] = "mlp"  # "none": the mean
    norm_before_pool: bool = True  # the final norm
    head_norm: bool = False  # LayerNorm before the classifier
    head_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.combine == "stack" and self.embed_dim % 2:
            raise InputError(f"combine='stack' halves embed_dim, but {self.embed_dim} is odd")
        if self.positions in ("sinusoidal", "fourier") and self.axis_dim % 2:
            raise InputError(
                f"positions={self.positions!r} are pairs of sine and cosine, but each axis has "
                f"{self.axis_dim} channels"
            )
        if self.positions == "grid" and (self.coordinates == "absolute" or self.combine != "sum"):
            raise InputError(
                "positions='grid' is one table for both axes: coordinates must be 'fractional' or "
                "'fractional_long', and combine 'sum'"
            )

    @property
    def axis_dim(self) -> int:
        """Channels of one axis's embedding."""
        return self.embed_dim // 2 if self.combine == "stack" else self.embed_dim


def _navit(size: ViTConfig) -> NaViTConfig:
    # Tables for long sides of 1,024 pixels.
    return NaViTConfig(
        embed_dim=size.embed_dim, depth=size.depth, num_heads=size.num_heads, image_size=1024
    )


VARIANTS = {
    "navit_tiny_patch16": _navit(TINY),
    "navit_small_patch16": _navit(SMALL),
    "navit_base_patch16": _navit(BASE),
    "navit_large_patch16": _navit(LARGE),
}
# timm's, by its names: "gap" resamples one table, "par" keeps the ratio, "parfac" does so by axis.
NAFLEX = replace(
    VARIANTS["navit_base_patch16"],
    image_size=256,
    num_reg_tokens=4,
    layer_scale_init=1e-5,
    positions="grid",
    qkv_bias=True,
    qk_norm="none",
    proj_bias=True,
    bias=True,
    attention_pool="none",
    norm_before_pool=False,
    head_norm=True,
)
VARIANTS |= {
    "naflexvit_base_patch16_gap": NAFLEX,
    "naflexvit_base_patch16_par_gap": replace(NAFLEX, coordinates="fractional_long"),
    "naflexvit_base_patch16_parfac_gap": replace(
        NAFLEX, coordinates="fractional_long", positions="learned"
    ),
}


class AxisPositions(nn.Module):
    """The embedding of rows, or of columns: `forward(count, longest)` -> (count, C)."""

    def __init__(self, config: NaViTConfig, length: int) -> None:
        super().__init__()
        self.kind, self.coordinates, self.length = config.positions, config.coordinates, length
        self.dim = config.axis_dim
        self.table = self.frequencies = None
        if self.kind == "learned":
            self.table = nn.Parameter(torch.zeros(length, self.dim))
            # Of a product each factor begins at one.
            offset = 1.0 if config.combine == "product" else 0.0
            nn.init.trunc_normal_(self.table, mean=offset, std=0.02, a=offset - 2, b=offset + 2)
        elif self.kind == "fourier":
            self.frequencies = nn.Parameter(torch.zeros(self.dim // 2))
            nn.init.trunc_normal_(self.frequencies, std=1.0)

    def forward(self, count: int, longest: int, like: Tensor) -> Tensor:
        wide = torch.promote_types(like.dtype, torch.float32)
        index = torch.arange(count, dtype=wide, device=like.device)
        side = longest if self.coordinates == "fractional_long" else count
        if self.table is not None:
            if self.coordinates == "absolute":
                if count > self.length:
                    raise InputError(
                        f"an image has {count} rows or columns of patches, but the absolute positions are "
                        f"for {self.length}; make it smaller, give a larger image_size, or take "
                        "coordinates='fractional'"
                    )
                return self.table[:count]
            return _between_rows(self.table, index, side)
        if self.coordinates != "absolute":
            index = index / side
        if self.frequencies is None:
            # The frequencies of the first transformer, over as many places as the tables of others have.
            places = index if self.coordinates == "absolute" else index * self.length
            steps = torch.arange(self.dim // 2, dtype=wide, device=like.device)
            angles = places[:, None] * 10000 ** (-2 * steps / self.dim)
        else:
            angles = 2 * math.pi * index[:, None] * self.frequencies.to(wide)
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


def _between_rows(table: Tensor, index: Tensor, side: int) -> Tensor:
    """Rows of a table (n, C) that spans `side` places, at the middle of each place in `index`: linear between
    neighbours, and the first and last row beyond them."""
    rows = table.shape[0]
    at = ((index + 0.5) * (rows / side) - 0.5).clamp(0, rows - 1)
    below = at.floor()
    share = (at - below).to(table.dtype)[:, None]
    below = below.long()
    return table[below] * (1 - share) + table[(below + 1).clamp(max=rows - 1)] * share


class NormedPatchEmbed(PatchEmbed):
    """Patches with a norm before and after their projection."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__(config.patch_size, config.embed_dim)
        numbers = 3 * config.patch_size**2
        self.norm_in = nn.LayerNorm(numbers, config.norm_eps, bias=config.norm_bias)
        self.norm_out = nn.LayerNorm(config.embed_dim, config.norm_eps, bias=config.norm_bias)

    def forward(self, images: Tensor, patch_size: int | None = None) -> Tensor:
        p = self.patch_size
        x = F.pixel_unshuffle(pad_to_multiple(images, p), p)  # (B, 3 * p * p, h, w)
        # A copy: for a view's strides a traced graph would ask whether a side is 1.
        patches = map_to_tokens(x).clone(memory_format=torch.contiguous_format)
        return tokens_to_map(self.project(patches), x.shape[2], x.shape[3])

    def project(self, patches: Tensor, patch_size: int | None = None) -> Tensor:
        return self.norm_out(super().project(self.norm_in(patches)))


class HeadNorm(nn.Module):
    """Queries or keys of each head brought to the length sqrt(D) and scaled; by `factor` beside that, what a
    product without division by sqrt(D) needs."""

    def __init__(self, num_heads: int, head_dim: int, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.factor = factor * head_dim**0.5

    def forward(self, x: Tensor) -> Tensor:
        """(T, heads, D)."""
        return F.normalize(x, dim=-1) * (self.weight * self.factor)


class NormedAttention(Attention):
    """Attention with normed queries and keys."""

    def __init__(self, config: NaViTConfig) -> None:
        dim, heads = config.embed_dim, config.num_heads
        super().__init__(dim, heads, config.qkv_bias)
        if not config.proj_bias:
            self.proj = Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = query_key_norms(config)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(qkv)
        return self._normed(self.q_norm, q), self._normed(self.k_norm, k), v

    def keys_values(self, x: Tensor) -> KeysValues:
        k, v = super().keys_values(x)
        return KeysValues(self._normed(self.k_norm, k), v)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        return packed_attention(self.q_norm(q), self.k_norm(k), v, spans)

    @staticmethod
    def _normed(norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.transpose(1, 2)).transpose(1, 2)  # (B, heads, N, D)


def query_key_norms(config: NaViTConfig) -> tuple[nn.Module, nn.Module]:
    """Of (..., heads, D)."""
    width = config.embed_dim // config.num_heads
    if config.qk_norm == "rms":
        heads = config.num_heads
        return HeadNorm(heads, width, width**0.5), HeadNorm(heads, width, 1.0)
    if config.qk_norm == "layer":
        norms = [nn.LayerNorm(width, config.norm_eps, bias=False) for _ in range(2)]
        return norms[0], norms[1]
    return nn.Identity(), nn.Identity()


class NaViTBlock(Block):
    """A ViT's block with normed queries and keys, and biases as the config says."""

    def __init__(self, config: NaViTConfig, drop_path: float) -> None:
        super().__init__(config, drop_path)
        dim, hidden = config.embed_dim, round(config.embed_dim * config.mlp_ratio)
        self.attn = NormedAttention(config)
        self.norm1 = nn.LayerNorm(dim, config.norm_eps, bias=config.norm_bias)
        self.norm2 = nn.LayerNorm(dim, config.norm_eps, bias=config.norm_bias)
        if not config.bias:
            self.mlp.fc1 = Linear(dim, hidden, bias=False)
            self.mlp.fc2 = Linear(hidden, dim, bias=False)


class NaViT(ViT):
    """images (B, 3, H, W) -> Features as ViT's: one map of stride 16 and register tokens, if any."""

    config: NaViTConfig

    def __init__(self, config: NaViTConfig) -> None:
        rates = drop_path_schedule(config.drop_path_rate, config.depth)
        patch_embed = NormedPatchEmbed(config) if config.patch_norm else None
        if patch_embed is None and not config.bias:
            patch_embed = PatchEmbed(config.patch_size, config.embed_dim)
            size = (config.patch_size, config.patch_size)
            patch_embed.proj = nn.Conv2d(3, config.embed_dim, size, size, bias=False)
        super().__init__(config, patch_embed, [NaViTBlock(config, rate) for rate in rates])
        self.norm = (
            nn.LayerNorm(config.embed_dim, config.norm_eps, bias=config.norm_bias)
            if config.norm_before_pool
            else nn.Identity()
        )
        self.rows = self.columns = None
        if config.positions != "grid":
            self.register_parameter("pos_embed", None)
            height, width = config.grid
            self.rows, self.columns = AxisPositions(config, height), AxisPositions(config, width)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        height, width = grid
        longest = max(height, width) if self.config.coordinates == "fractional_long" else 0
        if self.rows is None or self.columns is None:
            if not longest:
                return super().positions(grid)
            square = resample_positions(
                self.pos_embed, self.config.grid, (longest, longest), antialias=True
            )
            square = square.unflatten(1, (longest, longest))
            return square[:, :height, :width].flatten(1, 2)
        like = next(self.blocks.parameters())
        y, x = self.rows(height, longest, like), self.columns(width, longest, like)
        # By index: a broadcast sum would ask a traced graph whether a side is 1.
        place = torch.arange(height * width, device=like.device)
        row = (
            place // width
        )  # and no remainder by a traced side, which ONNX's exporter cannot translate
        y, x = y[row], x[place - row * width]  # (h * w, C)
        if self.config.combine == "stack":
            return torch.cat([y, x], dim=1)[None]
        return (y * x if self.config.combine == "product" else y + x)[None]


class NaViTHead(nn.Module):
    """Attention pooling (Zhai et al., "Scaling Vision Transformers", CVPR 2022, section 2.2), or the mean of
    the map; then a linear layer. Features -> (B, num_classes)."""

    def __init__(
        self, config: NaViTConfig, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        dim = config.embed_dim
        self.pool = None if config.attention_pool == "none" else AttentionPool(config)
        self.norm = (
            nn.LayerNorm(dim, config.norm_eps, bias=config.norm_bias)
            if config.head_norm
            else nn.Identity()
        )
        self.fc = nn.Linear(dim, num_classes, bias=config.head_bias)
        nn.init.zeros_(self.fc.weight)
        if config.head_bias:
            nn.init.zeros_(self.fc.bias)

    def forward(self, features: Features) -> Tensor:
        x = map_to_tokens(list(features.maps.values())[-1])
        # A copy: for a view's strides a traced graph would ask whether a batch is one image.
        x = x.clone(memory_format=torch.contiguous_format)
        return self.fc(self.norm(x.mean(1) if self.pool is None else self.pool(x)))


class AttentionPool(nn.Module):
    """One learned query attends to an image's tokens. (B, N, C) -> (B, C)."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        dim, bias = config.embed_dim, config.qkv_bias
        self.num_heads = config.num_heads
        self.query = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm = nn.LayerNorm(dim, config.norm_eps, bias=config.norm_bias)
        self.q = Linear(dim, dim, bias=bias)
        self.kv = Linear(dim, 2 * dim, bias=bias)
        self.proj = Linear(dim, dim, bias=config.proj_bias)
        self.q_norm, self.k_norm = query_key_norms(config)
        self.norm2 = self.fc1 = self.fc2 = None
        if config.attention_pool == "mlp":
            hidden = round(dim * config.mlp_ratio)
            self.norm2 = nn.LayerNorm(dim, config.norm_eps, bias=config.norm_bias)
            self.fc1 = Linear(dim, hidden, bias=config.bias)
            self.fc2 = Linear(hidden, dim, bias=config.bias)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        split = (self.num_heads, -1)
        q = self.q_norm(self.q(self.norm(self.query)).unflatten(-1, split))  # (heads, D)
        k, v = (x.unflatten(-1, split) for x in self.kv(tokens).chunk(2, dim=-1))
        # Products without a batch axis of one, which a traced graph would take for all batches.
        scores = (self.k_norm(k) * (q * q.shape[-1] ** -0.5)).sum(-1)  # (B, N, heads)
        out = (scores.softmax(1)[..., None] * v).sum(1).flatten(1)
        x = self.proj(out) + self.query
        if self.norm2 is not None and self.fc1 is not None and self.fc2 is not None:
            x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x


def from_vit_pytorch(state: Tensors, config: NaViTConfig) -> Tensors:
    """The keys of vit-pytorch's NaViT."""
    patch = config.patch_size
    rules = [
        (r"^pos_embed_height$", "backbone.rows.table"),
        (r"^pos_embed_width$", "backbone.columns.table"),
        (r"^to_patch_embedding\.0\.", "backbone.patch_embed.norm_in."),
        (r"^to_patch_embedding\.1\.", "backbone.patch_embed.proj."),
        (r"^to_patch_embedding\.2\.", "backbone.patch_embed.norm_out."),
        (r"^transformer\.norm\.", "backbone.norm."),
        (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"backbone.blocks.\1.norm1."),
        (r"^transformer\.layers\.(\d+)\.0\.", r"backbone.blocks.\1.attn."),
        (r"^transformer\.layers\.(\d+)\.1\.0\.", r"backbone.blocks.\1.norm2."),
        (r"^transformer\.layers\.(\d+)\.1\.1\.", r"backbone.blocks.\1.mlp.fc1."),
        (r"^transformer\.layers\.(\d+)\.1\.4\.", r"backbone.blocks.\1.mlp.fc2."),
        (r"^attn_pool_queries$", "head.pool.query"),
        (r"^attn_pool\.", "head.pool."),
        (r"^mlp_head\.0\.", "head.norm."),
        (r"^mlp_head\.1\.", "head.fc."),
        (r"\.to_out\.0\.", ".proj."),
        (r"\.to_(q|kv)\.", r".\1."),
        (r"\.gamma$", ".weight"),
    ]
    out = {}
    # Its norms' zero shifts are buffers.
    learned = {key: value for key, value in state.items() if not key.endswith(".beta")}
    for key, value in rename_keys(learned, rules).items():
        if key.endswith(("q_norm.weight", "k_norm.weight")):
            value = value.squeeze(1)
        elif key == "backbone.patch_embed.proj.weight":
            value = value.unflatten(1, (3, patch, patch))
        out[key] = value
    return join_rows(out, "attn.qkv", ("attn.q", "attn.kv"))


def from_timm(state: Tensors, config: NaViTConfig) -> Tensors:
    """timm's naflexvit keys; there a patch's numbers stand by row, column and channel."""
    rules = [
        (r"^embeds\.pos_embed_y$", "backbone.rows.table"),
        (r"^embeds\.pos_embed_x$", "backbone.columns.table"),
        (r"^embeds\.proj\.", "backbone.patch_embed.proj."),
        (r"^embeds\.", "backbone."),
        (r"^(blocks|norm)\.", r"backbone.\1."),
        (r"^fc_norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ]
    patch, out = config.patch_size, {}
    for key, value in rename_keys(state, rules).items():
        if key == "backbone.patch_embed.proj.weight":
            value = value.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
        elif key.endswith(".table"):
            value = value[0]
        elif key == "backbone.pos_embed":
            value = value.flatten(1, 2)
        out[key] = value
    return out


def fit_tables(state: Tensors, config: NaViTConfig) -> Tensors:
    """Position tables brought to the grid of `config.image_size`: by axis linearly, one of both axes
    bicubically from a square."""
    out: dict[str, Any] = dict(state)
    for name, length in zip(("rows", "columns"), config.grid, strict=True):
        key = f"backbone.{name}.table"
        if key in out and out[key].shape[0] != length and config.coordinates != "absolute":
            places = torch.arange(length, dtype=torch.float32, device=out[key].device)
            out[key] = _between_rows(out[key], places, length)
    table = out.get("backbone.pos_embed")
    if table is not None and table.shape[1] != math.prod(config.grid):
        side = math.isqrt(table.shape[1])
        out["backbone.pos_embed"] = resample_positions(
            table, (side, side), config.grid, antialias=True
        )
    return out


LAYOUTS = {
    "timm": Layout(
        from_timm,
        ("embeds.proj.weight", "embeds.pos_embed*", "blocks.0.mlp.fc1.weight"),
        source="timm's naflexvit",
    ),
    "vit_pytorch": Layout(
        from_vit_pytorch,
        ("pos_embed_height", "attn_pool_queries", "transformer.layers.0.0.to_q.weight"),
        may_leave=("*.beta",),
        source="vit-pytorch's NaViT",
    ),
}
HALF = (0.5, 0.5, 0.5)

register_backbone(
    NaViT,
    VARIANTS,
    # Without `patch_norm`, whose view of the patches is exported for sizes that are known alone.
    tiny=smallest(NaViTConfig, num_reg_tokens=1, out_blocks=(0, 1)),
    layouts=LAYOUTS,
    tail=NaViTHead,
    resample=fit_tables,
    preprocessing=Preprocessing(mode="native", mean=HALF, std=HALF),
)
