"""ViT (Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
ICLR 2021, https://arxiv.org/abs/2010.11929).

An image is cut into square patches, each patch becomes one token by a linear projection, a learned table
tells where it stood, and a pre-norm transformer does the rest; a class token collects what the head reads.

DeiT and DINOv2 are this network with other tokens, a LayerScale and a SwiGLU: the parts stand here, and what
else these papers bring stands in deit.py and dinov2.py.

Unlike the official code: every image size is taken (zeros fill up the last patches at the right and the
bottom; the position table is resampled bicubically to the grid); the final norm is applied to the map and the
prefix tokens, so average pooling reads normed tokens; new weights are drawn from a normal of std 0.02.
Dropout inside the blocks is left out: the recipes since DeiT use stochastic depth instead.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.backbones.vit_keys import (
    HUGGINGFACE_EMBEDDING,
    TIMM_MARKS,
    from_huggingface,
    from_timm,
    resample_to,
)
from vitrail.features import Features, FeatureSpec, check_images, level_name, pad_to_multiple
from vitrail.layers.attention import attend
from vitrail.layers.checkpoint import checkpointed
from vitrail.layers.mlp import Mlp
from vitrail.layers.position import resample_positions, resize_patch_embedding
from vitrail.layers.residual import DropPath, LayerScale, drop_path_schedule
from vitrail.ops.linear import Linear, linear
from vitrail.ops.packed_attention import packed_attention
from vitrail.packing import (
    PackedFeatures,
    PackedImages,
    Spans,
    check_packed,
    packed_features,
    packed_positions,
    patch_grid,
    split_prefix,
)
from vitrail.registry import Layout, register_backbone
from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.preprocess import Preprocessing

Pool = Literal["token", "avg", "both"]


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    image_size: int | tuple[int, int] = 224  # pixels; the position table's own grid covers it
    mlp_ratio: float = 4.0  # width of the hidden layer (of each half of it in SwiGLU) / embed_dim
    mlp: Literal["gelu", "swiglu"] = "gelu"
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    layer_scale_init: float | None = None  # None: no LayerScale
    drop_path_rate: float = 0.0  # rate of the last block; earlier blocks grow linearly from zero
    class_token: bool = True
    distillation_token: bool = False
    num_reg_tokens: int = 0
    prefix_positions: bool = True  # the table has rows for the tokens before the patches
    pos_antialias: bool = True  # how the table is resampled; timm's weights expect True
    pos_offset: float = 0.0  # added to the grid before its scale is taken; DINOv2 expects 0.1
    out_blocks: tuple[int, ...] = ()  # blocks whose normed maps "b2", ... are given; (): the last
    pool: Pool = "token"  # what the head reads
    head: Literal["linear", "tanh", "mlp"] = "linear"
    head_hidden_dim: int | None = None  # of the heads "tanh" and "mlp"; None: embed_dim

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise InputError(
                f"embed_dim {self.embed_dim} must be divisible by num_heads {self.num_heads}"
            )
        if self.pool != "avg" and not self.class_token:
            raise InputError(
                f"pool={self.pool!r} reads the class token; without one choose pool='avg'"
            )
        sides = (self.image_size,) if isinstance(self.image_size, int) else self.image_size
        if min(self.patch_size, *sides) < 1:
            raise InputError(
                f"image_size {self.image_size} and patch_size {self.patch_size} must be at least 1 pixel"
            )
        wrong = [i for i in self.out_blocks if not 0 <= i < self.depth]
        if wrong or list(self.out_blocks) != sorted(set(self.out_blocks)):
            raise InputError(
                f"out_blocks {self.out_blocks} must be rising block numbers from 0 to {self.depth - 1}"
            )

    @property
    def num_prefix_tokens(self) -> int:
        return self.class_token + self.distillation_token + self.num_reg_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the position table, in patches."""
        size = self.image_size
        return patch_grid((size, size) if isinstance(size, int) else size, self.patch_size)

    def alter(self, vit: "ViT") -> None:
        """What a study changes of a network just built (`register_study`); here nothing."""


TINY = ViTConfig(embed_dim=192, depth=12, num_heads=3)  # DeiT, Table 1
SMALL = ViTConfig(embed_dim=384, depth=12, num_heads=6)
BASE = ViTConfig(embed_dim=768, depth=12, num_heads=12)  # ViT, Table 1
LARGE = ViTConfig(embed_dim=1024, depth=24, num_heads=16)
HUGE = ViTConfig(embed_dim=1280, depth=32, num_heads=16)
# Zhai et al., "Scaling Vision Transformers", CVPR 2022, Table 2
GIANT = ViTConfig(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=6144 / 1408)
GIGANTIC = ViTConfig(embed_dim=1664, depth=48, num_heads=16, mlp_ratio=8192 / 1664)

