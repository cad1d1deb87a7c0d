"""MobileNetV2 (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
https://arxiv.org/abs/1801.04381).

Shortcuts join narrow linear maps; the wide map, which the depthwise convolution filters, lives inside the
block.

Unlike the official code (TensorFlow Slim), as timm and torchvision: strided convolutions are padded evenly,
and the epsilon of BatchNorm is 1e-5.
"c5" is the map that the paper's detectors take: before the 1x1 convolution of the classifier (320 channels).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from vitrail.features import Features, FeatureSpec
from vitrail.layers.conv import (
    ConvNormAct,
    ConvPoolHead,
    init_conv_weights,
    inverted_residuals,
    make_divisible,
    stage_specs,
    stem_and_stages,
)
from vitrail.layers.conv_keys import (
    TIMM_HEAD,
    counted_through,
    timm_stages,
    torchvision_head,
    torchvision_stages,
)
from vitrail.registry import Layout, Tensors, register_backbone, rename_keys
from vitrail_runtime.preprocess import Preprocessing

_relu6 = partial(nn.ReLU6, inplace=True)


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Config:
    width_multiplier: float = 1.0
    stages: tuple[tuple[int, int, int, int], ...] = (  # (expansion, width, blocks, stride); Table 2
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    head_drop_rate: float = 0.2


VARIANTS = {
    f"mobilenetv2_{percent:03d}": MobileNetV2Config(width_multiplier=percent / 100)
    for percent in (35, 50, 75, 100, 140)
}


class MobileNetV2(nn.Module):
    """images (B, 3, H, W) -> Features with "c2" to "c5" (strides 4 to 32). record: "stages.I.J"."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        width = config.width_multiplier
        dims = [make_divisible(dim * width) for _, dim, _, _ in config.stages]
        strides = [stride for *_, stride in config.stages]
        self.feature_specs, self.outputs = stage_specs(dims, strides)
        in_chans = make_divisible(32 * width)
        self.stem = ConvNormAct(3, in_chans, 3, stride=2, act=_relu6)
        self.stages = nn.ModuleList()
        for dim, (ratio, _, depth, stride) in zip(dims, config.stages, strict=True):
            self.stages.append(inverted_residuals(in_chans, dim, depth, ratio, stride, act=_relu6))
            in_chans = dim
        init_conv_weights(self)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        return stem_and_stages(self, images, record)


def mobilenetv2_head(
    config: MobileNetV2Config, specs: Mapping[str, FeatureSpec], num_classes: int
) -> ConvPoolHead:
    """The paper's tail: a 1x1 convolution to 1280 channels, which a width below 1 does not make narrower."""
    return ConvPoolHead(
        list(specs.values())[-1].channels,
        make_divisible(1280 * max(1.0, config.width_multiplier)),
        num_classes,
        act=_relu6,
        drop=config.head_drop_rate,
    )


def from_timm(state: Tensors, config: MobileNetV2Config) -> Tensors:
    """timm: `blocks.1.0.conv_pw.weight`, ..., `conv_head.weight`, `bn2.weight`, `classifier.weight`."""
    return rename_keys(timm_stages(state), TIMM_HEAD)


def from_torchvision(state: Tensors, config: MobileNetV2Config) -> Tensors:
    """torchvision: `features.2.conv.0.0.weight`, ..., `features.18.0.weight`, `classifier.1.weight`."""
    places = counted_through([depth for _, _, depth, _ in config.stages])
    rules = torchvision_head(len(places) + 1)
    return rename_keys(torchvision_stages(state, places, "conv"), rules)


register_backbone(
    MobileNetV2,
    VARIANTS,
    tiny=MobileNetV2Config(
        width_multiplier=0.5,
        stages=((1, 16, 1, 1), (2, 24, 2, 2), (2, 32, 1, 2), (2, 48, 1, 2), (2, 64, 1, 2)),
    ),
    tail=mobilenetv2_head,
    layouts={
        "timm": Layout(
            from_timm,
            marks=("conv_stem.weight", "blocks.6.0.conv_pwl.weight"),
            source="timm/mobilenetv2_*",
        ),
        "torchvision": Layout(
            from_torchvision,
            marks=("features.0.0.weight", "features.17.conv.2.weight"),
            source="torchvision MobileNet_V2_Weights",
        ),
    },
    preprocessing=Preprocessing(),
)
