"""MobileViT (Mehta and Rastegari, "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision
Transformer", ICLR 2022, https://arxiv.org/abs/2110.02178).

A convolution is unfold, local mixing, fold. MobileViT keeps unfold and fold and replaces the local mixing by
a transformer: the map is cut into 2x2 patches, and the pixels at the same place of all patches attend to
each other. A 3x3 convolution before has told each pixel of its patch, so that together every pixel sees
every other, without position tables and hence at any size.

Unlike the official code (github.com/apple/ml-cvnets):
- Its released weights were trained on images read by OpenCV, in the order blue, green, red. Our key maps
  reverse the stem's input channels, so that this model takes RGB like all others. timm's files are RGB.
- Its LayerNorm takes a token sequence whose length equals its width for a channels-first map and normalises
  over the tokens (XXS at 128x128, S at 192x192). We normalise over the width at every size, as timm does.

Pictures are scaled to [0, 1] and not normalised. A map whose sides are odd is resized bilinearly to even ones
before unfolding and back after folding, as in the official code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import Features, FeatureSpec, pyramid_specs
from vitrail.layers.attention import attend
from vitrail.layers.conv import (
    ConvNormAct,
    ConvPoolHead,
    init_conv_weights,
    inverted_residuals,
    stem_and_stages,
)
from vitrail.layers.keys import join_rows
from vitrail.layers.mlp import Mlp
from vitrail.layers.resize import resize_to_multiple
from vitrail.ops.linear import Linear
from vitrail.registry import Layout, Tensors, register_backbone, rename_keys
from vitrail_runtime.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class MobileViTConfig:
    dims: tuple[int, int, int, int, int]  # widths of the five stages, strides 2 to 32
    transformer_dims: tuple[int, int, int]  # widths inside the unfold, last three stages
    transformer_depths: tuple[int, int, int] = (2, 4, 3)
    stem_dim: int = 16
    head_dim: int = 640  # width of the 1x1 convolution before pooling
    expand_ratio: float = 4.0  # of the inverted residuals
    num_heads: int = 4
    mlp_ratio: float = 2.0
    patch_size: int = 2
    drop_rate: float = 0.1  # on both branches of a transformer layer
    head_drop_rate: float = 0.1  # before the classifier


VARIANTS = {  # Table 4
    "mobilevit_xxs": MobileViTConfig(
        dims=(16, 24, 48, 64, 80), transformer_dims=(64, 80, 96), expand_ratio=2.0, head_dim=320
    ),
    "mobilevit_xs": MobileViTConfig(
        dims=(32, 48, 64, 80, 96), transformer_dims=(96, 120, 144), head_dim=384
    ),
    "mobilevit_s": MobileViTConfig(
        dims=(32, 64, 96, 128, 160), transformer_dims=(144, 192, 240), head_dim=640
    ),
}

STAGE_DEPTHS = (1, 3, 1, 1, 1)  # inverted residuals per stage
_silu = partial(nn.SiLU, inplace=True)


class Attention(nn.Module):
    """Multi-head self-attention. (B * P, N, C) -> same."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, record: dict[str, Tensor] | None = None, name: str = "") -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B * P, heads, N, D) each
        out = attend(q, k, v, None, record, name)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class TransformerLayer(nn.Module):
    """Attention, then MLP, each pre-normed and added back. (B * P, N, C) -> same."""

    def __init__(self, dim: int, config: MobileViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), act=_silu)
        self.drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, record: dict[str, Tensor] | None = None, name: str = "") -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x), record, f"{name}.attn"))
        return x + self.drop(self.mlp(self.norm2(x)))


