"""EfficientViT (Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group
Attention", CVPR 2023, https://arxiv.org/abs/2305.07027).

Small transformers wait for memory more than for arithmetic: reshapes, norms and element-wise maps of
attention cost more than its products. So a block is a sandwich, one attention between two feed-forward
layers, each after a depthwise "token interaction"; norms are BatchNorm, which folds into its convolution
(`vitrail.layers.fold`). And heads that all see the same input learn the same: in cascaded group attention
each head gets its own slice of the channels, plus the output of the head before it.

Three stages of strides 16, 32 and 64; the maps are the outputs of the stages, without a final norm.

Unlike the official classification code: any map is cut into windows, padded with zeros at the right and the
bottom, as the official detection code does. The window of a stage is min(7, its map at `image_size`); the
detection code keeps 7 everywhere, which is `image_size=448` or more here. The table of attention biases of
another window is resampled bicubically with antialias, as timm does (the detection code without). The
distilled variant's second head is not built, and a file that has one is refused.

The paper's study of ViTs (section 2): `attn_every` says how many blocks of a ViT attend, `qk_dim` how wide
its queries and keys are.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.backbones.vit import Block, KeysValues, ViT, ViTConfig, smallest
from vitrail.features import Features, FeatureSpec, check_images, pyramid_specs
from vitrail.layers.checkpoint import checkpointed
from vitrail.layers.conv import ConvNormAct, SqueezeExcite, fast_layout
from vitrail.layers.tables import cached_table
from vitrail.packing import Spans
from vitrail.registry import Layout, Tensors, register_backbone, register_study, rename_keys
from vitrail_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EfficientViTConfig:
    dims: tuple[int, ...]
    depths: tuple[int, ...]  # L of Table 2: blocks per stage
    num_heads: tuple[int, ...]
    kernels: tuple[int, ...]  # of the token interaction on the queries, head by head
    # Of these two, one for all stages or one for each:
    key_dim: int | tuple[int, ...] = 16  # of a head's queries and keys; values: dim / num_heads
    ffn_ratio: float | tuple[float, ...] = 2.0  # width of the hidden layers of FFNs / dim
    window_size: int = 7
    image_size: int | tuple[int, int] = 224  # its short side sets the windows: min(7, map)

    def __post_init__(self) -> None:
        stages = len(self.dims)
        if not stages or len(self.depths) != stages or len(self.num_heads) != stages:
            raise InputError(
                f"dims, depths and num_heads need one number for each stage, but are {self.dims}, "
                f"{self.depths} and {self.num_heads}"
            )
        for dim, heads in zip(self.dims, self.num_heads, strict=True):
            if dim % heads or dim % 8:
                raise InputError(
                    f"dims must be multiples of 8 and of their num_heads, but {dim} is asked to serve "
                    f"{heads} heads; {math.lcm(8, heads) * max(1, dim // math.lcm(8, heads))} fits"
                )
            if heads > len(self.kernels):
                raise InputError(f"{heads} heads need as many kernels, but got {self.kernels}")
        for name in ("key_dim", "ffn_ratio"):
            given = getattr(self, name)
            each = given if isinstance(given, tuple) else (given,) * len(self.dims)
            if len(each) != len(self.dims) or min(each) <= 0:
                raise InputError(
                    f"{name} is {given}, but must be above 0, one number or one for each of the "
                    f"{len(self.dims)} stages"
                )

    def key_dims(self) -> tuple[int, ...]:
        """The width of a head's queries and keys in each stage."""
        return self.key_dim if isinstance(self.key_dim, tuple) else (self.key_dim,) * len(self.dims)

    def ffn_dims(self) -> tuple[int, ...]:
        """The hidden width of the feed-forward layers on each stage's channels."""
        ratio = self.ffn_ratio
        ratios = ratio if isinstance(ratio, tuple) else (ratio,) * len(self.dims)
        return tuple(round(r * dim) for r, dim in zip(ratios, self.dims, strict=True))

    def windows(self) -> list[int]:
        """The window of each stage, in tokens: the map at `image_size`, at most `window_size`."""
        size = self.image_size if isinstance(self.image_size, int) else min(self.image_size)
        return [min(self.window_size, -(-size // (16 << i))) for i in range(len(self.dims))]


VARIANTS = {  # Table 2; the kernels are those of the official code, the paper does not list them
    "efficientvit_m0": EfficientViTConfig(
        dims=(64, 128, 192), depths=(1, 2, 3), num_heads=(4, 4, 4), kernels=(5, 5, 5, 5)
    ),
    "efficientvit_m1": EfficientViTConfig(
        dims=(128, 144, 192), depths=(1, 2, 3), num_heads=(2, 3, 3), kernels=(7, 5, 3, 3)
    ),
    "efficientvit_m2": EfficientViTConfig(
        dims=(128, 192, 224), depths=(1, 2, 3), num_heads=(4, 3, 2), kernels=(7, 5, 3, 3)
    ),
    "efficientvit_m3": EfficientViTConfig(
        dims=(128, 240, 320), depths=(1, 2, 3), num_heads=(4, 3, 4), kernels=(5, 5, 5, 5)
    ),
    "efficientvit_m4": EfficientViTConfig(
        dims=(128, 256, 384), depths=(1, 2, 3), num_heads=(4, 4, 4), kernels=(7, 5, 3, 3)
    ),
    "efficientvit_m5": EfficientViTConfig(
        dims=(192, 288, 384), depths=(1, 3, 4), num_heads=(3, 3, 4), kernels=(7, 5, 3, 3)
    ),
}

_relu = functools.partial(nn.ReLU, inplace=True)


def conv_norm(
    in_chans: int, out_chans: int, kernel_size: int = 1, *, depthwise: bool = False
) -> ConvNormAct:
    """A convolution and its BatchNorm, without an activation. (B, C, H, W) -> (B, out, H, W)."""
    groups = in_chans if depthwise else 1
    return ConvNormAct(in_chans, out_chans, kernel_size, groups=groups, act=None)


class FFN(nn.Module):
    """Two pointwise convolutions, in the paper with expansion 2. (B, C, H, W) -> same."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.pw1 = ConvNormAct(dim, hidden_dim, 1, act=_relu)
        self.pw2 = conv_norm(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.pw1(x))


class PatchMerging(nn.Module):
    """Inverted residual with squeeze-and-excitation, without the residual: halves the map.
    (B, dim, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(dim, 4 * dim, 1, act=_relu)
        self.conv2 = ConvNormAct(4 * dim, 4 * dim, 3, stride=2, groups=4 * dim, act=_relu)
        self.se = SqueezeExcite(4 * dim, dim, act=_relu)
        self.conv3 = conv_norm(4 * dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.conv2(self.conv1(x))))


@cached_table
def offset_index(window: int, device: torch.device) -> Tensor:
    """(window ** 4,) entry |dy| * window + |dx| of the bias table for each pair (query, key)."""
    r = torch.arange(window, device=device)
    d = (r[:, None] - r).abs()
    dy, dx = d[:, None, :, None], d[None, :, None, :]
    return (dy * window + dx).flatten()


def cut(x: Tensor) -> Tensor:
    """(B, C, rows, r, columns, r) -> windows (B * rows * columns, C, r, r)."""
    dim, r = x.shape[1], x.shape[3]
    if torch.compiler.is_compiling():
        # An explicit clone: `reshape` and `contiguous` ask whether there is more than one window, and
        # an exported graph would keep the answer.
        x = x.permute(0, 2, 4, 1, 3, 5).clone(memory_format=torch.contiguous_format)
        return x.view(-1, dim, r, r)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, r, r, dim).permute(0, 3, 1, 2)


def join(x: Tensor) -> Tensor:
    """Windows (B, rows, columns, C, r, r) -> (B, C, rows * r, columns * r)."""
    batch, rows, cols, dim, r, _ = x.shape
    if torch.compiler.is_compiling():
        x = x.permute(0, 3, 1, 4, 2, 5).clone(memory_format=torch.contiguous_format)
        return x.view(batch, dim, rows * r, cols * r)
    x = x.permute(0, 1, 4, 2, 5, 3).reshape(batch, rows * r, cols * r, dim)
    return x.permute(0, 3, 1, 2)


class CascadedGroupAttention(nn.Module):
    """Attention in windows; head i sees its slice of the channels plus the output of head i - 1.

    (B, C, H, W) -> same, for any H and W: zeros fill the last windows and take part, as in the paper's code.
    Recorded "weights": (B * windows, heads, window ** 2 queries, window ** 2 keys).
    """

    def __init__(
        self, dim: int, num_heads: int, key_dim: int, window: int, kernels: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.window = window
        head_dim = dim // num_heads
        self.key_dim = key_dim
        self.scale = key_dim**-0.5
        self.qkvs = nn.ModuleList(
            conv_norm(head_dim, 2 * key_dim + head_dim) for _ in range(num_heads)
        )
        self.dws = nn.ModuleList(
            conv_norm(key_dim, key_dim, kernels[i], depthwise=True) for i in range(num_heads)
        )
        self.proj = conv_norm(dim, dim)
        # Symmetric in the sign of the offset, so window ** 2 entries serve all pairs.
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))

    def forward(self, x: Tensor, record: dict[str, Tensor] | None = None, name: str = "") -> Tensor:
        r = self.window
        batch, dim, height, width = x.shape
        tracing = torch.compiler.is_compiling()
        if not tracing and (height, width) == (r, r):
            return self.proj(F.relu_(self.attend(x, record, name)))
        rows, cols = (height + r - 1) // r, (width + r - 1) // r
        below, right = rows * r - height, cols * r - width
        if tracing or below or right:
            x = F.pad(x, (0, right, 0, below))
        x = cut(x.reshape(batch, dim, rows, r, cols, r))
        x = F.relu_(self.attend(x, record, name))
        x = join(x.view(batch, rows, cols, dim, r, r))
        if tracing or below or right:
            x = F.pad(x, (0, -right, 0, -below))
        return self.proj(x)

    def attend(self, x: Tensor, record: dict[str, Tensor] | None, name: str) -> Tensor:
        """Each window by itself, before the projection. (N, C, window, window) -> same."""
        r, key_dim = self.window, self.key_dim
        index = offset_index(r, x.device)
        biases = self.attention_biases.index_select(1, index).view(-1, r * r, r * r)
        slices = x.chunk(len(self.qkvs), dim=1)
        v_dim = slices[0].shape[1]
        y, outputs, kept = slices[0], [], []
        for i, (qkv, dw) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            if i > 0:
                y = y + slices[i]
            y = qkv(y)
            q = dw(y[:, :key_dim]).flatten(2)  # (N, key_dim, tokens)
            k, v = y.flatten(2)[:, key_dim:].split((key_dim, v_dim), dim=1)
            # One call for product, scale and bias: at 7 x 7 tokens calls cost more than arithmetic.
            scores = torch.baddbmm(biases[i], q.transpose(1, 2), k, alpha=self.scale)
            weights = scores.softmax(dim=-1)
            if torch.compiler.is_compiling():
                y = torch.bmm(v, weights.transpose(1, 2)).view(-1, v_dim, r, r)
            else:  # the same, but channels last in memory, as `fast_layout`
                y = torch.bmm(weights, v.transpose(1, 2))
                y = y.view(-1, r, r, v_dim).permute(0, 3, 1, 2)
            outputs.append(y)
            kept.append(weights)
        if record is not None:
            record[f"{name}.weights"] = torch.stack(kept, dim=1)
        return torch.cat(outputs, dim=1)


class EfficientViTBlock(nn.Module):
    """Sandwich: token interaction and FFN, attention, token interaction and FFN; each is added back.
    (B, C, H, W) -> same. A fresh block is the identity."""

    def __init__(self, config: EfficientViTConfig, stage: int) -> None:
        super().__init__()
        dim, heads, ffn_dim = config.dims[stage], config.num_heads[stage], config.ffn_dims()[stage]
        key_dim, window = config.key_dims()[stage], config.windows()[stage]
        self.dw0 = conv_norm(dim, dim, 3, depthwise=True)
        self.ffn0 = FFN(dim, ffn_dim)
        self.attn = CascadedGroupAttention(dim, heads, key_dim, window, config.kernels)
        self.dw1 = conv_norm(dim, dim, 3, depthwise=True)
        self.ffn1 = FFN(dim, ffn_dim)
        for last in (self.dw0, self.ffn0.pw2, self.attn.proj, self.dw1, self.ffn1.pw2):
            nn.init.zeros_(last.bn.weight)

    def forward(self, x: Tensor, record: dict[str, Tensor] | None = None, name: str = "") -> Tensor:
        x = x + self.dw0(x)
        x = x + self.ffn0(x)
        x = x + self.attn(x, record, f"{name}.attn")
        x = x + self.dw1(x)
        return x + self.ffn1(x)


class SubsampleBlock(nn.Module):
    """The same sandwich with an inverted residual block in the middle, which halves the map.
    (B, dim, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, config: EfficientViTConfig, stage: int) -> None:
        super().__init__()
        (dim, out_dim), ffn_dims = config.dims[stage - 1 : stage + 1], config.ffn_dims()
        self.dw0 = conv_norm(dim, dim, 3, depthwise=True)
        self.ffn0 = FFN(dim, ffn_dims[stage - 1])
        self.merge = PatchMerging(dim, out_dim)
        self.dw1 = conv_norm(out_dim, out_dim, 3, depthwise=True)
        self.ffn1 = FFN(out_dim, ffn_dims[stage])
        for last in (self.ffn0.pw2, self.ffn1.pw2):
            nn.init.zeros_(last.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dw0(x)
        x = x + self.ffn0(x)
        x = self.merge(x)
        x = x + self.dw1(x)
        return x + self.ffn1(x)


class Stage(nn.Module):
    """Subsampling (but in the first stage) and blocks of one resolution."""

    def __init__(self, config: EfficientViTConfig, index: int) -> None:
        super().__init__()
        self.downsample = SubsampleBlock(config, index) if index else nn.Identity()
        self.blocks = nn.ModuleList(
            EfficientViTBlock(config, index) for _ in range(config.depths[index])
        )

    def forward(
        self, x: Tensor, record: dict[str, Tensor] | None, name: str, checkpointing: bool
    ) -> Tensor:
        x = checkpointed(self.downsample, x) if checkpointing else self.downsample(x)
        for i, block in enumerate(self.blocks):
            args = (x, record, f"{name}.blocks.{i}")
            x = checkpointed(block, *args) if checkpointing else block(*args)
        return x


class EfficientViT(nn.Module):
    """images (B, 3, H, W) -> Features with maps "c4", "c5", "c6"."""

    def __init__(self, config: EfficientViTConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.feature_specs = pyramid_specs(config.dims, first_stride=16)
        dim = config.dims[0]
        # Overlapping patches: four 3 x 3 convolutions of stride 2, without activation after the last.
        self.patch_embed = nn.Sequential()
        widths = (3, dim // 8, dim // 4, dim // 2, dim)
        for i in range(4):
            conv = ConvNormAct(widths[i], widths[i + 1], 3, stride=2, act=_relu if i < 3 else None)
            self.patch_embed.add_module(f"conv{i + 1}", conv)
        self.stages = nn.ModuleList(Stage(config, i) for i in range(len(config.dims)))

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        check_images(images, self)
        x = self.patch_embed(fast_layout(images))
        checkpointing = self.grad_checkpointing and self.training
        maps = {}
        for i, (level, stage) in enumerate(zip(self.feature_specs, self.stages, strict=True)):
            x = maps[level] = stage(x, record, f"stages.{i}", checkpointing)
        return Features(maps)


class NormLinearHead(nn.Module):
    """The paper's tail: BatchNorm and a linear layer on the pooled last map. Features -> (B, K)."""

    def __init__(
        self, config: EfficientViTConfig, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        dim = config.dims[-1]
        self.bn = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> Tensor:
        last = list(features.maps.values())[-1]
        return self.linear(self.bn(last.mean((2, 3))))


class MlpBlock(Block):
    """What is left of a ViT's block when it does not attend: norm, MLP and shortcut. (B, N, C) -> same."""

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        self.register_module("attn", None)
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self.drop_path = block.drop_path

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        keys_values: list[KeysValues | None] | None = None,
        record: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        if memory is not None:
            raise InputError(f"{name or 'this block'} does not attend: its memory must be None")
        if keys_values is not None:
            keys_values.append(None)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def cross(
        self,
        tokens: Tensor,
        *others: KeysValues | None,
        keys_values: list[KeysValues | None] | None = None,
    ) -> Tensor:
        if any(other is not None for other in others):
            raise InputError("this block does not attend: it takes no keys and values of others")
        return self(tokens, keys_values=keys_values)

    def forward_packed(self, x: Tensor, spans: Spans) -> Tensor:
        return x + self.drop_images(self.ls2(self.mlp(self.norm2(x))), spans)


@dataclass(frozen=True, kw_only=True)
class StudiedViTConfig(ViTConfig):
    """A ViT's fields, and those that section 2 varies."""

    attn_every: int = 1  # blocks 0, k, 2k, ... attend, the others keep only their MLP (section 2.1)
    # Width of a head's queries and keys (section 2.3); None: as its values'.
    qk_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qk_dim is not None and self.qk_dim < 1:
            raise InputError(
                f"qk_dim is {self.qk_dim}, but a head's queries need at least 1 channel"
            )
        if self.attn_every < 1:
            raise InputError(
                f"attn_every is {self.attn_every}, but must be at least 1 (all blocks)"
            )

    def alter(self, vit: ViT) -> None:
        super().alter(vit)
        for i, block in enumerate(cast(Iterable[Block], vit.blocks)):
            if i % self.attn_every:
                vit.blocks[i] = MlpBlock(block)
            elif self.qk_dim is not None:
                qk, v = self.qk_dim * self.num_heads, self.embed_dim
                block.attn.widths = (qk, qk, v)
                block.attn.qkv = nn.Linear(v, 2 * qk + v, bias=self.qkv_bias)


def from_timm(state: Tensors, config: EfficientViTConfig) -> Tensors:
    """timm's efficientvit_msra keys: each residual wraps its content as `m`."""
    rules = [
        (r"^(?=patch_embed\.|stages\.)", "backbone."),
        (r"\.downsample\.res1\.0\.m\.", ".downsample.dw0."),
        (r"\.downsample\.res1\.1\.m\.", ".downsample.ffn0."),
        (r"\.downsample\.patchmerge\.", ".downsample.merge."),
        (r"\.downsample\.res2\.0\.m\.", ".downsample.dw1."),
        (r"\.downsample\.res2\.1\.m\.", ".downsample.ffn1."),
        (r"\.mixer\.m\.attn\.", ".attn."),
        (r"\.attn\.proj\.1\.", ".attn.proj."),
        (r"\.m\.", "."),
    ]
    # The index of the bias table is a function of the window here.
    kept = {k: v for k, v in state.items() if not k.endswith("attention_bias_idxs")}
    return rename_keys(kept, rules)


def from_official(state: Tensors, config: EfficientViTConfig) -> Tensors:
    """The keys of github.com/microsoft/Cream, for classification and for detection."""

    def stage(match: re.Match[str]) -> str:
        index, item = int(match[1]) - 1, int(match[2])
        if index == 0:
            return f"stages.0.blocks.{item}."
        if item >= 3:
            return f"stages.{index}.blocks.{item - 3}."
        return f"stages.{index}.downsample.{('res1', 'patchmerge', 'res2')[item]}."

    rules = [
        (r"^patch_embed\.(\d)\.", lambda m: f"patch_embed.conv{int(m[1]) // 2 + 1}."),
        (r"^blocks(\d)\.(\d+)\.", stage),
        (r"\.c\.", ".conv."),
        (r"^head\.l\.", "head.linear."),
    ]
    return from_timm(rename_keys(state, rules), config)


def fit_windows(state: Tensors, config: EfficientViTConfig) -> Tensors:
    """Resample each table of biases, a square over (|dy|, |dx|), to the window of its stage."""
    windows, state = config.windows(), dict(state)
    for key, table in state.items():
        match = re.fullmatch(r"backbone\.stages\.(\d)\..*\.attention_biases", key)
        if match is None or int(match[1]) >= len(windows):
            continue
        old, new = math.isqrt(table.shape[1]), windows[int(match[1])]
        if old != new:
            square = table.view(1, -1, old, old).float()
            square = F.interpolate(square, (new, new), mode="bicubic", antialias=True)
            state[key] = square.view(-1, new * new).to(table.dtype)
    return state


_INDEX = ("*.attention_bias_idxs",)
register_backbone(
    EfficientViT,
    VARIANTS,
    tiny=EfficientViTConfig(
        dims=(32, 48, 64), depths=(1, 1, 1), num_heads=(4, 3, 2), kernels=(7, 5, 3, 3)
    ),
    tail=NormLinearHead,
    resample=fit_windows,
    layouts={
        "timm": Layout(
            from_timm,
            marks=("patch_embed.conv1.conv.weight", "stages.0.blocks.0.mixer.m.attn.*"),
            may_leave=_INDEX,
            source="hf:timm/efficientvit_m*.r224_in1k",
        ),
        "official": Layout(
            from_official,
            marks=("patch_embed.0.c.weight", "blocks1.0.mixer.m.attn.*"),
            may_leave=_INDEX,
            source="github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo",
        ),
    },
)
register_study(ViT, StudiedViTConfig, tiny=smallest(StudiedViTConfig, attn_every=2, qk_dim=6))
