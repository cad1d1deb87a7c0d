"""Semantic FPN (Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019,
https://arxiv.org/abs/1901.02446).

A light dense head on a feature pyramid: every level is brought to stride 4 by steps of (3x3 convolution,
GroupNorm, ReLU, twofold bilinear upsampling), the levels are added, and a 1x1 convolution classifies
(section 3, figure 3).

Where maps do not halve exactly (sizes that 32 does not divide) the steps end at the size of the finest map.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import FeatureSpec
from vitrail.necks.fpn import FPN
from vitrail.segmenters.segmenter import Neck, Segmenter, neck_of


@dataclass(frozen=True, kw_only=True)
class SemanticFPNConfig:
    neck: Neck = "none"  # "simple_pyramid": learnt levels for a backbone of one map
    neck_dim: int = 256  # width of those
    fpn_dim: int = 256
    dim: int = 128
    groups: int = 32  # of GroupNorm
    dropout: float = 0.0  # of whole channels, before the classification


class SemanticFPNHead(nn.Module):
    """Maps -> (B, num_classes, h, w) at the stride of the finest, by default 4."""

    def __init__(
        self, config: SemanticFPNConfig, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        self.fpn = FPN(specs, config.fpn_dim)
        strides = [spec.stride for spec in self.fpn.feature_specs.values()]
        self.stride = strides[0]
        self.branches = nn.ModuleList()
        for level in range(len(strides)):
            dims = [config.fpn_dim, *[config.dim] * max(1, level)]
            steps = [_Step(before, after, config.groups) for before, after in pairwise(dims)]
            self.branches.append(nn.ModuleList(steps))
        self.dropout = nn.Dropout2d(config.dropout)
        self.fc = nn.Conv2d(config.dim, num_classes, 1)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        pyramid = list(self.fpn(maps).values())
        total = None
        for level, (x, steps) in enumerate(zip(pyramid, self.branches, strict=True)):
            assert isinstance(steps, nn.ModuleList)
            for i, step in enumerate(steps):
                x = step(x)
                if level:  # to the size of the next finer level, so that odd sizes meet
                    size = pyramid[level - 1 - i].shape[-2:]
                    x = F.interpolate(x, size, mode="bilinear", align_corners=False)
            total = x if total is None else total + x
        return self.fc(self.dropout(total))


class _Step(nn.Sequential):
    """3x3 convolution without bias, GroupNorm, ReLU. (B, C, H, W) -> (B, dim, H, W)."""

    def __init__(self, in_chans: int, dim: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, dim)
        self.act = nn.ReLU(inplace=True)
        # He et al.'s normal numbers, drawn so that building on `meta` imports no compiler.
        nn.init.trunc_normal_(self.conv.weight, std=math.sqrt(2 / (9 * dim)))


def build(backbone: Any, config: SemanticFPNConfig, num_classes: int) -> Segmenter:
    """Semantic FPN on a backbone."""
    neck = neck_of(backbone, config.neck, config.neck_dim)
    specs = neck.feature_specs
    return Segmenter(backbone, SemanticFPNHead(config, specs, num_classes), neck=neck)
