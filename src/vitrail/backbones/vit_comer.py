"""ViT-CoMer (Xia et al., "ViT-CoMer: Vision Transformer with Convolutional Multi-scale Feature Interaction
for Dense Predictions", CVPR 2024, https://arxiv.org/abs/2403.07392).

A plain ViT, pre-trained as it is, has one map and mixes its tokens globally; dense prediction wants several
scales and local detail. A small CNN runs beside it and makes maps of strides 8, 16 and 32. Before each
quarter of the ViT's blocks the maps pass convolutions of several kernels (MRFP) and are read into the tokens
(CTI to V); after it the tokens are read back into the maps (CTI to C), each time by deformable attention over
all three scales. What goes into the ViT starts at zero: training begins from the pre-trained network.

Where paper and code differ:
- The official detection and segmentation code are two architectures under one name: `form`. In detection MRFP
  is half as wide as the ViT and the last tokens are added to all four maps; in segmentation MRFP is wider, by
  variant, and the tokens after each quarter are added to one map each, the first to the finest.
- The attention of CTI to V has no residual, that of CTI to C one from the features after their norm; MRFP has
  two GELUs in a row and no residual. All as in the code, and equal to stored activations of it.
- `to_v="add"` and `to_c="add"` are the paper's plain addition (Table 8): the maps summed at the ViT's stride
  and scaled by `gamma`, and the tokens added to the map of their stride. "none" leaves the way out as the
  code does, MRFP with the way to V; the CTIs at the end (`num_extra`) go with the way to C. With another
  number of interactions than four, the segmentation form takes the tokens after the first quarter of them,
  half and so on, rounded up.
- The code takes sizes that 32 divides. Others are filled up with zeros at the right and the bottom, and the
  maps are cropped.
- The ViT's class token and final norm are not used; patches of another size than 16 (DINOv2) are resized.
  Tables are resampled bicubically without antialias.
- The code runs some blocks within windows (zeros fill up the last, and are attended to): `window_size`, for
  all blocks but the last of each interaction. There is no released Large over a plain ViT: its widths are
  those of the code's Large over BEiT, and in segmentation MRFP is as wide as in Base.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.backbones.vit import BASE, LARGE, SMALL, TINY, Block, PatchEmbed, ViTConfig
from vitrail.backbones.vit_keys import (
    HUGGINGFACE_EMBEDDING,
    TIMM_MARKS,
    from_huggingface,
    from_timm,
    resample_to,
)
from vitrail.features import Features, check_images, pad_to_multiple, pyramid_specs
from vitrail.layers.attention import map_to_tokens, tokens_to_map
from vitrail.layers.checkpoint import checkpointed
from vitrail.layers.conv import ConvNormAct
from vitrail.layers.position import resample_positions
from vitrail.layers.residual import DropPath, drop_path_schedule
from vitrail.layers.tables import cached_table
from vitrail.ops.linear import Linear
from vitrail.ops.ms_deform_attn import MSDeformAttn
from vitrail.registry import Layout, Tensors, register_backbone, rename_keys
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

Shape = tuple[int, int]
Way = Literal["cti", "add", "none"]
STRIDES = (8, 16, 32)  # of the maps that interact; the tokens are of the second


@dataclass(frozen=True, kw_only=True)
class ViTCoMerConfig:
    embed_dim: int
    depth: int
    num_heads: int
    image_size: int | tuple[int, int] = 224  # pixels; the position table's own grid covers it
    mlp_ratio: float = 4.0
    layer_scale_init: float = 1.0
    drop_path_rate: float = (
        0.0  # of the last block and of all interactions; earlier blocks grow from zero
    )
    window_size: int | None = None  # patches; None: every block attends to all
    form: Literal["detection", "segmentation"] = "detection"
    stem_dim: int = 64  # width of the CNN at stride 4
    num_interactions: int = 4  # Table 9
    kernels: tuple[int, ...] = (3, 5)  # of MRFP, Table 10
    mrfp_ratio: float = 0.5  # hidden width of MRFP / embed_dim in the detection form
    segmentation_mrfp_ratio: float = 6.0  # the same in the segmentation form
    to_v: Way = "cti"  # Table 8
    to_c: Way = "cti"
    num_extra: int = 4  # CTIs to C after the last block
    deform_heads: int = 6
    num_points: int = 4
    value_ratio: float = 1.0  # width of the deformable attention's values / embed_dim
    ffn_ratio: float = 0.25  # hidden width of the interactions' feed-forward layers / embed_dim
    gamma_init: float = 0.0  # of what is added to the tokens

    def __post_init__(self) -> None:
        if not 1 <= self.num_interactions <= self.depth or self.depth % self.num_interactions:
            raise InputError(
                f"num_interactions {self.num_interactions} must divide the {self.depth} blocks: each "
                "interaction has as many"
            )
        if not self.kernels or any(k < 1 or k % 2 == 0 for k in self.kernels):
            raise InputError(
                f"kernels {self.kernels} must be one or more odd sizes, such as (3, 5)"
            )
        if self.mrfp_dim < 1 or self.mrfp_dim % len(self.kernels):
            raise InputError(
                f"MRFP is {self.mrfp_dim} wide, which its {len(self.kernels)} kernels do not share evenly; "
                "change mrfp_ratio, segmentation_mrfp_ratio or kernels"
            )
        if self.window_size is not None and self.window_size < 1:
            raise InputError(
                f"window_size is {self.window_size}, but a window has at least 1 patch"
            )

    @cached_property
    def vit(self) -> ViTConfig:
        """The ViT inside, as far as its blocks and its position table go."""
        return ViTConfig(
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            image_size=self.image_size,
            mlp_ratio=self.mlp_ratio,
            layer_scale_init=self.layer_scale_init,
            drop_path_rate=self.drop_path_rate,
            class_token=False,
            pos_antialias=False,
            pool="avg",
        )

    @property
    def mrfp_dim(self) -> int:
        detection = self.form == "detection"
        return int(
            self.embed_dim * (self.mrfp_ratio if detection else self.segmentation_mrfp_ratio)
        )


def _variant(vit: ViTConfig, mrfp: float, heads: int, value_ratio: float) -> ViTCoMerConfig:
    return ViTCoMerConfig(
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=vit.num_heads,
        segmentation_mrfp_ratio=mrfp,
        deform_heads=heads,
        value_ratio=value_ratio,
    )


VARIANTS = {
    "vit_comer_tiny": _variant(TINY, 6.0, 6, 1.0),
    "vit_comer_small": _variant(SMALL, 1.5, 6, 1.0),
    "vit_comer_base": _variant(BASE, 1.0, 12, 0.5),
    "vit_comer_large": _variant(LARGE, 1.0, 16, 0.5),
}


def to_maps(c: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Tokens of all levels (B, S, C) -> a map (B, C, h, w) for each."""
    parts = c.split([h * w for h, w in shapes], dim=1)
    return [tokens_to_map(part, h, w) for part, (h, w) in zip(parts, shapes, strict=True)]


