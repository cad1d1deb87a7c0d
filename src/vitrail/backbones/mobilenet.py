"""The MobileNets, three papers that refine one block.

- MobileNetV1 (Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
  Applications", 2017, https://arxiv.org/abs/1704.04861): a convolution split into one per channel and one per
  pixel costs an eighth; a width multiplier trades the rest.
- MobileNetV2 (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
  https://arxiv.org/abs/1801.04381): shortcuts join narrow linear maps; the wide one lives inside the block.
- MobileNetV3 (Howard et al., "Searching for MobileNetV3", ICCV 2019, https://arxiv.org/abs/1905.02244):
  layers found by search, squeeze-and-excitation, h-swish, and a tail that widens after pooling, not before.

Unlike the official code (TensorFlow Slim), as timm and torchvision: strided convolutions are padded evenly,
and the epsilon of BatchNorm is 1e-5. torchvision's MobileNetV3 has 1e-3, which its key map adds to the
running variances: the same function.
"c5" is the map that the papers' detectors take: V2 before the 1x1 convolution of the classifier (320
channels), V3 after its last convolution (960 or 576 channels).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import Features, FeatureSpec, check_images
from vitrail.layers.conv import (
    ConvNormAct,
    ConvPoolHead,
    InvertedResidual,
    SqueezeExcite,
    absorb_eps,
    fast_layout,
    init_conv_weights,
    make_divisible,
    run_stages,
    stage_specs,
)
from vitrail.layers.conv_keys import timm_stages, torchvision_stages
from vitrail.registry import Layout, Published, Tensors, register_backbone, rename_keys
from vitrail_runtime.preprocess import Preprocessing

_relu = partial(nn.ReLU, inplace=True)
_relu6 = partial(nn.ReLU6, inplace=True)
_hardswish = partial(nn.Hardswish, inplace=True)


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


@dataclass(frozen=True)
class Bneck:
    """Blocks of one row of MobileNetV3's Tables 1 and 2; the stride is the first block's."""

    kernel_size: int
    expand_ratio: float
    dim: int
    se: bool
    hardswish: bool
    stride: int = 1
    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class MobileNetV3Config:
    stages: tuple[tuple[Bneck, ...], ...]
    last_dim: int  # width of the last convolution, before pooling
    head_dim: int  # width after pooling
    width_multiplier: float = 1.0
    drop_path_rate: float = 0.0
    head_drop_rate: float = 0.2


LARGE = MobileNetV3Config(  # Table 1; ratios are its "exp size" over the width before
    stages=(
        (Bneck(3, 1, 16, False, False),),
        (Bneck(3, 4, 24, False, False, stride=2), Bneck(3, 3, 24, False, False)),
        (Bneck(5, 3, 40, True, False, stride=2, depth=3),),
        (
            Bneck(3, 6, 80, False, True, stride=2),
            Bneck(3, 2.5, 80, False, True),
            Bneck(3, 2.3, 80, False, True, depth=2),
        ),
        (Bneck(3, 6, 112, True, True, depth=2),),
        (Bneck(5, 6, 160, True, True, stride=2, depth=3),),
    ),
    last_dim=960,
    head_dim=1280,
)
SMALL = MobileNetV3Config(  # Table 2
    stages=(
        (Bneck(3, 1, 16, True, False, stride=2),),
        (Bneck(3, 4.5, 24, False, False, stride=2), Bneck(3, 88 / 24, 24, False, False)),
        (Bneck(5, 4, 40, True, True, stride=2), Bneck(5, 6, 40, True, True, depth=2)),
        (Bneck(5, 3, 48, True, True, depth=2),),
        (Bneck(5, 6, 96, True, True, stride=2, depth=3),),
    ),
    last_dim=576,
    head_dim=1024,
)


def _scaled(config: MobileNetV3Config, width: float) -> MobileNetV3Config:
    return replace(config, width_multiplier=width)


V1_VARIANTS = {
    f"mobilenetv1_{percent:03d}": MobileNetV1Config(width_multiplier=percent / 100)
    for percent in (25, 50, 75, 100, 125)
}
V2_VARIANTS = {
    f"mobilenetv2_{percent:03d}": MobileNetV2Config(width_multiplier=percent / 100)
    for percent in (35, 50, 75, 100, 140)
}
V3_VARIANTS = {
    "mobilenetv3_large": LARGE,
    "mobilenetv3_large_075": _scaled(LARGE, 0.75),
    "mobilenetv3_small": SMALL,
    "mobilenetv3_small_075": _scaled(SMALL, 0.75),
    "mobilenetv3_small_050": _scaled(SMALL, 0.5),
}


class SeparableConv(nn.Module):
    """A convolution per channel, then one per pixel (V1, fig. 3).
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
        check_images(images, self)
        checkpointing = self.grad_checkpointing and self.training
        x = self.stem(fast_layout(images))
        return Features(run_stages(x, self.stages, self.outputs, record, checkpointing))


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
            blocks = nn.ModuleList()
            for j in range(depth):
                blocks.append(
                    InvertedResidual(
                        in_chans,
                        dim,
                        make_divisible(in_chans * ratio),
                        stride=stride if j == 0 else 1,
                        act=_relu6,
                    )
                )
                in_chans = dim
            self.stages.append(blocks)
        init_conv_weights(self)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        check_images(images, self)
        checkpointing = self.grad_checkpointing and self.training
        x = self.stem(fast_layout(images))
        return Features(run_stages(x, self.stages, self.outputs, record, checkpointing))