VARIANTS = {
    "vit_tiny_patch16": TINY,
    "vit_small_patch8": replace(SMALL, patch_size=8),
    "vit_small_patch16": SMALL,
    "vit_small_patch32": replace(SMALL, patch_size=32),
    "vit_base_patch8": replace(BASE, patch_size=8),
    "vit_base_patch16": BASE,
    "vit_base_patch32": replace(BASE, patch_size=32),
    "vit_large_patch14": replace(LARGE, patch_size=14),
    "vit_large_patch16": LARGE,
    "vit_large_patch32": replace(LARGE, patch_size=32),
    "vit_huge_patch14": replace(HUGE, patch_size=14),
    "vit_giant_patch14": replace(GIANT, patch_size=14),
    "vit_gigantic_patch14": replace(GIGANTIC, patch_size=14),
}

C = TypeVar("C", bound=ViTConfig)


def smallest(kind: type[C], **fields: Any) -> C:
    """A config for the contract suite, of this paper or one that builds on it."""
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
    return kind(**{**size, "mlp_ratio": 2.0, "drop_path_rate": 0.1, **fields})


class KeysValues(NamedTuple):
    """What a block's tokens offer to whoever attends to them: each (B, heads, N, D)."""

    keys: Tensor
    values: Tensor


class PatchEmbed(nn.Module):
    """Patches by a strided projection (eq. 1). (B, 3, H, W) -> (B, C, ceil(H / p), ceil(W / p)).

    p is `patch_size`, or what a call asks for: the projection is then that of its own patches brought to the
    other size, and learns through it (Beyer et al., "FlexiViT", CVPR 2023, section 3.4).
    """

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor, patch_size: int | None = None) -> Tensor:
        p = patch_size or self.patch_size
        images = pad_to_multiple(images, p)
        if p == self.patch_size:
            return self.proj(images)
        weight = resize_patch_embedding(self.proj.weight, p)
        return F.conv2d(images, weight, self.proj.bias, p)

    def project(self, patches: Tensor, patch_size: int | None = None) -> Tensor:
        """The same for cut patches, in any order: (T, 3 * p * p) -> (T, C)."""
        weight = resize_patch_embedding(self.proj.weight, patch_size or self.patch_size)
        return linear(patches, weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention (appendix A). (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Channels of queries, keys and values, in this order: rows of the one projection.
        self.widths = (dim, dim, dim)
        self.qkv: nn.Linear = Linear(dim, sum(self.widths), bias=qkv_bias)
        self.proj: nn.Linear = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        *others: KeysValues | None,
        keys_values: list[KeysValues | None] | None = None,
        record: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        """`others` are attended to as well; the tokens' own keys and values are appended to the list."""
        q, k, v = self.heads(self.qkv(x))
        # Kept only when asked for: otherwise they are freed before the MLP takes its memory.
        if keys_values is not None:
            keys_values.append(KeysValues(k, v))
        given = [kv for kv in others if kv is not None]
        if given:
            batch = x.shape[0]
            k = torch.cat([k, *(kv.keys.expand(batch, -1, -1, -1) for kv in given)], dim=2)
            v = torch.cat([v, *(kv.values.expand(batch, -1, -1, -1) for kv in given)], dim=2)
        out = self.attend(q, k, v, record, name)
        return self.proj(out.transpose(1, 2).flatten(2))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        record: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        """The core, for queries and keys of any number: (B, heads, N, D)."""
        return attend(q, k, v, None, record, name)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3C) -> queries, keys, values, each (B, heads, N, D)."""
        if self.widths[0] == self.widths[2]:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = qkv.split(self.widths, dim=-1)
            q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts)
        return q, k, v

    def keys_values(self, x: Tensor) -> KeysValues:
        """Keys and values alone: (B, N, C), or (N, C) for every image alike."""
        skip = self.widths[0]
        bias = None if self.qkv.bias is None else self.qkv.bias[skip:]
        kv = F.linear(x if x.ndim == 3 else x[None], self.qkv.weight[skip:], bias)
        parts = kv.split(self.widths[1:], dim=-1)
        return KeysValues(*(p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in parts))

    def forward_packed(self, x: Tensor, spans: Spans) -> Tensor:
        """(T, C) -> (T, C): projections over all tokens at once, attention within each image."""
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in parts)
        return self.proj(self.attend_packed(q, k, v, spans).flatten(1))

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        """The core, for tokens of many images: (T, heads, D)."""
        return packed_attention(q, k, v, spans)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, "GLU Variants Improve Transformer", 2020,
    https://arxiv.org/abs/2002.05202): fc2(silu(gate) * value), both halves from one projection."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class Block(nn.Module):
    """Attention, then MLP; each is pre-normed, scaled and added back (eq. 2 and 3). (B, N, C) -> same."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        dim, init = config.embed_dim, config.layer_scale_init
        self.norm1 = nn.LayerNorm(dim, config.norm_eps)
        self.attn = Attention(dim, config.num_heads, config.qkv_bias)
        self.ls1 = nn.Identity() if init is None else LayerScale(dim, init)
        self.norm2 = nn.LayerNorm(dim, config.norm_eps)
        mlp = SwiGLU if config.mlp == "swiglu" else Mlp
        self.mlp = mlp(dim, round(dim * config.mlp_ratio))
        self.ls2 = nn.Identity() if init is None else LayerScale(dim, init)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        keys_values: list[KeysValues | None] | None = None,
        record: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        """memory: rows (M, C) or (B, M, C) beside the tokens, which are attended to but do not attend and
        are not handed on (Sandler et al., CVPR 2022, https://arxiv.org/abs/2203.15243, eq. 2).
        keys_values: a list that the block's own are appended to (None where it does not attend).
        """
        extra = None if memory is None else self.keys_values(memory)
        handed = {"keys_values": keys_values, "record": record, "name": f"{name}.attn"}
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), extra, **handed)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def cross(
        self,
        tokens: Tensor,
        *others: KeysValues | None,
        keys_values: list[KeysValues | None] | None = None,
    ) -> Tensor:
        """A second stream through this block's weights: (B, Q, C) -> (B, Q, C).

        The tokens attend to themselves and to `others`: what the base stream offers, memory. The base stream
        does not see them (the masked form of Sandler et al., section 3.3). keys_values: a list that the
        tokens' own are appended to.
        """
        y = self.attn(self.norm1(tokens), *others, keys_values=keys_values)
        tokens = tokens + self.drop_path(self.ls1(y))
        return tokens + self.drop_path(self.ls2(self.mlp(self.norm2(tokens))))

    def keys_values(self, memory: Tensor) -> KeysValues:
        """What memory rows (M, C) or (B, M, C) offer: they pass the block's norm like any other token."""
        return self.attn.keys_values(self.norm1(memory))

    def forward_packed(self, x: Tensor, spans: Spans) -> Tensor:
        """(T, C) tokens of many images, one after another -> same."""
        y = self.attn.forward_packed(self.norm1(x), spans)
        x = x + self.drop_images(self.ls1(y), spans)
        return x + self.drop_images(self.ls2(self.mlp(self.norm2(x))), spans)

    def drop_images(self, y: Tensor, spans: Spans) -> Tensor:
        """Stochastic depth drops the branch of a whole image, never of single tokens."""
        if not self.training or self.drop_path.rate == 0.0:
            return y
        return y * spans.spread(self.drop_path(y.new_ones(len(spans.lengths), 1)))


