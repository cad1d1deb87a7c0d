"""Swin Transformer (Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted
Windows", ICCV 2021, https://arxiv.org/abs/2103.14030).

Attention within windows of fixed size costs time linear in the image. Every second block shifts the
windows by half their size, so that what two neighbouring windows know is exchanged; between stages
2x2 patches are merged, which makes the pyramid of a convolutional network.

Sizes that do not fit follow the official detection code, torchvision and transformers: zeros right and
bottom of the image up to a whole patch, of the normed map up to whole windows (they are keys like any
other, with the bias of qkv as their value), and of the map to be merged up to an even size; cropped at once.
An axis that a single window covers is not shifted (torchvision).

Where papers and codes differ:
- The paper says that masking keeps apart regions that are not adjacent in the image; the official code adds
  -100 to their scores, and so do we: the leak of exp(-100) is far below rounding.
- The official classification code shrinks a window to a map that is smaller; with a window of 7 this happens
  only below 224 pixels. We pad the map instead, so one set of weights runs at every size.
- timm shifts before it pads. Both are the same where windows fit; elsewhere we pad first, as above.
- The official code merges patches at the end of a stage; here, as in timm, a stage begins with it, and the
  four maps are what leaves the blocks. The final norm stands in this paper's classifier tail.
- Index tables and masks are not in the state dict; they are functions of the size.
- The official detection and segmentation code puts a LayerNorm on each of the four maps (`norm_maps`); it
  gathers the patches to be merged channel by channel, and its weights are permuted when they are read.
- `attn_every` is not in the paper. The study behind EfficientViT (Liu et al., CVPR 2023,
  https://arxiv.org/abs/2305.07027, section 2.1) asks how much attention such a network needs: with
  attn_every=n only every n-th block attends (a share of 1/n), the others keep their MLP alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import Features, FeatureSpec, check_images, pad_to_multiple, pyramid_specs
from vitrail.layers.attention import attend, map_to_tokens, tokens_to_map
from vitrail.layers.checkpoint import checkpointed
from vitrail.layers.keys import join_rows
from vitrail.layers.mlp import Mlp
from vitrail.layers.residual import DropPath, drop_path_schedule
from vitrail.layers.tables import cached_table
from vitrail.ops.linear import Linear
from vitrail.registry import Layout, Tensors, register_backbone, rename_keys
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int = 7  # patches
    patch_size: int = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    attn_every: int = 1  # blocks 0, n, 2n, ... of the network attend, the others keep their MLP
    drop_path_rate: float = 0.0  # rate of the last block; earlier blocks grow linearly from zero
    norm_maps: bool = False  # a LayerNorm on every map, for dense heads

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads):
            raise InputError(
                f"Swin needs one number of heads per stage, but got depths={self.depths} and "
                f"num_heads={self.num_heads}"
            )
        for stage, heads in enumerate(self.num_heads):
            dim = self.embed_dim * 2**stage
            if heads < 1 or dim % heads:
                raise InputError(
                    f"Swin's stage {stage} is {dim} wide, which {heads} heads do not divide; "
                    "change num_heads or embed_dim"
                )
        if min(self.window_size, self.patch_size, self.attn_every) < 1:
            raise InputError(
                "Swin needs window_size, patch_size and attn_every of at least 1, but got "
                f"{self.window_size}, {self.patch_size} and {self.attn_every}"
            )


def _variant(embed_dim: int, depth: int, heads: int, window_size: int = 7) -> SwinConfig:
    return SwinConfig(
        embed_dim=embed_dim,
        depths=(2, 2, depth, 2),
        num_heads=(heads, 2 * heads, 4 * heads, 8 * heads),
        window_size=window_size,
    )


VARIANTS = {  # section 3.3; heads are 32 wide
    "swin_tiny_patch4_window7": _variant(96, 6, 3),
    "swin_small_patch4_window7": _variant(96, 18, 3),
    "swin_base_patch4_window7": _variant(128, 18, 4),
    "swin_base_patch4_window12": _variant(128, 18, 4, 12),
    "swin_large_patch4_window7": _variant(192, 18, 6),
    "swin_large_patch4_window12": _variant(192, 18, 6, 12),
}


@cached_table
def window_tokens(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(windows * window ** 2,) which token of a map stands at each place of its windows, window by
    window; height * width, one past the last, where a window reaches beyond the map."""
    rows, columns = _windows(height, width, window)

    inside = torch.arange(window, device=device)

    def rolled(count: int) -> Tensor:  # (count, window)
        i = torch.arange(count, device=device)[:, None] * window + inside
        i = i + _axis_shift(count, shift)
        return torch.where(i < count * window, i, i - count * window)

    y, x = rolled(rows)[:, None, :, None], rolled(columns)[:, None]
    return torch.where((y < height) & (x < width), y * width + x, height * width).flatten()