def mobilenetv2_head(
    config: MobileNetV2Config, specs: Mapping[str, FeatureSpec], num_classes: int
) -> ConvPoolHead:
    """V2's tail: a 1x1 convolution to 1280 channels, which a width below 1 does not make narrower."""
    return ConvPoolHead(
        list(specs.values())[-1].channels,
        make_divisible(1280 * max(1.0, config.width_multiplier)),
        num_classes,
        act=_relu6,
        drop=config.head_drop_rate,
    )


class MobileNetV3(nn.Module):
    """images (B, 3, H, W) -> Features with "c2" to "c5" (strides 4 to 32). record: "stages.I.J"."""

    def __init__(self, config: MobileNetV3Config) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        width = config.width_multiplier
        total = sum(row.depth for stage in config.stages for row in stage)
        # Widths below 0.75 keep the stem.
        in_chans = 16 if width < 0.75 else make_divisible(16 * width)
        self.stem = ConvNormAct(3, in_chans, 3, stride=2, act=_hardswish)
        self.stages = nn.ModuleList()
        dims, strides, index = [], [], 0
        for stage in config.stages:
            blocks = nn.ModuleList()
            for row in stage:
                for j in range(row.depth):
                    blocks.append(
                        bneck(
                            in_chans,
                            make_divisible(row.dim * width),
                            row,
                            stride=row.stride if j == 0 else 1,
                            drop_path=config.drop_path_rate * index / total,
                        )
                    )
                    in_chans = make_divisible(row.dim * width)
                    index += 1
            self.stages.append(blocks)
            dims.append(in_chans)
            strides.append(stage[0].stride)
        last_dim = make_divisible(config.last_dim * width)
        self.stages.append(nn.ModuleList([ConvNormAct(in_chans, last_dim, 1, act=_hardswish)]))
        self.feature_specs, self.outputs = stage_specs([*dims, last_dim], [*strides, 1])
        init_conv_weights(self)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        check_images(images, self)
        checkpointing = self.grad_checkpointing and self.training
        x = self.stem(fast_layout(images))
        return Features(run_stages(x, self.stages, self.outputs, record, checkpointing))


def bneck(
    in_chans: int, out_chans: int, row: Bneck, *, stride: int, drop_path: float
) -> InvertedResidual:
    """One block of MobileNetV3: gates of a quarter of the wide width (section 5.3), by hard sigmoid."""
    hidden_dim = make_divisible(in_chans * row.expand_ratio)
    se = SqueezeExcite(hidden_dim, make_divisible(hidden_dim / 4), act=_relu, gate=F.hardsigmoid)
    return InvertedResidual(
        in_chans,
        out_chans,
        hidden_dim,
        kernel_size=row.kernel_size,
        stride=stride,
        act=_hardswish if row.hardswish else _relu,
        se=se if row.se else None,
        drop_path=drop_path,
    )


