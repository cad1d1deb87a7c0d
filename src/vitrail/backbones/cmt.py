"""CMT (Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers", CVPR 2022,
https://arxiv.org/abs/2107.06263).

Convolutions see neighbours, attention sees everything; a CMT block has both. A depthwise convolution before
it (local perception unit, LPU) tells where things are, attention looks at keys and values which a depthwise
convolution of stride k has thinned out (lightweight MHSA), and the feed-forward network has a depthwise
convolution in its middle (IRFFN). Four stages halve the map as in a convolutional network.

The maps are what leaves the blocks, without a final norm; the network has none.

Where the paper and the official code (github.com/ggjy/CMT.pytorch) differ, we follow the code, whose weights
exist (what is said of the paper here, its tables and equations, is from memory and unverified):
- Keys and values: the paper's equation 2 has the depthwise convolution alone, the code BatchNorm after it.
- Scores are divided by the square root of the width of a value head; the same as a key head's (section 3.2)
  in every named model.
- The tail: the paper's table 1 has a 1x1 convolution to 1280 after global pooling, "followed by ReLU or
  Swish"; the code applies it to the 1/32 map, then BatchNorm and swish, and pools after that.
- The expansion of the IRFFN: the paper rounds 3.77 of CMT-XS to 3.8.
- Norms inside blocks have eps 1e-6, those after patch embeddings 1e-5; the paper does not say.
- The relative position bias is a dense table (heads, queries, keys) for a stage, shared by its blocks: it is
  not indexed by offsets, and the paper's "relative" is a matter of training.
Unlike the official code, which takes only the size it was built for: any size. Zeros are added right and
bottom before each convolution of stride 2 and each reduction of keys and values, and the position table is
resampled bicubically, first over the grid of queries, then over the grid of keys.

Switches of the paper's ablation (table 4): `stem` off: patches of 4x4 pixels straight from the image; `lpu`
off: none; `lmhsa` off: all tokens are keys, without bias, as in ViT; `irffn` off: ViT's MLP of two layers.
The other way round, a ViT gets the stem by `stem="conv"`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitrail.backbones.vit import PatchEmbed as ViTPatchEmbed
from vitrail.backbones.vit import ViT, ViTConfig, smallest
from vitrail.features import Features, FeatureSpec, check_images, pad_to_multiple, pyramid_specs
from vitrail.layers.attention import attend, map_to_tokens, tokens_to_map
from vitrail.layers.checkpoint import checkpointed
from vitrail.layers.mlp import Mlp
from vitrail.layers.position import resample_positions
from vitrail.layers.residual import DropPath, drop_path_schedule
from vitrail.ops.linear import Linear
from vitrail.registry import Layout, Tensors, register_backbone, register_study, rename_keys
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class CMTConfig:
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    stem_dim: int
    mlp_ratio: float
    image_size: int | tuple[int, int]  # pixels; the position tables' own grids cover it
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)  # k of equation 2: one key for k x k tokens
    qkv_bias: bool = True
    stem: bool = True
    lpu: bool = True
    lmhsa: bool = True
    irffn: bool = True
    head_dim: int = 1280  # width of the classifier tail
    head_drop: float = 0.1
    drop_path_rate: float = 0.0  # rate of the last block; earlier blocks grow linearly from zero

    def __post_init__(self) -> None:
        stages = {len(self.embed_dims), len(self.depths), len(self.num_heads), len(self.sr_ratios)}
        if len(stages) > 1:
            raise InputError(
                "CMT needs embed_dims, depths, num_heads and sr_ratios of one length, but got "
                f"{self.embed_dims}, {self.depths}, {self.num_heads} and {self.sr_ratios}"
            )
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if heads < 1 or dim % heads:
                raise InputError(
                    f"CMT's width {dim} cannot be shared by {heads} heads; change embed_dims or num_heads"
                )

    def grids(self) -> list[Grid]:
        """(h, w) of each stage's map at `image_size`."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        grids = []
        for i in range(len(self.depths)):
            stride = 4 * 2**i
            grids.append((math.ceil(height / stride), math.ceil(width / stride)))
        return grids


