"""UPerNet (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018,
https://arxiv.org/abs/1807.10221).

Two ideas joined: a pyramid pooling module (Zhao et al., CVPR 2017) on the coarsest map, which sees the whole
image at several grids, and a feature pyramid that carries it down to the finest map. All levels are joined at
the finest and classified. A small fully convolutional head on the third map helps in training.

Unlike the paper's, which does several tasks at once, this is the segmentation part, as the mmsegmentation
library made it common: every convolution is followed by BatchNorm and ReLU, and resizing is bilinear.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import FeatureSpec
from vitrail.layers.conv import ConvNormAct
from vitrail.registry import Tensors, rename_keys
from vitrail.segmenters.segmenter import Neck, Segmenter, neck_of


@dataclass(frozen=True, kw_only=True)
class UPerNetConfig:
    neck: Neck = "none"  # "simple_pyramid": learnt levels for a backbone of one map
    neck_dim: int = 256  # width of those
    dim: int = 512
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1  # of whole channels, before the classification
    auxiliary_dim: int = 256
    auxiliary_level: int = 2  # which of the maps the auxiliary head reads, 0 the finest
    auxiliary_weight: float = 0.4  # 0: no auxiliary head


_conv = partial(ConvNormAct, act=partial(nn.ReLU, inplace=True))


class UPerNetHead(nn.Module):
    """Maps -> (B, num_classes, h, w) at the stride of the finest."""

    def __init__(
        self, config: UPerNetConfig, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        dims, dim = [spec.channels for spec in specs.values()], config.dim
        self.stride = next(iter(specs.values())).stride
        self.pool_scales = config.pool_scales
        self.pools = nn.ModuleList(_conv(dims[-1], dim, 1) for _ in config.pool_scales)
        self.bottleneck = _conv(dims[-1] + len(config.pool_scales) * dim, dim)
        self.lateral = nn.ModuleList(_conv(d, dim, 1) for d in dims[:-1])
        self.smooth = nn.ModuleList(_conv(dim, dim) for _ in dims[:-1])
        self.fuse = _conv(len(dims) * dim, dim)
        self.dropout = nn.Dropout2d(config.dropout)
        self.fc = nn.Conv2d(dim, num_classes, 1)
        _init_classifier(self.fc)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        *fine, coarsest = maps.values()
        pooled = [
            _resize(conv(F.adaptive_avg_pool2d(coarsest, scale)), coarsest)
            for scale, conv in zip(self.pool_scales, self.pools, strict=True)
        ]
        top = self.bottleneck(torch.cat([coarsest, *pooled], 1))
        levels = [top]
        for x, lateral in zip(reversed(fine), reversed(self.lateral), strict=True):
            x = lateral(x)
            levels.insert(0, x + _resize(levels[0], x))
        smoothed = [conv(x) for conv, x in zip(self.smooth, levels[:-1], strict=True)]
        joined = [_resize(x, levels[0]) for x in (*smoothed, top)]
        return self.fc(self.dropout(self.fuse(torch.cat(joined, 1))))


class FCNHead(nn.Module):
    """The auxiliary head (Long et al., CVPR 2015): a 3x3 convolution on one map, then classification."""

    def __init__(
        self, config: UPerNetConfig, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        self.level = list(specs)[config.auxiliary_level]
        self.stride = specs[self.level].stride
        self.conv = _conv(specs[self.level].channels, config.auxiliary_dim)
        self.dropout = nn.Dropout2d(config.dropout)
        self.fc = nn.Conv2d(config.auxiliary_dim, num_classes, 1)
        _init_classifier(self.fc)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        return self.fc(self.dropout(self.conv(maps[self.level])))


def build(backbone: Any, config: UPerNetConfig, num_classes: int) -> Segmenter:
    """UPerNet on a backbone."""
    neck = neck_of(backbone, config.neck, config.neck_dim)
    specs = neck.feature_specs
    auxiliary = FCNHead(config, specs, num_classes) if config.auxiliary_weight else None
    return Segmenter(
        backbone,
        UPerNetHead(config, specs, num_classes),
        neck=neck,
        auxiliary=auxiliary,
        auxiliary_weight=config.auxiliary_weight,
    )


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def _init_classifier(fc: nn.Conv2d) -> None:
    # Nothing is cut at 200 sigma; `normal_` on `meta` would import torch's compiler, for seconds.
    nn.init.trunc_normal_(fc.weight, std=0.01)
    assert fc.bias is not None
    nn.init.zeros_(fc.bias)


def from_mmsegmentation(state: Tensors) -> Tensors:
    """decode_head.*, auxiliary_head.* of mmsegmentation's files -> head.*, auxiliary.*; other keys stay."""
    return rename_keys(
        state,
        [
            (r"^auxiliary_head\.convs\.0\.", "auxiliary.conv."),
            (r"^auxiliary_head\.conv_seg\.", "auxiliary.fc."),
            (r"^decode_head\.conv_seg\.", "head.fc."),
            (r"^decode_head\.psp_modules\.(\d+)\.1\.", r"head.pools.\1."),
            (r"^decode_head\.lateral_convs\.", "head.lateral."),
            (r"^decode_head\.fpn_convs\.", "head.smooth."),
            (r"^decode_head\.fpn_bottleneck\.", "head.fuse."),
            (r"^decode_head\.bottleneck\.", "head.bottleneck."),
        ],
    )


def from_foreign(state: Tensors) -> Tensors:
    """The heads of mmsegmentation's files and of UperNetForSemanticSegmentation of transformers, which are
    the same but for the names of norms and classifiers. Keys that are ours already stay."""
    renamed = rename_keys(
        state,
        [
            (r"^((?:decode|auxiliary)_head\..*)\.batch_norm\.", r"\1.bn."),
            (r"^((?:decode|auxiliary)_head)\.classifier\.", r"\1.conv_seg."),
        ],
    )
    return from_mmsegmentation(renamed)
