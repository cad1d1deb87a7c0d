"""DeepViT (Zhou et al., "DeepViT: Towards Deeper Vision Transformer", 2021,
https://arxiv.org/abs/2103.11886).

As a ViT gets deeper its attention maps become alike from block to block ("attention collapse"), and depth
stops paying. Maps of different heads of one block stay different, so re-attention makes new maps from them:
after the softmax a learnt matrix mixes the heads, and a norm brings the result back to a fair scale (equation
3). The rest is a ViT, and its code is in vit.py. The paper's other remedy, wider tokens, is `embed_dim`.

Where the paper and the official code (github.com/zhoudaquan/dvit_repo) differ, we follow the code (what is
said of the paper here is from memory and unverified, but for its figures, which later papers quote):
- The paper puts re-attention into every block; the code's DeepViT-S and -L mix the heads in the last 5 of 16
  and the last 12 of 32 blocks only (`mix_from`). The depth family 16b, 24b and 32b mixes in all.
- The paper's mixing is one matrix of heads by heads; the code's has a bias too: a 1x1 convolution over heads.
- The paper leaves the norm open; the code has BatchNorm over heads, with running statistics at test time.
- DeepViT-S multiplies the mixed maps by head width ** -0.5 (`scale_maps`); L and the depth family do not.
- S and L double each residual branch and halve what its norm reads (`branch_scale` 0.5), which through a
  LayerNorm matters to its eps alone. They have a convolutional stem. Neither is in the paper's equations.
- The code hands each block the maps of the one before, and does not use them; here there is no such argument.
- The paper's counts of DeepViT-L, 55 M and 12.5 G, fit a width of 408, which nobody states: it is inferred
  from them. The code's is 420 wide.
`attention="self"` is the plain ViT of the paper's comparison. In training the statistics of BatchNorm are
those of the batch; in a pack, of neighbours of equal size. Any image size is taken as by ViT.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.backbones.vit import Attention, Block, ViT, ViTConfig, ViTHead, smallest
from vitrail.backbones.vit_keys import TIMM_MARKS, from_timm, resample_to
from vitrail.features import pad_to_multiple
from vitrail.layers.residual import drop_path_schedule
from vitrail.ops.packed_attention import by_runs
from vitrail.packing import Spans
from vitrail.registry import Layout, register_backbone
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class DeepViTConfig(ViTConfig):
    """A ViT's fields, the stem and those of the mixing."""

    stem: Literal["patch", "conv"] = "patch"  # "conv": two convolutions before patching
    attention: Literal["re", "self"] = "re"
    mix_from: int = 0  # the first block that mixes its heads; all after it do
    scale_maps: bool = False  # multiply mixed maps by head width ** -0.5
    branch_scale: float = 1.0  # s: branches read s x and are divided by s

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem == "conv" and self.patch_size % 2:
            raise InputError(f"stem='conv' halves the image: patch_size {self.patch_size} is odd")
        if self.attention == "re" and not 0 <= self.mix_from < self.depth:
            raise InputError(
                f"mix_from is {self.mix_from}, but the blocks are 0 to {self.depth - 1}; "
                'choose attention="self" for a model that mixes nowhere'
            )
        if self.branch_scale <= 0:
            raise InputError(f"branch_scale is {self.branch_scale}, but must be above 0")


def _variant(embed_dim: int, depth: int) -> DeepViTConfig:
    return DeepViTConfig(embed_dim=embed_dim, depth=depth, num_heads=12, mlp_ratio=3.0)


VARIANTS = {
    "deepvit_s": replace(
        _variant(396, 16), stem="conv", mix_from=11, scale_maps=True, branch_scale=0.5
    ),
    "deepvit_l": replace(_variant(420, 32), stem="conv", mix_from=20, branch_scale=0.5),
    "deepvit_16b": _variant(384, 16),
    "deepvit_24b": _variant(384, 24),
    "deepvit_32b": _variant(384, 32),
}


class ConvStem(nn.Module):
    """A 7x7 convolution of stride 2 and a 3x3, then patches of half the size.
    (B, 3, H, W) -> (B, C, ceil(H / p), ceil(W / p))."""

    def __init__(self, patch_size: int, embed_dim: int, stem_dim: int = 64) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv1 = nn.Conv2d(3, stem_dim, 7, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_dim)
        self.conv2 = nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem_dim)
        self.proj = nn.Conv2d(stem_dim, embed_dim, patch_size // 2, patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        # The 7x7 has a padding of 3, whose last row and column an even size never reaches: left out, so
        # that a traced graph halves its sizes without a remainder.
        x = F.pad(pad_to_multiple(images, self.patch_size), (3, 2, 3, 2))
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.proj(x)


class ReAttention(Attention):
    """Attention whose maps are mixed across heads and normed before they meet the values (equation 3)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, scale_maps: bool) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        self.reatten_matrix = nn.Conv2d(num_heads, num_heads, 1)
        self.var_norm = nn.BatchNorm2d(num_heads)
        self.map_scale = (dim // num_heads) ** -0.5 if scale_maps else 1.0

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        record: dict[str, Tensor] | None = None,
        name: str = "",
    ) -> Tensor:
        maps = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        mixed = self.var_norm(self.reatten_matrix(maps))
        if self.map_scale != 1.0:
            mixed = mixed * self.map_scale
        if record is not None:
            record[f"{name}.softmax"] = maps
            record[f"{name}.weights"] = mixed  # (B, heads, queries, keys); rows do not sum to 1
        return mixed @ v

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        """No fused kernel mixes heads."""
        return by_runs(self.attend, q, k, v, spans)


class Scale(nn.Module):
    """A fixed factor on a residual branch."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class DeepViTBlock(Block):
    """A ViT's block; `mixes` says whether its attention is re-attention. (B, N, C) -> same."""

    def __init__(self, config: DeepViTConfig, drop_path: float, mixes: bool) -> None:
        s = config.branch_scale
        # LayerNorm(s x) with eps is LayerNorm(x) with eps / s^2.
        super().__init__(replace(config, norm_eps=config.norm_eps / s**2), drop_path)
        if mixes:
            self.attn = ReAttention(
                config.embed_dim, config.num_heads, config.qkv_bias, config.scale_maps
            )
        if s != 1.0:
            self.ls1 = nn.Sequential(self.ls1, Scale(1 / s))
            self.ls2 = nn.Sequential(self.ls2, Scale(1 / s))


class DeepViT(ViT):
    """images (B, 3, H, W) -> Features as ViT's: one map of stride 16 and the class token, both normed."""

    config: DeepViTConfig

    def __init__(self, config: DeepViTConfig) -> None:
        stem = ConvStem(config.patch_size, config.embed_dim) if config.stem == "conv" else None
        rates = drop_path_schedule(config.drop_path_rate, config.depth)
        blocks = [
            DeepViTBlock(config, rate, config.attention == "re" and i >= config.mix_from)
            for i, rate in enumerate(rates)
        ]
        super().__init__(config, stem, blocks)


HALF = (0.5, 0.5, 0.5)  # the official models are shown images as the first ViT, not as DeiT

register_backbone(
    DeepViT,
    VARIANTS,
    tiny=smallest(
        DeepViTConfig,
        num_heads=4,
        image_size=(24, 40),
        stem="conv",
        mix_from=1,
        scale_maps=True,
        branch_scale=0.5,
    ),
    tail=ViTHead,
    resample=resample_to,
    layouts={"official": Layout(from_timm, TIMM_MARKS, source="github.com/zhoudaquan/dvit_repo")},
    preprocessing=Preprocessing(crop_pct=0.9, mean=HALF, std=HALF),
)