class MobileNetV3Head(nn.Module):
    """V3's efficient last stage (section 5.1, fig. 5): pool first, then widen. Features -> (B, K)."""

    def __init__(
        self, config: MobileNetV3Config, specs: Mapping[str, FeatureSpec], num_classes: int
    ) -> None:
        super().__init__()
        self.expand = nn.Linear(list(specs.values())[-1].channels, config.head_dim)
        self.act = nn.Hardswish()
        self.drop = nn.Dropout(config.head_drop_rate)
        self.fc = nn.Linear(config.head_dim, num_classes)
        init_conv_weights(self)

    def forward(self, features: Features) -> Tensor:
        last = list(features.maps.values())[-1]
        return self.fc(self.drop(self.act(self.expand(last.mean((2, 3))))))


def from_timm_v1(state: Tensors, config: MobileNetV1Config) -> Tensors:
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


def from_timm_v2(state: Tensors, config: MobileNetV2Config) -> Tensors:
    """timm: `blocks.1.0.conv_pw.weight`, ..., `conv_head.weight`, `bn2.weight`, `classifier.weight`."""
    rules = [
        (r"^conv_head\.", "head.conv.conv."),
        (r"^bn2\.", "head.conv.bn."),
        (r"^classifier\.", "head.fc."),
    ]
    return rename_keys(timm_stages(state), rules)


def from_timm_v3(state: Tensors, config: MobileNetV3Config) -> Tensors:
    """timm: as V2, but the layer after pooling is a 1x1 convolution."""
    rules = [(r"^conv_head\.", "head.expand."), (r"^classifier\.", "head.fc.")]
    out = rename_keys(timm_stages(state), rules)
    if "head.expand.weight" in out:
        out["head.expand.weight"] = out["head.expand.weight"].flatten(1)
    return out


def _in_a_row(depths: Sequence[int]) -> dict[str, str]:
    """torchvision counts blocks through: {"features.1": "stages.0.0", "features.2": "stages.1.0", ...}."""
    blocks = [f"stages.{i}.{j}" for i, depth in enumerate(depths) for j in range(depth)]
    return {f"features.{n}": block for n, block in enumerate(blocks, 1)}


def from_torchvision_v2(state: Tensors, config: MobileNetV2Config) -> Tensors:
    """torchvision: `features.2.conv.0.0.weight`, ..., `features.18.0.weight`, `classifier.1.weight`."""
    places = _in_a_row([depth for _, _, depth, _ in config.stages])
    last = len(places) + 1
    rules = [
        (rf"^features\.{last}\.0\.", "head.conv.conv."),
        (rf"^features\.{last}\.1\.", "head.conv.bn."),
        (r"^classifier\.1\.", "head.fc."),
    ]
    return rename_keys(torchvision_stages(state, places, "conv"), rules)


def from_torchvision_v3(state: Tensors, config: MobileNetV3Config) -> Tensors:
    """torchvision: `features.2.block.0.0.weight`, ..., `classifier.0.weight`, `classifier.3.weight`."""
    places = _in_a_row([sum(row.depth for row in stage) for stage in config.stages])
    last, stage = len(places) + 1, len(config.stages)
    rules = [
        (rf"^features\.{last}\.0\.", f"backbone.stages.{stage}.0.conv."),
        (rf"^features\.{last}\.1\.", f"backbone.stages.{stage}.0.bn."),
        (r"^classifier\.0\.", "head.expand."),
        (r"^classifier\.3\.", "head.fc."),
    ]
    return absorb_eps(rename_keys(torchvision_stages(state, places, "block"), rules), 1e-3, 1e-5)


V1_TABLE = "the paper's table 6, as TensorFlow's and Keras's documentation quote it"
SLIM = "TensorFlow Slim's README"
V2_NOTE = (
    "the README leaves out the scales and shifts of BatchNorm, without which the count is the same"
)
V2_REMARK = "the paper draws this width in its figure 5, without numbers"

