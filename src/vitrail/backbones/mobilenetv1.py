"""MobileNetV1 (Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
Applications", 2017, https://arxiv.org/abs/1704.04861).

A convolution split into one per channel and one per pixel costs an eighth of a whole one; a width multiplier
trades the rest.

Unlike the official code (TensorFlow Slim), as timm: strided convolutions are padded evenly, and the epsilon
of BatchNorm is 1e-5.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from vitrail.features import Features
from vitrail.layers.conv import (
    ConvNormAct,
    init_conv_weights,
    make_divisible,
    stage_specs,
    stem_and_stages,
)
from vitrail.registry import Layout, Tensors, register_backbone, rename_keys
from vitrail_runtime.preprocess import Preprocessing

_relu6 = partial(nn.ReLU6, inplace=True)


@dataclass(frozen=True, kw_only=True)
class MobileNetV1Config:
    width_multiplier: float = 1.0
    stages: tuple[tuple[int, int, int], ...] = (  # (width, blocks, stride); Table 1
        (64, 1, 1),
        (128, 2, 2),
        (256, 2, 2),
        (512, 6, 2),
        (1024, 2, 2),
    )


VARIANTS = {
    f"mobilenetv1_{percent:03d}": MobileNetV1Config(width_multiplier=percent / 100)
    for percent in (25, 50, 75, 100, 125)
}


class SeparableConv(nn.Module):
    """A convolution per channel, then one per pixel (fig. 3).
    (B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.depthwise = ConvNormAct(in_chans, in_chans, 3, stride, groups=in_chans, act=_relu6)
        self.pointwise = ConvNormAct(in_chans, out_chans, 1, act=_relu6)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class MobileNetV1(nn.Module):
    """images (B, 3, H, W) -> Features with "c2" to "c5" (strides 4 to 32). record: "stages.I.J"."""

    def __init__(self, config: MobileNetV1Config) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        width = config.width_multiplier
        dims = [make_divisible(dim * width) for dim, _, _ in config.stages]
        strides = [stride for *_, stride in config.stages]
        self.feature_specs, self.outputs = stage_specs(dims, strides)
        in_chans = make_divisible(32 * width)
        self.stem = ConvNormAct(3, in_chans, 3, stride=2, act=_relu6)
        self.stages = nn.ModuleList()
        for dim, (_, depth, stride) in zip(dims, config.stages, strict=True):
            blocks = [SeparableConv(in_chans, dim, stride)]
            blocks += [SeparableConv(dim, dim, 1) for _ in range(depth - 1)]
            self.stages.append(nn.ModuleList(blocks))
            in_chans = dim
        init_conv_weights(self)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        return stem_and_stages(self, images, record)


def from_timm(state: Tensors, config: MobileNetV1Config) -> Tensors:
    """timm: `blocks.1.0.conv_dw.weight`, `blocks.1.0.bn1.weight`, `blocks.1.0.conv_pw.weight`, ..."""
    rules = [
        (r"^conv_stem\.", "backbone.stem.conv."),
        (r"^bn1\.", "backbone.stem.bn."),
        (r"\.conv_dw\.", ".depthwise.conv."),
        (r"(blocks.*)\.bn1\.", r"\1.depthwise.bn."),
        (r"\.conv_pw\.", ".pointwise.conv."),
        (r"(blocks.*)\.bn2\.", r"\1.pointwise.bn."),
        (r"^blocks\.", "backbone.stages."),
        (r"^classifier\.", "head.fc."),
    ]
    return rename_keys(state, rules)


HALF = (0.5, 0.5, 0.5)

register_backbone(
    MobileNetV1,
    VARIANTS,
    tiny=MobileNetV1Config(stages=((8, 1, 1), (16, 1, 2), (16, 1, 2), (24, 1, 2), (32, 2, 2))),
    layouts={
        "timm": Layout(
            from_timm,
            marks=("conv_stem.weight", "blocks.0.0.conv_pw.weight", "blocks.4.1.conv_pw.weight"),
            source="timm/mobilenetv1_*",
        )
    },
    preprocessing={
        # timm's only weights of this width are evaluated so.
        name: Preprocessing(crop_pct=0.9 if name.endswith("125") else 0.875, mean=HALF, std=HALF)
        for name in VARIANTS
    },
)