class MobileViTBlock(nn.Module):
    """Local convolution, unfold, transformer, fold, fusion with the input (fig. 1b).
    (B, C, H, W) -> same."""

    def __init__(self, dim: int, transformer_dim: int, depth: int, config: MobileViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.conv_kxk = ConvNormAct(dim, dim, 3, act=_silu)
        self.conv_1x1 = nn.Conv2d(dim, transformer_dim, 1, bias=False)
        self.transformer = nn.ModuleList(
            TransformerLayer(transformer_dim, config) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(transformer_dim)
        self.conv_proj = ConvNormAct(transformer_dim, dim, 1, act=_silu)
        self.conv_fusion = ConvNormAct(2 * dim, dim, 3, act=_silu)

    def forward(self, x: Tensor, record: dict[str, Tensor] | None = None, name: str = "") -> Tensor:
        y = self.conv_1x1(self.conv_kxk(x))
        even = resize_to_multiple(y, self.patch_size, align_corners=False)
        tokens = self.unfold(even)
        for i, layer in enumerate(self.transformer):
            tokens = layer(tokens, record, f"{name}.transformer.{i}")
        folded = self.fold(self.norm(tokens), even)
        if even is not y:
            folded = F.interpolate(folded, y.shape[-2:], mode="bilinear", align_corners=False)
        return self.conv_fusion(torch.cat((x, self.conv_proj(folded)), dim=1))

    def unfold(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B * P, N, C): N patches, row by row, for each of P places in a patch."""
        batch, dim, height, width = x.shape
        p = self.patch_size
        x = x.reshape(batch, dim, height // p, p, width // p, p).permute(0, 3, 5, 2, 4, 1)
        return x.reshape(batch * p * p, (height // p) * (width // p), dim)

    def fold(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The inverse of `unfold`, to the shape of `like`."""
        batch, dim, height, width = like.shape
        p = self.patch_size
        x = tokens.reshape(batch, p, p, height // p, width // p, dim)
        if torch.compiler.is_compiling():
            return x.permute(0, 5, 3, 1, 4, 2).reshape(batch, dim, height, width)
        # The same, but channels last in memory, as `fast_layout`: rows of channels are copied whole.
        x = x.permute(0, 3, 1, 4, 2, 5).reshape(batch, height, width, dim)
        return x.permute(0, 3, 1, 2)


class MobileViT(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> Features with "c2" to "c5" (strides 4 to 32).

    record: "stages.I.J" (the block's map) and "stages.I.1.transformer.L.attn.weights", of shape
    (B * P, heads, N, N) with P = 4 places in a patch and N patches.
    """

    def __init__(self, config: MobileViTConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.feature_specs = pyramid_specs(config.dims[1:], first_stride=4)
        self.outputs = dict(enumerate(self.feature_specs, start=1))  # all but the first stage's
        self.stem = ConvNormAct(3, config.stem_dim, 3, stride=2, act=_silu)
        self.stages = nn.ModuleList()
        in_chans = config.stem_dim
        for i, (dim, depth) in enumerate(zip(config.dims, STAGE_DEPTHS, strict=True)):
            stride = 2 if i > 0 else 1
            ratio = config.expand_ratio
            stage = inverted_residuals(in_chans, dim, depth, ratio, stride, act=_silu)
            in_chans = dim
            if i >= 2:
                inner, layers = config.transformer_dims[i - 2], config.transformer_depths[i - 2]
                stage.append(MobileViTBlock(dim, inner, layers, config))
            self.stages.append(stage)
        init_conv_weights(self, linear_std=0.02)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        return stem_and_stages(self, images, record, recording=MobileViTBlock)


def mobilevit_head(
    config: MobileViTConfig, specs: Mapping[str, FeatureSpec], num_classes: int
) -> ConvPoolHead:
    """The tail of Table 4: a 1x1 convolution to `head_dim` channels, pooling, a linear layer."""
    return ConvPoolHead(
        specs["c5"].channels, config.head_dim, num_classes, act=_silu, drop=config.head_drop_rate
    )


def reverse_stem(state: Tensors) -> Tensors:
    """The stem of a network trained on BGR, for RGB."""
    key = "backbone.stem.conv.weight"
    return {**state, key: state[key].flip(1)} if key in state else state


def from_timm(state: Tensors, config: MobileViTConfig) -> Tensors:
    """timm: `stages.2.0.conv1_1x1.conv.weight`, `stages.2.1.transformer.0.attn.qkv.weight`, `final_conv`."""
    rules = [
        (r"^head\.fc\.", "head.fc."),
        (r"^final_conv\.", "head.conv."),
        (r"\.conv1_1x1\.", ".expand."),
        (r"\.conv2_kxk\.", ".depthwise."),
        (r"\.conv3_1x1\.", ".project."),
        (r"^(stem|stages)\.", r"backbone.\1."),
    ]
    return rename_keys(state, rules)


def from_official(state: Tensors, config: MobileViTConfig) -> Tensors:
    """cvnets: `layer_3.1.global_rep.0.pre_norm_mha.1.qkv_proj.weight`, ...; BGR stem."""
    depths = config.transformer_depths
    rules = [
        (r"\.block\.norm\.", ".bn."),
        (r"\.block\.conv\.", ".conv."),
        (r"\.block\.(exp_1x1|conv_3x3|red_1x1)\.", r".\1."),
        (r"\.exp_1x1\.", ".expand."),
        (r"(layer_\d\.\d)\.conv_3x3\.", r"\1.depthwise."),
        (r"\.red_1x1\.", ".project."),
        (r"\.local_rep\.conv_3x3\.", ".conv_kxk."),
        (r"\.local_rep\.conv_1x1\.conv\.", ".conv_1x1."),
        (r"\.pre_norm_mha\.0\.", ".norm1."),
        (r"\.pre_norm_mha\.1\.qkv_proj\.", ".attn.qkv."),
        (r"\.pre_norm_mha\.1\.out_proj\.", ".attn.proj."),
        (r"\.pre_norm_ffn\.0\.", ".norm2."),
        (r"\.pre_norm_ffn\.1\.", ".mlp.fc1."),
        (r"\.pre_norm_ffn\.4\.", ".mlp.fc2."),
        # The norm after the layers has the next index in the same list.
        *(
            (rf"layer_{3 + i}\.1\.global_rep\.{d}\.", f"layer_{3 + i}.1.norm.")
            for i, d in enumerate(depths)
        ),
        (r"\.global_rep\.", ".transformer."),
        (r"\.fusion\.", ".conv_fusion."),
        (r"^layer_(\d)\.", lambda m: f"backbone.stages.{int(m[1]) - 1}."),
        (r"^conv_1\.", "backbone.stem."),
        (r"^conv_1x1_exp\.", "head.conv."),
        (r"^classifier\.fc\.", "head.fc."),
    ]
    return reverse_stem(rename_keys(state, rules))


def from_huggingface(state: Tensors, config: MobileViTConfig) -> Tensors:
    """transformers: `mobilevit.encoder.layer.2.transformer.layer.0.attention.attention.query.weight`, ...;
    the official weights, so BGR too."""
    rules = [
        (r"^mobilevit\.", ""),
        (r"^encoder\.layer\.(\d)\.downsampling_layer\.", r"stages.\1.0."),
        (r"^encoder\.layer\.([01])\.layer\.", r"stages.\1."),
        (r"^encoder\.layer\.(\d)\.", r"stages.\1.1."),
        (r"\.conv_1x1\.convolution\.", ".conv_1x1."),
        (r"\.convolution\.", ".conv."),
        (r"\.normalization\.", ".bn."),
        (r"\.expand_1x1\.", ".expand."),
        (r"\.conv_3x3\.", ".depthwise."),
        (r"\.reduce_1x1\.", ".project."),
        (r"\.transformer\.layer\.", ".transformer."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layernorm\.", ".norm."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.attention\.attention\.", ".attn."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.conv_projection\.", ".conv_proj."),
        (r"\.fusion\.", ".conv_fusion."),
        (r"^conv_stem\.", "backbone.stem."),
        (r"^stages\.", "backbone.stages."),
        (r"^conv_1x1_exp\.", "head.conv."),
        (r"^classifier\.", "head.fc."),
    ]
    out = join_rows(rename_keys(state, rules), "attn.qkv", ("attn.query", "attn.key", "attn.value"))
    return reverse_stem(out)


register_backbone(
    MobileViT,
    VARIANTS,
    tiny=MobileViTConfig(
        dims=(8, 8, 16, 16, 24),
        transformer_dims=(16, 24, 32),
        transformer_depths=(1, 2, 1),
        stem_dim=8,
        head_dim=32,
        expand_ratio=2.0,
        num_heads=2,
        drop_rate=0.0,
        head_drop_rate=0.0,
    ),
    tail=mobilevit_head,
    layouts={
        "timm": Layout(
            from_timm,
            marks=("stages.0.0.conv1_1x1.conv.weight", "stages.2.1.conv_fusion.conv.weight"),
            source="timm/mobilevit_*.cvnets_in1k",
        ),
        "official": Layout(
            from_official,
            marks=("conv_1.block.conv.weight", "layer_3.1.fusion.block.conv.weight"),
            source="apple/ml-cvnets v0.1",
        ),
        "huggingface": Layout(
            from_huggingface,
            marks=("mobilevit.encoder.layer.2.fusion.convolution.weight",),
            source="apple/mobilevit-*",
        ),
    },
    preprocessing=Preprocessing(
        size=(256, 256), crop_pct=0.9, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    ),
)