VARIANTS = {  # table 1
    "cmt_ti": CMTConfig(
        embed_dims=(46, 92, 184, 368), depths=(2, 2, 10, 2), stem_dim=16, mlp_ratio=3.6, image_size=160
    ),
    "cmt_xs": CMTConfig(
        embed_dims=(52, 104, 208, 416), depths=(3, 3, 12, 3), stem_dim=16, mlp_ratio=3.77, image_size=192
    ),
    "cmt_s": CMTConfig(
        embed_dims=(64, 128, 256, 512), depths=(3, 3, 16, 3), stem_dim=32, mlp_ratio=4.0, image_size=224
    ),
    "cmt_b": CMTConfig(
        embed_dims=(76, 152, 304, 608),
        depths=(4, 4, 20, 4),
        stem_dim=38,
        mlp_ratio=4.0,
        image_size=256,
        head_drop=0.3,
    ),
}  # fmt: skip


class Stem(nn.Sequential):
    """Three 3x3 convolutions, the first of stride 2; GELU, then BatchNorm, after each.
    (B, 3, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int) -> None:
        layers: list[nn.Module] = []
        for in_chans, stride in ((3, 2), (dim, 1), (dim, 1)):
            layers += [nn.Conv2d(in_chans, dim, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(dim)]
        super().__init__(*layers)


class PatchEmbed(nn.Module):
    """Patches by a strided convolution, normed. (B, C, H, W) -> (B, C', ceil(H / p), ceil(W / p))."""

    def __init__(self, in_chans: int, dim: int, patch_size: int = 2) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(pad_to_multiple(x, self.patch_size))
        return tokens_to_map(self.norm(map_to_tokens(x)), *x.shape[-2:])


class LPU(nn.Module):
    """Local perception unit: a depthwise convolution behind a shortcut (equation 1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


class Attention(nn.Module):
    """Lightweight multi-head self-attention (equations 2 and 3). (B, N, C) -> (B, N, C).

    sr_ratio: keys and values are one in sr_ratio x sr_ratio tokens.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.k = Linear(dim, dim, bias=qkv_bias)
        self.v = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.sr: nn.Module | None = None
        if sr_ratio > 1:
            conv = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, groups=dim)
            self.sr = nn.Sequential(conv, nn.BatchNorm2d(dim))

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        bias: Tensor | None,
        record: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        source = x
        if self.sr is not None:
            thin = pad_to_multiple(tokens_to_map(x, *grid), self.sr_ratio)
            source = map_to_tokens(self.sr(thin))
        q, k, v = self.heads(self.q(x)), self.heads(self.k(source)), self.heads(self.v(source))
        x = attend(q, k, v, bias, record, name)
        return self.proj(x.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, D)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class IRFFN(nn.Module):
    """Inverted residual feed-forward network (equations 4 and 5). (B, C, H, W) -> same."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(dim, hidden_dim, 1), nn.GELU(), nn.BatchNorm2d(hidden_dim)
        )
        self.proj = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.proj_act = nn.GELU()
        self.proj_bn = nn.BatchNorm2d(hidden_dim)
        self.conv2 = nn.Sequential(nn.Conv2d(hidden_dim, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.proj_bn(self.proj_act(self.proj(x) + x))
        return self.conv2(x)


class CMTBlock(nn.Module):
    """LPU, attention, IRFFN (equations 6 to 8). (B, C, H, W) -> same."""

    def __init__(self, config: CMTConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dims[stage]
        hidden_dim = int(dim * config.mlp_ratio)
        self.lpu = LPU(dim) if config.lpu else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        sr_ratio = config.sr_ratios[stage] if config.lmhsa else 1
        self.attn = Attention(dim, config.num_heads[stage], sr_ratio, config.qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = IRFFN(dim, hidden_dim) if config.irffn else Mlp(dim, hidden_dim)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        record: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        grid = x.shape[-2], x.shape[-1]
        tokens = map_to_tokens(self.lpu(x))
        y = self.attn(self.norm1(tokens), grid, bias, record, f"{name}.attn")
        tokens = tokens + self.drop_path(y)
        y = self.norm2(tokens)
        if isinstance(self.mlp, IRFFN):
            x = tokens_to_map(tokens, *grid)
            return x + self.drop_path(self.mlp(tokens_to_map(y, *grid)))
        return tokens_to_map(tokens + self.drop_path(self.mlp(y)), *grid)


class CMTStage(nn.Module):
    """Patch embedding and blocks, which share a table of position biases."""

    def __init__(
        self, config: CMTConfig, stage: int, patch_embed: PatchEmbed, rates: list[float]
    ) -> None:
        super().__init__()
        self.grid = config.grids()[stage]
        self.sr_ratio = config.sr_ratios[stage]
        self.patch_embed = patch_embed
        self.relative_pos: nn.Parameter | None = None
        if config.lmhsa:
            queries, keys = math.prod(self.grid), math.prod(_thinned(self.grid, self.sr_ratio))
            table = torch.empty(config.num_heads[stage], queries, keys)
            self.relative_pos = nn.Parameter(table)
            nn.init.normal_(self.relative_pos)  # as the official code; no smaller std
        self.blocks = nn.ModuleList(CMTBlock(config, stage, rate) for rate in rates)

    def forward(
        self, x: Tensor, record: dict[str, Tensor] | None, name: str, checkpointing: bool
    ) -> Tensor:
        x = self.patch_embed(x)
        bias = self.bias((x.shape[-2], x.shape[-1]))
        for i, block in enumerate(self.blocks):
            if checkpointing:
                x = checkpointed(block, x, bias)
            else:
                x = block(x, bias, record, f"{name}.blocks.{i}")
        return x

    def bias(self, grid: Grid) -> Tensor | None:
        """(1, heads, queries, keys) for a map of `grid`, or None where there is no table."""
        if self.relative_pos is None:
            return None
        keys = _thinned(self.grid, self.sr_ratio), _thinned(grid, self.sr_ratio)
        return resample_table(self.relative_pos, (self.grid, grid), keys)[None]


def resample_table(table: Tensor, queries: tuple[Grid, Grid], keys: tuple[Grid, Grid]) -> Tensor:
    """A bias table (heads, queries, keys) for other grids, bicubically. queries, keys: (old, new) grids."""
    if not torch.compiler.is_compiling() and queries[0] == queries[1] and keys[0] == keys[1]:
        return table
    heads = table.shape[0]
    x = table.permute(1, 0, 2).flatten(1)[None]  # (1, queries, heads * keys)
    x = resample_positions(x, *queries, antialias=True)[0]
    x = x.unflatten(1, (heads, math.prod(keys[0]))).permute(2, 1, 0).flatten(1)[None]
    x = resample_positions(x, *keys, antialias=True)[0]  # (keys, heads * queries)
    return x.unflatten(1, (heads, queries[1][0] * queries[1][1])).permute(1, 2, 0)


def _thinned(grid: Grid, sr_ratio: int) -> Grid:
    """The grid of keys and values of a map."""
    return (grid[0] + sr_ratio - 1) // sr_ratio, (grid[1] + sr_ratio - 1) // sr_ratio


class CMT(nn.Module):
    """images (B, 3, H, W) -> maps "c2".."c5"."""

    def __init__(self, config: CMTConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.feature_specs = pyramid_specs(config.embed_dims, first_stride=4)
        self.stem = Stem(config.stem_dim) if config.stem else None
        rates = iter(drop_path_schedule(config.drop_path_rate, sum(config.depths)))
        stages = []
        width = config.stem_dim if config.stem else 3
        for i, dim in enumerate(config.embed_dims):
            patch_embed = PatchEmbed(width, dim, 2 if i or config.stem else 4)
            stages.append(
                CMTStage(config, i, patch_embed, [next(rates) for _ in range(config.depths[i])])
            )
            width = dim
        self.stages = nn.ModuleList(stages)
        self.apply(_init)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        check_images(images, self)
        x = images if self.stem is None else self.stem(images)
        checkpointing = self.grad_checkpointing and self.training
        maps = {}
        for i, (level, stage) in enumerate(zip(self.feature_specs, self.stages, strict=True)):
            x = maps[level] = stage(x, record, f"stages.{i}", checkpointing)
        return Features(maps)


class CMTTail(nn.Module):
    """1x1 convolution, BatchNorm and swish on the coarsest map, then pooling. Features -> (B, K)."""

    def __init__(
        self, config: CMTConfig, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(list(specs.values())[-1].channels, config.head_dim, 1)
        self.bn = nn.BatchNorm2d(config.head_dim)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(config.head_drop)
        self.fc = nn.Linear(config.head_dim, num_classes)
        self.apply(_init)

    def forward(self, features: Features) -> Tensor:
        x = self.act(self.bn(self.conv(list(features.maps.values())[-1])))
        return self.fc(self.drop(x.mean((2, 3))))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


class ConvStemEmbed(nn.Module):
    """The stem, then patches of half the size; shapes as ViT's PatchEmbed."""

    def __init__(self, patch_size: int, embed_dim: int, stem_dim: int = 32) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stem = Stem(stem_dim)
        self.proj = nn.Conv2d(stem_dim, embed_dim, patch_size // 2, patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.stem(pad_to_multiple(images, self.patch_size)))


@dataclass(frozen=True, kw_only=True)
class ConvStemViTConfig(ViTConfig):
    """A ViT's fields, and the stem that the ablation begins with."""

    stem: Literal["patch", "conv"] = "patch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem == "conv" and self.patch_size % 2:
            raise InputError(f"stem='conv' halves the image: patch_size {self.patch_size} is odd")

    def alter(self, vit: ViT) -> None:
        super().alter(vit)
        if self.stem == "conv" and not isinstance(vit.patch_embed, ViTPatchEmbed):
            raise InputError(
                f"stem is 'conv', but {type(vit).__name__} has a stem of its own; leave the field"
            )
        if self.stem == "conv":
            vit.patch_embed = ConvStemEmbed(self.patch_size, self.embed_dim)


def from_official(state: Tensors, config: CMTConfig) -> Tensors:
    """The official code names stages a to d, and the tail _fc, _bn and head."""

    def stage(match: re.Match[str]) -> str:
        return f"backbone.stages.{'abcd'.index(match[2])}.{match[1]}"

    def stem(match: re.Match[str]) -> str:
        return f"backbone.stem.{3 * (int(match[2]) - 1) + (0 if match[1] == 'conv' else 2)}."

    return rename_keys(
        state,
        [
            (r"^(relative_pos|patch_embed|blocks)_([abcd])(?=\.|$)", stage),
            (r"(\.blocks\.\d+)\.proj\.", r"\1.lpu.conv."),
            (r"^stem_(conv|norm)(\d)\.", stem),
            (r"^head\.", "head.fc."),
            (r"^_fc\.", "head.conv."),
            (r"^_bn\.", "head.bn."),
        ],
    )


def resample(state: Tensors, config: CMTConfig) -> Tensors:
    """Bring the position tables of square images of another size to `config.image_size`."""
    out = dict(state)
    for i, (new, sr_ratio) in enumerate(zip(config.grids(), config.sr_ratios, strict=True)):
        key = f"backbone.stages.{i}.relative_pos"
        if key not in state:
            continue
        table = state[key]
        side = math.isqrt(table.shape[1])
        old = (side, side)
        keys = _thinned(old, sr_ratio), _thinned(new, sr_ratio)
        if math.prod(old) == table.shape[1] and math.prod(keys[0]) == table.shape[2]:
            out[key] = resample_table(table, (old, new), keys)
    return out


register_backbone(
    CMT,
    VARIANTS,
    tiny=CMTConfig(
        embed_dims=(16, 24, 32, 48),
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 4),
        stem_dim=8,
        mlp_ratio=2.5,
        image_size=64,
        head_dim=64,
    ),
    tail=CMTTail,
    resample=resample,
    layouts={
        "official": Layout(
            from_official,
            marks=("relative_pos_a", "stem_conv1.weight", "blocks_a.0.attn.q.weight"),
            source="github.com/ggjy/CMT.pytorch",
        )
    },
    preprocessing={
        name: Preprocessing(size=(config.image_size, config.image_size))
        for name, config in VARIANTS.items()
        if isinstance(config.image_size, int)
    },
)
register_study(
    ViT,
    ConvStemViTConfig,
    tiny=smallest(ConvStemViTConfig, depth=1, image_size=(24, 40), stem="conv"),
)
