"""The hybrid ViT (Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at
Scale", ICLR 2021, https://arxiv.org/abs/2010.11929, section 3.1; the tiny, small and large ones from Steiner
et al., "How to train your ViT?", TMLR 2022, https://arxiv.org/abs/2106.10270).

Instead of cutting pixels into patches, a small ResNet sees the image first and the transformer's tokens are
the pixels (or small patches) of its map. The ResNet is BiT's (Kolesnikov et al., "Big Transfer", ECCV 2020,
https://arxiv.org/abs/1912.11370): GroupNorm and weight standardisation stand where BatchNorm stood, so that
training does not depend on the batch; here with the activation after the norm, as in the first ResNets.

Unlike the official code (JAX, github.com/google-research/vision_transformer): weights are standardised by
sqrt(variance + 1e-8) and GroupNorm adds 1e-5, as timm does with the same weights; JAX divides by the
deviation + 1e-5 and adds 1e-6. "SAME" padding follows the size of each image, as there; a map that patches
do not divide is filled up with zeros at the right and the bottom, as timm's `dynamic_img_pad` does.

Paper and code: "s16" in `vit_tiny_r_s16_p8` is its authors' name. Its stem has stride 4 and its patches are
8 x 8, so a token stands for 32 x 32 pixels.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.backbones.vit import BASE, LARGE, SMALL, TINY, ViT, ViTConfig, ViTHead, smallest
from vitrail.backbones.vit_keys import TIMM_MARKS, resample_to
from vitrail.backbones.vit_keys import from_timm as vit_from_timm
from vitrail.features import pad_to_multiple
from vitrail.layers.conv import fast_layout
from vitrail.registry import Layout, Tensors, register_backbone
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class ViTHybridConfig(ViTConfig):
    """A ViT's fields; `patch_size` is the pixels of a side that a token stands for."""

    layers: tuple[int, ...]  # bottlenecks of each ResNet stage; none: its stem alone
    stem_width: int = 64  # channels after the stem; stage i has 4 * stem_width * 2**i

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem_width % GROUPS:
            raise InputError(f"stem_width {self.stem_width} must be a multiple of {GROUPS}")
        if self.patch_size % self.map_stride:
            raise InputError(
                f"patch_size {self.patch_size} must be a multiple of the ResNet's stride "
                f"{self.map_stride} (layers={self.layers})"
            )

    @property
    def map_stride(self) -> int:
        """Stride of the ResNet's map: 4 after the stem, twice that after every stage but the first."""
        return 4 * 2 ** max(len(self.layers) - 1, 0)


GROUPS = 32


def _on(vit: ViTConfig, layers: tuple[int, ...], patch_size: int) -> ViTHybridConfig:
    return ViTHybridConfig(**{**vars(vit), "layers": layers, "patch_size": patch_size})


VARIANTS = {
    "vit_tiny_r_s16_p8": _on(TINY, layers=(), patch_size=32),
    "vit_small_r26_s32": _on(SMALL, layers=(2, 2, 2, 2), patch_size=32),
    "vit_base_r50_s16": _on(BASE, layers=(3, 4, 9), patch_size=16),
    "vit_large_r50_s32": _on(LARGE, layers=(3, 4, 6, 3), patch_size=32),
}