def to_tokens(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C, h, w) -> the tokens of all, one level after another: (B, S, C)."""
    return torch.cat([map_to_tokens(x) for x in maps], dim=1)


def add_tokens(c: Tensor, x: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """The ViT's tokens added to those of the map of their stride, the second."""
    fine, middle, coarse = c.split([h * w for h, w in shapes], dim=1)
    return torch.cat([fine, middle + x, coarse], dim=1)


@cached_table
def pixel_centres(shapes: tuple[Shape, ...], device: torch.device) -> Tensor:
    """(1, S, 1, 2) where each token of the maps stands in the image, as (x, y) in 0 to 1."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        places = [x.expand(height, width), y[:, None].expand(height, width)]
        centres.append(torch.stack(places, -1).flatten(0, 1))
    return torch.cat(centres)[None, :, None]


class ConvBranch(nn.Module):
    """images (B, 3, H, W) -> maps of `dim` channels at strides 4, 8, 16 and 32."""

    def __init__(self, stem_dim: int, dim: int) -> None:
        super().__init__()
        widths = [stem_dim, 2 * stem_dim, 4 * stem_dim, 4 * stem_dim]
        self.stem = nn.Sequential(
            ConvNormAct(3, stem_dim, stride=2, act=nn.ReLU),
            ConvNormAct(stem_dim, stem_dim, act=nn.ReLU),
            ConvNormAct(stem_dim, stem_dim, act=nn.ReLU),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.downs = nn.ModuleList(
            ConvNormAct(widths[i], widths[i + 1], stride=2, act=nn.ReLU) for i in range(3)
        )
        self.proj = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for down in self.downs:
            maps.append(down(maps[-1]))
        return [proj(x) for proj, x in zip(self.proj, maps, strict=True)]


class MRFP(nn.Module):
    """Multi-receptive-field feature pyramid (section 3.2): each level passes depthwise convolutions of
    several kernels, which share its channels. (B, S, C) -> same."""

    def __init__(self, dim: int, hidden_dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        share = hidden_dim // len(kernels)
        self.fc1 = Linear(dim, hidden_dim)
        self.convs = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(share, share, k, padding=k // 2, groups=share) for k in kernels)
            for _ in STRIDES
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(hidden_dim) for _ in STRIDES)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, c: Tensor, shapes: Sequence[Shape]) -> Tensor:
        maps = []
        for x, convs, norm in zip(
            to_maps(self.fc1(c), shapes), self.convs, self.norms, strict=True
        ):
            convs = cast(nn.ModuleList, convs)
            parts = x.chunk(len(convs), dim=1)
            x = torch.cat([conv(part) for conv, part in zip(convs, parts, strict=True)], dim=1)
            maps.append(F.gelu(norm(x)))
        return self.fc2(F.gelu(to_tokens(maps)))  # the second GELU is the official code's


class ConvFFN(nn.Module):
    """Feed-forward layer with one depthwise convolution for all levels. (B, S, C) -> same."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, c: Tensor, shapes: Sequence[Shape]) -> Tensor:
        maps = [self.dwconv(x) for x in to_maps(self.fc1(c), shapes)]
        return self.fc2(F.gelu(to_tokens(maps)))


