"""MobileNetV3 (Howard et al., "Searching for MobileNetV3", ICCV 2019, https://arxiv.org/abs/1905.02244).

MobileNetV2's inverted residuals in layers found by search, with squeeze-and-excitation and h-swish where they
pay, and a tail that widens after pooling, not before.

Unlike the official code (TensorFlow Slim), as timm and torchvision: strided convolutions are padded evenly,
and the epsilon of BatchNorm is 1e-5. torchvision's has 1e-3, which its key map adds to the running
variances: the same function.
"c5" is the map that the paper's detectors take: after the last convolution (960 or 576 channels).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import Features, FeatureSpec
from vitrail.layers.conv import (
    ConvNormAct,
    InvertedResidual,
    SqueezeExcite,
    absorb_eps,
    init_conv_weights,
    make_divisible,
    stage_specs,
    stem_and_stages,
)
from vitrail.layers.conv_keys import counted_through, timm_stages, torchvision_stages
from vitrail.registry import Layout, Tensors, register_backbone, rename_keys
from vitrail_runtime.preprocess import Preprocessing

_relu = partial(nn.ReLU, inplace=True)
_hardswish = partial(nn.Hardswish, inplace=True)


@dataclass(frozen=True)
class Bneck:
    """Blocks of one row of Tables 1 and 2; the stride is the first block's."""

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
    detection_maps: bool = (
        False  # torchvision's two of stride 32: behind its first block and the last
    )


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


VARIANTS = {
    "mobilenetv3_large": LARGE,
    "mobilenetv3_large_075": _scaled(LARGE, 0.75),
    "mobilenetv3_small": SMALL,
    "mobilenetv3_small_075": _scaled(SMALL, 0.75),
    "mobilenetv3_small_050": _scaled(SMALL, 0.5),
}


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
        if config.detection_maps:
            last = self.feature_specs["c5"]
            self.feature_specs = {"c5a": FeatureSpec(dims[-1], last.stride), "c5": last}
        init_conv_weights(self)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        if not self.config.detection_maps:
            return stem_and_stages(self, images, record)
        record = {} if record is None else record
        last = stem_and_stages(self, images, record).maps["c5"]
        return Features({"c5a": record[f"stages.{len(self.config.stages) - 1}.0"], "c5": last})


def bneck(
    in_chans: int, out_chans: int, row: Bneck, *, stride: int, drop_path: float
) -> InvertedResidual:
    """One block: gates of a quarter of the wide width (section 5.3), by hard sigmoid."""
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
    """The efficient last stage (section 5.1, fig. 5): pool first, then widen. Features -> (B, K)."""

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


def from_timm(state: Tensors, config: MobileNetV3Config) -> Tensors:
    """timm: `blocks.1.0.conv_pw.weight`, ..., `classifier.weight`; the layer after pooling, `conv_head`, is a
    1x1 convolution."""
    rules = [(r"^conv_head\.", "head.expand."), (r"^classifier\.", "head.fc.")]
    out = rename_keys(timm_stages(state), rules)
    if "head.expand.weight" in out:
        out["head.expand.weight"] = out["head.expand.weight"].flatten(1)
    return out


def from_torchvision(state: Tensors, config: MobileNetV3Config) -> Tensors:
    """torchvision: `features.2.block.0.0.weight`, ..., `classifier.0.weight`, `classifier.3.weight`."""
    places = counted_through([sum(row.depth for row in stage) for stage in config.stages])
    last, stage = len(places) + 1, len(config.stages)
    rules = [
        (rf"^features\.{last}\.0\.", f"backbone.stages.{stage}.0.conv."),
        (rf"^features\.{last}\.1\.", f"backbone.stages.{stage}.0.bn."),
        (r"^classifier\.0\.", "head.expand."),
        (r"^classifier\.3\.", "head.fc."),
    ]
    return absorb_eps(rename_keys(torchvision_stages(state, places, "block"), rules), 1e-3, 1e-5)


register_backbone(
    MobileNetV3,
    VARIANTS,
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
            from_timm,
            marks=("conv_stem.weight", "blocks.4.0.se.conv_reduce.weight"),
            source="timm/mobilenetv3_*",
        ),
        "torchvision": Layout(
            from_torchvision,
            marks=("features.0.0.weight", "features.11.block.2.fc1.weight"),
            source="torchvision MobileNet_V3_*_Weights",
        ),
    },
    preprocessing=Preprocessing(),
)