class StdConv(nn.Conv2d):
    """A convolution with standardised weights: zero mean, unit variance for each output channel (Qiao et al.,
    2019, https://arxiv.org/abs/1903.10520). (B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int, stride: int = 1) -> None:
        padding = kernel_size // 2 if stride == 1 else 0  # else it depends on the size
        super().__init__(in_chans, out_chans, kernel_size, stride, padding, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        x, stride = input, self.stride
        if stride[0] == 2 and self.kernel_size[0] == 1:
            x, stride = x[..., ::2, ::2], 1  # the same, and of a size that tracers can compare
        elif stride[0] == 2:
            x = pad_same(x, self.kernel_size[0])
        flat = self.weight.flatten(1)  # (out, in * k * k)
        weight = F.layer_norm(flat, flat.shape[1:], eps=1e-8).view_as(self.weight)
        return F.conv2d(x, weight, None, stride, self.padding)


def pad_same(x: Tensor, kernel_size: int) -> Tensor:
    """Zeros such that a window of stride 2 gives ceil(size / 2), the odd one at the end ("SAME" padding)."""
    height, width = x.shape[-2:]
    # Written with the result's size, of which a tracer proves that it comes out.
    down = (height + 1) // 2 * 2 + kernel_size - 2 - height
    right = (width + 1) // 2 * 2 + kernel_size - 2 - width
    return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))


class GroupNorm(nn.GroupNorm):
    """torch's, without its refusal of a group of one value, which an image of one pixel can come to."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, each normed, around a residual.
    (B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, project: bool) -> None:
        super().__init__()
        dim = out_chans // 4
        self.downsample = None
        if project:
            conv, norm = StdConv(in_chans, out_chans, 1, stride), GroupNorm(GROUPS, out_chans)
            self.downsample = nn.Sequential(OrderedDict(conv=conv, norm=norm))
        self.conv1 = StdConv(in_chans, dim, 1)
        self.norm1 = GroupNorm(GROUPS, dim)
        self.conv2 = StdConv(dim, dim, 3, stride)
        self.norm2 = GroupNorm(GROUPS, dim)
        self.conv3 = StdConv(dim, out_chans, 1)
        self.norm3 = GroupNorm(GROUPS, out_chans)
        nn.init.zeros_(self.norm3.weight)  # each block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(self.norm2(self.conv2(x)), inplace=True)
        return F.relu(self.norm3(self.conv3(x)) + shortcut, inplace=True)


class ResNet(nn.Module):
    """(B, 3, H, W) -> (B, dim, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, layers: Sequence[int], stem_width: int) -> None:
        super().__init__()
        conv, norm = StdConv(3, stem_width, 7, stride=2), GroupNorm(GROUPS, stem_width)
        self.stem = nn.Sequential(OrderedDict(conv=conv, norm=norm))
        self.stages = nn.ModuleList()
        self.dim = stem_width
        for i, depth in enumerate(layers):
            dim, blocks = 4 * stem_width * 2**i, nn.Sequential()
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(Bottleneck(self.dim, dim, stride, project=not j))
                self.dim = dim
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images), inplace=True)
        # Nothing is below zero here, so zeros are as good a padding for the maximum as -infinity.
        x = F.max_pool2d(pad_same(x, 3), 3, 2)
        for stage in self.stages:
            x = stage(x)
        return x


class HybridEmbed(nn.Module):
    """Tokens from the ResNet's map. (B, 3, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, config: ViTHybridConfig) -> None:
        super().__init__()
        self.resnet = ResNet(config.layers, config.stem_width)
        patch = config.patch_size // config.map_stride
        self.proj = nn.Conv2d(self.resnet.dim, config.embed_dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        x = self.resnet(fast_layout(images))
        return self.proj(pad_to_multiple(x, self.proj.stride[0]))


class ViTHybrid(ViT):
    """images (B, 3, H, W) -> Features, as ViT's. No packed images: its tokens see beyond their patch."""

    def __init__(self, config: ViTHybridConfig) -> None:
        super().__init__(config, HybridEmbed(config))


def from_timm(state: Tensors, config: ViTHybridConfig) -> Tensors:
    """timm's vision_transformer_hybrid keys; where there is only a stem, it is not called so."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("patch_embed.backbone.", "patch_embed.resnet.")
        for part in ("conv", "norm"):
            key = key.replace(f".resnet.{part}.", f".resnet.stem.{part}.")
        renamed[key] = value
    return vit_from_timm(renamed, config)


HALF = (0.5, 0.5, 0.5)

register_backbone(
    ViTHybrid,
    VARIANTS,
    tiny=smallest(ViTHybridConfig, patch_size=16, image_size=64, layers=(1, 2), stem_width=32),
    layouts={
        "timm": Layout(
            from_timm,
            marks=("patch_embed.backbone.*", *TIMM_MARKS),
            source="timm vision_transformer_hybrid",
        )
    },
    tail=ViTHead,
    resample=resample_to,
    preprocessing=Preprocessing(crop_pct=0.9, mean=HALF, std=HALF),
)