class CTI(nn.Module):
    """The core of the CNN-transformer interaction (section 3.3): deformable attention over the three levels,
    then a feed-forward layer. (B, S, C) -> same.

    residual: the queries are added to what the attention reads.
    """

    def __init__(self, config: ViTCoMerConfig, *, residual: bool) -> None:
        super().__init__()
        dim = config.embed_dim
        self.residual = residual
        self.query_norm = _norm(dim)
        self.feat_norm = _norm(dim)
        self.attn = MSDeformAttn(
            dim, config.deform_heads, len(STRIDES), config.num_points, config.value_ratio
        )
        self.ffn_norm = _norm(dim)
        self.ffn = ConvFFN(dim, int(dim * config.ffn_ratio))
        self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, query: Tensor, feat: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
        centres = pixel_centres(shapes, query.device)
        y = self.attn(self.query_norm(query), centres, self.feat_norm(feat), shapes)
        if self.residual:
            y = query + y
        return y + self.drop_path(self.ffn(self.ffn_norm(y), shapes))


class ToV(nn.Module):
    """The maps' way into the tokens: summed at the tokens' stride, scaled, added.

    x (B, N, C), c (B, S, C) -> x.
    """

    def __init__(self, config: ViTCoMerConfig) -> None:
        super().__init__()
        self.cti = CTI(config, residual=False) if config.to_v == "cti" else None
        self.gamma = nn.Parameter(torch.full((config.embed_dim,), config.gamma_init))

    def forward(self, x: Tensor, c: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
        if self.cti is not None:
            c = self.cti(c, c, shapes)
        fine, middle, coarse = to_maps(c, shapes)
        total = middle + _resize(fine, shapes[1]) + _resize(coarse, shapes[1])
        return x + self.gamma * map_to_tokens(total)


class ToC(nn.Module):
    """The tokens' way into the maps. x (B, N, C), c (B, S, C) -> c.

    ffn: a feed-forward layer before the attention, as the CTIs after the last block have.
    """

    def __init__(self, config: ViTCoMerConfig, *, ffn: bool = False) -> None:
        super().__init__()
        dim = config.embed_dim
        self.cti = None
        if config.to_c == "cti":
            self.query_norm = _norm(dim)
            self.feat_norm = _norm(dim)
            self.cti = CTI(config, residual=True)
        self.ffn = None
        if ffn:
            self.ffn_norm = _norm(dim)
            self.ffn = ConvFFN(dim, int(dim * config.ffn_ratio))
            self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, x: Tensor, c: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
        c = add_tokens(c, x, shapes)
        if self.ffn is not None:
            c = c + self.drop_path(self.ffn(self.ffn_norm(c), shapes))
        if self.cti is not None:
            # Normed here and again inside: the residual carries the normed features.
            c = self.cti(self.query_norm(c), self.feat_norm(c), shapes)
        return c


class Interaction(nn.Module):
    """What stands around a run of ViT blocks: `before` them the maps are read, `after` them the tokens."""

    def __init__(self, config: ViTCoMerConfig, *, last: bool) -> None:
        super().__init__()
        self.mrfp = self.to_v = self.to_c = None
        if config.to_v != "none":
            self.mrfp = MRFP(config.embed_dim, config.mrfp_dim, config.kernels)
            self.to_v = ToV(config)
        if config.to_c != "none":
            self.to_c = ToC(config)
        num_extra = config.num_extra if last and config.to_c == "cti" else 0
        self.extra = nn.ModuleList(ToC(config, ffn=True) for _ in range(num_extra))

    def before(self, x: Tensor, c: Tensor, shapes: tuple[Shape, ...]) -> tuple[Tensor, Tensor]:
        if self.mrfp is None or self.to_v is None:
            return x, c
        c = add_tokens(self.mrfp(c, shapes), x, shapes)
        return self.to_v(x, c, shapes), c

    def after(self, x: Tensor, c: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
        if self.to_c is not None:
            c = self.to_c(x, c, shapes)
        for extra in self.extra:
            c = extra(x, c, shapes)
        return c


class WindowBlock(Block):
    """A ViT block whose attention stays within windows of a map, where the size of one is given."""

    def __init__(self, config: ViTConfig, drop_path: float, window: int | None) -> None:
        super().__init__(config, drop_path)
        self.window = window

    def forward_map(
        self, x: Tensor, grid: Shape, record: dict[str, Tensor] | None = None, name: str = ""
    ) -> Tensor:
        """(B, h * w, C) -> same."""
        if self.window is None:
            return self(x, None, None, record, name)
        y = self.attend_within(self.window, self.norm1(x), grid, record, f"{name}.attn")
        x = x + self.drop_path(self.ls1(y))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def attend_within(
        self, size: int, x: Tensor, grid: Shape, record: dict[str, Tensor] | None, name: str
    ) -> Tensor:
        batch, (height, width) = x.shape[0], grid
        rows, columns = (height + size - 1) // size, (width + size - 1) // size
        # Zeros are filled in after the projection: as keys they have no bias (official code).
        qkv = self.attn.qkv(x).unflatten(1, grid)
        qkv = F.pad(qkv, (0, 0, 0, columns * size - width, 0, rows * size - height))
        qkv = qkv.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3)
        # A copy before axes are joined: the search for a view would ask a traced graph for sizes of 1.
        qkv = qkv.clone(memory_format=torch.contiguous_format).flatten(3, 4).flatten(0, 2)
        y = self.attn.attend(*self.attn.heads(qkv), record, name)
        y = y.transpose(1, 2).flatten(2).unflatten(1, (size, size))
        y = y.unflatten(0, (batch, rows, columns)).transpose(2, 3)
        y = y.clone(memory_format=torch.contiguous_format).flatten(3, 4).flatten(1, 2)
        return self.attn.proj(y[:, :height, :width].flatten(1, 2))


class ViTCoMer(nn.Module):
    """images (B, 3, H, W) -> maps "c2".."c5" of strides 4 to 32, each after its BatchNorm."""

    new_parameters = ("level_embed",)  # before the blocks, though no ViT checkpoint has it

    def __init__(self, config: ViTCoMerConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        dim = config.embed_dim
        self.feature_specs = pyramid_specs((dim,) * 4, first_stride=4)
        self.patch_embed = PatchEmbed(config.vit.patch_size, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(config.vit.grid), dim))
        self.run = config.depth // config.num_interactions  # blocks of an interaction
        self.blocks = nn.ModuleList(
            WindowBlock(config.vit, rate, None if (i + 1) % self.run == 0 else config.window_size)
            for i, rate in enumerate(drop_path_schedule(config.drop_path_rate, config.depth))
        )
        self.cnn = ConvBranch(config.stem_dim, dim)
        self.level_embed = nn.Parameter(torch.zeros(len(STRIDES), dim))
        self.interactions = nn.ModuleList(
            Interaction(config, last=i == config.num_interactions - 1)
            for i in range(config.num_interactions)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(dim) for name in self.feature_specs})
        self._init_weights()

    def _init_weights(self) -> None:
        # Drawn far beyond any cut, as `normal_` on `meta` would import torch's compiler, for seconds.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.level_embed, std=1.0, a=-20.0, b=20.0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                if module is self.patch_embed.proj:  # as every ViT's
                    continue
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.trunc_normal_(module.weight, std=math.sqrt(2 / fan_out), a=-20.0, b=20.0)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        check_images(images, self)
        height, width = images.shape[-2:]
        saving = self.grad_checkpointing and self.training and record is None
        images = pad_to_multiple(images, STRIDES[-1])
        finest, *levels = self.cnn(images)
        shapes = tuple((x.shape[-2], x.shape[-1]) for x in levels)
        c = to_tokens([x + e[:, None, None] for x, e in zip(levels, self.level_embed, strict=True)])
        x = self.patch_embed(images)
        grid = (x.shape[-2], x.shape[-1])
        x = map_to_tokens(x) + resample_positions(
            self.pos_embed, self.config.vit.grid, grid, antialias=False
        )

        seen = []  # tokens after each interaction
        for i, module in enumerate(self.interactions):
            interaction = cast(Interaction, module)
            if saving:
                x, c = checkpointed(interaction, x, c, shapes, run=interaction.before)
            else:
                x, c = interaction.before(x, c, shapes)
            for j in range(i * self.run, (i + 1) * self.run):
                block = cast(WindowBlock, self.blocks[j])
                if saving:
                    x = checkpointed(block, x, grid, run=block.forward_map)
                else:
                    x = block.forward_map(x, grid, record, f"blocks.{j}")
                if record is not None:
                    record[f"blocks.{j}"] = x
            if saving:
                c = checkpointed(interaction, x, c, shapes, run=interaction.after)
            else:
                c = interaction.after(x, c, shapes)
            if record is not None:
                record[f"interactions.{i}.c"] = c
            seen.append(x)

        maps = to_maps(c, shapes)
        maps.insert(0, self.up(maps[0]) + finest)
        out = {}
        for i, (name, spec) in enumerate(self.feature_specs.items()):
            x = tokens_to_map(self._tokens_for(i, seen), *grid)
            y = self.norms[name](maps[i] + _resize(x, maps[i].shape[-2:]))
            stride = int(spec.stride)
            rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
            out[name] = y[..., :rows, :columns]
        return Features(out)

    def _tokens_for(self, level: int, seen: Sequence[Tensor]) -> Tensor:
        """What the ViT adds to the map of a level, 0 the finest."""
        if self.config.form == "detection":
            return seen[-1]
        return seen[-(-len(seen) * (level + 1) // len(self.feature_specs)) - 1]


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if not torch.compiler.is_compiling() and tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


OFFICIAL_NAMES = [
    (r"^blocks\.(\d+)\.gamma([12])$", r"blocks.\1.ls\2.gamma"),
    (
        r"^spm\.stem\.(\d)\.",
        lambda m: f"cnn.stem.{int(m[1]) // 3}.{'bn' if int(m[1]) % 3 else 'conv'}.",
    ),
    (
        r"^spm\.conv(\d)\.(\d)\.",
        lambda m: f"cnn.downs.{int(m[1]) - 2}.{'bn' if int(m[2]) else 'conv'}.",
    ),
    (r"^spm\.fc(\d)\.", lambda m: f"cnn.proj.{int(m[1]) - 1}."),
    (r"\.cti_tov\.(?!gamma)", ".to_v.cti."),
    (r"\.cti_tov\.", ".to_v."),
    (r"\.cti_toc\.", ".to_c."),
    (r"\.extra_CTIs\.", ".extra."),
    (r"\.cfinter\.", ".cti."),
    (r"\.ffn\.dwconv\.dwconv\.", ".ffn.dwconv."),
    # 1 and 2 are the kernels 3 and 5 of the first level, and so on.
    (
        r"\.mrfp\.dwconv\.dwconv(\d)\.",
        lambda m: f".mrfp.convs.{(int(m[1]) - 1) // 2}.{(int(m[1]) - 1) % 2}.",
    ),
    (r"\.mrfp\.dwconv\.bn(\d)\.", lambda m: f".mrfp.norms.{int(m[1]) - 1}."),
    (r"^norm(\d)\.", lambda m: f"norms.c{int(m[1]) + 1}."),
]


def from_official(state: Tensors, config: ViTCoMerConfig) -> Tensors:
    """The backbone of the official files, of both forms. Their tables have a row for the class token."""
    ours = rename_keys(state, OFFICIAL_NAMES)
    return _patches_alone({f"backbone.{key}": value for key, value in ours.items()})


def over_vit(
    convert: Callable[[Tensors, ViTConfig], Tensors],
) -> Callable[[Tensors, ViTCoMerConfig], Tensors]:
    """The key map of a plain ViT's files, whose tokens before the patches have no place here."""
    return lambda state, config: _patches_alone(convert(state, config.vit))


def from_ours(state: Tensors, config: ViTConfig) -> Tensors:
    """A ViT trained and saved here, its classifier left."""
    return dict(state)


def _patches_alone(state: Tensors) -> Tensors:
    """Released position tables are square, behind the rows of class, distillation and register tokens."""
    table = state.get("backbone.pos_embed")
    if table is None:
        return state
    prefix = table.shape[1] - math.isqrt(table.shape[1]) ** 2
    return {**state, "backbone.pos_embed": table[:, prefix:]}


# What a plain ViT's file does not have: all but the blocks, the patches and their positions.
_NEW = tuple(
    f"backbone.{part}*" for part in ("cnn.", "level_embed", "interactions.", "up.", "norms.")
)
_NEW = (*_NEW, "backbone.blocks.*.ls?.gamma")
_TOKENS = ("cls_token", "dist_token", "reg_token", "register_tokens", "mask_token")
_HEADS = ("norm.*", "fc_norm.*", "head.*", "head_dist.*", "pre_logits.*")

LAYOUTS = {
    "official": Layout(
        from_official,
        ("spm.stem.0.weight", "level_embed", "interactions.0.*"),
        source="github.com/Traffic-X/ViT-CoMer, both forms",
    ),
    "vit": Layout(
        over_vit(from_timm),
        TIMM_MARKS,
        may_leave=(*_TOKENS, *_HEADS),
        may_be_new=_NEW,
        source="a plain ViT, DeiT or DINOv2 of timm or of the official code: the other parts start anew",
    ),
    "vitrail_vit": Layout(
        over_vit(from_ours),
        tuple(f"backbone.{mark}" for mark in TIMM_MARKS),
        may_leave=(*(f"backbone.{key}" for key in (*_TOKENS, "norm.*")), "head.*"),
        may_be_new=_NEW,
        source="a plain ViT, DeiT or DINOv2 trained by vitrail",
    ),
} | {
    f"huggingface_{prefix.rstrip('.') or 'base'}": Layout(
        over_vit(from_huggingface),
        (prefix + HUGGINGFACE_EMBEDDING, f"{prefix}embeddings.position_embeddings"),
        may_leave=(
            *(f"{prefix}embeddings.{key}" for key in (*_TOKENS, "distillation_token")),
            f"{prefix}layernorm.*",
            f"{prefix}pooler.*",
            "*classifier.*",
        ),
        may_be_new=_NEW,
        source="a plain ViT, DeiT or DINOv2 of Hugging Face",
    )
    for prefix in ("vit.", "deit.", "dinov2.", "dinov2_with_registers.", "")
}


def resample(state: Tensors, config: ViTCoMerConfig) -> Tensors:
    """Patches of another size and a table of another grid brought to ours."""
    return resample_to(state, config.vit)


register_backbone(
    ViTCoMer,
    VARIANTS,
    tiny=replace(
        VARIANTS["vit_comer_tiny"],
        embed_dim=32,
        depth=2,
        num_heads=2,
        image_size=48,
        mlp_ratio=2.0,
        drop_path_rate=0.1,
        window_size=2,
        form="segmentation",
        stem_dim=8,
        num_interactions=1,
        segmentation_mrfp_ratio=1.0,
        num_extra=1,
        deform_heads=2,
        num_points=2,
        value_ratio=0.5,
        gamma_init=0.1,
    ),
    layouts=LAYOUTS,
    resample=resample,
    preprocessing=Preprocessing(crop_pct=0.9),
)
