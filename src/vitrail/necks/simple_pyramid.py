"""Simple feature pyramid (Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection",
ECCV 2022, https://arxiv.org/abs/2203.16527, section 3).

A plain ViT has one map, of stride 16, and its last layer knows most. All levels are made from that map alone:
finer ones by transposed convolutions, coarser ones by pooling; no lateral and no top-down connections.

Where the paper is silent this follows its official code: each twofold enlargement halves the channels, with a
LayerNorm and a GELU between two of them; a level then passes a 1x1 and a 3x3 convolution to the common width,
both without bias and each followed by a LayerNorm over the channels (eps 1e-6); the level beyond the coarsest
takes every second value. Any stride is taken (DINOv2's 14 gives 3.5, 7, 14, 28), and maps of odd size are
pooled to the ceiling.
"""

import math
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import Features, FeatureSpec, adapt_levels


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map. (B, C, H, W) -> same."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        x = F.layer_norm(
            input.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return x.permute(0, 3, 1, 2)


class SimplePyramid(nn.Module):
    """Features -> "p2".. of `dim` channels, at the strides that are wanted: it stands where `adapt_levels`
    would, between a backbone and a head.

    specs: the backbone's. wanted: strides, finest first; each level is made from the map of the nearest
        stride, the last of several. pool: one more level, twice as coarse as the last.
    """

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        dim: int = 256,
        *,
        wanted: Sequence[int] = (4, 8, 16, 32),
        pool: bool = False,
    ) -> None:
        super().__init__()
        self.pool = pool
        levels = adapt_levels(specs, wanted)
        self.sources: list[str] = []
        self.stages = nn.ModuleList()
        self.feature_specs: dict[str, FeatureSpec] = {}
        for name, (source, scale) in levels.sources.items():
            self.sources.append(source)
            self.stages.append(_stage(specs[source].channels, dim, round(math.log2(scale))))
            stride = levels.feature_specs[name].stride
            self.feature_specs[f"p{name[1:]}"] = FeatureSpec(dim, stride)
        if pool:
            level, spec = list(self.feature_specs.items())[-1]
            self.feature_specs[f"p{int(level[1:]) + 1}"] = FeatureSpec(dim, 2 * spec.stride)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """Features -> "p2" ... -> (B, dim, h, w), finest first."""
        maps = [
            stage(features.maps[source])
            for stage, source in zip(self.stages, self.sources, strict=True)
        ]
        if self.pool:
            maps.append(maps[-1][..., ::2, ::2])
        return dict(zip(self.feature_specs, maps, strict=True))


def _stage(in_chans: int, dim: int, doublings: int) -> nn.Sequential:
    """A map enlarged 2 ** doublings times (pooled where that is negative), then brought to `dim` channels."""
    steps: list[nn.Module] = []
    for i in range(doublings):
        if i:
            steps += [ChannelNorm(in_chans), nn.GELU()]
        steps.append(nn.ConvTranspose2d(in_chans, in_chans // 2, 2, 2))
        in_chans //= 2
    steps += [nn.MaxPool2d(2, 2, ceil_mode=True) for _ in range(-doublings)]
    smooth = [
        nn.Conv2d(in_chans, dim, 1, bias=False),
        ChannelNorm(dim),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        ChannelNorm(dim),
    ]
    return nn.Sequential(*steps, *smooth)