class ViT(nn.Module):
    """images (B, 3, H, W) -> Features: one map of stride `patch_size` (or those of `out_blocks`), and the
    prefix tokens (class, distillation, registers, in this order), all after the final norm.

    patch_embed: another module from images to a map (B, embed_dim, ceil(H / p), ceil(W / p)), where p is
    config.patch_size: the pixels of a side that one token stands for.
    blocks: a paper's own, in place of config.depth plain ones.
    """

    def __init__(
        self,
        config: ViTConfig,
        patch_embed: nn.Module | None = None,
        blocks: Iterable[Block] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        # That it takes, the first where a call names none; `models.use_patch_sizes` changes them.
        self.patch_sizes = (config.patch_size,)
        dim = config.embed_dim
        self.patch_embed = (
            PatchEmbed(config.patch_size, dim) if patch_embed is None else patch_embed
        )
        kinds = (config.class_token, config.distillation_token, config.num_reg_tokens)
        self.cls_token, self.dist_token, self.reg_token = (
            nn.Parameter(torch.zeros(1, count, dim)) if count else None for count in map(int, kinds)
        )
        self.num_prefix_tokens = config.num_prefix_tokens
        # Rows of the table that belong to prefix tokens.
        self.prefix_rows = config.num_prefix_tokens if config.prefix_positions else 0
        rows = self.prefix_rows + math.prod(config.grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, dim))
        if blocks is None:
            rates = drop_path_schedule(config.drop_path_rate, config.depth)
            blocks = [Block(config, rate) for rate in rates]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, config.norm_eps)

        spec = FeatureSpec(dim, config.patch_size)
        self.map_names = {i: f"b{i}" for i in config.out_blocks}
        if not self.map_names:
            self.map_names = {config.depth - 1: level_name(spec.stride)}
        self.feature_specs = dict.fromkeys(self.map_names.values(), spec)
        self.grad_checkpointing = False
        config.alter(self)
        self._init_weights()

    def _init_weights(self) -> None:
        for parameter in (self.pos_embed, self.cls_token, self.dist_token, self.reg_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        images: Tensor,
        record: dict[str, Tensor] | None = None,
        *,
        memory: Sequence[Tensor | None] | None = None,
        class_offset: Tensor | None = None,
        keys_values: list[KeysValues | None] | None = None,
        patch_size: int | None = None,
    ) -> Features:
        """memory: for each block rows (M, C) or (B, M, C) that all its tokens attend to, or None: the
        full-attention form of learnable memory (`Block.forward`). class_offset: (C,), added to the class
        token before the first block. keys_values: a list that each block's are appended to, for a second
        stream (`Block.cross`).
        patch_size: one of `patch_sizes`; None: the first."""
        check_images(images, self)
        if memory is not None and len(memory) != len(self.blocks):
            raise InputError(
                f"memory has {len(memory)} entries, but {type(self).__name__} has {len(self.blocks)} "
                "blocks; give one per block, None where it has none"
            )
        # What is handed out is kept anyway: computing it again would save nothing.
        saving = (
            self.grad_checkpointing and self.training and record is None and keys_values is None
        )
        x, grid = self.embed(images, patch_size)
        if class_offset is not None:
            x = torch.cat([x[:, :1] + class_offset, x[:, 1:]], dim=1)
        tapped: dict[str, Tensor] = {}
        normed = x
        for i, block in enumerate(cast(Iterable[Block], self.blocks)):
            extra = None if memory is None else memory[i]
            if saving:
                x = checkpointed(block, x, extra)
            else:
                x = block(x, extra, keys_values, record, f"blocks.{i}")
            if record is not None:
                record[f"blocks.{i}"] = x
            if i in self.map_names:
                normed = self.norm(x)
                tapped[self.map_names[i]] = normed
        if self.config.depth - 1 not in self.map_names:
            normed = self.norm(x)
        skip = self.num_prefix_tokens
        maps = {
            name: tokens[:, skip:].unflatten(1, grid).permute(0, 3, 1, 2)
            for name, tokens in tapped.items()
        }
        return Features(maps, normed[:, :skip] if skip else None)

    def embed(
        self, images: Tensor, patch_size: int | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """The tokens that enter the first block (B, P + h * w, C), and the grid (h, w)."""
        p = self.patch_sizes[0] if patch_size is None else patch_size
        if p not in self.patch_sizes:
            raise InputError(
                f"{type(self).__name__} takes patches of {listed(list(map(str, self.patch_sizes)))} pixels, "
                f"but was asked for {p}; vitrail.models.use_patch_sizes(model, ...) says which it takes"
            )
        own = p == self.config.patch_size
        x = self.patch_embed(images) if own else self.patch_embed(images, p)
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2) + self.positions(grid)
        prefix = self.prefix()
        if prefix is not None:
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        return x, grid

    def prefix(self) -> Tensor | None:
        """Class, distillation and register tokens with their positions (1, P, C), or None."""
        kinds = (self.cls_token, self.dist_token, self.reg_token)
        tokens: list[Tensor] = [token for token in kinds if token is not None]
        if not tokens:
            return None
        prefix = torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0]
        return prefix + self.pos_embed[:, : self.prefix_rows] if self.prefix_rows else prefix

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The patches' position table for a grid (h, w): (1, h * w, C)."""
        return resample_positions(
            self.pos_embed[:, self.prefix_rows :],
            self.config.grid,
            grid,
            antialias=self.config.pos_antialias,
            offset=self.config.pos_offset,
        )

    @property
    def takes_packs(self) -> bool:
        """Whether its tokens are plain patches."""
        return isinstance(self.patch_embed, PatchEmbed)

    @property
    def takes_patch_sizes(self) -> bool:
        """Whether its patches may have other sizes: a plain projection can be resized."""
        embed = self.patch_embed
        return isinstance(embed, PatchEmbed) and type(embed).project is PatchEmbed.project

    def forward_packed(self, packed: PackedImages) -> PackedFeatures:
        """Many images of any sizes at once, each as if it were alone."""
        if not isinstance(self.patch_embed, PatchEmbed):
            raise InputError(
                f"{type(self).__name__} with {type(self.patch_embed).__name__} cannot take packed images: "
                "its tokens are no plain patches; use images of one size in a batch"
            )
        check_packed(packed, self)
        skip = self.num_prefix_tokens
        x = self.patch_embed.project(packed.patches, packed.patch_size)
        x = x + packed_positions(packed, lambda grid: self.positions(grid)[0])
        prefix = self.prefix()
        if prefix is not None:
            parts = [t for piece in x.split(packed.lengths) for t in (prefix[0], piece)]
            x = torch.cat(parts)
        spans = packed.spans(skip)
        tapped: dict[str, Tensor] = {}
        for i, block in enumerate(cast(Iterable[Block], self.blocks)):
            if self.grad_checkpointing and self.training:
                x = checkpointed(block, x, spans, run=block.forward_packed)
            else:
                x = block.forward_packed(x, spans)
            if i in self.map_names:
                tapped[self.map_names[i]] = self.norm(x)
        split = {name: split_prefix(tokens, spans, skip) for name, tokens in tapped.items()}
        if self.config.depth - 1 in self.map_names:
            tokens = split[self.map_names[self.config.depth - 1]][0]
        else:
            tokens = split_prefix(self.norm(x), spans, skip)[0]
        return packed_features(
            packed,
            {name: patches for name, (_, patches) in split.items()},
            tokens if skip else None,
        )