@cached_table
def token_places(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(height * width,) the inverse: at which place each token stands."""
    rows, columns = _windows(height, width, window)

    def rolled(size: int, count: int) -> Tensor:
        i = torch.arange(size, device=device) - _axis_shift(count, shift)
        return torch.where(i >= 0, i, i + count * window)

    y, x = rolled(height, rows)[:, None], rolled(width, columns)
    which = y // window * columns + x // window
    return (which * window**2 + y % window * window + x % window).flatten()


@cached_table
def window_kinds(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """(windows,) 2 where a window is of the last row, plus 1 where it is of the last column."""
    rows, columns = _windows(height, width, window)
    last_row = torch.arange(rows, device=device) == rows - 1
    last_column = torch.arange(columns, device=device) == columns - 1
    return (2 * last_row.long()[:, None] + last_column.long()).flatten()


@cached_table
def shift_masks(
    height: int, width: int, window: int, shift: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What a shifted block adds to the scores of each kind of window: 0 within a region of the image, -100
    across (figure 4). Returns (4, N, N) with N = window ** 2.

    Only the last window of a row or column holds tokens from both ends of the image; those that came from
    the other end stand last.
    """
    rows, columns = _windows(height, width, window)
    inside = torch.arange(window**2, device=device)
    below = inside // window >= window - _axis_shift(rows, shift)
    right = inside % window >= window - _axis_shift(columns, shift)
    kind = torch.arange(4, device=device)[:, None]
    region = 2 * (below & (kind >= 2)).long() + (right & (kind % 2 == 1)).long()
    return (region[:, :, None] != region[:, None, :]).to(dtype) * -100.0


@cached_table
def relative_position_index(window: int, device: torch.device) -> Tensor:
    """(N, N) index into the bias table: (dy + window - 1) * (2 window - 1) + dx + window - 1, with d the
    offset of the query (row) from the key (column)."""
    i = torch.arange(window**2, device=device)
    y, x = i // window, i % window
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx


def _windows(height: int, width: int, window: int) -> tuple[int, int]:
    return (height + window - 1) // window, (width + window - 1) // window


def _axis_shift(count: int, shift: int) -> int:
    # `shift`, but 0 where one window covers the axis: arithmetic, as the count may be symbolic.
    return shift - shift * (1 // count)


class PatchEmbed(nn.Module):
    """Patches by a strided projection, normed. (B, 3, H, W) -> (B, h * w, C), h, w."""

    def __init__(self, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(pad_to_multiple(images, self.patch_size))
        height, width = x.shape[-2:]
        return self.norm(map_to_tokens(x)), height, width


class PatchMerging(nn.Module):
    """2x2 patches become one of twice the width.
    (B, H * W, C) -> (B, ceil(H / 2) * ceil(W / 2), 2C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x.unflatten(1, (height, width))
        half_h, half_w = (height + 1) // 2, (width + 1) // 2
        if torch.compiler.is_compiling() or height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, 2 * half_w - width, 0, 2 * half_h - height))
        x = x.reshape(x.shape[0], half_h, 2, half_w, 2, x.shape[3])
        # Rows vary faster than columns: (0, 0), (1, 0), (0, 1), (1, 1).
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(x.shape[0], half_h * half_w, 4 * x.shape[5])
        return self.reduction(self.norm(x))


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learnt bias per offset (equation 4).

    (B, H * W, C) -> same. shift: patches by which the windows are moved down and right, 0 for none.
    """

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.shift = shift
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window - 1) ** 2, num_heads)
        )
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(
        self,
        x: Tensor,
        height: int,
        width: int,
        record: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        batch, _, dim = x.shape
        rows, columns = _windows(height, width, self.window)
        windows, size = rows * columns, self.window**2
        where = (height, width, self.window, self.shift)
        # Padding, shift and partition are one gather, and undone by another: measured several times
        # faster than pad, roll, reshape and back.
        if torch.compiler.is_compiling() or windows * size != height * width:
            x = F.pad(x, (0, 0, 0, 1))  # the zero token that fills windows up
        x = x.index_select(1, window_tokens(*where, x.device))
        qkv = self.qkv(x).reshape(batch * windows, size, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B * windows, heads, N, D)
        bias = self.bias().to(q.dtype)
        if self.shift:
            bias = bias + shift_masks(*where, q.dtype, q.device)[:, None]  # (4, heads, N, N)
            kinds = window_kinds(height, width, self.window, q.device)
            bias = bias.index_select(0, kinds.repeat(batch))
        x = attend(q, k, v, bias, record, name)
        x = x.transpose(1, 2).reshape(batch, windows * size, dim)
        return self.proj(x.index_select(1, token_places(*where, x.device)))

    def bias(self) -> Tensor:
        """(1, heads, N, N): the learnt bias of every query and key of a window."""
        table = self.relative_position_bias_table
        index = relative_position_index(self.window, table.device)
        return table[index.flatten()].T.reshape(1, self.num_heads, *index.shape)


class SwinBlock(nn.Module):
    """Window attention (none with `attn` None), then an MLP; each pre-normed. (B, H * W, C) -> same."""

    def __init__(
        self, dim: int, mlp_ratio: float, attn: WindowAttention | None, drop_path: float
    ) -> None:
        super().__init__()
        if attn is not None:
            self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        height: int,
        width: int,
        record: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        if self.attn is not None:
            y = self.attn(self.norm1(x), height, width, record, f"{name}.attn")
            x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinStage(nn.Module):
    """Patch merging, except in the first stage, then blocks."""

    downsample: PatchMerging | None

    def __init__(self, downsample: PatchMerging | None, blocks: list[SwinBlock]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class Swin(nn.Module):
    """images (B, 3, H, W) -> maps "c2".."c5", normed by `norm_maps` alone: the tail has its own norm."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        dims = [config.embed_dim * 2**i for i in range(len(config.depths))]
        self.feature_specs = pyramid_specs(dims, first_stride=config.patch_size)
        self.patch_embed = PatchEmbed(config.embed_dim, config.patch_size)
        rates = drop_path_schedule(config.drop_path_rate, sum(config.depths))
        stages = []
        index = 0  # of the block in the network
        every = config.attn_every
        for stage, (dim, depth, heads) in enumerate(
            zip(dims, config.depths, config.num_heads, strict=True)
        ):
            blocks = []
            for i in range(depth):
                attn = None
                if index % every == 0:
                    # Windows alternate over the blocks that attend.
                    shift = config.window_size // 2 if (i // every) % 2 else 0
                    attn = WindowAttention(dim, heads, config.window_size, shift, config.qkv_bias)
                blocks.append(SwinBlock(dim, config.mlp_ratio, attn, rates[index]))
                index += 1
            merging = PatchMerging(dims[stage - 1]) if stage else None
            stages.append(SwinStage(merging, blocks))
        self.layers = nn.ModuleList(stages)
        self.norms = nn.ModuleDict()
        if config.norm_maps:
            self.norms.update({k: nn.LayerNorm(s.channels) for k, s in self.feature_specs.items()})
        self.apply(_init)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        check_images(images, self)
        x, height, width = self.patch_embed(images)
        maps = {}
        for stage, (level, layer) in enumerate(zip(self.feature_specs, self.layers, strict=True)):
            assert isinstance(layer, SwinStage)
            if layer.downsample is not None:
                x = layer.downsample(x, height, width)
                height, width = (height + 1) // 2, (width + 1) // 2
            for i, block in enumerate(layer.blocks):
                if self.grad_checkpointing and self.training:
                    x = checkpointed(block, x, height, width)
                else:
                    x = block(x, height, width, record, f"layers.{stage}.blocks.{i}")
            seen = self.norms[level](x) if level in self.norms else x
            maps[level] = tokens_to_map(seen, height, width)
        return Features(maps)


class SwinTail(nn.Module):
    """Norm, mean over the coarsest map, linear. Features -> (B, num_classes)."""

    def __init__(
        self, config: SwinConfig, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        dim = list(specs.values())[-1].channels
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes)
        self.apply(_init)

    def forward(self, features: Features) -> Tensor:
        x = map_to_tokens(list(features.maps.values())[-1])
        return self.fc(self.norm(x).mean(1))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resample(state: Tensors, config: SwinConfig) -> Tensors:
    """Bring the bias tables of another window to this one's, bicubically as the official code does."""
    out, size = dict(state), 2 * config.window_size - 1
    for key, table in state.items():
        if key.endswith("relative_position_bias_table") and table.shape[0] != size**2:
            old = round(table.shape[0] ** 0.5)
            grid = table.T.reshape(1, -1, old, old).float()
            grid = F.interpolate(grid, (size, size), mode="bicubic", align_corners=False)
            out[key] = grid.reshape(-1, size**2).T.to(table.dtype)
    return out


_COMPUTED = ("relative_position_index", "attn_mask")


def from_timm(state: Tensors, config: SwinConfig) -> Tensors:
    """timm's keys are ours, but for the classifier tail."""
    out = {}
    for key, value in state.items():
        if not key.endswith(_COMPUTED):
            tail = key.startswith(("norm.", "head."))
            out[f"head.{key.removeprefix('head.')}" if tail else f"backbone.{key}"] = value
    return out


# Where merging closes a stage, ours begins the next with it.
_MERGING = (r"^layers\.(\d+)\.(?=downsample\.)", lambda m: f"layers.{int(m[1]) + 1}.")


def from_official(state: Tensors, config: SwinConfig) -> Tensors:
    """Official keys: merging closes the stage before; the classifier is `head`."""
    return from_timm(rename_keys(state, [_MERGING, (r"^head\.", "head.fc.")]), config)


def from_torchvision(state: Tensors, config: SwinConfig) -> Tensors:
    """features.0: patches; 1, 3, 5, 7: blocks; 2, 4, 6: merging."""

    def stage(match: re.Match[str]) -> str:
        index = int(match[1])
        return f"layers.{index // 2}.{'blocks' if index % 2 else 'downsample'}."

    rules = [
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.(\d+)\.", stage),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
        (r"^head\.", "head.fc."),
    ]
    return from_timm(rename_keys(state, rules), config)


def from_hugging_face(state: Tensors, config: SwinConfig) -> Tensors:
    """SwinForImageClassification, as released and as of transformers 5.x: query, key and value apart;
    merging closes the stage before."""
    rules = [
        (r"^swin\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^swin\.embeddings\.norm\.", "patch_embed.norm."),
        (r"^swin\.layernorm\.", "norm."),
        (r"^swin\.encoder\.", ""),
        (r"^classifier\.", "head.fc."),
        _MERGING,
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(?:self\.)?(?:(q)uery|(k)ey|(v)alue|([qkv])_proj)\.", r".attn.\1\2\3\4."),
        (r"\.attention\.(?:self|relative_position_bias)\.", ".attn."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    ]
    out = join_rows(rename_keys(state, rules), "attn.qkv", ("attn.q", "attn.k", "attn.v"))
    return from_timm(out, config)


def maps_from_hugging_face(state: Tensors, config: SwinConfig) -> Tensors:
    """SwinBackbone, as it stands in transformers' dense models, "embeddings.*" as released and "swin.*" as of
    5.x; a norm for each map. Its last norm is the classifier's, and of no use here."""
    rules = [(r"^(?:swin\.)?", "swin.")]
    rules += [(r"^swin\.hidden_states_norms\.stage(\d+)\.", lambda m: f"norms.c{int(m[1]) + 1}.")]
    return from_hugging_face(rename_keys(state, rules), config)


def maps_from_mmsegmentation(state: Tensors, config: SwinConfig) -> Tensors:
    """The backbone of mmsegmentation's and mmdetection's files: "stages.*", or "layers.*" as in the official
    dense code, which both read; a norm for each map."""
    rules = [
        (r"^norm(\d)\.", lambda m: f"norms.c{int(m[1]) + 2}."),
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^stages\.", "layers."),
        (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    ]
    gathered = any(key.startswith("stages.") for key in state)
    out = {}
    for key, value in rename_keys(state, rules).items():
        if gathered and ".downsample." in key:
            # (channel, column, row) -> (row within column, channel), as the official merging has it.
            value = value.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3)
        out[key] = value
    return from_official(out, config)


_INDEX = tuple(f"*.{name}" for name in _COMPUTED)


register_backbone(
    Swin,
    VARIANTS,
    tiny=SwinConfig(
        embed_dim=16, depths=(2, 2, 2), num_heads=(2, 2, 4), window_size=3, drop_path_rate=0.1
    ),
    tail=SwinTail,
    dense={"norm_maps": True},
    resample=resample,
    layouts={
        "timm": Layout(
            from_timm,
            marks=("layers.3.downsample.reduction.weight", "patch_embed.norm.weight"),
            may_leave=_INDEX,
            source="hf:timm/swin_*",
        ),
        "official": Layout(
            from_official,
            marks=("layers.0.downsample.reduction.weight", "patch_embed.norm.weight"),
            may_leave=_INDEX,
            source="github.com/microsoft/Swin-Transformer",
        ),
        "torchvision": Layout(
            from_torchvision,
            marks=("features.2.reduction.weight", "features.1.0.attn.relative_position_bias_table"),
            may_leave=_INDEX,
            source="torchvision.models.swin_t, swin_s, swin_b",
        ),
        "huggingface-dense": Layout(
            maps_from_hugging_face,
            marks=("hidden_states_norms.stage1.weight",),
            may_leave=(*_INDEX, "hidden_states_norms.*"),
            source="the backbone of hf:openmmlab/upernet-swin-*",
        ),
        "mmsegmentation": Layout(
            maps_from_mmsegmentation,
            marks=("norm0.weight", "norm3.weight", "patch_embed.norm.weight"),
            may_leave=(*_INDEX, "norm[0-3].*"),
            source="the backbone of mmsegmentation's and mmdetection's files",
        ),
        "huggingface": Layout(
            from_hugging_face,
            marks=("swin.embeddings.patch_embeddings.projection.weight", "swin.layernorm.weight"),
            may_leave=_INDEX,
            source="hf:microsoft/swin-*",
        ),
    },
    preprocessing={
        name: Preprocessing(size=(384, 384), crop_pct=1.0)
        if config.window_size == 12
        else Preprocessing(crop_pct=0.9)
        for name, config in VARIANTS.items()
    },
)
