"""One linear layer on a backbone's maps: the baseline that every claim of a dense head is held against
(DINOv2, Oquab et al. 2023, https://arxiv.org/abs/2304.07193, section 7.4, "Linear").

The backbone's maps are brought to the size of the finest, joined, normalised over the batch and classified
pixel by pixel: what the features know, and nothing that a head has learnt.

Unlike the official code, which reads the last block of a ViT alone: all maps that the backbone declares are
read, so that a pyramid can be measured too. With a ViT's one map both are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import FeatureSpec
from vitrail.packing import Spans
from vitrail.segmenters.segmenter import Segmenter
from vitrail_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    dropout: float = 0.0  # of whole channels, before the linear layer


class LinearHead(nn.Module):
    """Maps -> (B, num_classes, h, w) at the stride of the finest."""

    def __init__(
        self, config: LinearConfig, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        self.stride = min(spec.stride for spec in specs.values())
        dim = sum(spec.channels for spec in specs.values())
        self.norm = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout2d(config.dropout)
        self.fc = nn.Conv2d(dim, num_classes, 1)
        # Nothing is cut at 200 sigma; `normal_` on `meta` would import torch's compiler, for seconds.
        nn.init.trunc_normal_(self.fc.weight, std=0.01)
        assert self.fc.bias is not None
        nn.init.zeros_(self.fc.bias)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        first, *rest = maps.values()
        size = first.shape[-2:]
        rest = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in rest]
        return self.fc(self.dropout(self.norm(torch.cat([first, *rest], 1))))

    def forward_packed(self, maps: Mapping[str, Tensor], spans: Spans) -> Tensor:
        """The maps' tokens of many images (T, C), of one stride -> (T, num_classes). Norms are over all of
        the pack, as they are over a batch."""
        x = torch.cat(list(maps.values()), 1).T[None, :, :, None]  # as one image of a column
        if self.norm.training and x.shape[2] == 1:
            raise InputError(
                "a part of an update is one image of one patch, of which BatchNorm knows no variance; give "
                "larger --packing.max-tokens, more --packing.packs or a smaller --accumulate"
            )
        x = self.norm(x)
        if self.training and self.dropout.p:
            kept = self.dropout(x.new_ones(len(spans.lengths), x.shape[1], 1, 1))
            x = x * spans.spread(kept[..., 0, 0]).T[None, :, :, None]
        return self.fc(x)[0, :, :, 0].T


def build(backbone: Any, config: LinearConfig, num_classes: int) -> Segmenter:
    """The linear segmenter of a backbone."""
    return Segmenter(
        backbone, LinearHead(config, backbone.feature_specs, num_classes), strides=None
    )
