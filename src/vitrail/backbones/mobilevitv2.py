"""MobileViTv2 (Mehta and Rastegari, "Separable Self-attention for Mobile Vision Transformers", TMLR 2023,
https://arxiv.org/abs/2206.02680).

Attention costs the square of the number of tokens because every token is compared with every other. Here
each token is compared with one learnt latent token: the softmax of those scores weighs the keys into a
single context vector, which gates the value of every token. Two products over the tokens, so linear cost
(eq. 3, fig. 3c). The block of MobileViT loses its shortcut and its fusion convolution.

Unlike the paper, as the official code (github.com/apple/ml-cvnets):
- The norms of the transformer are GroupNorms of one group over all channels, places and patches of an image,
  where the paper says layer norm.
Unlike the official code:
- Where a map has odd sides, the official block resizes it to even ones (bilinear, corners aligned) and
  returns the larger map. We crop the result, so that strides hold at every size. At multiples of 64 pixels,
  where all maps are even, both are equal.

Pictures are scaled to [0, 1] and not normalised. The official weights take RGB (cvnets reads by PIL since
v0.2, where these were trained; only MobileViT's first version was trained on BGR), so no key map
touches the stem, although the Hugging Face processor of these weights reverses channels.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import Features, pyramid_specs
from vitrail.layers.conv import (
    ConvNormAct,
    init_conv_weights,
    inverted_residuals,
    make_divisible,
    stem_and_stages,
)
from vitrail.layers.resize import resize_to_multiple
from vitrail.registry import Layout, Tensors, register_backbone, rename_keys
from vitrail_runtime.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class MobileViTV2Config:
    width_multiplier: float = 1.0
    transformer_depths: tuple[int, int, int] = (2, 4, 3)
    expand_ratio: float = 2.0  # of the inverted residuals
    mlp_ratio: float = 2.0
    patch_size: int = 2


VARIANTS = {
    f"mobilevitv2_{percent:03d}": MobileViTV2Config(width_multiplier=percent / 100)
    for percent in (50, 75, 100, 125, 150, 175, 200)
}

DIMS = (64, 128, 256, 384, 512)  # of the five stages at width 1
TRANSFORMER_DIMS = (128, 192, 256)
STAGE_DEPTHS = (1, 2, 1, 1, 1)  # inverted residuals per stage
_silu = partial(nn.SiLU, inplace=True)


class SeparableAttention(nn.Module):
    """Self-attention of linear cost (eq. 3). (B, C, H, W) -> same; H and W are multiples of the patch.

    The paper unfolds the map into patches, and the pixels at the same place of all patches attend to each
    other. Only one sum asks which place a pixel has, so the map itself is not rearranged here.
    """

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.split = [1, dim, dim]
        self.qkv_proj = nn.Conv2d(dim, sum(self.split), 1)
        self.out_proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, record: dict[str, Tensor] | None = None, name: str = "") -> Tensor:
        batch, dim, height, width = x.shape
        p = self.patch_size
        query, key, value = self.qkv_proj(x).flatten(2).split(self.split, dim=1)
        # How close each token is to the latent one: one softmax per place, over the pixels of that place.
        own = torch.eye(p * p, dtype=query.dtype, device=query.device).log()  # 0, elsewhere -inf
        mask = own.view(p * p, p, p).repeat(1, height // p, width // p)
        scores = (query + mask.flatten(1)).softmax(-1)  # (B, P, H * W)
        if record is not None:
            record[f"{name}.scores"] = scores.reshape(batch, p * p, height, width)
        context = torch.bmm(key, scores.transpose(1, 2))  # (B, C, P)
        # A row of patches repeats its contexts, and so does every row of patches.
        gates = context.reshape(batch, dim, 1, p, p).repeat(1, 1, 1, 1, width // p)
        gated = F.relu(value).reshape(batch, dim, height // p, p, width) * gates
        return self.out_proj(gated.reshape(batch, dim, height, width))


class FeedForward(nn.Module):
    """1x1 convolution, SiLU, 1x1 convolution. (B, C, H, W) -> same."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = _silu()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TransformerLayer(nn.Module):
    """Separable attention, then feed-forward, each pre-normed and added back. (B, C, H, W) -> same."""

    def __init__(self, dim: int, config: MobileViTV2Config) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, dim)
        self.attn = SeparableAttention(dim, config.patch_size)
        self.norm2 = nn.GroupNorm(1, dim)
        self.mlp = FeedForward(dim, int(config.mlp_ratio * dim // 16) * 16)

    def forward(self, x: Tensor, record: dict[str, Tensor] | None = None, name: str = "") -> Tensor:
        x = x + self.attn(self.norm1(x), record, f"{name}.attn")
        return x + self.mlp(self.norm2(x))


class MobileViTV2Block(nn.Module):
    """Depthwise convolution, transformer, projection. (B, C, H, W) -> same."""

    def __init__(
        self, dim: int, transformer_dim: int, depth: int, config: MobileViTV2Config
    ) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.conv_kxk = ConvNormAct(dim, dim, 3, groups=dim, act=_silu)
        self.conv_1x1 = nn.Conv2d(dim, transformer_dim, 1, bias=False)
        self.transformer = nn.ModuleList(
            TransformerLayer(transformer_dim, config) for _ in range(depth)
        )
        self.norm = nn.GroupNorm(1, transformer_dim)
        self.conv_proj = ConvNormAct(transformer_dim, dim, 1, act=None)

    def forward(self, x: Tensor, record: dict[str, Tensor] | None = None, name: str = "") -> Tensor:
        height, width = x.shape[-2:]
        y = resize_to_multiple(x, self.patch_size, align_corners=True)
        y = self.conv_1x1(self.conv_kxk(y))
        for i, layer in enumerate(self.transformer):
            y = layer(y, record, f"{name}.transformer.{i}")
        return self.conv_proj(self.norm(y))[..., :height, :width]


class MobileViTV2(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> Features with "c2" to "c5" (strides 4 to 32).

    record: "stages.I.J" (the block's map) and "stages.I.1.transformer.L.attn.scores", of shape
    (B, P, h, w): for each of P = 4 places in a patch the weights of the map's pixels, which sum to 1 and are
    zero at other places.
    """

    def __init__(self, config: MobileViTV2Config) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        width = config.width_multiplier
        divisors = (16, 8, 8, 8, 8)
        dims = [make_divisible(d * width, div) for d, div in zip(DIMS, divisors, strict=True)]
        self.feature_specs = pyramid_specs(dims[1:], first_stride=4)
        self.outputs = dict(enumerate(self.feature_specs, start=1))  # all but the first stage's
        in_chans = make_divisible(min(max(32 * width, 16), 64))
        self.stem = ConvNormAct(3, in_chans, 3, stride=2, act=_silu)
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, STAGE_DEPTHS, strict=True)):
            stride = 2 if i > 0 else 1
            ratio = config.expand_ratio
            stage = inverted_residuals(in_chans, dim, depth, ratio, stride, act=_silu)
            in_chans = dim
            if i >= 2:
                inner = make_divisible(TRANSFORMER_DIMS[i - 2] * width)
                layers = config.transformer_depths[i - 2]
                stage.append(MobileViTV2Block(dim, inner, layers, config))
            self.stages.append(stage)
        init_conv_weights(self)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        return stem_and_stages(self, images, record, recording=MobileViTV2Block)


def from_timm(state: Tensors, config: MobileViTV2Config) -> Tensors:
    """timm: `stages.2.1.transformer.0.attn.qkv_proj.weight`, ..."""
    rules = [
        (r"\.conv1_1x1\.", ".expand."),
        (r"\.conv2_kxk\.", ".depthwise."),
        (r"\.conv3_1x1\.", ".project."),
        (r"^(stem|stages)\.", r"backbone.\1."),
    ]
    return rename_keys(state, rules)


def from_official(state: Tensors, config: MobileViTV2Config) -> Tensors:
    """cvnets: `layer_3.1.global_rep.0.pre_norm_attn.1.qkv_proj.block.conv.weight`, ..."""
    # The norm after the layers has the next index in the same list.
    last = [
        (rf"^layer_{i}\.1\.global_rep\.{depth}\.", f"layer_{i}.1.norm.")
        for i, depth in enumerate(config.transformer_depths, 3)
    ]
    rules = [
        *last,
        (r"\.pre_norm_attn\.0\.", ".norm1."),
        (r"\.pre_norm_attn\.1\.(\w+)\.block\.conv\.", r".attn.\1."),
        (r"\.pre_norm_ffn\.0\.", ".norm2."),
        (r"\.pre_norm_ffn\.1\.block\.conv\.", ".mlp.fc1."),
        (r"\.pre_norm_ffn\.3\.block\.conv\.", ".mlp.fc2."),
        (r"\.local_rep\.1\.block\.conv\.", ".conv_1x1."),
        (r"\.local_rep\.0\.", ".conv_kxk."),
        (r"\.global_rep\.", ".transformer."),
        (r"\.block\.norm\.", ".bn."),
        (r"\.block\.conv\.", ".conv."),
        (r"\.block\.exp_1x1\.", ".expand."),
        (r"\.block\.conv_3x3\.", ".depthwise."),
        (r"\.block\.red_1x1\.", ".project."),
        (r"^layer_(\d)\.", lambda m: f"backbone.stages.{int(m[1]) - 1}."),
        (r"^conv_1\.", "backbone.stem."),
        (r"^classifier\.1\.", "head.fc."),
    ]
    return rename_keys(state, rules)


def from_huggingface(state: Tensors, config: MobileViTV2Config) -> Tensors:
    """transformers: `mobilevitv2.encoder.layer.2.transformer.layer.0.attention.qkv_proj...`."""
    rules = [
        (r"^mobilevitv2\.", ""),
        (r"^encoder\.layer\.(\d)\.downsampling_layer\.", r"stages.\1.0."),
        (r"^encoder\.layer\.([01])\.layer\.", r"stages.\1."),
        (r"^encoder\.layer\.(\d)\.", r"stages.\1.1."),
        (r"\.transformer\.layer\.", ".transformer."),
        (r"\.attention\.(\w+)\.convolution\.", r".attn.\1."),
        (r"\.ffn\.conv([12])\.convolution\.", r".mlp.fc\1."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layernorm\.", ".norm."),
        (r"\.conv_projection\.", ".conv_proj."),
        (r"\.conv_1x1\.convolution\.", ".conv_1x1."),
        (r"\.convolution\.", ".conv."),
        (r"\.normalization\.", ".bn."),
        (r"\.expand_1x1\.", ".expand."),
        (r"\.conv_3x3\.", ".depthwise."),
        (r"\.reduce_1x1\.", ".project."),
        (r"^conv_stem\.", "backbone.stem."),
        (r"^stages\.", "backbone.stages."),
        (r"^classifier\.", "head.fc."),
    ]
    return rename_keys(state, rules)


register_backbone(
    MobileViTV2,
    VARIANTS,
    tiny=MobileViTV2Config(width_multiplier=0.125, transformer_depths=(1, 2, 1)),
    layouts={
        "timm": Layout(
            from_timm,
            marks=(
                "stages.0.0.conv1_1x1.conv.weight",
                "stages.2.1.transformer.0.attn.qkv_proj.weight",
            ),
            source="timm/mobilevitv2_*.cvnets_in1k",
        ),
        "official": Layout(
            from_official,
            marks=("layer_3.1.global_rep.0.pre_norm_attn.1.qkv_proj.block.conv.weight",),
            source="apple/ml-cvnets v0.2",
        ),
        "huggingface": Layout(
            from_huggingface,
            marks=("mobilevitv2.conv_stem.convolution.weight",),
            source="apple/mobilevitv2-*",
        ),
    },
    preprocessing=Preprocessing(
        size=(256, 256), crop_pct=0.888, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    ),
)