register_backbone(
    MobileNetV1,
    V1_VARIANTS,
    tiny=MobileNetV1Config(stages=((8, 1, 1), (16, 1, 2), (16, 1, 2), (24, 1, 2), (32, 2, 2))),
    layouts={
        "timm": Layout(
            from_timm_v1,
            marks=("conv_stem.weight", "blocks.0.0.conv_pw.weight", "blocks.4.1.conv_pw.weight"),
            source="timm/mobilenetv1_*",
        )
    },
    preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    published={
        "mobilenetv1_025": Published(params=0.5, macs=0.041, top1=50.6, source=V1_TABLE),
        "mobilenetv1_050": Published(params=1.3, macs=0.149, top1=63.7, source=V1_TABLE),
        "mobilenetv1_075": Published(params=2.6, macs=0.325, top1=68.4, source=V1_TABLE),
        "mobilenetv1_100": Published(params=4.2, macs=0.569, top1=70.6, source=V1_TABLE),
        "mobilenetv1_125": Published(
            source="none",
            remark="a width of timm's; the paper's end at 1.0, and so do TensorFlow's",
        ),
    },
)
register_backbone(
    MobileNetV2,
    V2_VARIANTS,
    tiny=MobileNetV2Config(
        width_multiplier=0.5,
        stages=((1, 16, 1, 1), (2, 24, 2, 2), (2, 32, 1, 2), (2, 48, 1, 2), (2, 64, 1, 2)),
    ),
    tail=mobilenetv2_head,
    layouts={
        "timm": Layout(
            from_timm_v2,
            marks=("conv_stem.weight", "blocks.6.0.conv_pwl.weight"),
            source="timm/mobilenetv2_*",
        ),
        "torchvision": Layout(
            from_torchvision_v2,
            marks=("features.0.0.weight", "features.17.conv.2.weight"),
            source="torchvision MobileNet_V2_Weights",
        ),
    },
    preprocessing=Preprocessing(),
    published={
        "mobilenetv2_035": Published(
            params=1.66, macs=0.059, top1=60.3, source=SLIM, params_note=V2_NOTE, remark=V2_REMARK
        ),
        "mobilenetv2_050": Published(
            params=1.95, macs=0.097, top1=65.4, source=SLIM, params_note=V2_NOTE, remark=V2_REMARK
        ),
        "mobilenetv2_075": Published(
            params=2.61, macs=0.209, top1=69.8, source=SLIM, params_note=V2_NOTE, remark=V2_REMARK
        ),
        "mobilenetv2_100": Published(
            params=3.47,
            macs=0.300,
            top1=71.8,
            source=SLIM,
            params_note=V2_NOTE,
            remark="the paper's table 4 has 3.4 M and 72.0 %",
        ),
        "mobilenetv2_140": Published(
            params=6.06,
            macs=0.582,
            top1=75.0,
            source=SLIM,
            params_note=V2_NOTE,
            remark="the paper's table 4 has 6.9 M, 0.585 G and 74.7 %; no model of that size was released",
        ),
    },
)
register_backbone(
    MobileNetV3,
    V3_VARIANTS,
    tiny=MobileNetV3Config(
        stages=(
            (Bneck(3, 1, 16, True, False, stride=2),),
            (Bneck(3, 2, 16, False, False, stride=2), Bneck(3, 2.5, 16, True, True)),
            (Bneck(5, 2, 24, True, True, stride=2, depth=2),),
            (Bneck(5, 2, 32, True, True, stride=2),),
        ),
        last_dim=48,
        head_dim=64,
        head_drop_rate=0.0,
    ),
    tail=MobileNetV3Head,
    layouts={
        "timm": Layout(
            from_timm_v3,
            marks=("conv_stem.weight", "blocks.4.0.se.conv_reduce.weight"),
            source="timm/mobilenetv3_*",
        ),
        "torchvision": Layout(
            from_torchvision_v3,
            marks=("features.0.0.weight", "features.11.block.2.fc1.weight"),
            source="torchvision MobileNet_V3_*_Weights",
        ),
    },
    preprocessing=Preprocessing(),
    published={
        "mobilenetv3_large": Published(
            params=5.4,
            macs=0.217,
            top1=75.2,
            source="the paper's table 9 (table 3 has 0.219 G)",
            params_note="timm's and torchvision's models have 5.48 M too; digits seem cut there",
        ),
        "mobilenetv3_large_075": Published(
            params=4.0, macs=0.155, top1=73.3, source="the paper's table 3"
        ),
        "mobilenetv3_small": Published(
            params=2.5, macs=0.056, top1=67.4, source="the paper's table 3"
        ),
        "mobilenetv3_small_075": Published(
            params=2.0,
            macs=0.044,
            top1=65.4,
            source="the paper's table 3",
            macs_note="timm's model has 0.0434 G too; what else the paper counts is not known",
        ),
        "mobilenetv3_small_050": Published(
            params=1.6,
            macs=0.021,
            top1=58.0,
            source="the paper's table 9",
            macs_note="timm keeps the stem 16 wide at this multiplier; 8 wide, all is 0.021 G",
        ),
    },
)