class ViTHead(nn.Module):
    """The class token, the mean of the map or both, then a classifier. Features -> (B, num_classes).

    "linear": zero-initialised, for fine-tuning; "tanh": one hidden layer, for pre-training (section 3.1);
    "mlp": two layers with GELU.
    """

    def __init__(
        self, config: ViTConfig, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        self.pool: Pool = config.pool
        dim = config.embed_dim * (2 if config.pool == "both" else 1)
        self.hidden, self.act = None, None
        if config.head != "linear":
            hidden_dim = config.head_hidden_dim or config.embed_dim
            self.hidden = nn.Linear(dim, hidden_dim)
            self.act = nn.Tanh() if config.head == "tanh" else nn.GELU()
            nn.init.trunc_normal_(self.hidden.weight, std=0.02)
            nn.init.zeros_(self.hidden.bias)
            dim = hidden_dim
        self.fc = nn.Linear(dim, num_classes)
        nn.init.zeros_(self.fc.bias)
        if config.head == "linear":
            nn.init.zeros_(self.fc.weight)
        else:
            # Zeros here would hide the hidden layer from its first gradients.
            nn.init.trunc_normal_(self.fc.weight, std=0.02)

    def forward(self, features: Features) -> Tensor:
        x = pooled(features, self.pool)
        if self.hidden is not None and self.act is not None:
            x = self.act(self.hidden(x))
        return self.fc(x)


def pooled(features: Features, pool: Pool) -> Tensor:
    """The class token, the mean of the last map, or both side by side: (B, C) or (B, 2C)."""
    parts = []
    if pool != "avg":
        assert features.prefix is not None
        parts.append(features.prefix[:, 0])
    if pool != "token":
        parts.append(list(features.maps.values())[-1].mean((2, 3)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


LAYOUTS = {
    "timm": Layout(from_timm, TIMM_MARKS, may_leave=("pre_logits.*",), source="timm"),
    "huggingface": Layout(
        from_huggingface,
        (f"vit.{HUGGINGFACE_EMBEDDING}", "vit.embeddings.position_embeddings"),
        may_leave=("vit.pooler.*",),
        source="Hugging Face ViTForImageClassification",
    ),
    "huggingface_base": Layout(
        from_huggingface,
        (HUGGINGFACE_EMBEDDING, "embeddings.position_embeddings", "layernorm.weight"),
        may_leave=("pooler.*",),
        source="Hugging Face ViTModel",
    ),
}

HALF = (0.5, 0.5, 0.5)
AUGREG = Preprocessing(crop_pct=0.9, mean=HALF, std=HALF)


register_backbone(
    ViT,
    VARIANTS,
    tiny=smallest(ViTConfig, image_size=(24, 40), out_blocks=(0, 1), pool="both", head="mlp"),
    layouts=LAYOUTS,
    tail=ViTHead,
    resample=resample_to,
    preprocessing=dict.fromkeys(VARIANTS, AUGREG)
    | {"vit_small_patch8": Preprocessing(crop_pct=0.9)},
)
